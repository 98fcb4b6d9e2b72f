"""Persistent threads for local work; one of them owns loading, warm-up, prefill and decoding.

One thread for all of it: each thread that enters an OpenMP region gets worker threads of its own, and
more of them than cores slow every operation down (see `openmp`); CUDA graphs belong to one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llm_magic.backends.thread_bridge import ThreadBridge
from llm_magic.errors import LLMMagicError, chained, release_frames

_log = logging.getLogger(__name__)
T = TypeVar("T")
Translate = Callable[[BaseException], LLMMagicError]


class Cancelled(Exception):
    """Raised inside a job when its cancel flag was seen."""


# The random number generator of torch and the progress hook of Transformers belong to the process,
# and two sessions that compute at once on the same cores take longer than one after the other.
_PROCESS_LOCK = threading.Lock()
_POLL_S = 0.05


@contextlib.contextmanager
def process_lock(cancel: threading.Event) -> Iterator[None]:
    """Wait until no other session of this process computes; raises `Cancelled` if `cancel` is set."""
    while not _PROCESS_LOCK.acquire(timeout=_POLL_S):
        if cancel.is_set():
            raise Cancelled
    try:
        yield
    finally:
        _PROCESS_LOCK.release()


class Worker:
    """Runs jobs one after another on a daemon thread; started on first use."""

    def __init__(self, name: str, after_job: Callable[[], None] = lambda: None) -> None:
        """`after_job` is called on the thread after each job."""
        self._name, self._after_job = name, after_job
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._running: _Job[Any] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job that is submitted now has to wait."""
        running = self._running
        return not self._jobs.empty() or (running is not None and not running.future.done())

    def submit(
        self, work: Callable[[threading.Event], T], translate: Translate
    ) -> tuple[Future[T], threading.Event]:
        """Queue `work(cancel)`; returns its future and the flag that asks it to stop.

        `translate` turns a foreign exception into one of ours.
        """
        job = _Job(work, translate)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.put(job)
        return job.future, job.cancel

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
        work: Callable[[threading.Event, Callable[[T], None]], None],
        translate: Translate,
        queued: T | None = None,
    ) -> AsyncGenerator[T, None]:
        """Yield what the job emits, and raise its failure; closing sets its flag and waits for it.

        `queued` is yielded first if the job has to wait for others.
        """
        bridge: ThreadBridge[T] = ThreadBridge()
        if queued is not None and self.is_busy:
            bridge.put(queued)

        def job(cancel: threading.Event) -> None:
            try:
                work(cancel, bridge.put)
            finally:
                bridge.close()

        future, cancel = self.submit(job, translate)
        wrapped = asyncio.wrap_future(future)
        try:
            while not bridge.is_finished:
                for item in bridge.take():
                    yield item
                await bridge.wait_async()
            await wrapped
        finally:
            await _stop(future, wrapped, cancel)

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._jobs.put(None)
        if thread is not None:
            thread.join(timeout=5)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._running = job
            job.run()
            # Or the last job's tensors would live until the next one comes.
            self._running = None
            del job
            try:
                self._after_job()
            except Exception:  # noqa: BLE001 - logged, and the thread goes on
                # Without the thread, every later job would wait for ever.
                _log.exception("after a job of %s", self._name)


@dataclass(eq=False, slots=True)
class _Job(Generic[T]):
    """One piece of work, the flag that asks it to stop, and its outcome."""

    work: Callable[[threading.Event], T]
    translate: Translate
    cancel: threading.Event = field(default_factory=threading.Event)
    future: Future[T] = field(default_factory=Future)

    def run(self) -> None:
        """Do the work; a failure becomes a fresh error without frames.

        The frames of the original hold tensors, and a notebook stores its last error.
        """
        if not self.future.set_running_or_notify_cancel():
            return
        error: BaseException
        try:
            if self.cancel.is_set():
                raise Cancelled
            result = self.work(self.cancel)
        except Cancelled:
            error = Cancelled()
        except BaseException as caught:  # noqa: BLE001 - the thread's boundary: translated, carried on
            for found in chained(caught):
                traceback.clear_frames(found.__traceback__)
            error = release_frames(self._translated(caught))
        else:
            self.future.set_result(result)
            return
        self.future.set_exception(error)

    def _translated(self, caught: BaseException) -> LLMMagicError:
        try:
            return self.translate(caught)
        except BaseException:  # noqa: BLE001 - else the thread ends, and its callers wait for ever
            message = f"{type(caught).__name__}: {caught}"
            return LLMMagicError(message, details=traceback.format_exc())


async def _stop(future: Future[T], wrapped: asyncio.Future[T], cancel: threading.Event) -> None:
    """Stop a job and wait until it has seen its flag; one that has not begun never runs."""
    cancel.set()
    if not wrapped.done() and not future.cancel():
        await asyncio.wait({wrapped})
    if wrapped.done() and not wrapped.cancelled():
        # Nothing else retrieves this outcome, and asyncio logs one that was never retrieved.
        wrapped.exception()
