"""Answers that are produced while other things happen: begun, watched, stopped, waited for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llm_magic.errors import Interrupted, JobNotFound, release_frames
from llm_magic.session.handover import handover
from llm_magic.session.interrupts import Inbox, held_back, interrupts_to, translated
from llm_magic.session.requests import Draft, stopped
from llm_magic.session.thread_bridge import TICK_S, Wake
from llm_magic.text.formatting import generated
from llm_magic.text.terminal import visible_line

if TYPE_CHECKING:
    from llm_magic.types import Chunk, Reply

JobState = Literal["waiting", "running", "done", "stopped", "failed"]
# How many ended jobs stay listed: their answers are kept, so not all of them.
_KEPT = 20


class Screen(Protocol):
    """Where a job is shown, if it is shown anywhere."""

    async def take(self, chunk: Chunk) -> None:
        """Take the next chunk, on the loop thread; returns when there is room for another one."""

    def again(self, job: Job) -> None:
        """Show how the job ended once more, in the cell that is running now."""

    def close(self) -> None:
        """Wait until the end of the job has been shown."""


class Job:
    """One answer in the making; every attribute may be read from any thread at any time.

    ``await job`` and ``job.result()`` wait for the reply; giving up the wait does not stop the job.
    """

    def __init__(self, number: int, draft: Draft, screen: Screen | None = None) -> None:
        self.id, self.draft, self.screen = number, draft, screen
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self.notice = ""
        # Whether somebody has waited for it, and so knows how it ended.
        self.is_known = False
        self.future: concurrent.futures.Future[Reply] | None = None
        self._began = time.monotonic()
        self._ended: float | None = None
        self._task: asyncio.Task[Any] | None = None
        self._stopping = False

    @property
    def state(self) -> JobState:
        """How far it is: waiting means that nothing was said yet."""
        if self.future is None or not self.future.done():
            return "waiting" if self.draft.is_empty else "running"
        if self.future.cancelled():
            return "stopped"
        return "failed" if self.future.exception() is not None else "done"

    @property
    def done(self) -> bool:
        """Whether nothing more will come: it is whole, stopped or failed."""
        return self.future is not None and self.future.done()

    @property
    def model(self) -> str:
        """The name of the model that answers."""
        return self.draft.call.loaded_model.name

    @property
    def prompt(self) -> str:
        """What was asked."""
        return self.draft.call.messages[-1].content

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.draft.text

    @property
    def tokens(self) -> int | None:
        """The number of tokens generated so far; None where it is unknown."""
        return self.reply.usage.completion_tokens if self.reply else self.draft.tokens

    @property
    def amount(self) -> str:
        """How much was generated so far, in words: tokens, or characters where those are unknown."""
        return generated(self.tokens, self.draft.characters)

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        return (self._ended or time.monotonic()) - self._began

    @held_back()
    def result(self, timeout: float | None = None) -> Reply:
        """Wait for the reply; raises the job's error, `Interrupted` where it was stopped.

        After `timeout` seconds it raises `TimeoutError`, and at an interrupt `Interrupted`; then the
        job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        assert self.future is not None
        inbox: Inbox = queue.SimpleQueue()
        with interrupts_to(inbox):
            while not self.done:
                left = TICK_S if deadline is None else min(TICK_S, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"Job {self.id} goes on after {timeout} s.")
                concurrent.futures.wait([self.future], left)
                if not inbox.empty():
                    raise Interrupted(f"Stopped waiting; still running: {self.id}.")
        return self._outcome()

    def __await__(self) -> Generator[Any, None, Reply]:
        yield from self.ended().__await__()
        return self._outcome()

    async def ended(self) -> None:
        """Return when nothing more will come, in a coroutine of any loop."""
        assert self.future is not None
        here, news = handover(asyncio.get_running_loop(), TICK_S), asyncio.Event()
        wake = Wake(here, news)
        self.future.add_done_callback(lambda _future: wake())
        # An awaiting cell only notices an interrupt when its loop wakes.
        with translated(), here.awake():
            await news.wait()

    def _outcome(self) -> Reply:
        self.is_known = True
        if self.error is not None:
            raise self.error
        assert self.reply is not None
        if self.state == "stopped":
            raise Interrupted(f"Job {self.id}: {stopped(self.reply)}", reply=self.reply)
        return self.reply

    def starts(self) -> None:
        """Remember the task that does the work; called in it."""
        self._task = asyncio.current_task()
        if self._stopping:
            raise asyncio.CancelledError

    async def takes(self, chunk: Chunk) -> None:
        """Show the next chunk, which is in the draft already; called on the loop thread."""
        self.notice = chunk.notice
        if self.screen is not None:
            await self.screen.take(chunk)

    def ends(self, reply: Reply, error: Exception | None = None) -> None:
        """Keep what came of it; called at the end of the work."""
        self.reply, self.error, self._ended = reply, error, time.monotonic()
        if error is not None:
            # A listed job must not keep alive what its error's frames hold.
            traceback.clear_frames(error.__traceback__)
            release_frames(error)

    def stop(self) -> None:
        """Stop the work; it is over when it has ended, and what there is of it stays in `reply`."""
        self._stopping = True
        task = self._task
        if task is not None and not task.done():
            # The loop may have been closed under us; then nothing runs any more.
            with contextlib.suppress(RuntimeError):
                task.get_loop().call_soon_threadsafe(task.cancel)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        amount = f", {self.amount}" if self.amount else ""
        return f"<Job {self.id}: {visible_line(self.model)}, {self.state}{amount}, {self.seconds:.1f} s>"


