"""Persistent threads for local work; one of them owns loading, warm-up, prefill and decoding.

One thread for all of it: each thread that enters an OpenMP region gets worker threads of its own, and
more of them than cores slow every operation down (see `openmp`); CUDA graphs belong to one thread.

Jobs of the same group may be done together: the running one takes those that follow it in the queue,
in their order. A job of another kind is therefore never overtaken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llm_magic.backends.thread_bridge import ThreadBridge
from llm_magic.errors import LLMMagicError, chained, release_frames
from llm_magic.types import Chunk

_log = logging.getLogger(__name__)
T = TypeVar("T")
Translate = Callable[[BaseException], LLMMagicError]


class Cancelled(Exception):
    """Raised inside a job when its cancel flag was seen."""


# The random number generator of torch and the progress hook of Transformers belong to the process,
# and two sessions that compute at once on the same cores take longer than one after the other.
_PROCESS_LOCK = threading.Lock()
_POLL_S = 0.05
# How long the reader of a stream lets fast items collect: a wake-up takes a CPU from the model.
_PAUSE_S = 0.05
# One entry for each session that waits for the lock.
_WAITING: list[threading.Event] = []


@contextlib.contextmanager
def process_lock(cancel: threading.Event) -> Iterator[None]:
    """Wait until no other session of this process computes; raises `Cancelled` if `cancel` is set."""
    _WAITING.append(cancel)
    try:
        while not _PROCESS_LOCK.acquire(timeout=_POLL_S):
            if cancel.is_set():
                raise Cancelled
    finally:
        _WAITING.remove(cancel)
    try:
        yield
    finally:
        _PROCESS_LOCK.release()


class Worker:
    """Runs jobs one after another on a daemon thread; started on first use."""

    def __init__(self, name: str, after_job: Callable[[], None] = lambda: None) -> None:
        """`after_job` is called on the thread after each job."""
        self._name, self._after_job = name, after_job
        self._jobs: deque[Job[Any] | None] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running: Job[Any] | None = None

    def _has_to_wait(self, new: Job[Any]) -> bool:
        """Return whether a job that comes now waits for others that it cannot join."""
        running = self._running
        ahead = [] if running is None or running.is_over else [running]
        ahead += [job for job in self._jobs if job is not None]
        return any(not job.accepts or job.group != new.group for job in ahead)

    def set_accepts(self, running: Job[Any], accepts: bool) -> None:
        """Set whether the running job takes others."""
        with self._changed:
            running.accepts = accepts
            for job in self._jobs:
                if job is not None and not (accepts or running.is_over):
                    job.emit_queued()

    def submit(
        self, work: Callable[[threading.Event], T], translate: Translate
    ) -> tuple[Future[T], threading.Event]:
        """Queue `work(cancel)`; returns its future and the flag that asks it to stop.

        `translate` turns a foreign exception into one of ours.
        """
        job = Job(lambda job: work(job.cancel), translate, self)
        self._queue(job)
        return job.future, job.cancel

    def _queue(self, job: Job[Any]) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            if self._has_to_wait(job):
                job.emit_queued()
            self._jobs.append(job)
            self._changed.notify()

    async def run(self, work: Callable[[threading.Event], T], translate: Translate) -> T:
        """Await a job; cancelling sets its flag and waits until the job has seen it."""
        future, cancel = self.submit(work, translate)
        wrapped = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(wrapped)
        except asyncio.CancelledError:
            await _stop(future, wrapped, cancel)
            raise

    async def stream(
        self,
        work: Callable[[Job[None]], None],
        translate: Translate,
        queued: Any = None,
        group: str | None = None,
        request: Any = None,
    ) -> AsyncGenerator[Any, None]:
        """Yield what the job emits, and raise its failure; closing sets its flag and waits for it.

        `queued` is yielded if the job has to wait for others. `group` and `request` are those of the
        `Job`.
        """
        bridge: ThreadBridge[Any] = ThreadBridge()
        job = Job(work, translate, self, bridge.put, group, request, queued)
        job.future.add_done_callback(lambda _future: bridge.close())
        self._queue(job)
        wrapped = asyncio.wrap_future(job.future)
        try:
            pause = 0.0
            while not bridge.is_finished:
                items = bridge.take()
                for item in _joined(items):
                    yield item
                began = time.monotonic()
                await bridge.wait_async(pause)
                # Of slow items, each is worth a wake-up; a pause would only add another one.
                is_fast = len(items) > 1 or time.monotonic() - began < _PAUSE_S / 2
                pause = _PAUSE_S if is_fast and items else 0.0
            await wrapped
        finally:
            await _stop(job.future, wrapped, job.cancel)

    def has_next(self, group: str | None) -> bool:
        """Return whether the next job belongs to `group`, and no other session waits."""
        if not self._jobs or _WAITING:
            return False
        with self._changed:
            job = self._jobs[0] if self._jobs else None
            return job is not None and job.group == group

    def take_next(self, group: str | None) -> Job[Any] | None:
        """Remove the next job if it belongs to `group`, and return it: the running job does its work."""
        while self.has_next(group):
            job = self._jobs.popleft()
            # False for one that was cancelled.
            if job is not None and job.future.set_running_or_notify_cancel():
                return job
        return None

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        with self._changed:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._jobs.append(None)
                self._changed.notify()
        if thread is not None:
            thread.join(timeout=5)

    def _run(self) -> None:
        while (job := self._wait_for_job()) is not None:
            if job.future.set_running_or_notify_cancel():
                job.run()
            # Or the last job's tensors would live until the next one comes.
            self._running = None
            del job
            try:
                self._after_job()
            except Exception:  # noqa: BLE001 - logged, and the thread goes on
                # Without the thread, every later job would wait for ever.
                _log.exception("after a job of %s", self._name)

    def _wait_for_job(self) -> Job[Any] | None:
        with self._changed:
            while not self._jobs:
                self._changed.wait()
            self._running = job = self._jobs.popleft()
            return job


@dataclass(eq=False, slots=True)
class Job(Generic[T]):
    """One piece of work, the flag that asks it to stop, and its outcome.

    `emit` takes the items of a stream. `group` is what it may be done together with, None for
    nothing, and `request` what another job of the group needs to do its work. `queued` is the item of a
    job that waits for others. `accepts` is whether it takes more jobs of its group.
    """

    work: Callable[[Job[T]], T]
    translate: Translate
    worker: Worker
    emit: Callable[[Any], None] = lambda _item: None
    group: str | None = None
    request: Any = None
    queued: Any = None
    cancel: threading.Event = field(default_factory=threading.Event)
    future: Future[T] = field(default_factory=Future)
    accepts: bool = field(init=False)
    # Whether the thread has finished its work, also that of the jobs which it took.
    is_over: bool = False

    def __post_init__(self) -> None:
        self.accepts = self.group is not None

    @property
    def has_company(self) -> bool:
        """Whether another job can be done together with this one now."""
        return self.accepts and self.worker.has_next(self.group)

    def set_accepts(self, accepts: bool) -> None:
        """Set whether it takes more jobs of its group; those that wait emit it if not."""
        if accepts != self.accepts:
            self.worker.set_accepts(self, accepts)

    def emit_queued(self) -> None:
        """Emit, once, that it waits for others that it cannot join."""
        item, self.queued = self.queued, None
        if item is not None:
            self.emit(item)

    def run(self) -> None:
        """Do the work."""
        try:
            if self.cancel.is_set():
                raise Cancelled
            result = self.work(self)
        except BaseException as caught:  # noqa: BLE001 - the thread's boundary: translated, carried on
            self.is_over = True
            self.fail(caught)
        else:
            self.is_over = True
            self.finish(result)

    def finish(self, result: T) -> None:
        """End with a result; has no effect on a job that has ended."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, caught: BaseException) -> None:
        """End with a failure, which becomes a fresh error without frames.

        The frames of the original hold tensors, and a notebook stores its last error.
        """
        if self.future.done():
            return
        if isinstance(caught, Cancelled):
            self.future.set_exception(Cancelled())
            return
        for found in chained(caught):
            traceback.clear_frames(found.__traceback__)
        self.future.set_exception(release_frames(self._translated(caught)))

    def _translated(self, caught: BaseException) -> LLMMagicError:
        try:
            return self.translate(caught)
        except BaseException:  # noqa: BLE001 - else the thread ends, and its callers wait for ever
            message = f"{type(caught).__name__}: {caught}"
            return LLMMagicError(message, details=traceback.format_exc())


def _joined(items: list[Any]) -> Iterator[Any]:
    """Yield the items, with neighboring pieces of text as one: each passes through several generators.

    Those with a number of tokens stay.
    """
    pieces: list[Chunk] = []
    for item in items:
        if isinstance(item, Chunk) and item == _piece([item]):
            pieces.append(item)
            continue
        if pieces:
            yield _piece(pieces)
            pieces = []
        yield item
    if pieces:
        yield _piece(pieces)


def _piece(chunks: list[Chunk]) -> Chunk:
    """Return a chunk with the text and the reasoning of several."""
    return Chunk(
        text="".join([chunk.text for chunk in chunks]),
        reasoning="".join([chunk.reasoning for chunk in chunks]),
        time=chunks[-1].time,
    )


async def _stop(future: Future[T], wrapped: asyncio.Future[T], cancel: threading.Event) -> None:
    """Stop a job and wait until it has seen its flag; one that has not begun never runs."""
    cancel.set()
    if not wrapped.done() and not future.cancel():
        await asyncio.wait({wrapped})
    if wrapped.done() and not wrapped.cancelled():
        # Nothing else retrieves this outcome, and asyncio logs one that was never retrieved.
        wrapped.exception()
