"""The backend for Ollama: its own API with newline-delimited JSON."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

from llm_magic.backends.base import Capabilities, Report
from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.base import (
    MAX_MODELS,
    RESERVED,
    RemoteBackend,
    RemoteModel,
    message_objects,
    named_entries,
)
from llm_magic.backends.remote.stream_decoders import (
    JsonLinesDecoder,
    MalformedStream,
    parse_object,
    parse_text,
    whole_number,
)
from llm_magic.backends.remote.structures import ollama_format
from llm_magic.backends.remote.token_logprobs import TOP, TokenReader, requested
from llm_magic.config.commands import command, option
from llm_magic.config.option_spec import OptionSpec
from llm_magic.config.server_address import ServerAddress
from llm_magic.config.settings import GenerationConfig, LoadConfig, ServerLoadConfig
from llm_magic.errors import LoadFailed, ModelNotFound, RequestFailed, ServerError
from llm_magic.text import human_bytes
from llm_magic.types import Chunk, FinishReason, Message, ModelInfo, Progress, Usage

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer

# The field of each option, inside the field `options` of a request.
_OPTION_NAMES = MappingProxyType({
    "max_new_tokens": "num_predict",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
    "seed": "seed",
    "stop": "stop",
    "logprobs": TOP,
    "extra": "options",
})  # fmt: skip
# Fields of a request next to `options`. All other fields of ``-p`` belong into `options`.
_TOP_LEVEL_FIELDS = frozenset({"keep_alive", "format", "think", "truncate", "shift", "tools"})
# Longer than the names of quantizations: `Q4_K_M`, `MXFP4`.
_MAX_QUANTIZATION_LENGTH = 20
_MAX_DIGEST_LENGTH = 100
# The time that reading the context may add to the first reply of a model.
_CONTEXT_S = 1.0
# A parameter of a Modelfile in the response of `/api/show`.
_NUM_CTX = re.compile(r"^num_ctx\s+(\d{1,18})\s*$", re.MULTILINE)


@dataclass(slots=True)
class _OllamaModel(RemoteModel):
    """A model on an Ollama server.

    `trained_length` is the context length that the model was trained for. `info.context_length` is
    that of the runner, which is often shorter: 4,096 tokens by default. It was read after a reply with
    the value of ``num_ctx`` in `read_after`, which is empty before the first reply.
    """

    trained_length: int | None = None
    read_after: tuple[object, ...] = ()


class OllamaLoadConfig(ServerLoadConfig):
    """The options of a load from Ollama."""

    pull: Annotated[
        bool,
        OptionSpec(
            "Download the model to the server first if necessary.",
            ("--pull",),
            label="Download the model to the server first",
        ),
    ] = False


class OllamaBackend(RemoteBackend):
    """Generates with ``/api/chat``."""

    name = "ollama"
    option_names = _OPTION_NAMES
    load_config = OllamaLoadConfig
    capabilities = Capabilities(structures=frozenset({"json_schema", "choice"}))
    structure_fields = staticmethod(ollama_format)
    start = "To start one, run: ollama serve"
    reserved = MappingProxyType(
        {**RESERVED, "options": "Set each option by its name, for example -p num_ctx=8192."}
    )

    def _api_prefix(self, address: ServerAddress) -> str:
        # The address of Ollama's OpenAI-compatible API is accepted too.
        return "/.." if address.url.endswith(("/v1", "/api")) else ""

    # -- models -------------------------------------------------------------------------------

    async def _list_models(self, server: HttpServer) -> list[ModelInfo]:
        running = await self._entries(server, "ps")
        entries = await self._entries(server, "tags")
        return [
            self._info(server, entry, {}, _runner(entry, running), _trained_length({}, entry))
            for entry in entries[:MAX_MODELS]
        ]

    async def _entries(self, server: HttpServer, path: str) -> list[dict[str, Any]]:
        """Return the models that ``/api/tags`` or ``/api/ps`` lists."""
        try:
            value = await server.get(f"{server.prefix}/api/{path}")
        except RequestFailed as error:
            if error.status not in {200, 404, 405}:
                raise
            raise await self._no_api(server, path, error) from None
        entries = named_entries(value.get("models") if isinstance(value, dict) else None, "name")
        if path == "tags":
            self._store_names(server, [str(entry["name"]) for entry in entries])
        return entries

    async def _no_api(self, server: HttpServer, path: str, error: RequestFailed) -> RequestFailed:
        """Return the error for a server without an API at its address; names the right one if it has that."""
        address = server.address
        below = address.url.removeprefix(address.origin)
        if below:
            with contextlib.suppress(RequestFailed):
                await server.get(f"{'/..' * below.count('/')}/api/{path}")
                found = RequestFailed(f"Ollama's API is not at {address.url}.", status=404)
                return found.advise(
                    f"Use {option('base_url', address.origin)}.", "base_url", address.origin
                )
        if error.is_page:
            return error
        problem = f"{address.origin} is not an Ollama server: it has no /api/{path}."
        other = option("backend", "openai")
        advice = f"Check {option('base_url')}. For an OpenAI-compatible server, use {other}."
        return RequestFailed(problem, status=404).advise(advice, "base_url")

    def _info(
        self,
        server: HttpServer,
        entry: Mapping[str, Any],
        description: Mapping[str, Any],
        runner: Mapping[str, Any],
        context: int | None,
    ) -> ModelInfo:
        found = (entry.get("details"), description.get("details"))
        details = next(filter(_is_map, found), {})
        return ModelInfo(
            str(entry["name"]),
            self.name,
            where="server",
            source=str(entry["name"]),
            server=server.address.host_port,
            dtype=str(details.get("quantization_level") or "")[:_MAX_QUANTIZATION_LENGTH],
            size=whole_number(entry.get("size")),
            context_length=context,
            memory_bytes=whole_number(runner.get("size")),
            digest=str(entry.get("digest") or "")[:_MAX_DIGEST_LENGTH],
        )

    async def _find_model(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[RemoteModel, tuple[str, ...]]:
        assert isinstance(config, OllamaLoadConfig)
        entries = await self._entries(server, "tags")
        names = [str(entry["name"]) for entry in entries]
        model = model or server_errors.single_model(server.address, names)
        if config.pull:
            await self._pull(server, model, report)
            entries = await self._entries(server, "tags")
        description = await self._describe(server, model, names)
        tagged = _with_tag(model)
        entry: Mapping[str, Any] = next((e for e in entries if e["name"] in {model, tagged}), {})
        runner = _runner({**entry, "name": tagged}, await self._running(server))
        context = _context(runner) or _num_ctx(description)
        info = self._info(server, {**entry, "name": model}, description, {}, context)
        trained = _trained_length(description, entry)
        fields = self.request_fields()
        return _OllamaModel(model, server, info, fields, trained_length=trained), ()

    async def _running(self, server: HttpServer) -> list[dict[str, Any]]:
        """Return the running models, none if a proxy does not forward that request."""
        try:
            return await self._entries(server, "ps")
        except RequestFailed as error:
            if error.status != 404:
                raise
            return []

    async def _describe(
        self, server: HttpServer, model: str, names: Sequence[str]
    ) -> dict[str, Any]:
        """Return what ``/api/show`` returns about a model."""
        try:
            value = await server.post(f"{server.prefix}/api/show", {"model": model})
        except RequestFailed as error:
            if error.status not in {400, 404}:
                raise
            without_tag = [name.removesuffix(":latest") for name in names]
            missing = server_errors.model_not_found(server.address, model, without_tag)
            pull = command("load", model, **server.address.options, pull=True)
            raise missing.advise(f"To download it to the server, run {pull}.", "pull") from None
        return value if isinstance(value, dict) else {}

    async def _pull(self, server: HttpServer, model: str, report: Report) -> None:
        """Download a model to the server. The server continues a canceled download the next time."""
        body = {"model": model, "stream": True}
        is_done = False
        async with server.stream("POST", f"{server.prefix}/api/pull", body) as answer:
            try:
                async for line in answer.events(JsonLinesDecoder()):
                    value = parse_object(line)
                    if value.get("error"):
                        reason = server_errors.parse_error(value).text
                        raise ModelNotFound(
                            f"{server.address.host_port} could not pull {model}: {reason}. Check the"
                            " name in Ollama's library."
                        )
                    report(_pull_progress(value))
                    if is_done := value.get("status") == "success":
                        await answer.drain()
                        break
            except MalformedStream as error:
                raise LoadFailed(
                    f"{server.address.origin} sent {error} during the download. Load again to continue."
                ) from None
        if not is_done:
            raise LoadFailed(
                f"{server.address.host_port} stopped the download of {model}. Load again to continue."
            )

    async def _unload_from_server(self, remote: RemoteModel) -> str:
        """Free the memory of a server on this machine; other users may use other servers."""
        note = await super()._unload_from_server(remote)
        if not (remote.was_used and remote.server.address.is_local):
            return note
        body = {"model": remote.model, "keep_alive": 0}
        # The server may be stopped, which frees its memory too.
        with contextlib.suppress(ServerError):
            await remote.server.post(f"{remote.server.prefix}/api/generate", body)
            note = f"{remote.server.address.host_port} frees its memory"
        return note

    def _shorten_hint(self, remote: RemoteModel) -> str:
        trained = remote.trained_length if isinstance(remote, _OllamaModel) else None
        limit = f" (N up to {trained:,})" if trained else ""
        return f"Shorten the prompt, or load the model with more context: -p num_ctx=N{limit}."

    def details(self, name: str) -> dict[str, str]:
        """Return the context length of the runner, and the one that the model was trained for."""
        details, remote = super().details(name), self._models.get(name)
        if not isinstance(remote, _OllamaModel) or not remote.trained_length:
            return details
        limit = f"at most {remote.trained_length:,} tokens"
        current = remote.info.context_length
        context = f"{current:,} of {limit} (-p num_ctx=N)" if current else limit
        return {**details, "context": context}

    # -- generation ---------------------------------------------------------------------------

    async def _generate(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        server = remote.server
        body = self.body(remote, messages, config)
        tokens = TokenReader(config.logprobs)
        last: Chunk | None = None
        is_reply = has_message = has_text = False
        async with server.stream("POST", f"{server.prefix}/api/chat", body) as answer:
            async for line in answer.events(JsonLinesDecoder()):
                value = parse_object(line)
                if value.get("error"):
                    raise server_errors.stream_error(server.address, server.key, value)
                is_reply = is_reply or "message" in value or "done" in value
                has_message = has_message or isinstance(value.get("message"), dict)
                chunk = _chunk(value, tokens)
                if chunk.text or chunk.reasoning:
                    has_text = True
                    answer.use_idle_limit()
                if chunk.text or chunk.reasoning or chunk.logprobs:
                    yield chunk
                if value.get("done"):
                    last = _last_chunk(value)
                    break
            if not is_reply:
                raise server_errors.no_reply_error(server.address, answer.content_type)
            if not has_text and not (has_message and last):
                missing = "ended before the first word" if has_message else "has no message"
                raise server_errors.missing_reply_error(server.address, missing)
            yield last or Chunk(finish_reason="truncated", time=time.perf_counter())
            await answer.drain()
        await self._update_context(remote, config.extra.get("num_ctx"))

    async def _update_context(self, remote: RemoteModel, num_ctx: object) -> None:
        """Read the context length of the runner after the first reply, and after one with another `num_ctx`.

        During the load, the runner may not exist, or have the context of another client's request.
        """
        if not isinstance(remote, _OllamaModel) or remote.read_after == (num_ctx,):
            return
        remote.read_after = (num_ctx,)
        # The reply is complete, and an error must not fail it.
        with contextlib.suppress(ServerError, TimeoutError):
            async with asyncio.timeout(_CONTEXT_S):
                running = await self._running(remote.server)
            context = _context(_runner({"name": _with_tag(remote.model)}, running))
            if context is not None:
                remote.info = dataclasses.replace(remote.info, context_length=context)

    def body(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> dict[str, Any]:
        """Return the body of a request."""
        options = remote.option_fields(config)
        top_level = requested(options)
        options.pop(TOP, None)
        for name, value in config.extra.items():
            (top_level if name in _TOP_LEVEL_FIELDS else options)[name] = value
        return {
            "model": remote.model,
            "messages": message_objects(messages),
            "stream": True,
            "options": options,
            # By default, Ollama silently removes the beginning of a long prompt. `shift` is not sent, because
            # a change of its value reloads the model for all clients.
            "truncate": False,
            **self._structure_fields(remote, config.structure),
            **top_level,
        }


def _with_tag(model: str) -> str:
    """Return the name of a model with its tag."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def _runner(entry: Mapping[str, Any], running: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the entry of the runner of a model, which its aliases share; empty if there is none."""
    digest, name = entry.get("digest"), entry.get("name")
    same = (r for r in running if r["name"] == name or (digest and r.get("digest") == digest))
    return next(same, {})