class Jobs:
    """The jobs of a session: those that run, and the last ones that ended."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """`changed` is called after every end."""
        self._changed = changed
        self._numbers = itertools.count(1)
        self._running: list[Job] = []
        # Whoever sees the answer of a job finds the job, too, however early. Reentrant: ■ asks for
        # what runs in the thread that it interrupts.
        self._beginning = threading.RLock()
        self._ended: deque[Job] = deque(maxlen=_KEPT)

    @property
    def running(self) -> tuple[Job, ...]:
        """Those that have not ended, oldest first."""
        with self._beginning:
            return tuple(self._running)

    @property
    def all(self) -> tuple[Job, ...]:
        """Those that run and the last ones that ended, oldest first."""
        # Those that run first: one that ends meanwhile is among the ended by then.
        known = {job.id: job for job in (*self.running, *tuple(self._ended))}
        return tuple(known[number] for number in sorted(known))

    def begin(
        self,
        draft: Draft,
        screen: Screen | None,
        start: Callable[[Job], concurrent.futures.Future[Reply]],
    ) -> Job:
        """Begin a job."""
        job = Job(next(self._numbers), draft, screen)
        with self._beginning:
            job.future = start(job)
            self._running.append(job)
        job.future.add_done_callback(lambda _future: self._end(job))
        return job

    def _end(self, job: Job) -> None:
        # In this order: whoever looks in between finds it twice rather than not at all.
        self._ended.append(job)
        self._running.remove(job)
        self._changed()

    def find(self, number: str) -> Job:
        """Return a job by its number; raises `JobNotFound`."""
        found = next((job for job in self.all if str(job.id) == number), None)
        if found is not None:
            return found
        numbers = [str(job.id) for job in self.all]
        there = f"there are: {', '.join(numbers)}. See %llm_jobs" if numbers else "there is none"
        raise JobNotFound(f"There is no job {number!r}; {there}.")

    def stop(self) -> None:
        """Stop them all."""
        for job in self.running:
            job.stop()

    def unknown(self) -> tuple[Job, ...]:
        """Return those that run, and those that ended under their cell with nobody waiting."""
        return tuple(j for j in self.all if not j.done or (j.screen and not j.is_known))

    def close(self) -> None:
        """End what the loop could not: it is being closed, and nothing will run any more."""
        for job in self.running:
            if job.future is not None and not job.done:
                job.ends(job.draft.reply("cancelled"))
                job.future.cancel()
        for job in self.all:
            if job.screen is not None:
                job.screen.close()
