"""The base class of the backends for servers: models, connections, retries and error messages."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from abc import abstractmethod
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from llm_magic.backends.base import (
    LAST_ANSWER,
    Backend,
    LoadPlan,
    Report,
    TokenCount,
    by_prompt,
    find_loaded,
)
from llm_magic.backends.remote.client_pool import Servers
from llm_magic.backends.remote.limits import ANSWER_S, FIRST_FACTOR
from llm_magic.backends.remote.retry import Retries, is_overload
from llm_magic.backends.remote.server_errors import one_line
from llm_magic.backends.remote.stream_decoders import MalformedStream, join_surrogates
from llm_magic.backends.remote.structures import Fields, advise, response_format
from llm_magic.backends.remote.token_logprobs import TOP
from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.commands import command, option
from llm_magic.config.option_spec import specs
from llm_magic.config.server_address import ServerAddress, parse_url
from llm_magic.config.settings import (
    GenerationConfig,
    LoadConfig,
    ReadSettings,
    ServerLoadConfig,
)
from llm_magic.errors import (
    IncompleteReply,
    LLMMagicError,
    OptionError,
    PromptTooLong,
    RequestFailed,
    ServerError,
    ServerTimeout,
    ServerUnreachable,
)
from llm_magic.types import (
    Chunk,
    MemoryUse,
    Message,
    ModelInfo,
    Progress,
    Structure,
    StructureKind,
    Unloaded,
)

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer

T = TypeVar("T")

# The models of one server that are listed and completed; others can be loaded by name.
MAX_MODELS = 10_000
# vLLM uses the path of a folder as the name of its model.
_MAX_NAME_LENGTH = 1000

# Options that only a load has: advice about them in the error of a prompt names the load.
_LOAD_OPTIONS = MappingProxyType(
    {"base_url": "use another address", "key_env": "use a key", "idle_timeout": "change the limit"}
)

# Fields of a request that no option sets, and what to do instead.
RESERVED: Mapping[str, str] = MappingProxyType(
    {
        "model": "Choose a loaded model with -m, or load another with %llm_load.",
        "messages": "The cell is the prompt; -s sets the system prompt, -c continues a chat.",
        "prompt": "The cell is the prompt; -s sets the system prompt, -c continues a chat.",
        "stream": "Every reply is streamed; --quiet or -o hides it.",
    }
)
# Names of options in other APIs. Servers ignore them or use them for other options.
SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("max_tokens", "max_completion_tokens", "num_predict", "n_predict"), "max_new_tokens"
        ),
        "repeat_penalty": "repetition_penalty",
        TOP: "logprobs",
    }
)


@dataclass(slots=True)
class RemoteModel:
    """A model on a server.

    Attributes:
        model: Its name on the server; `info.name` is its name in the session.
        fields: The field of each option in a request.
        unsupported: The fields that the server has rejected. They are sent only on request.
        failure: When and why the connection for the last answer failed, empty if it did not.
        structures: The kinds of structures that it can be held to; None for those of its backend.
        structure_fields: The fields of a structure in a request; None for those of its backend.
    """

    model: str
    server: HttpServer
    info: ModelInfo
    fields: dict[str, str]
    unsupported: set[str] = field(default_factory=set)
    was_used: bool = False
    failure: str = ""
    structures: Collection[StructureKind] | None = None
    structure_fields: Fields | None = None

    def option_fields(self, config: GenerationConfig) -> dict[str, Any]:
        """Return the fields of the options that have a value."""
        return option_fields(self.fields, config)


class RemoteBackend(Backend):
    """Generates with the models of servers. Subclasses implement a protocol.

    Attributes:
        start: How to start such a server.
        concurrency: How many requests such a server processes at once.
        reserved: Fields of a request that ``-p`` cannot set, and what to do instead.
        spellings: Names of options in other APIs.
    """

    load_config: ClassVar[type[LoadConfig]] = ServerLoadConfig
    start = ""
    concurrency = 256
    reserved: Mapping[str, str] = MappingProxyType({})
    spellings: Mapping[str, str] = SPELLINGS

    def __init__(self, settings: ReadSettings, keys: ApiKeys) -> None:
        self._models: dict[str, RemoteModel] = {}
        # By URL. The event-loop thread writes it, and completion reads it in the main thread.
        self._listed: dict[str, list[ModelInfo]] = {}
        self._servers = Servers(settings, keys, self.start, self.concurrency, self._api_prefix)

    @classmethod
    def request_fields(cls) -> dict[str, str]:
        """Return the field of each supported option in a request. Pairs are fields themselves."""
        options = specs(GenerationConfig)
        return {
            name: field
            for name, field in cls.option_names.items()
            if cls.supports(name) and options[name].kind != "pairs"
        }

    # -- the protocol -------------------------------------------------------------------------

    @abstractmethod
    async def _list_models(self, server: HttpServer) -> list[ModelInfo]:
        """Return the models of a server."""

    @abstractmethod
    async def _find_model(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[RemoteModel, tuple[str, ...]]:
        """Return a model of the server, its only one for None, and notes for the user."""

    @abstractmethod
    def _generate(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Send one request and yield the reply; the last chunk has a `finish_reason`."""

    def _api_prefix(self, address: ServerAddress) -> str | None:
        """Return the path of the API below the address; None if it is detected by requests."""
        return None

    def _adapt(self, remote: RemoteModel, error: LLMMagicError, config: GenerationConfig) -> bool:
        """Adapt the fields of a model after an error; returns whether to send the request again."""
        return False

    def _shorten_hint(self, remote: RemoteModel) -> str:
        """Return what to do if the prompt exceeds the context."""
        return "Shorten the prompt, or lower --max-new-tokens."

    # -- models -------------------------------------------------------------------------------

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the models of the server."""
        with self._servers.borrowed(config) as server:
            # llama-cpp-python aborts its reply for any other request, this one included.
            async with server.turns:
                return await self._retry(
                    lambda: self._list_models(server), lambda _progress: None, ANSWER_S
                )

    def is_current(self, name: str, _model: str | None, config: LoadConfig) -> bool:
        """Return whether a load would use the same address with the same key now, and reaches it."""
        remote = self._find_loaded(name)
        return not remote.failure and self._servers.is_of(config, remote.server)

    def known(self, base_url: str | None) -> list[ModelInfo]:
        """Return the models that servers listed in their last response."""
        lists = dict(self._listed)
        if base_url is not None:
            return lists.get(parse_url(self.name, base_url).url, [])
        return [info for infos in lists.values() for info in infos]

    def _store_names(self, server: HttpServer, names: Sequence[str]) -> None:
        """Store the names of a server's models for completion."""
        self._listed[server.address.url] = [
            ModelInfo(name, self.name, "server", server=server.address.host_port)
            for name in names[:MAX_MODELS]
        ]

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """Check that the server responds and has the model."""
        self._servers.planned = None
        try:
            with self._servers.borrowed(config) as server:
                is_waiting = server.turns.locked()
                stage = "waiting for a turn at" if is_waiting else "connecting to"
                report(Progress(f"{stage} {server.address.host_port}"))
                async with server.turns:
                    remote, notes = await self._retry(
                        lambda: self._find_model(server, model, config, report),
                        report,
                        _busy_timeout(server),
                    )
        except BaseException:
            await self._close_unused()
            raise
        self._servers.planned = server
        notes = (*self._load_notes(server), *notes)
        return LoadPlan(model or remote.model, remote.model, config, remote, notes)

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Store the model under `name`; the server holds it in memory."""
        remote = plan.source
        assert isinstance(remote, RemoteModel)
        remote.info = dataclasses.replace(remote.info, name=name)
        self._models[name], self._servers.planned = remote, None
        return remote.info

    async def unload(self, name: str) -> Unloaded:
        """Remove the model, and close the connections that no other model uses."""
        remote = self._find_loaded(name)
        del self._models[name]
        before = self.memory()
        note = await self._unload_from_server(remote)
        await self._close_unused()
        return Unloaded(name, 0, before, self.memory(), note=note, server=remote.info.server)

    async def _unload_from_server(self, remote: RemoteModel) -> str:
        """Free the memory of the server, if its API has a request for that; returns a note."""
        return f"it stays on {remote.server.address.host_port}"

    # -- generation ---------------------------------------------------------------------------

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the reply; repeats failed requests until the first token was received."""
        remote = self._find_loaded(name)
        remote.was_used = True
        server = remote.server
        # Its connections stay open, even if its model is unloaded meanwhile.
        server.users += 1
        try:
            is_queued = server.turns.locked()
            if is_queued:
                yield Chunk(queued=True)
            chunks = self._generate_with_retries(remote, messages, config)
            async with server.turns, contextlib.aclosing(chunks):
                if is_queued:
                    yield Chunk()
                async for chunk in chunks:
                    yield chunk
        finally:
            server.users -= 1
            await self._close_unused()

    async def _generate_with_retries(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        retries, has_text, notice = Retries(_busy_timeout(remote.server)), False, ""
        while True:
            try:
                chunks = join_surrogates(self._generate(remote, messages, config))
                async with contextlib.aclosing(chunks):
                    async for chunk in chunks:
                        has_text = has_text or bool(chunk.text or chunk.reasoning)
                        yield chunk
                remote.failure = ""
                return
            except (ServerError, MalformedStream) as caught:
                remote.failure = _failure(caught)
                error = self._translated(remote, caught, has_text)
                advise(error, config.structure)
            if not has_text and self._adapt(remote, error, config):
                continue
            wait = None if has_text else retries.next_delay(error)
            if wait is None:
                raise error
            before, notice = notice, retries.notice(error, wait)
            backoff_s = wait if is_overload(error) else 0.0
            if notice != before or backoff_s:
                yield Chunk(notice=notice if notice != before else "", backoff_s=backoff_s)
            await asyncio.sleep(wait)

    def concurrency_of(self, name: str) -> int:
        """Return the limit of the connection; others wait here."""
        return self._find_loaded(name).server.concurrency

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Return the context length; the server does not count tokens."""
        return TokenCount(None, self._find_loaded(name).info.context_length)

    def check_options(self, name: str, config: GenerationConfig, given: Collection[str]) -> None:
        """Raise `OptionError` for an option that the server does not support, or that is set twice."""
        super().check_options(name, config, given)
        structure, remote = config.structure, self._models.get(name)
        if structure is None or remote is None:
            # A model that is still being loaded is checked again afterwards.
            return
        if remote.structures is not None and structure.kind not in remote.structures:
            raise OptionError(
                f"{remote.model} on {self.name} cannot enforce {option(structure.option)}."
                f"{by_prompt(structure)}"
            )
        for twice in self._structure_fields(remote, structure).keys() & config.extra.keys():
            raise OptionError(
                f"-p {twice} is set by {option(structure.option)}. Remove one of them."
            )

    def enforced_by(self, name: str, structure: Structure) -> str:
        """Return the field of the request that holds an answer to a structure."""
        remote = self._find_loaded(name)
        return f"the server ({', '.join(self._structure_fields(remote, structure))})"

    def _structure_fields(self, remote: RemoteModel, structure: Structure | None) -> dict[str, Any]:
        """Return the fields of a request for a structure."""
        if structure is None:
            return {}
        return (remote.structure_fields or type(self).structure_fields)(structure)

    @staticmethod
    def structure_fields(structure: Structure) -> dict[str, Any]:
        """Return the fields of a request for a structure, on most servers of this backend."""
        return response_format(structure)

    def check_extra(self, config: GenerationConfig) -> None:
        """Raise `OptionError` for fields that options set, and for values that are not JSON."""
        known = {name for name in self.option_names if self.supports(name)}
        check_fields(config, known, self.spellings, self.reserved)

    def details(self, name: str) -> dict[str, str]:
        """Return the address of the API."""
        remote = self._models.get(name)
        if remote is None:
            return {}
        # That of Ollama leads out of the address of its other API.
        prefix = (remote.server.prefix or "").removeprefix("/..")
        found = {"server": f"{remote.server.address.url}{prefix}"}
        return found | ({LAST_ANSWER: remote.failure} if remote.failure else {})

    def memory(self) -> MemoryUse:
        """Return the memory of this process, which does not contain the model."""
        import psutil

        return MemoryUse(psutil.Process().memory_info().rss)

    async def aclose(self) -> None:
        """Close the connections."""
        self._models.clear()
        self._servers.planned = None
        await self._close_unused()

    async def _close_unused(self) -> None:
        await self._servers.close_unused(remote.server for remote in self._models.values())

    async def _retry(
        self, request: Callable[[], Awaitable[T]], report: Report, busy_timeout: float
    ) -> T:
        """Return the result of a request; repeats it after error responses, if that can help."""
        retries = Retries(busy_timeout)
        while True:
            try:
                return await request()
            except RequestFailed as error:
                wait = retries.next_delay(error)
                if wait is None:
                    raise
                stage = retries.notice(error, wait)
            report(Progress(stage))
            await asyncio.sleep(wait)

    def _find_loaded(self, name: str) -> RemoteModel:
        return find_loaded(self._models, name)

    # -- messages -----------------------------------------------------------------------------

    def _load_notes(self, server: HttpServer) -> Iterator[str]:
        """Yield a warning about the key."""
        if server.key is not None and not server.address.is_private:
            yield (
                f"Warning: the key is sent to {server.address.origin} in clear text, and others on the"
                " network can read it. Use https."
            )

    def _translated(
        self, remote: RemoteModel, error: ServerError | MalformedStream, has_text: bool
    ) -> LLMMagicError:
        """Return the error to raise; `has_text` is whether a part of the reply was received."""
        if isinstance(error, MalformedStream):
            failed = RequestFailed(f"{remote.server.address.origin} sent {error}.")
            check = f"Check {option('base_url')} and {option('backend')}."
            error = failed if has_text else failed.advise(check, "base_url")
        if purpose := _LOAD_OPTIONS.get(error.option, ""):
            options = {**remote.server.address.options}
            if error.choice:
                purpose, options["base_url"] = "do that", error.choice
            elif error.option == "base_url":
                # The same command would load the same address.
                options["base_url"] = "URL"
            again = command("load", one_line(remote.model), **options)
            error.advise(f"To {purpose}, load it again: {again}")
        if has_text:
            return IncompleteReply.like(error).append("The reply is incomplete.")
        if isinstance(error, RequestFailed) and error.exceeds_context:
            return self._prompt_too_long(remote, error)
        return error

    def _prompt_too_long(self, remote: RemoteModel, error: RequestFailed) -> PromptTooLong:
        """Return the error for a prompt that exceeds the context of the model."""
        name, hint = remote.info.name, self._shorten_hint(remote)
        if error.lengths is None:
            context = remote.info.context_length
            reads = f" {name} reads {context:,} tokens." if context else ""
            return PromptTooLong(f"{error.problem}{reads}").advise(hint)
        prompt, context = error.lengths
        model = f"{name} on {remote.server.address.host_port}"
        return PromptTooLong.measured(model, prompt, context, hint)


def _failure(error: ServerError | MalformedStream) -> str:
    """Return when and why a connection failed, or nothing for a server that responded."""
    if not isinstance(error, (ServerUnreachable, ServerTimeout)):
        return ""
    return f"failed at {datetime.now():%H:%M:%S}: {error.problem}"


def _busy_timeout(server: HttpServer) -> float:
    """Return the seconds to wait for a busy server: as long as for the first token."""
    return server.limits.idle_s * FIRST_FACTOR


def message_objects(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return the messages of a conversation as JSON objects."""
    return [{"role": message.role, "content": message.content} for message in messages]


def option_fields(fields: Mapping[str, str], config: GenerationConfig) -> dict[str, Any]:
    """Return the fields of the options that have a value; `fields` has the field of each option."""
    values = {field: getattr(config, name) for name, field in fields.items()}
    return {
        field: list(value) if isinstance(value, tuple) else value
        for field, value in values.items()
        if value not in (None, ())
    }


def check_fields(
    config: GenerationConfig,
    supported: Collection[str],
    spellings: Mapping[str, str],
    reserved: Mapping[str, str],
) -> None:
    """Raise `OptionError` for a ``-p`` field that an option sets, is reserved, or is not JSON."""
    options = specs(GenerationConfig)
    for name in config.extra:
        option = options.get(spellings.get(name, name))
        if option is not None and option.flags and option.name in supported:
            raise OptionError(
                f"{name} has its own option. Use {option.flags[-1]} {option.metavar} instead of -p"
                f" (in Python: {option.name}=)."
            )
        if name in reserved:
            raise OptionError(f"-p {name} cannot be set. {reserved[name]}")
        _check_json(name, config.extra[name])


def named_entries(listed: object, field: str) -> list[dict[str, Any]]:
    """Return the entries of a server's list that have a name in `field`; omits invalid entries."""
    if not isinstance(listed, list):
        return []
    named = (e for e in listed if isinstance(e, dict) and isinstance(e.get(field), str))
    return [entry for entry in named if len(entry[field]) <= _MAX_NAME_LENGTH]


def _check_json(name: str, value: object) -> None:
    """Raise `OptionError` if a value of ``-p`` or ``extra`` cannot be encoded as JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except RecursionError:
        reason = "it is nested too deeply"
    except (TypeError, ValueError) as error:
        reason = str(error)[:100]
    else:
        return
    raise OptionError(
        f"-p {name}: a value of type {type(value).__name__} cannot be sent as JSON ({reason})."
        " Use numbers, strings, lists and dictionaries."
    )