def _context(runner: Mapping[str, Any]) -> int | None:
    return whole_number(runner.get("context_length")) or None


def _trained_length(description: Mapping[str, Any], entry: Mapping[str, Any]) -> int | None:
    """Return the context length that a model was trained for."""
    model, details = description.get("model_info"), entry.get("details")
    if _is_map(model):
        length = whole_number(model.get(f"{model.get('general.architecture')}.context_length"))
        if length:
            return length
    return whole_number(details.get("context_length")) if _is_map(details) else None


def _num_ctx(description: Mapping[str, Any]) -> int | None:
    """Return the context length in the Modelfile of a model."""
    found = _NUM_CTX.search(str(description.get("parameters") or ""))
    return int(found.group(1)) if found else None


def _is_map(value: object) -> TypeGuard[Mapping[str, Any]]:
    return bool(value) and isinstance(value, dict)


def _pull_progress(value: Mapping[str, Any]) -> Progress:
    total, completed = whole_number(value.get("total")), whole_number(value.get("completed") or 0)
    if total and completed is not None:
        sizes = f"{human_bytes(completed)} of {human_bytes(total)}"
        return Progress("pulling on the server", min(1.0, completed / total), sizes)
    status = value.get("status")
    stage = server_errors.one_line(status) if isinstance(status, str) else "working"
    return Progress(f"server: {stage}")


def _chunk(value: dict[str, Any], tokens: TokenReader) -> Chunk:
    message = value.get("message") or {}
    if not isinstance(message, dict):
        raise MalformedStream("a chunk in an unknown format")
    text, reasoning = parse_text(message.get("content")), parse_text(message.get("thinking"))
    logprobs = tokens.read(value.get("logprobs"))
    return Chunk(text=text, reasoning=reasoning, time=time.perf_counter(), logprobs=logprobs)


def _last_chunk(value: Mapping[str, Any]) -> Chunk:
    reason: FinishReason = "length" if value.get("done_reason") == "length" else "stop"
    usage = Usage(
        whole_number(value.get("prompt_eval_count")), whole_number(value.get("eval_count"))
    )
    return Chunk(finish_reason=reason, usage=usage, time=time.perf_counter())
