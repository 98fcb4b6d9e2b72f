"""A backend with a script and a memory: it answers what was scripted, and records every call."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from llm_magic.backends.base import Backend, Capabilities, LoadPlan, Report, TokenCount
from llm_magic.backends.manager import BackendManager, LoadedModel
from llm_magic.config.settings import GenerationConfig, LoadConfig, Settings
from llm_magic.errors import OptionError
from llm_magic.session import Session
from llm_magic.session.chats import Chats
from llm_magic.session.event_loop import LoopThread
from llm_magic.session.recording import Recorder
from llm_magic.session.requests import PreparedRequest, Request
from llm_magic.session.response import Response
from llm_magic.types import (
    Chunk,
    FinishReason,
    MemoryUse,
    Message,
    ModelInfo,
    Progress,
    Reply,
    Timing,
    Unloaded,
    Usage,
)

Stage = Literal["check", "verify", "load", "unload"]


class Hang:
    """A step that lasts until it is cancelled, or `go` is set (from any thread).

    A `deaf` one hears that it is cancelled and ends only when it is released.
    """

    def __init__(self, *, deaf: bool = False) -> None:
        self.deaf = deaf
        self.go = threading.Event()
        self.reached = threading.Event()

    async def wait(self) -> None:
        """Wait without holding the loop up."""
        self.reached.set()
        cancelled = False
        while not self.go.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                cancelled = True
                if not self.deaf:
                    raise
        if cancelled:
            raise asyncio.CancelledError


@dataclass(frozen=True)
class Pause:
    """A step that lasts some seconds."""

    seconds: float


Step = str | Chunk | Pause | Hang | BaseException
Script = Sequence[Step]


def whole_answer(*texts: str, finish: FinishReason = "stop", prompt_tokens: int = 7) -> list[Step]:
    """Return the script of a whole answer: one token a text, then why it ended and the counts."""
    return [*texts, Chunk(finish_reason=finish, usage=Usage(prompt_tokens, len(texts), 0))]


@dataclass
class ScriptedCall:
    """One call of `stream`, and how it ended: whole, closed (by the caller) or failed."""

    name: str
    messages: tuple[Message, ...]
    config: GenerationConfig
    outcome: str = "open"


@dataclass
class ScriptedBackend(Backend):
    """Answers from a queue of scripts; without one it repeats the question word by word."""

    name = "scripted"
    scripts: deque[Script] = field(default_factory=deque)
    trouble: dict[Stage, BaseException | Hang] = field(default_factory=dict)
    reports: dict[Stage, Sequence[Progress]] = field(default_factory=dict)
    requests: list[ScriptedCall] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    leaving: list[tuple[str, ...]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    listed: list[ModelInfo] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    context: int = 8192
    counting: bool = True

    capabilities = Capabilities(in_process=True, local_token_counts=True)
    option_names: ClassVar[Mapping[str, str]] = {
        name: name for name in GenerationConfig.model_fields
    }

    def will(self, *script: Step) -> None:
        """Queue the script of one more answer."""
        self.scripts.append(script)

    def hang(self, stage: Stage, *, deaf: bool = False) -> Hang:
        """Make a stage wait; returns what lets it go on."""
        hang = self.trouble[stage] = Hang(deaf=deaf)
        return hang

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return two models."""
        self.listed = [
            ModelInfo(name, self.name, where="cache", size=1000) for name in ("big", "tiny")
        ]
        return self.listed

    def known(self, base_url: str | None) -> list[ModelInfo]:
        """Return them, once they were listed."""
        return self.listed

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """Accept every model; its name is the last part of its id."""
        self.leaving.append(tuple(leaving))
        requested = model or "default"
        await self._stage("check", requested, report)
        return LoadPlan(requested, requested.rpartition("/")[2], config, requested, self.notes)

    async def verify(self, plan: LoadPlan, report: Report) -> LoadPlan:
        """Accept every plan; recorded only where that is scripted."""
        if "verify" in self.trouble:
            await self._stage("verify", plan.name, report)
        return plan

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Record the model."""
        await self._stage("load", name, report)
        self.loaded.append(name)
        return ModelInfo(
            name, "local", where="cache", source=f"/models/{plan.model}", device="cpu",
            dtype="bfloat16", size=269_000_000, context_length=self.context,
        )  # fmt: skip

    async def unload(self, name: str) -> Unloaded:
        """Remove the model."""
        await self._stage("unload", name, lambda _progress: None)
        before = self.memory()
        self.loaded.remove(name)
        return Unloaded(name, 1000, before, self.memory())

    async def _stage(self, stage: Stage, subject: str, report: Report) -> None:
        self.events.append(f"{stage} {subject}")
        for progress in self.reports.get(stage, ()):
            report(progress)
        trouble = self.trouble.get(stage)
        if isinstance(trouble, BaseException):
            raise trouble
        if trouble is not None:
            try:
                await trouble.wait()
            except asyncio.CancelledError:
                self.events.append(f"{stage} {subject} cancelled")
                raise

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Follow the next script."""
        call = ScriptedCall(name, tuple(messages), config)
        self.requests.append(call)
        script = self.scripts.popleft() if self.scripts else _echo(messages)
        try:
            for step in script:
                if isinstance(step, BaseException):
                    call.outcome = "failed"
                    raise step
                if isinstance(step, Hang):
                    await step.wait()
                elif isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                else:
                    yield _chunk(step)
            call.outcome = "whole"
        finally:
            if call.outcome == "open":
                call.outcome = "closed"

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count words, where it can count."""
        count = sum(len(m.content.split()) for m in messages)
        return TokenCount(count if self.counting else None, self.context)

    def check_options(self, _name: str, config: GenerationConfig, given: Collection[str]) -> None:
        """Support every option of the table."""
        self.check_extra(config)

    def check_extra(self, config: GenerationConfig) -> None:
        """Support no extra option but ``known``."""
        for name in config.extra:
            if name != "known":
                raise OptionError(f"There is no option {name!r}.")

    def memory(self) -> MemoryUse:
        """Hold one kB, and one more for each model."""
        return MemoryUse(1000 * (1 + len(self.loaded)))

    async def aclose(self) -> None:
        """Discard all models."""
        self.events.append("close")
        self.loaded.clear()


def _chunk(step: str | Chunk) -> Chunk:
    if isinstance(step, Chunk):
        return step
    return Chunk(text=step, tokens=1, time=time.perf_counter())


def _echo(messages: Sequence[Message]) -> Script:
    pieces = messages[-1].content.split(" ")
    return whole_answer(*[word if i == 0 else f" {word}" for i, word in enumerate(pieces)])


def stop_when(event: threading.Event) -> None:
    """Press the stop button once `event` is set and the main thread waits for an answer."""
    usual = signal.getsignal(signal.SIGINT)

    def press() -> None:
        assert event.wait(30)
        deadline = time.monotonic() + 30
        while signal.getsignal(signal.SIGINT) is usual:
            assert time.monotonic() < deadline, "nothing waits"
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def at_release(act: Callable[[], object]) -> None:
    """Call a function on a thread of its own when `tests.kernels.Kernel.release` is called."""

    def release(_signal: int, _frame: object) -> None:
        # Not `threading`: its locks may be taken by what the signal interrupted.
        _thread.start_new_thread(act, ())

    signal.signal(signal.SIGUSR2, release)


def read(chunks: Iterable[Chunk], take: Callable[[Chunk], object]) -> None:
    """Give every chunk to `take`."""
    for chunk in chunks:
        take(chunk)


def show(response: Response, draw: Callable[[], object]) -> None:
    """ScriptedCall `draw` at every update of a response, as the display of a cell does."""
    with response:
        for _ in response.updates():
            draw()


def make_reply(text: str, **attributes: Any) -> Reply:
    """Return a reply of ``tiny`` with some token counts and times, unless others are given."""
    defaults: dict[str, Any] = {
        "model": "tiny",
        "backend": "local",
        "finish_reason": "stop",
        "usage": Usage(3, 2, 0),
        "timing": Timing(0.1, 1.0, 30.0),
        "messages": (Message("user", "?"),),
    }
    return Reply(text, **(defaults | attributes))


def unstarted(info: ModelInfo) -> Response:
    """Return a response of a model that nothing generates: tests add its chunks and its reply."""
    backend, config = ScriptedBackend(), LoadConfig(backend=info.backend)
    loaded = LoadedModel(info.name, info.name, config, backend, info)
    prepared = PreparedRequest(
        loaded, (Message("user", "?"),), GenerationConfig(), Request("?"), None
    )
    manager = BackendManager(lambda _name: backend)
    return Response(prepared, manager, LoopThread(), Recorder(Chats(), lambda: None))


def settings(**changes: object) -> Settings:
    """Return settings that no environment and no ``.env`` file has touched."""
    return Settings.model_construct(**changes)  # type: ignore[arg-type]


@contextlib.contextmanager
def scripted_session(
    load: bool = True, **changed_settings: object
) -> Iterator[tuple[Session, ScriptedBackend]]:
    """Give a session on a scripted backend, with ``tiny`` loaded, and close it afterwards."""
    backend = ScriptedBackend()
    session = Session(settings(**changed_settings), create=lambda _name: backend)
    try:
        if load:
            session.load("org/tiny")
        yield session, backend
    finally:
        session.close()
