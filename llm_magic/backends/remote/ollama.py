"""Ollama, by its own API: newline-delimited JSON, models that can be pulled, memory that is told."""

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

from pydantic import Field

from llm_magic.backends.base import Report
from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.base import (
    MOST_MODELS,
    RESERVED,
    Dialect,
    RemoteBackend,
    RemoteModel,
    entries_with,
)
from llm_magic.backends.remote.stream_decoders import (
    JsonLinesDecoder,
    MalformedStream,
    parse_object,
    text_of,
    whole_number,
)
from llm_magic.config.option_spec import Control, Flag
from llm_magic.config.server_address import ServerAddress
from llm_magic.config.settings import GenerationConfig, LoadConfig, ServerLoadConfig
from llm_magic.errors import LoadFailed, ModelNotFound, RequestFailed, ServerError, did_you_mean
from llm_magic.text.formatting import human_bytes
from llm_magic.types import Chunk, FinishReason, Message, ModelInfo, Progress, Usage

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer

_OPTION_NAMES = MappingProxyType({
    "max_new_tokens": "num_predict",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
    "seed": "seed",
    "stop": "stop",
    "extra": "options",
})  # fmt: skip
# What stands beside `options` in a request; everything else of `-p` goes into them.
_BESIDE = frozenset(
    {"keep_alive", "format", "think", "logprobs", "top_logprobs", "truncate", "shift", "tools"}
)


# The longest name of a quantization that is shown: `Q4_K_M`, `MXFP4`.
_LONGEST_LEVEL = 20
# The longest time that reading the context adds to the first answer of a model.
_CONTEXT_S = 1.0
# A parameter of a Modelfile, as `/api/show` lists them.
_NUM_CTX = re.compile(r"^num_ctx\s+(\d{1,18})\s*$", re.MULTILINE)


@dataclass(slots=True)
class _OllamaModel(RemoteModel):
    """A model on an Ollama; `trained_length` is the longest context that it was made for.

    The `context_length` of its `info` is that of the runner, which is shorter: 4,096 tokens by
    default, where the model reads 131,072.
    """

    trained_length: int | None = None
    has_read_context: bool = False


class OllamaLoadConfig(ServerLoadConfig):
    """The options of a load from Ollama."""

    pull: Annotated[
        bool,
        Flag(("--pull",)),
        Control("Download it there first"),
        Field(description="Let the server download the model first if necessary."),
    ] = False


