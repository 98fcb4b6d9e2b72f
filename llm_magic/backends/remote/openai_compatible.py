"""Servers that speak OpenAI's chat completions over SSE: vLLM, InstructLab, and any other."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from llm_magic.backends.base import UNSUPPORTED, Report, TokenCount
from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.base import (
    MOST_MODELS,
    RESERVED,
    Dialect,
    RemoteBackend,
    RemoteModel,
    entries_with,
)
from llm_magic.backends.remote.chat_completions import NOTHING, Reader
from llm_magic.backends.remote.limits import END_S
from llm_magic.backends.remote.stream_decoders import (
    EventDecoder,
    MalformedStream,
    is_done,
    parse_object,
    whole_number,
)
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.errors import LLMMagicError, RequestFailed, ServerBusy, ServerError
from llm_magic.types import Chunk, Message, ModelInfo

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer

# What an option is called in the body of a request to any server with OpenAI's API.
_OPTION_NAMES = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": UNSUPPORTED,
    "repetition_penalty": UNSUPPORTED,
    "seed": "seed",
    "stop": "stop",
    "extra": "the body of the request",
}
# What the models of a kind of server are "owned by", and how many requests that kind takes at once:
# llama-cpp-python ("me") drops the answer it is at when another question comes.
_AT_ONCE = {"vllm": 256, "llamacpp": 256, "me": 1}
_LONGEST_OWNER = 40
_VERSIONED = re.compile(r"/v\d+[a-z]*$|/openai$")


class OpenAICompatibleBackend(RemoteBackend):
    """Streams from ``/v1/chat/completions``."""

    # Whether the server has `/tokenize`.
    counts_tokens = False
    reserved = MappingProxyType(
        {
            **RESERVED,
            "stream_options": "Token counts are always asked for.",
            **dict.fromkeys(("n", "best_of"), "A call gives one answer; run it again for another."),
        }
    )

    # -- what the server has ------------------------------------------------------------------

    async def _list(self, server: HttpServer) -> list[ModelInfo]:
        entries = await self._entries(server) or []
        return [self._info(server, entry) for entry in entries[:MOST_MODELS]]

    async def _entries(self, server: HttpServer) -> list[dict[str, Any]] | None:
        """Return what ``/v1/models`` lists; None where a server answers questions but lists nothing."""
        prefixes = _prefixes(server.address.url) if server.prefix is None else [server.prefix]
        for prefix in prefixes:
            try:
                value = await server.get(f"{prefix}/models")
            except RequestFailed as refused:
                if refused.status not in {200, 404, 405}:
                    raise
                continue
            server.prefix = prefix
            listed = value.get("data") if isinstance(value, dict) else value
            entries = entries_with("id", listed)
            self._remember(server, [str(entry["id"]) for entry in entries])
            return entries
        for prefix in prefixes:
            if await self._takes_questions(server, prefix):
                server.prefix = prefix
                return None
        raise RequestFailed(
            f"{server.address.origin} answers, but not at {server.address.url}{prefixes[0]}/models."
            " Is the path of --base-url right, and is it an OpenAI-compatible server?",
            status=404,
        )

    async def _takes_questions(self, server: HttpServer, prefix: str) -> bool:
        """Return whether an empty question is refused as a question, and not as a wrong address."""
        try:
            await server.post(f"{prefix}/chat/completions", {})
        except ServerBusy:
            raise
        except RequestFailed as refused:
            return refused.status in {400, 422}
        return False

    def _info(self, server: HttpServer, entry: Mapping[str, Any]) -> ModelInfo:
        more = entry.get("meta")
        meta: Mapping[str, Any] = more if isinstance(more, dict) else {}
        # vLLM's name for it, OpenRouter's, and llama.cpp's two.
        found = [
            entry.get("max_model_len"), entry.get("context_length"),
            meta.get("n_ctx"), meta.get("n_ctx_train"),
        ]  # fmt: skip
        context = next(filter(None, map(whole_number, found)), None)
        return ModelInfo(
            str(entry["id"]),
            self.name,
            where="server",
            source=str(entry["id"]),
            server=server.address.host_port,
            size=whole_number(meta.get("size")),
            context_length=context,
        )

    async def _find(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[RemoteModel, tuple[str, ...]]:
        entries = await self._entries(server)
        names = [str(entry["id"]) for entry in entries or ()]
        if model is None:
            model = server_errors.only_one(server.address, names)
        entry: Mapping[str, Any] = next((e for e in entries or () if e["id"] == model), {})
        notes: tuple[str, ...] = ()
        if entries is None:
            notes = (
                f"{server.address.host_port} lists no models: the first question shows if it has it.",
            )
        elif not entry:
            entry = await self._unlisted(server, model, names)
        info = self._info(server, {**entry, "id": model})
        notes += self._other_kind(server, entry)
        self._servers.limit(server, config, self._at_once(entry))
        return RemoteModel(model, server, info, config, self._dialect(server, entry)), notes

    def _at_once(self, entry: Mapping[str, Any]) -> int:
        """Return how many requests a server takes at once, which follows from what it is."""
        owner = entry.get("owned_by")
        known = _AT_ONCE.get(owner) if isinstance(owner, str) else None
        return known or self.concurrency

    def _other_kind(self, server: HttpServer, entry: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a warning for a server that is asked as vLLM and names itself otherwise."""
        owner = entry.get("owned_by")
        if self.name != "vllm" or not isinstance(owner, str) or owner == "vllm":
            return ()
        shown = server_errors.one_line(owner)[:_LONGEST_OWNER]
        return (
            f"Warning: {server.address.host_port} is not vLLM: its models are owned by {shown!r}. It may"
            " ignore top_k and repetition_penalty; -b openai is for any OpenAI-compatible server.",
        )

    async def _unlisted(
        self, server: HttpServer, model: str, names: Sequence[str]
    ) -> Mapping[str, Any]:
        """Ask for a model by its name: lists leave aliases out."""
        try:
            entry = await server.get(f"{server.prefix}/models/{quote(model, safe='')}")
        except ServerBusy:
            raise
        except RequestFailed:
            entry = None
        if not isinstance(entry, dict) or entry.get("id") != model:
            raise server_errors.unknown(server.address, model, names)
        return entry

    def _dialect(self, server: HttpServer, entry: Mapping[str, Any]) -> Dialect:
        """Return how the options are spelled there."""
        spelled = self.sent_names()
        if server.address.origin == "https://api.openai.com":
            # The newer models refuse the older name, the older ones take both.
            spelled["max_new_tokens"] = "max_completion_tokens"
        if self.name == "instructlab" and entry.get("owned_by") == "vllm":
            spelled["repetition_penalty"] = "repetition_penalty"
        return Dialect(spelled)

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Ask vLLM, which counts with the model's own template; the others cannot tell."""
        remote = self._find_loaded(name)
        if not self.counts_tokens:
            return TokenCount(None, remote.info.context_length)
        server = remote.server
        # Beside the API, not in it: above an address that ends in /v1.
        path = "/tokenize" if server.prefix else "/../tokenize"
        body = {"model": remote.model, "messages": _wire(messages)}
        try:
            value = await server.post(path, body)
        except ServerError:
            value = {}
        count = value.get("count") if isinstance(value, dict) else None
        return TokenCount(whole_number(count), remote.info.context_length)

    # -- an answer ----------------------------------------------------------------------------

    async def _answer(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        reader, heard = Reader(remote.server.address, remote.server.key), False
        path = f"{remote.server.prefix}/chat/completions"
        body = self.body(remote, messages, config)
        async with remote.server.stream("POST", path, body) as answer:
            if answer.kind == "application/json":
                # Asked for a stream, some gateways answer in one piece.
                yield reader.whole(parse_object(await answer.read_all()))
                return
            try:
                async for event in answer.decoded(EventDecoder()):
                    heard = True
                    if is_done(event):
                        break
                    chunk = reader.read(parse_object(event))
                    if chunk.text or chunk.reasoning:
                        answer.has_begun()
                    if reader.finished:
                        answer.ends_within(END_S)
                    if chunk is not NOTHING:
                        yield chunk
            except (ServerError, MalformedStream):
                # What comes after the end of the answer, or not, is no part of it.
                if not reader.finished:
                    raise
            if not heard:
                raise server_errors.no_answer(remote.server.address, answer.kind)
            yield reader.end()
            await answer.drain()

    def body(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> dict[str, Any]:
        """Return the body of a request."""
        body: dict[str, Any] = {
            "model": remote.model,
            "messages": _wire(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for name, spelled in remote.dialect.spelled.items():
            value = getattr(config, name)
            if value not in (None, ()):
                body[spelled] = list(value) if isinstance(value, tuple) else value
        for name in remote.dialect.left_out - self._asked(remote, config):
            body.pop(name, None)
        return {**body, **config.extra}

    def _asked(self, remote: RemoteModel, config: GenerationConfig) -> set[str]:
        """Return what somebody asked for, under the server's names."""
        spelled = remote.dialect.spelled
        return {spelled[n] for n in config.model_fields_set if n in spelled} | set(config.extra)

    def _adapt(self, remote: RemoteModel, error: LLMMagicError, config: GenerationConfig) -> bool:
        """Spell the limit the newer way, or leave a default away that this model does not take."""
        if not isinstance(error, RequestFailed) or error.status not in {400, 422}:
            return False
        spelled, left_out = remote.dialect.spelled, remote.dialect.left_out
        if "max_completion_tokens" in str(error) and spelled["max_new_tokens"] == "max_tokens":
            spelled["max_new_tokens"] = "max_completion_tokens"
            return True
        # Not the limit: without one, the answer would have another that nobody knows.
        mine = {*spelled.values(), "stream_options"} - {spelled["max_new_tokens"]}
        name = error.parameter
        if name not in mine or name in left_out or name in self._asked(remote, config):
            return False
        left_out.add(name)
        return True


class VLLMBackend(OpenAICompatibleBackend):
    """Servers started by ``vllm serve``."""

    name = "vllm"
    option_names = MappingProxyType(
        _OPTION_NAMES | {"top_k": "top_k", "repetition_penalty": "repetition_penalty"}
    )
    start = "Start one: vllm serve MODEL"
    counts_tokens = True


class InstructLabBackend(OpenAICompatibleBackend):
    """Servers started by ``ilab model serve``: llama-cpp-python or vLLM."""

    name = "instructlab"
    option_names = MappingProxyType(
        _OPTION_NAMES | {"top_k": "top_k", "repetition_penalty": "repeat_penalty"}
    )
    start = "Start one: ilab model serve"
    # llama-cpp-python aborts its answer when another request arrives.
    concurrency = 1


class OpenAIBackend(OpenAICompatibleBackend):
    """OpenAI, and any other server with its API."""

    name = "openai"
    option_names = MappingProxyType(_OPTION_NAMES)
    start = "Check --base-url, and that the server runs."


def _prefixes(url: str) -> list[str]:
    """Return what may stand between an address and the paths of the API, likeliest first."""
    return [""] if _VERSIONED.search(url) else ["/v1", ""]


def _wire(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]
