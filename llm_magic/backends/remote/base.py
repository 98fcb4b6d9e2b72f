"""What all remote backends share: servers, the models they answer with, retries and their limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import psutil

from llm_magic.backends.base import Backend, LoadPlan, Report, TokenCount
from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.client_pool import Servers
from llm_magic.backends.remote.limits import ANSWER_S, FIRST_FACTOR
from llm_magic.backends.remote.retry import Patience, waiting
from llm_magic.backends.remote.stream_decoders import MalformedStream, joined
from llm_magic.config.api_keys import ApiKeys
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
    ModelNotLoaded,
    OptionError,
    PromptTooLong,
    RequestFailed,
    ServerBusy,
    ServerError,
)
from llm_magic.types import Chunk, MemoryUse, Message, ModelInfo, Progress, Unloaded

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer

T = TypeVar("T")

# How many models of one server are listed and kept for completion; any can be loaded by its name.
MOST_MODELS = 10_000
# Longer than a path: vLLM calls a model by its folder.
_LONGEST_NAME = 1000

# Names in a request that no option sets, and what to do instead.
RESERVED: Mapping[str, str] = MappingProxyType(
    {
        "model": "Choose a loaded model with -m, or load another with %llm_load.",
        "messages": "The cell is the prompt; -s sets the system prompt, -c continues a chat.",
        "prompt": "The cell is the prompt; -s sets the system prompt, -c continues a chat.",
        "stream": "Every answer is streamed; --quiet or -o hides it.",
    }
)


@dataclass(slots=True)
class Dialect:
    """How a server spells the options, and which defaults this model does not take."""

    spelled: dict[str, str]
    left_out: set[str] = field(default_factory=set)


@dataclass(slots=True)
class RemoteModel:
    """A model on a server; `model` is its name there, `dialect` what was learned about it."""

    model: str
    server: HttpServer
    info: ModelInfo
    config: LoadConfig
    dialect: Dialect
    used: bool = False


class RemoteBackend(Backend):
    """Answers through a server; subclasses know its protocol."""

    load_config: ClassVar[type[LoadConfig]] = ServerLoadConfig
    # What to type to start such a server, and how many questions it takes at once.
    start = ""
    concurrency = 256
    # Names in the body of a request that are made from something else, and from what.
    reserved: Mapping[str, str] = MappingProxyType({})
    # Names of options in other APIs, which servers ignore or mix up with their own names.
    spellings: Mapping[str, str] = MappingProxyType(
        {
            **dict.fromkeys(
                ("max_tokens", "max_completion_tokens", "num_predict", "n_predict"),
                "max_new_tokens",
            ),
            "repeat_penalty": "repetition_penalty",
        }
    )

    def __init__(self, settings: ReadSettings, keys: ApiKeys) -> None:
        self._remotes: dict[str, RemoteModel] = {}
        # What servers listed, by address: written on the loop, read at a key press.
        self._listed: dict[str, list[ModelInfo]] = {}
        self._servers = Servers(settings, keys, self.start, self.concurrency, self._prefix)

    @classmethod
    def sent_names(cls) -> dict[str, str]:
        """Return what the supported options are called in a request; `extra` has names of its own."""
        return {n: sent for n, sent in cls.option_names.items() if sent and n != "extra"}

    # -- what a protocol adds -----------------------------------------------------------------

    @abstractmethod
    async def _list(self, server: HttpServer) -> list[ModelInfo]:
        """Return the models of a server."""

    @abstractmethod
    async def _find(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[RemoteModel, tuple[str, ...]]:
        """Return a model of the server, and what the user should know about it."""

    @abstractmethod
    def _answer(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Ask once; the last chunk carries `finish_reason`."""

    def _prefix(self, address: ServerAddress) -> str | None:
        """Return where the API of a server begins; None if it is not known before it was asked."""
        return None

    def _adapt(self, remote: RemoteModel, error: LLMMagicError, config: GenerationConfig) -> bool:
        """Learn from an error how this server wants it; returns whether asking again may help."""
        return False

    def _room(self, remote: RemoteModel) -> str:
        """Return what to do about a prompt that is too long."""
        return " Shorten the prompt, or lower --max-new-tokens."

    # -- the contract -------------------------------------------------------------------------

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return what the server has."""
        with self._servers.borrowed(config) as server:
            # llama-cpp-python drops the answer it is at for any other request, this one too.
            async with server.turns:
                return await self._patiently(
                    lambda: self._list(server), lambda _progress: None, ANSWER_S
                )

    def is_current(self, name: str, config: LoadConfig) -> bool:
        """Return whether the server would be asked at the same address, with the same key."""
        return self._servers.is_of(config, self._find_loaded(name).server)

    def known(self, base_url: str | None) -> list[ModelInfo]:
        """Return what servers listed when they were last asked."""
        lists = dict(self._listed)
        if base_url is not None:
            return lists.get(parse_url(self.name, base_url).url, [])
        return [info for infos in lists.values() for info in infos]

    def _remember(self, server: HttpServer, names: Sequence[str]) -> None:
        """Keep the names that a server lists, for completion."""
        label = server.address.host_port
        self._listed[server.address.url] = [
            ModelInfo(name, self.name, "server", server=label) for name in names[:MOST_MODELS]
        ]

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """See that the server answers and knows the model."""
        self._servers.planned = None
        try:
            with self._servers.borrowed(config) as server:
                waits = "waiting for a turn at" if server.turns.locked() else "asking"
                report(Progress(f"{waits} {server.address.host_port}"))
                async with server.turns:
                    remote, notes = await self._patiently(
                        lambda: self._find(server, model, config, report), report, _busy_s(server)
                    )
        except BaseException:
            await self._close_unused()
            raise
        self._servers.planned = server
        notes = (*self._warnings(server), *self._left_out(), *notes)
        return LoadPlan(model or remote.model, remote.model, config, remote, notes)

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Remember the model under `name`: the server holds it."""
        remote = plan.source
        assert isinstance(remote, RemoteModel)
        remote.info = dataclasses.replace(remote.info, name=name)
        self._remotes[name], self._servers.planned = remote, None
        return remote.info

    async def unload(self, name: str) -> Unloaded:
        """Forget the model, and close the connections where nobody else uses them."""
        remote = self._find_loaded(name)
        del self._remotes[name]
        before = self.memory()
        note = await self._let_go(remote)
        await self._close_unused()
        return Unloaded(name, 0, before, self.memory(), note=note)

    async def _let_go(self, remote: RemoteModel) -> str:
        """Tell the server, where it wants to know; returns what became of the model."""
        return f"it stays on {remote.server.address.host_port}"

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer; tries again where that may help, until the first token has come."""
        remote = self._find_loaded(name)
        remote.used = True
        turns = remote.server.turns
        async with self._held(remote):
            if turns.locked():
                yield Chunk(notice=f"waiting for a turn at {remote.server.address.host_port}")
            async with turns, contextlib.aclosing(self._tries(remote, messages, config)) as chunks:
                async for chunk in chunks:
                    yield chunk

    @contextlib.asynccontextmanager
    async def _held(self, remote: RemoteModel) -> AsyncIterator[None]:
        """Keep the connections of an answer that is under way, also when its model is unloaded."""
        remote.server.users += 1
        try:
            yield
        finally:
            remote.server.users -= 1
            await self._close_unused()

    async def _tries(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        patience, told, notice = Patience(_busy_s(remote.server)), False, ""
        while True:
            try:
                whole = joined(self._answer(remote, messages, config))
                async with contextlib.aclosing(whole) as chunks:
                    async for chunk in chunks:
                        told = told or bool(chunk.text or chunk.reasoning)
                        yield chunk
                return
            except (ServerError, MalformedStream) as caught:
                error = self._explained(remote, caught, told)
            if not told and self._adapt(remote, error, config):
                continue
            wait = None if told else patience.next_try(error)
            if wait is None:
                raise error
            if waiting(error, wait) != notice or not isinstance(error, ServerBusy):
                notice = waiting(error, wait)
                yield Chunk(notice=notice)
            await asyncio.sleep(wait)

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count nothing: only the server knows its tokenizer."""
        return TokenCount(None, self._find_loaded(name).info.context_length)

    def check_extra(self, config: GenerationConfig) -> None:
        """Raise for what is made from something else: the rest is the server's to judge."""
        known = specs(GenerationConfig)
        for name in config.extra:
            option = known.get(self.spellings.get(name, name))
            if option is not None and option.flag is not None and self.supports(option.name):
                flag, value = option.flag.names[-1], option.flag.metavar
                raise OptionError(
                    f"{name} has an option of its own. Use {flag} {value} instead of -p"
                    f" (in Python: {option.name}=)."
                )
            if name in self.reserved:
                raise OptionError(f"-p {name} cannot be set. {self.reserved[name]}")
            _refuse_no_json(name, config.extra[name])

    def memory(self) -> MemoryUse:
        """Return what this process holds: the model is elsewhere."""
        return MemoryUse(psutil.Process().memory_info().rss)

    async def aclose(self) -> None:
        """Close the connections."""
        self._remotes.clear()
        self._servers.planned = None
        await self._close_unused()

    # -- requests -----------------------------------------------------------------------------

    async def _close_unused(self) -> None:
        await self._servers.close_unused(remote.server for remote in self._remotes.values())

    async def _patiently(
        self, request: Callable[[], Awaitable[T]], report: Report, busy_s: float
    ) -> T:
        """Make a request that may be made again; a server that does not answer fails at once."""
        patience = Patience(busy_s)
        while True:
            try:
                return await request()
            except RequestFailed as refused:
                wait = patience.next_try(refused)
                if wait is None:
                    raise
                words = waiting(refused, wait)
            report(Progress(words))
            await asyncio.sleep(wait)

    def _find_loaded(self, name: str) -> RemoteModel:
        try:
            return self._remotes[name]
        except KeyError:
            raise ModelNotLoaded(f"{name} is not loaded any more. Type %llm_load.") from None

    # -- words --------------------------------------------------------------------------------

    def _warnings(self, server: HttpServer) -> tuple[str, ...]:
        if server.key is None or server.address.is_private:
            return ()
        return (
            f"Warning: the key goes to {server.address.origin} in clear text; who is on the way can"
            " read it. Use https.",
        )

    def _left_out(self) -> tuple[str, ...]:
        """Return which defaults of the settings are not sent, because they do not exist there."""
        names = [name for name in self.option_names if not self.supports(name)]
        if not names:
            return ()
        return (f"Not sent, because {self.name} has no such options: {', '.join(names)}.",)

    def _explained(
        self, remote: RemoteModel, error: ServerError | MalformedStream, told: bool
    ) -> LLMMagicError:
        """Return what went wrong; after the first token it is the answer that broke."""
        message = str(error)
        if isinstance(error, MalformedStream):
            message = f"{remote.server.address.origin} sent {error}."
        if told:
            return IncompleteReply(
                f"{message} The answer is not whole; what there is of it is in llm.last."
            )
        if isinstance(error, MalformedStream):
            return RequestFailed(f"{message} Is it the right kind of server?")
        if isinstance(error, RequestFailed) and server_errors.is_too_long(error):
            return self._too_long(remote, error)
        return error

    def _too_long(self, remote: RemoteModel, error: RequestFailed) -> PromptTooLong:
        """Return the error for a prompt that is longer than the model reads."""
        if error.lengths is None:
            context = remote.info.context_length
            reads = f" {remote.info.name} reads {context:,} tokens." if context else ""
            return PromptTooLong(f"{error}{reads}{self._room(remote)}")
        prompt, context = error.lengths
        return PromptTooLong(
            f"The prompt has {prompt:,} tokens, {remote.info.name} on"
            f" {remote.server.address.host_port} reads {context:,}.{self._room(remote)}"
        )


def _busy_s(server: HttpServer) -> float:
    """Return the seconds to wait for a server that answers others: as long as for a first word."""
    return server.limits.idle_s * FIRST_FACTOR


def entries_with(name: str, listed: object) -> list[dict[str, Any]]:
    """Return the entries of a server's list that have a `name`; whatever else is in it is left out.

    So are entries with a name that is too long to be typed.
    """
    if not isinstance(listed, list):
        return []
    named = (e for e in listed if isinstance(e, dict) and isinstance(e.get(name), str))
    return [entry for entry in named if len(entry[name]) <= _LONGEST_NAME]


def _refuse_no_json(name: str, value: object) -> None:
    """Raise `OptionError` for a value of ``-p`` or ``extra`` that no request can carry."""
    try:
        json.dumps(value, allow_nan=False)
    except RecursionError:
        why = "it is nested too deeply"
    except (TypeError, ValueError) as error:
        why = str(error)[:100]
    else:
        return
    raise OptionError(
        f"-p {name}: a value of type {type(value).__name__} cannot be sent as JSON ({why})."
        " Give numbers, texts, lists and dictionaries."
    )
