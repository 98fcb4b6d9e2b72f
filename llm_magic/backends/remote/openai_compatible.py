"""The backends for OpenAI-compatible servers: their base, and those of vLLM and InstructLab."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

from llm_magic.backends.base import UNSUPPORTED, Capabilities, Report, TokenCount
from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.base import (
    MAX_MODELS,
    RESERVED,
    RemoteBackend,
    RemoteModel,
    message_objects,
    named_entries,
)
from llm_magic.backends.remote.chat_completions import EMPTY, ReplyReader
from llm_magic.backends.remote.limits import END_S
from llm_magic.backends.remote.stream_decoders import (
    EventDecoder,
    MalformedStream,
    is_done,
    parse_object,
    whole_number,
)
from llm_magic.backends.remote.structures import llama_cpp_python, structured_outputs
from llm_magic.backends.remote.token_logprobs import TOP, requested
from llm_magic.config.commands import command, option
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.errors import (
    AuthenticationFailed,
    LLMMagicError,
    RequestFailed,
    ServerBusy,
    ServerError,
)
from llm_magic.types import Chunk, Message, ModelInfo, StructureKind

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer

ALL_STRUCTURES: frozenset[StructureKind] = frozenset(get_args(StructureKind))
# The field of each option in a request to any OpenAI-compatible server.
OPTION_NAMES = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": UNSUPPORTED,
    "repetition_penalty": UNSUPPORTED,
    "seed": "seed",
    "stop": "stop",
    "logprobs": TOP,
    "extra": "the body of the request",
}
# How many requests a server processes at once, by the owner of its models. llama-cpp-python ("me")
# aborts its reply when another request arrives.
_CONCURRENCY = {"vllm": 256, "llamacpp": 256, "me": 1}
_MAX_OWNER_LENGTH, _MAX_ALIASES = 40, 20
_VERSIONED = re.compile(r"/v\d+[a-z]*$|/openai$")


class OpenAICompatibleBackend(RemoteBackend):
    """Generates with ``/v1/chat/completions``."""

    # Whether the server has `/tokenize`.
    counts_tokens = False
    # The path of the list of models, and the prefix of the names in it.
    list_path, id_prefix = "/models", ""
    # Whether the entry of an alias has another name.
    resolves_aliases = False
    reserved = MappingProxyType(
        {
            **RESERVED,
            "stream_options": "Token counts are always requested.",
            **dict.fromkeys(
                ("n", "best_of"), "A call returns one reply; run it again for another."
            ),
        }
    )

    # -- models -------------------------------------------------------------------------------

    async def _list_models(self, server: HttpServer) -> list[ModelInfo]:
        entries = await self._entries(server) or []
        return [self._info(server, entry) for entry in entries[:MAX_MODELS]]

    async def _entries(self, server: HttpServer) -> list[dict[str, Any]] | None:
        """Return what ``/v1/models`` lists; None if the server generates, but lists no models."""
        prefixes = _prefixes(server.address.url) if server.prefix is None else [server.prefix]
        page: RequestFailed | None = None
        for prefix in prefixes:
            try:
                value = await server.get(f"{prefix}{self.list_path}")
            except RequestFailed as error:
                if error.status not in {200, 404, 405}:
                    raise
                page = page or (error if error.is_page else None)
                continue
            server.prefix = prefix
            if isinstance(value, dict):
                value = value.get("data", value.get("models"))
            entries = named_entries(value, "id")
            for entry in entries:
                entry["id"] = entry["id"].removeprefix(self.id_prefix)
            self._store_names(server, [name for entry in entries for name in _names_of(entry)])
            return entries
        for prefix in prefixes:
            # The server of a web page, such as JupyterLab, may require a login for any other request.
            with contextlib.suppress(*() if page is None else (AuthenticationFailed,)):
                if await self._generates(server, prefix):
                    server.prefix = prefix
                    return None
        tried = f"{server.address.url}{prefixes[0]}/models"
        missing = f"{server.address.origin} responds, but has no {tried}."
        raise await self._no_api(server, page or RequestFailed(missing, status=404))

    async def _no_api(self, server: HttpServer, error: RequestFailed) -> RequestFailed:
        """Return the error for a server without an API at its address; names its usual one if it has that."""
        address = server.address
        up = "/.." * address.url.removeprefix(address.origin).count("/")
        listed = None
        if up:
            with contextlib.suppress(RequestFailed):
                listed = await server.get(f"{up}/v1/models")
        if isinstance(listed, dict) and isinstance(listed.get("data"), list):
            found = RequestFailed(error.problem, status=404)
            right = f"{address.origin}/v1"
            return found.advise(f"Use {option('base_url', right)}.", "base_url", right)
        if error.is_page:
            return error
        return error.advise(
            f"Check the path of {option('base_url')}, and whether the server is OpenAI-compatible.",
            "base_url",
        )

    async def _generates(self, server: HttpServer, prefix: str) -> bool:
        """Return whether an empty request is rejected as invalid, and not as an unknown path."""
        try:
            await server.post(f"{prefix}/chat/completions", {})
        except ServerBusy:
            raise
        except RequestFailed as error:
            return error.status in {400, 422}
        return False

    def _info(self, server: HttpServer, entry: Mapping[str, Any]) -> ModelInfo:
        value = entry.get("meta")
        meta: Mapping[str, Any] = value if isinstance(value, dict) else {}
        # The fields of vLLM, OpenRouter and llama.cpp.
        lengths = [
            entry.get("max_model_len"), entry.get("context_length"),
            meta.get("n_ctx"), meta.get("n_ctx_train"),
        ]  # fmt: skip
        context = next(filter(None, map(whole_number, lengths)), None)
        return ModelInfo(
            str(entry["id"]),
            self.name,
            where="server",
            source=str(entry["id"]),
            server=server.address.host_port,
            size=whole_number(meta.get("size")),
            context_length=context,
        )

    async def _find_model(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[RemoteModel, tuple[str, ...]]:
        entries = await self._entries(server)
        if model is None:
            model = server_errors.single_model(server.address, [e["id"] for e in entries or ()])
        model = model.removeprefix(self.id_prefix)
        names = {name: e for e in entries or () for name in _names_of(e)}
        entry: Mapping[str, Any] = names.get(model, {})
        notes: tuple[str, ...] = ()
        if entries is None:
            notes = (
                f"{server.address.host_port} lists no models. The first prompt shows whether it has"
                f" {model}.",
            )
        elif not entry:
            entry = await self._unlisted(server, model, list(names))
        info = self._info(server, {**entry, "id": model})
        owner = entry.get("owned_by")
        if isinstance(owner, str):
            notes += self._owner_warning(server, owner)
        else:
            owner = ""
        self._servers.limit(server, config, _CONCURRENCY.get(owner) or self.concurrency)
        remote = RemoteModel(model, server, info, self._fields(server, entry))
        self._set_structures(remote, entry)
        return remote, notes

    def _set_structures(self, remote: RemoteModel, entry: Mapping[str, Any]) -> None:
        """Set which structures a model can be held to, where `entry` of the list of models shows that."""

    def _owner_warning(self, server: HttpServer, owner: str) -> tuple[str, ...]:
        """Return a warning if the server is not vLLM, but the backend is."""
        if self.name != "vllm" or owner == "vllm":
            return ()
        owner = server_errors.one_line(owner)[:_MAX_OWNER_LENGTH]
        return (
            f"Warning: {server.address.host_port} does not look like vLLM: its models report the owner"
            f" {owner!r}. It may ignore top_k and repetition_penalty. Use -b openai for other"
            " OpenAI-compatible servers.",
        )

    async def _unlisted(
        self, server: HttpServer, model: str, names: Sequence[str]
    ) -> Mapping[str, Any]:
        """Return the entry of a model that is not listed, such as an alias."""
        try:
            entry = await server.get(f"{server.prefix}/models/{quote(model, safe='')}")
        except ServerBusy:
            raise
        except RequestFailed:
            entry = None
        found = named_entries([entry], "id")
        is_same = bool(found) and found[0]["id"].removeprefix(self.id_prefix) == model
        if not is_same and not (found and self.resolves_aliases):
            missing = server_errors.model_not_found(server.address, model, names)
            advice = f"Run {command('models', **server.address.options)} to list models."
            raise missing.advise(advice, "model")
        return found[0]

    def _fields(self, server: HttpServer, entry: Mapping[str, Any]) -> dict[str, str]:
        """Return the field of each option of a model; `entry` is what the server lists about it."""
        fields = self.request_fields()
        if server.address.origin == "https://api.openai.com":
            # Newer models reject `max_tokens`, and older models accept both fields.
            fields["max_new_tokens"] = "max_completion_tokens"
        if self.name == "instructlab" and entry.get("owned_by") == "vllm":
            fields["repetition_penalty"] = "repetition_penalty"
        return fields

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Return the token count of vLLM, which applies the template of the model; None for others."""
        remote = self._find_loaded(name)
        if not self.counts_tokens:
            return TokenCount(None, remote.info.context_length)
        server = remote.server
        # The path is not below /v1.
        path = "/tokenize" if server.prefix else "/../tokenize"
        body = {"model": remote.model, "messages": message_objects(messages)}
        try:
            value = await server.post(path, body)
        except ServerError:
            value = {}
        count = value.get("count") if isinstance(value, dict) else None
        return TokenCount(whole_number(count), remote.info.context_length)

    # -- generation ---------------------------------------------------------------------------

    async def _generate(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        server = remote.server
        to_error = partial(server_errors.stream_error, server.address, server.key)
        reader, has_events = ReplyReader(to_error, config.logprobs), False
        body = self.body(remote, messages, config)
        async with server.stream("POST", f"{server.prefix}/chat/completions", body) as answer:
            if answer.content_type == "application/json":
                # Some gateways do not stream, although the request asks for it.
                whole = reader.read_whole(_whole_reply(server, await answer.read_all()))
                _require_reply(server, reader)
                yield whole
                return
            try:
                async for event in answer.events(EventDecoder()):
                    has_events = True
                    if is_done(event):
                        break
                    chunk = reader.read(parse_object(event))
                    if chunk.text or chunk.reasoning:
                        answer.use_idle_limit()
                    if reader.is_finished:
                        answer.set_deadline(END_S)
                    if chunk is not EMPTY:
                        yield chunk
            except (ServerError, MalformedStream):
                # The reply is complete, whatever follows it.
                if not reader.is_finished:
                    raise
            if not has_events:
                raise server_errors.no_reply_error(server.address, answer.content_type)
            _require_reply(server, reader)
            yield reader.last_chunk()
            await answer.drain()

    def body(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> dict[str, Any]:
        """Return the body of a request."""
        body: dict[str, Any] = {
            "model": remote.model,
            "messages": message_objects(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        fields = remote.option_fields(config)
        body |= fields | requested(fields) | self._structure_fields(remote, config.structure)
        for field in remote.unsupported - self._requested_fields(remote, config):
            body.pop(field, None)
        return {**body, **config.extra}

    def _requested_fields(self, remote: RemoteModel, config: GenerationConfig) -> set[str]:
        """Return the fields that the user has set, and which are sent even if the model rejects them."""
        requested = {remote.fields.get(name, "") for name in config.model_fields_set}
        return requested | set(config.extra)

    def _adapt(self, remote: RemoteModel, error: LLMMagicError, config: GenerationConfig) -> bool:
        """Use the newer field for the token limit, or omit a default that the model rejects."""
        if not isinstance(error, RequestFailed) or error.status not in {400, 422}:
            return False
        fields, unsupported = remote.fields, remote.unsupported
        if error.parameter == "max_tokens" and error.code == "unsupported_parameter":
            fields["max_new_tokens"] = "max_completion_tokens"
            return True
        # The token limit is never omitted, because the default of the server is unknown.
        sent = [*remote.option_fields(config), "stream_options"]
        required = {fields["max_new_tokens"]} | self._requested_fields(remote, config)
        # Some servers name the field only in their message, or two of which they accept one.
        named = [error.parameter] if error.parameter else [f for f in sent if _names(str(error), f)]
        rejected = [f for f in named if f in sent and f not in required | unsupported]
        unsupported.update(rejected[-1:])
        return bool(rejected)


class VLLMBackend(OpenAICompatibleBackend):
    """Servers started by ``vllm serve``."""

    name = "vllm"
    option_names = MappingProxyType(
        OPTION_NAMES | {"top_k": "top_k", "repetition_penalty": "repetition_penalty"}
    )
    start = "To start one, run: vllm serve MODEL"
    counts_tokens = True
    capabilities = Capabilities(structures=ALL_STRUCTURES)
    structure_fields = staticmethod(structured_outputs)


class InstructLabBackend(OpenAICompatibleBackend):
    """Servers started by ``ilab model serve``: llama-cpp-python or vLLM."""

    name = "instructlab"
    option_names = MappingProxyType(
        OPTION_NAMES
        # llama-cpp-python reports them only for models that it has loaded in a certain way.
        | {"top_k": "top_k", "repetition_penalty": "repeat_penalty", "logprobs": UNSUPPORTED}
    )
    start = "To start one, run: ilab model serve"
    # llama-cpp-python aborts its answer when another request arrives.
    concurrency = 1
    capabilities = Capabilities(structures=ALL_STRUCTURES)
    structure_fields = staticmethod(llama_cpp_python)

    def _set_structures(self, remote: RemoteModel, entry: Mapping[str, Any]) -> None:
        if entry.get("owned_by") == "vllm":
            remote.structure_fields = structured_outputs
        else:
            remote.structures = ("json_schema", "choice")


def _require_reply(server: HttpServer, reader: ReplyReader) -> None:
    """Raise `RequestFailed` for a complete response that contains no part of a reply."""
    if reader.missing:
        raise server_errors.missing_reply_error(server.address, reader.missing)


def _whole_reply(server: HttpServer, body: bytes) -> dict[str, Any]:
    """Return the object in the body of a reply that is not streamed: a reply, or an error."""
    if not body.strip():
        raise server_errors.no_reply_error(server.address, "")
    value = parse_object(body)
    if not isinstance(value.get("choices"), list) and not value.get("error"):
        text = server_errors.parse_error(value).text
        error = RequestFailed(f"{server.address.origin} sent no reply: {text}.", brief="no reply")
        raise error.advise(f"Check {option('base_url')}.", "base_url")
    return value


def _names_of(entry: Mapping[str, Any]) -> list[str]:
    """Return the name of a listed model, and its aliases."""
    aliases = entry.get("aliases")
    texts = aliases[:_MAX_ALIASES] if isinstance(aliases, list) else ()
    return [str(entry["id"]), *(alias for alias in texts if isinstance(alias, str))]


def _names(message: str, field: str) -> bool:
    """Return whether a message contains the name of a field."""
    return re.search(rf"\b{field}\b", message) is not None


def _prefixes(url: str) -> list[str]:
    """Return the possible paths of the API below an address, the most likely first."""
    return [""] if _VERSIONED.search(url) else ["/v1", ""]
