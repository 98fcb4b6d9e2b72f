"""What all remote backends share: servers, the models they answer with, retries and their limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil

from llm_magic.backends import _refusals
from llm_magic.backends._http import HttpServer, Limits
from llm_magic.backends._lines import MalformedStream, Surrogates
from llm_magic.backends._retry import Patience
from llm_magic.backends.base import Backend, Plan, Report, TokenCount
from llm_magic.config import GenerationConfig, LoadConfig, Settings
from llm_magic.errors import (
    AnswerBroken,
    LLMMagicError,
    ModelNotFound,
    ModelNotLoaded,
    OptionError,
    PromptTooLong,
    RequestRefused,
    ServerError,
    did_you_mean,
)
from llm_magic.keys import Key, Keys
from llm_magic.places import Place, place
from llm_magic.specs import specs
from llm_magic.types import Chunk, MemoryUse, Message, ModelInfo, Progress, State, Unloaded

T = TypeVar("T")


@dataclass(slots=True)
class Dialect:
    """How a server spells the options, and which defaults this model does not take."""

    spelled: dict[str, str]
    left_out: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Remote:
    """A model on a server; `model` is its name there, `dialect` what was learned about it."""

    model: str
    server: HttpServer
    info: ModelInfo
    config: LoadConfig
    dialect: Dialect
    used: bool = False


class RemoteBackend(Backend):
    """Answers through a server; subclasses know its protocol."""

    loading: State = "Configuring"
    # What to type to start such a server, and how many questions it takes at once.
    start = ""
    concurrency = 256
    # Names in the body of a request that are made from something else.
    reserved: frozenset[str] = frozenset()

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings, self._keys = settings, keys
        self._remotes: dict[str, Remote] = {}
        self._servers: dict[tuple[Place, Key | None, Limits], HttpServer] = {}
        # Of a model that was checked and is not loaded yet.
        self._planned: HttpServer | None = None

    # -- what a protocol adds -----------------------------------------------------------------

    @abstractmethod
    async def _list(self, server: HttpServer) -> list[ModelInfo]:
        """Return the models of a server."""

    @abstractmethod
    async def _find(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[Remote, tuple[str, ...]]:
        """Return a model of the server, and what the user should know about it."""

    @abstractmethod
    def _answer(
        self, remote: Remote, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Ask once; the last chunk carries `finish_reason`."""

    def _adapt(self, remote: Remote, error: LLMMagicError, config: GenerationConfig) -> bool:
        """Learn from an error how this server wants it; returns whether asking again may help."""
        return False

    def _room(self, remote: Remote) -> str:
        """Return what helps against a prompt that is too long."""
        context = remote.info.context_length
        reads = f" {remote.info.name} reads {context:,} tokens." if context else ""
        return f"{reads} Shorten the prompt, or lower --max-new-tokens."

    # -- the contract -------------------------------------------------------------------------

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return what the server has."""
        with self._borrowed(config) as server:
            # llama-cpp-python drops the answer it is at for any other request, this one too.
            async with server.turns:
                return await self._patiently(lambda: self._list(server), lambda _progress: None)

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> Plan:
        """See that the server answers and knows the model."""
        began = time.perf_counter()
        self._planned = None
        try:
            with self._borrowed(config) as server:
                waits = "waiting for a turn at" if server.turns.locked() else "asking"
                report(Progress(f"{waits} {server.place.label}"))
                async with server.turns:
                    remote, notes = await self._patiently(
                        lambda: self._find(server, model, config, report), report
                    )
        except BaseException:
            await self._close_unused()
            raise
        self._planned = server
        took = time.perf_counter() - began
        remote.info = dataclasses.replace(remote.info, load_s=took)
        notes = (*self._warnings(server), *self._left_out(), *notes)
        return Plan(model or remote.model, remote.model, config, remote, notes)

    async def load(self, plan: Plan, name: str, report: Report) -> ModelInfo:
        """Remember the model under `name`: the server holds it."""
        remote = plan.source
        assert isinstance(remote, Remote)
        remote.info = dataclasses.replace(remote.info, name=name)
        self._remotes[name], self._planned = remote, None
        return remote.info

    async def unload(self, name: str) -> Unloaded:
        """Forget the model, and close the connections where nobody else uses them."""
        remote = self._find_loaded(name)
        del self._remotes[name]
        before = self.memory()
        note = await self._let_go(remote)
        await self._close_unused()
        return Unloaded(name, 0, before, self.memory(), note=note)

    async def _let_go(self, remote: Remote) -> str:
        """Tell the server, where it wants to know; returns what became of the model."""
        return f"it stays on {remote.server.place.label}"

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer; tries again where that may help, until the first token has come."""
        remote = self._find_loaded(name)
        remote.used = True
        turns = remote.server.turns
        if turns.locked():
            yield Chunk(notice=f"waiting for a turn at {remote.server.place.label}")
        async with turns, contextlib.aclosing(self._tries(remote, messages, config)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _tries(
        self, remote: Remote, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        patience, told = Patience(), False
        while True:
            try:
                whole = _joined(self._answer(remote, messages, config))
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
            yield Chunk(notice=_next_try(error, wait))
            await asyncio.sleep(wait)

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count nothing: only the server knows its tokenizer."""
        return TokenCount(None, self._find_loaded(name).info.context_length)

    def check_extra(self, config: GenerationConfig) -> None:
        """Raise for what is made from something else: the rest is the server's to judge."""
        known = specs(GenerationConfig)
        for name in config.extra:
            if name in self.reserved:
                raise OptionError(f"-p {name} does not go with a streamed answer. Leave it away.")
            if name in known and known[name].works_on(self.name):
                raise OptionError(f"{name} has an option of its own. Leave -p away and type that.")

    def memory(self) -> MemoryUse:
        """Return what this process holds: the model is elsewhere."""
        return MemoryUse(psutil.Process().memory_info().rss)

    async def aclose(self) -> None:
        """Close the connections."""
        self._remotes.clear()
        self._planned = None
        await self._close_unused()

    # -- servers ------------------------------------------------------------------------------

    def _place(self, config: LoadConfig) -> Place:
        found = place(config, self._settings)
        assert found is not None, f"{self.name} has no address among the settings"
        return found

    def _server(self, config: LoadConfig) -> HttpServer:
        """Return the one client of a server; loads that differ in its limits have their own."""
        where = self._place(config)
        key = self._keys.find(config, where, self._settings)
        limits = Limits(
            config.idle_timeout or self._settings.idle_timeout,
            config.concurrency or self.concurrency,
        )
        spec = (where, key, limits)
        if spec not in self._servers:
            self._servers[spec] = HttpServer(where, key, limits, self.start)
        return self._servers[spec]

    @contextlib.contextmanager
    def _borrowed(self, config: LoadConfig) -> Iterator[HttpServer]:
        """Use a server that no loaded model belongs to yet, and keep others from closing it."""
        server = self._server(config)
        server.users += 1
        try:
            yield server
        finally:
            server.users -= 1

    async def _close_unused(self) -> None:
        used = {id(remote.server) for remote in self._remotes.values()}
        for spec, server in list(self._servers.items()):
            if id(server) not in used and not server.users and server is not self._planned:
                del self._servers[spec]
                await server.aclose()

    async def _patiently(self, request: Callable[[], Awaitable[T]], report: Report) -> T:
        """Make a request that may be made again; what nobody listens to is told at once."""
        patience = Patience()
        while True:
            try:
                return await request()
            except RequestRefused as refused:
                wait = patience.next_try(refused)
                if wait is None:
                    raise
                words = _next_try(refused, wait)
            report(Progress(words))
            await asyncio.sleep(wait)

    def _find_loaded(self, name: str) -> Remote:
        try:
            return self._remotes[name]
        except KeyError:
            raise ModelNotLoaded(f"{name} is not loaded any more. Type %llm_load.") from None

    # -- words --------------------------------------------------------------------------------

    def _warnings(self, server: HttpServer) -> tuple[str, ...]:
        if server.key is None or server.place.is_private:
            return ()
        return (
            f"Warning: the key goes to {server.place.origin} in clear text; who is on the way can"
            " read it. Use https.",
        )

    def _left_out(self) -> tuple[str, ...]:
        """Return which defaults of the settings are not sent, because they do not exist there."""
        names = [
            name for name, spec in specs(GenerationConfig).items() if not spec.works_on(self.name)
        ]
        if not names:
            return ()
        return (f"Not sent, because {self.name} has no such options: {', '.join(names)}.",)

    def _only_one(self, server: HttpServer, names: Sequence[str]) -> str:
        """Return the one model of a server; raises where there is none or a choice."""
        if len(names) == 1:
            return names[0]
        has = f"It has: {', '.join(names[:8])}" if names else "It lists none"
        raise OptionError(
            f"Which model of {server.place.label}? {has}. Type %llm_load MODEL -b {self.name}."
        )

    def _unknown(self, server: HttpServer, model: str, names: Sequence[str]) -> ModelNotFound:
        """Return the error for a model that the server does not have."""
        near = did_you_mean(model, names)
        if not near and names:
            near = f" It has: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
        return ModelNotFound(f"{server.place.label} has no model {model}.{near}")

    def _explained(
        self, remote: Remote, error: ServerError | MalformedStream, told: bool
    ) -> LLMMagicError:
        """Return what went wrong; after the first token it is the answer that broke."""
        message = str(error)
        if isinstance(error, MalformedStream):
            message = f"{remote.server.place.origin} sent {error}."
        if told:
            return AnswerBroken(
                f"{message} The answer is not whole; what there is of it is in llm.last."
            )
        if isinstance(error, MalformedStream):
            return RequestRefused(f"{message} Is it the right kind of server?")
        if isinstance(error, RequestRefused) and _is_too_long(error):
            return PromptTooLong(f"{message}{self._room(remote)}")
        return error


def no_answer(where: Place, kind: str) -> RequestRefused:
    """Return the error for a body with nothing of an answer in it; `kind` is its content type."""
    if kind in {"text/event-stream", "application/x-ndjson", ""}:
        # llama-cpp-python's way to say that the prompt is too long.
        return RequestRefused(
            f"{where.origin} sent an empty answer. Is the prompt longer than its context?",
            brief="an empty answer",
        )
    return RequestRefused(
        f"{where.origin} sent no answer, but {kind}. Is --base-url right? Is it the right kind of server?",
        brief="no answer",
    )


def entries_with(name: str, listed: object) -> list[dict[str, Any]]:
    """Return the entries of a server's list that have a `name`; whatever else is in it is left out."""
    if not isinstance(listed, list):
        return []
    return [e for e in listed if isinstance(e, dict) and isinstance(e.get(name), str)]


async def _joined(source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks with halves of characters joined: servers cut escaped text anywhere."""
    text, reasoning = Surrogates(), Surrogates()
    async with contextlib.aclosing(source):
        async for chunk in source:
            said, thought = text.feed(chunk.text), reasoning.feed(chunk.reasoning)
            if chunk.finish_reason:
                said, thought = said + text.flush(), thought + reasoning.flush()
            if said is not chunk.text or thought is not chunk.reasoning:
                chunk = dataclasses.replace(chunk, text=said, reasoning=thought)
            yield chunk


def _is_too_long(error: RequestRefused) -> bool:
    asked_too_much = error.status in {400, 413, 422, 500, None}
    about_length = error.status == 413 or _refusals.Refusal(str(error)).about_length
    return asked_too_much and about_length


def _next_try(error: LLMMagicError, wait: float) -> str:
    brief = error.brief if isinstance(error, ServerError) else "no answer"
    return f"{brief}, next try in {max(1, round(wait))} s"