class OllamaBackend(RemoteBackend):
    """Streams from ``/api/chat``."""

    name = "ollama"
    option_names = _OPTION_NAMES
    load_config = OllamaLoadConfig
    start = "Start it: ollama serve"
    reserved = MappingProxyType(
        {**RESERVED, "options": "Name each option by itself, for example -p num_ctx=8192."}
    )

    def _prefix(self, address: ServerAddress) -> str:
        # Whoever has it set for OpenAI's API means the same server.
        return "/.." if address.url.endswith(("/v1", "/api")) else ""

    # -- what the server has ------------------------------------------------------------------

    async def _list(self, server: HttpServer) -> list[ModelInfo]:
        running = await self._entries(server, "ps")
        entries = await self._entries(server, "tags")
        return [
            self._info(server, entry, {}, _runner(entry, running), _trained_length({}, entry))
            for entry in entries[:MOST_MODELS]
        ]

    async def _entries(self, server: HttpServer, path: str) -> list[dict[str, Any]]:
        try:
            value = await server.get(f"{server.prefix}/api/{path}")
        except RequestFailed as refused:
            if refused.status not in {200, 404, 405}:
                raise
            raise RequestFailed(
                f"{server.address.origin} answers, but it is no Ollama: there is no /api/{path}."
                " Is --base-url right? (For an OpenAI-compatible server: -b openai.)",
                status=404,
            ) from None
        listed = value.get("models") if isinstance(value, dict) else None
        entries = entries_with("name", listed)
        if path == "tags":
            self._remember(server, [str(entry["name"]) for entry in entries])
        return entries

    def _info(
        self,
        server: HttpServer,
        entry: Mapping[str, Any],
        shown: Mapping[str, Any],
        runner: Mapping[str, Any],
        context: int | None,
    ) -> ModelInfo:
        details = next((d for d in (entry.get("details"), shown.get("details")) if _is_map(d)), {})
        return ModelInfo(
            str(entry["name"]),
            self.name,
            where="server",
            source=str(entry["name"]),
            server=server.address.host_port,
            dtype=str(details.get("quantization_level") or "")[:_LONGEST_LEVEL],
            size=whole_number(entry.get("size")),
            context_length=context,
            memory_bytes=whole_number(runner.get("size")),
        )

    async def _find(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[RemoteModel, tuple[str, ...]]:
        assert isinstance(config, OllamaLoadConfig)
        entries = await self._entries(server, "tags")
        names = [str(entry["name"]) for entry in entries]
        model = model or server_errors.only_one(server.address, names)
        if config.pull:
            await self._pull(server, model, report)
            entries = await self._entries(server, "tags")
        shown = await self._show(server, model, names)
        full = _full(model)
        entry: Mapping[str, Any] = next((e for e in entries if e["name"] in {model, full}), {})
        runner = _runner({**entry, "name": full}, await self._running(server))
        context = _context(runner) or _num_ctx(shown)
        info = self._info(server, {**entry, "name": model}, shown, {}, context)
        trained = _trained_length(shown, entry)
        return _OllamaModel(
            model, server, info, config, Dialect(self.sent_names()), trained_length=trained
        ), ()

    async def _running(self, server: HttpServer) -> list[dict[str, Any]]:
        """Return what runs on the server; nothing where a proxy does not pass that question on."""
        try:
            return await self._entries(server, "ps")
        except RequestFailed as refused:
            if refused.status != 404:
                raise
            return []

    async def _show(self, server: HttpServer, model: str, names: Sequence[str]) -> dict[str, Any]:
        try:
            shown = await server.post(f"{server.prefix}/api/show", {"model": model})
        except RequestFailed as refused:
            if refused.status not in {400, 404}:
                raise
            near = did_you_mean(model, [n.removesuffix(":latest") for n in names])
            raise ModelNotFound(
                f"{model} is not pulled on {server.address.host_port}.{near}"
                f" To download it there: %llm_load {model} -b ollama --pull"
            ) from None
        return shown if isinstance(shown, dict) else {}

    async def _pull(self, server: HttpServer, model: str, report: Report) -> None:
        """Have the server download a model; it stops where this ends early, and goes on next time."""
        body = {"model": model, "stream": True}
        done = False
        async with server.stream("POST", f"{server.prefix}/api/pull", body) as answer:
            try:
                async for line in answer.decoded(JsonLinesDecoder()):
                    value = parse_object(line)
                    if value.get("error"):
                        raise _not_pulled(server, model, value)
                    report(_pulling(value))
                    if done := value.get("status") == "success":
                        await answer.drain()
                        break
            except MalformedStream as error:
                raise LoadFailed(f"{server.address.origin} sent {error} while it pulled.") from None
        if not done:
            raise LoadFailed(
                f"{server.address.host_port} stopped while it pulled {model}. Type it again: it goes on."
            )

    async def _let_go(self, remote: RemoteModel) -> str:
        """Free the memory that it takes on this machine; elsewhere others may be using it."""
        note = await super()._let_go(remote)
        if not (remote.used and remote.server.address.is_local):
            return note
        body = {"model": remote.model, "keep_alive": 0}
        # It may be gone already, and its memory with it.
        with contextlib.suppress(ServerError):
            await remote.server.post(f"{remote.server.prefix}/api/generate", body)
            note = f"{remote.server.address.host_port} was told to free its memory"
        return note

    def _room(self, remote: RemoteModel) -> str:
        trained = remote.trained_length if isinstance(remote, _OllamaModel) else None
        up_to = f" (N up to {trained:,})" if trained else ""
        return f" Shorten the prompt, or load the model with more context: -p num_ctx=N{up_to}."

    def details(self, name: str) -> dict[str, str]:
        """Return how many tokens the runner reads, and how many the model was made for."""
        remote = self._remotes.get(name)
        if not isinstance(remote, _OllamaModel) or not remote.trained_length:
            return {}
        most = f"{remote.trained_length:,} tokens"
        now = remote.info.context_length
        return {
            "context": f"{now:,} of at most {most} (-p num_ctx=N)" if now else f"at most {most}"
        }

    # -- an answer ----------------------------------------------------------------------------

    async def _answer(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        path = f"{remote.server.prefix}/api/chat"
        body = self.body(remote, messages, config)
        async with remote.server.stream("POST", path, body) as answer:
            last: Chunk | None = None
            heard = False
            try:
                async for line in answer.decoded(JsonLinesDecoder()):
                    value = parse_object(line)
                    heard = heard or "message" in value or "done" in value
                    chunk = _chunk(remote.server, value)
                    if chunk.text or chunk.reasoning:
                        answer.has_begun()
                        yield chunk
                    if value.get("done"):
                        last = _last(value)
                        break
            except MalformedStream:
                if last is None:
                    raise
            if not heard:
                raise server_errors.no_answer(remote.server.address, answer.kind)
            yield last or Chunk(finish_reason="truncated", time=time.perf_counter())
            await answer.drain()
        await self._learn_context(remote)

    async def _learn_context(self, remote: RemoteModel) -> None:
        """Read the context of the runner after the first answer.

        At the load, the runner may not exist yet, or have the context that another client asked for.
        """
        if not isinstance(remote, _OllamaModel) or remote.has_read_context:
            return
        remote.has_read_context = True
        # The answer is whole, whatever the server does now.
        with contextlib.suppress(ServerError, TimeoutError):
            async with asyncio.timeout(_CONTEXT_S):
                running = await self._running(remote.server)
            context = _context(_runner({"name": _full(remote.model)}, running))
            if context is not None:
                remote.info = dataclasses.replace(remote.info, context_length=context)

    def body(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> dict[str, Any]:
        """Return the body of a request."""
        options: dict[str, Any] = {}
        for name, spelled in remote.dialect.spelled.items():
            value = getattr(config, name)
            if value not in (None, ()):
                options[spelled] = list(value) if isinstance(value, tuple) else value
        beside = {name: value for name, value in config.extra.items() if name in _BESIDE}
        options |= {name: value for name, value in config.extra.items() if name not in _BESIDE}
        return {
            "model": remote.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "stream": True,
            "options": options,
            # Without it, Ollama removes the beginning of a long prompt and reports nothing. `shift` is not
            # sent: a request whose value differs from the last one's reloads the model for all clients.
            "truncate": False,
            **beside,
        }


def _full(model: str) -> str:
    """Return the name of a model with its tag."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def _runner(entry: Mapping[str, Any], running: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the entry of the runner of a model; an alias of the model shares it."""
    digest, name = entry.get("digest"), entry.get("name")
    same = (r for r in running if r["name"] == name or (digest and r.get("digest") == digest))
    return next(same, {})


def _context(runner: Mapping[str, Any]) -> int | None:
    return whole_number(runner.get("context_length")) or None


def _trained_length(shown: Mapping[str, Any], entry: Mapping[str, Any]) -> int | None:
    """Return the longest context that a model was made for."""
    about, details = shown.get("model_info"), entry.get("details")
    if _is_map(about):
        length = whole_number(about.get(f"{about.get('general.architecture')}.context_length"))
        if length:
            return length
    return whole_number(details.get("context_length")) if _is_map(details) else None


def _num_ctx(shown: Mapping[str, Any]) -> int | None:
    """Return the context that the Modelfile of a model asks for."""
    found = _NUM_CTX.search(str(shown.get("parameters") or ""))
    return int(found.group(1)) if found else None


def _is_map(value: object) -> TypeGuard[Mapping[str, Any]]:
    return bool(value) and isinstance(value, dict)


def _pulling(value: Mapping[str, Any]) -> Progress:
    total, completed = whole_number(value.get("total")), whole_number(value.get("completed") or 0)
    if total and completed is not None:
        sizes = f"{human_bytes(completed)} of {human_bytes(total)}"
        return Progress("pulling on the server", min(1.0, completed / total), sizes)
    status = value.get("status")
    stage = server_errors.one_line(status) if isinstance(status, str) else "work"
    return Progress(f"the server is at: {stage}")


def _not_pulled(server: HttpServer, model: str, value: Mapping[str, Any]) -> ModelNotFound:
    said = server_errors.from_object(value).text
    return ModelNotFound(
        f"{server.address.host_port} could not pull {model}: {said}. Is that its name in Ollama's library?"
    )


def _chunk(server: HttpServer, value: dict[str, Any]) -> Chunk:
    if value.get("error"):
        refusal = server_errors.from_object(value)
        error = RequestFailed(
            f"{server.address.origin} stopped with an error: {server.scrub(refusal.text)}.",
            brief="an error",
        )
        error.lengths = refusal.lengths
        raise error
    message = value.get("message") or {}
    if not isinstance(message, dict):
        raise MalformedStream("a chunk of an unknown shape")
    text, thinking = text_of(message.get("content")), text_of(message.get("thinking"))
    return Chunk(text=text, reasoning=thinking, time=time.perf_counter())


def _last(value: Mapping[str, Any]) -> Chunk:
    reason: FinishReason = "length" if value.get("done_reason") == "length" else "stop"
    usage = Usage(
        whole_number(value.get("prompt_eval_count")), whole_number(value.get("eval_count"))
    )
    return Chunk(finish_reason=reason, usage=usage, time=time.perf_counter())
