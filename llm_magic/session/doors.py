"""The doors to an answer: sync, async and in the background, all to one core.

The core is an async generator of chunks on the loop thread; there is no second code path.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Unpack

from llm_magic.config.api_keys import ApiKeys
from llm_magic.errors import Interrupted
from llm_magic.session import context_window
from llm_magic.session.cell_keys import Cells
from llm_magic.session.chats import Chats
from llm_magic.session.event_loop import LoopThread
from llm_magic.session.interrupts import held_back
from llm_magic.session.jobs import Job, Jobs, Screen
from llm_magic.session.listeners import Watchers
from llm_magic.session.loading import Loads, Tick
from llm_magic.session.requests import (
    AskOptions,
    Call,
    Draft,
    DryRun,
    Prompt,
    Request,
    definite,
    request,
)
from llm_magic.session.response import Answers, chunks, filled
from llm_magic.types import Chunk, Reply

if TYPE_CHECKING:
    from llm_magic.backends.base import Backend
    from llm_magic.backends.manager import BackendManager
    from llm_magic.config.settings import Settings
    from llm_magic.session.generation_settings import GenerationSettings
    from llm_magic.types import ModelInfo


_sessions: weakref.WeakSet[Doors] = weakref.WeakSet()
_left_to_the_parent: list[object] = []


def _after_fork() -> None:
    for session in list(_sessions):
        session._begin_anew()


# Windows and some other places cannot fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Doors:
    """What a session asks its models through; every method may be called from any cell."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        create: Callable[[str], Backend] | None = None,
    ) -> None:
        """`create` makes the backend of a name; the ones of this package if left away."""
        self._given_settings = settings
        self._create = create
        self._chats = Chats()
        # Told by the face, which knows the frontend.
        self.cells = Cells()
        self._keys = ApiKeys()
        self._watchers = Watchers()
        self._closing: list[Callable[[], None]] = []
        self._begin()
        _sessions.add(self)

    def _begin(self) -> None:
        """Make what lives in this process: threads, and what runs on them."""
        self._loop = LoopThread()
        self._jobs = Jobs(self._watchers.tell)
        self._answers = Answers(self._chats, self._watchers.tell)
        self._loads = Loads(self._loop, lambda: self._manager)

    def _begin_anew(self) -> None:
        """In a forked child, where none of the threads is: nothing is loaded there."""
        # Kept as it is: connections and memory are the parent's, to be closed by that.
        _left_to_the_parent.append((self._loop, self.__dict__.pop("_manager", None)))
        last = self._answers.last
        self._begin()
        self._answers.last = last

    @functools.cached_property
    def generation(self) -> GenerationSettings:
        """The generation settings: ``llm.generation.temperature = 0.3``."""
        from llm_magic.session.generation_settings import GenerationSettings

        return GenerationSettings(self._given_settings, self._watchers.tell)

    @property
    def settings(self) -> Settings:
        """The settings of the environment and ``.env``."""
        return self.generation.settings

    @functools.cached_property
    def _manager(self) -> BackendManager:
        from llm_magic.backends import registry
        from llm_magic.backends.manager import BackendManager

        def create(name: str) -> Backend:
            return registry.create(name, lambda: self.settings, self._keys)

        return BackendManager(self._create or create, self._watchers.tell)

    @held_back()
    def wait_for_load(self, tick: Tick | None = None) -> None:
        """Wait for a load that was begun with `load_later`; an interrupt only ends the wait.

        `tick` is called about ten times a second meanwhile. Raises the error of the load.
        """
        self._loads.settle(tick)

    @held_back()
    def ready(self, request: Request) -> ModelInfo:
        """Return the model that will answer, after a load that was begun has ended."""
        self._loads.settle()
        return self._manager.find(request.model).info

    @held_back()
    def generate(self, prompt: Prompt, **about: Unpack[AskOptions]) -> Reply:
        """Answer a prompt; blocks until the answer is whole, and can be interrupted.

        What it is given is that of ``%%llm?``: model, system, chat, trim, max_new_tokens,
        temperature, top_p, top_k, repetition_penalty, seed, stop, extra (what else the backend accepts).

        >>> llm.generate("What is 7 times 6?", temperature=0).text
        """
        return self.answer(request(prompt, about))

    @held_back()
    def answer(
        self,
        request: Request,
        take: Callable[[Chunk], None] | None = None,
        tick: Tick | None = None,
        rest: Callable[[], float] | None = None,
        ended: Callable[[Reply], None] | None = None,
    ) -> Reply:
        """Answer a request, handing every chunk to `take` on this thread.

        `tick` is called when some were taken, and about ten times a second while none come; after
        it none are handed over for `rest()` seconds.

        Whatever ends it early, the text so far stays in `last`, and `ended` is given it; an
        interrupt raises `Interrupted`, which carries it too.
        """
        self._loads.settle(tick)
        call = self._call(request)
        draft = self._answers.draft(call)
        try:
            with self._answers.kept(draft):
                if take is None:
                    self._loop.drain(filled(draft, self._chunks(draft)), lambda _chunk: None, tick)
                else:
                    # Kept as it is shown: what an interrupt leaves is what was seen.
                    self._loop.drain(self._chunks(draft), _both(draft.add, take), tick, rest)
            return self._answers.keep(draft)
        finally:
            # Not `last`: a job may have ended in the meantime.
            if ended is not None and draft.kept is not None:
                ended(draft.kept)

    @held_back()
    def stream(self, prompt: Prompt, **about: Unpack[AskOptions]) -> Iterator[Chunk]:
        """Yield the answer as it is produced; leaving the loop early stops the model."""
        asked = request(prompt, about)
        self._loads.settle()
        return self._stream(self._call(asked))

    def _stream(self, call: Call) -> Iterator[Chunk]:
        draft = self._answers.draft(call)
        with self._answers.kept(draft):
            for chunk in self._loop.iterate(self._chunks(draft)):
                draft.add(chunk)
                yield chunk
        self._answers.keep(draft)

    async def agenerate(self, prompt: Prompt, **about: Unpack[AskOptions]) -> Reply:
        """Answer a prompt in an async cell or program; cancelling the task stops the model."""
        asked = request(prompt, about)
        await self._loads.asettle()
        call = self._call(asked)
        draft = self._answers.draft(call)
        with self._answers.kept(draft):
            filling = self._loop.relay(
                filled(draft, self._chunks(draft)), lambda: self._answers.stopping(draft)
            )
            async with contextlib.aclosing(filling) as nothing:
                async for _chunk in nothing:
                    pass
        return self._answers.keep(draft)

    async def astream(
        self, prompt: Prompt, **about: Unpack[AskOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer in an async cell or program; leaving the loop early stops the model."""
        asked = request(prompt, about)
        await self._loads.asettle()
        call = self._call(asked)
        draft = self._answers.draft(call)
        with self._answers.kept(draft):
            relayed = self._loop.relay(self._chunks(draft), lambda: self._answers.stopping(draft))
            async with contextlib.aclosing(relayed) as stream:
                async for chunk in stream:
                    draft.add(chunk)
                    yield chunk
        self._answers.keep(draft)

    @held_back()
    def begin(self, request: Request, screen: Screen | None = None) -> Job:
        """Begin to answer a request and return at once; raises what is wrong with it.

        `screen` is given every chunk, on the loop thread; the model waits while it takes one.
        """
        draft = self._answers.draft(self._call(request))
        return self._jobs.begin(draft, screen, lambda job: self._loop.submit(self._work(job)))

    async def _work(self, job: Job) -> Reply:
        draft = job.draft
        try:
            job.starts()
            with self._answers.kept(draft):
                async for chunk in filled(draft, self._chunks(draft), all_of_it=True):
                    await job.takes(chunk)
            reply = self._answers.keep(draft)
        except asyncio.CancelledError:
            job.ends(draft.kept or draft.reply("cancelled"))
            raise
        except Exception as error:
            job.ends(draft.kept or draft.reply("truncated"), error)
            raise
        job.ends(reply)
        return reply

    @held_back()
    def wait(self, jobs: Iterable[Job], tick: Tick | None = None) -> None:
        """Wait until jobs have ended, however; an interrupt only ends the waiting."""

        async def all_ended() -> None:
            for job in waited_for:
                await job.ended()

        waited_for = tuple(jobs)
        try:
            self._loop.run(all_ended(), tick)
        except KeyboardInterrupt:
            left = ", ".join(str(job.id) for job in waited_for if not job.done)
            raise Interrupted(f"Stopped waiting; still running: {left or 'nothing'}.") from None

    @property
    def last(self) -> Reply | None:
        """The last answer, whole or not."""
        return self._answers.last

    @property
    def jobs(self) -> Jobs:
        """What was begun in the background."""
        return self._jobs

    @property
    def answering(self) -> tuple[Draft, ...]:
        """The answers that are being produced now, in whatever way they were asked for."""
        return self._answers.drafts

    def interrupt(self) -> None:
        """Stop what cells are waiting for, as ■ does, and what panels asked; from any thread.

        Jobs that have a cell of their own go on: `jobs.stop` stops them.
        """
        self._loop.interrupt()
        for job in self._jobs.running:
            if job.screen is None:
                job.stop()

    def when_closed(self, closed: Callable[[], None]) -> Callable[[], None]:
        """Call `closed` once, when the session is closed; returns what takes that back."""
        self._closing.append(closed)

        def remove() -> None:
            if closed in self._closing:
                self._closing.remove(closed)

        return remove

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` after every change, from any thread; returns what ends that.

        It must return at once: it is told of every token.
        """
        return self._watchers.add(changed)

    @held_back()
    def dry_run(self, request: Request) -> DryRun:
        """Return the exact messages and their token count; calls nothing."""
        self._loads.settle()
        call = self._loop.run(context_window.fit(self._manager, self._call(request, peek=True)))
        name = call.loaded_model.name
        count = self._loop.run(self._manager.count(name, call.messages))
        backend = call.loaded_model.config.backend
        return DryRun(name, backend, call.messages, call.config, count, call.dropped)

    def _call(self, request: Request, *, peek: bool = False) -> Call:
        """Check a request; raises before anything is sent. `peek` starts no turn of its chat."""
        loaded_model = self._manager.find(request.model)
        loaded_model.backend.release_threads()
        if request.chat is not None and request.key is None:
            request = dataclasses.replace(request, key=self.cells.key(request.chat, peek=peek))
        return definite(request, loaded_model, self.generation.config, self._chats)

    def _chunks(self, draft: Draft) -> AsyncGenerator[Chunk, None]:
        return chunks(self._manager, draft)


def _both(
    first: Callable[[Chunk], None], second: Callable[[Chunk], None]
) -> Callable[[Chunk], None]:
    def take(chunk: Chunk) -> None:
        first(chunk)
        second(chunk)

    return take
