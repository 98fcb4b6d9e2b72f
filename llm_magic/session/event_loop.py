"""One event loop on one daemon thread, and what other threads run on it and read from it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llm_magic.backends.thread_bridge import CHECK_S, LoopCalls, ThreadBridge, loop_calls
from llm_magic.errors import Interrupted, release_frames
from llm_magic.session import interruptible_wait

T = TypeVar("T")

# After the first interrupt the work gets this long to end in an orderly way; then the cell ends
# and the work finishes its stop in the background.
GRACE_S = 0.6
# How long tasks that are cancelled get to end before the loop stops.
_STOP_S = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """A thread that waits for what a bridge receives, since a time of `time.monotonic`."""

    bridge: ThreadBridge[Any]
    thread: int = field(default_factory=threading.get_ident)
    since: float = field(default_factory=time.monotonic)


class LoopThread:
    """Owns the loop that all backends live on; started on first use, closed explicitly."""

    def __init__(self, name: str = "llm_magic-loop") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._readers: list[_Reader] = []
        # What other threads wait for is stopped, also what they start after the interrupt.
        self._stops_threads = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, started now if it was not."""
        with self._lock:
            return self._running_loop()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            # Built by hand: a new loop of our own is not touched by nest-asyncio's patches.
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=_run_loop, args=(self._loop,), name=self._name, daemon=True
            )
            self._thread.start()
        return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop and return at once."""
        # With the lock, `close` ends what starts here.
        with self._lock:
            return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())

    def call(self, callback: Callable[[], object]) -> LoopCalls:
        """Have the loop call `callback`, in turn, and return the calls of the loop."""
        with self._lock:
            calls = loop_calls(self._running_loop())
            calls.call(callback)
            return calls

    def run(
        self, coroutine: Coroutine[Any, Any, T], on_wait: Callable[[], None] | None = None
    ) -> T:
        """Run a coroutine and wait; an interrupt cancels it and raises `KeyboardInterrupt`.

        Raises `Interrupted` if the loop is closed meanwhile, which cancels it, too.
        `on_wait` is called on this thread about ten times a second while waiting.
        """
        result: list[T] = []
        stream, bridge = LoopStream(self, _once(coroutine)), ThreadBridge[T]()
        try:
            stream.attach(bridge)
            for batch in stream.read(bridge):
                result += batch
                if on_wait is not None and not batch:
                    on_wait()
        finally:
            stream.stop()
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()
        return _only(result, bridge)

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine that runs on the loop thread, from a coroutine of another loop."""
        result: list[T] = []
        stream, bridge = LoopStream(self, _once(coroutine)), ThreadBridge[T]()
        stream.attach(bridge)
        async with contextlib.aclosing(stream.read_async(bridge)) as batches:
            async for batch in batches:
                result += batch
        return _only(result, bridge)

    @contextlib.contextmanager
    def interrupting(self, bridge: ThreadBridge[Any]) -> Iterator[None]:
        """Let `interrupt` reach the reader of a bridge in the block."""
        reader = _Reader(bridge)
        self._readers.append(reader)
        if self._stops_threads and threading.current_thread() is not threading.main_thread():
            bridge.interrupt()
        try:
            yield
        finally:
            self._readers.remove(reader)

    def interrupt(self) -> None:
        """Do what SIGINT does to all that is waited for, from any thread."""
        for reader in tuple(self._readers):
            reader.bridge.interrupt()

    def interrupt_threads(self, since: float) -> int:
        """Do what SIGINT does to what other threads wait for since a time; returns how much that is.

        It does the same to what they start until `resume_threads`. Signal handlers may call it.
        """
        here = threading.get_ident()
        found = [one for one in tuple(self._readers) if one.thread != here and one.since >= since]
        self._stops_threads = bool(found)
        for reader in found:
            reader.bridge.interrupt()
        return len(found)

    def resume_threads(self) -> None:
        """End the effect of `interrupt_threads`."""
        self._stops_threads = False

    def cancel_all(self) -> None:
        """Cancel everything that runs on the loop, and wait a little until it has ended."""
        if self._loop is not None:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                self.submit(_cancel_all()).result(timeout=_STOP_S)

    def close(self) -> None:
        """Stop the loop and wait for the thread; the next use starts a new one."""
        self.cancel_all()
        with self._lock:
            thread = self._thread
            if self._loop is not None:
                # Once more: calls may have come meanwhile. None comes after this one.
                asyncio.run_coroutine_threadsafe(_stop_loop(), self._loop)
            self._loop = self._thread = None
        if thread is not None:
            thread.join(timeout=5)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, and close it."""
    calls = loop_calls(loop)
    loop.run_forever()
    loop.close()
    # What a closed loop does not call any more: readers that came at its end.
    calls.call_left()


def _only(result: list[T], bridge: ThreadBridge[T]) -> T:
    """Return the result of a coroutine that has ended, or raise its error."""
    if isinstance(bridge.error, asyncio.CancelledError):
        # Nothing else cancels a coroutine whose caller still waits.
        raise Interrupted("llm.close() stopped this call before it was complete.")
    if bridge.error is not None:
        raise bridge.error
    return result[0]


async def _once(coroutine: Coroutine[Any, Any, T]) -> AsyncGenerator[T, None]:
    yield await coroutine


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _stop_loop() -> None:
    """Cancel what still runs, wait a little until it has ended, and stop the loop."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_S):
            while asyncio.all_tasks() - {asyncio.current_task()}:
                await _cancel_all()
    # Two turns: the callbacks of ended tasks, and the calls that those leave for the next turn.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asyncio.get_running_loop().stop()


class LoopStream(Generic[T]):
    """An async generator that runs on the loop thread, for readers on other threads and loops.

    Each reader has a bridge. The generator pauses while a reader is far behind.
    """

    def __init__(
        self,
        thread: LoopThread,
        source: AsyncGenerator[T, None],
        received: Callable[[T], object] | None = None,
        finished: Callable[[BaseException | None], object] | None = None,
    ) -> None:
        """`received` and `finished` are called on the loop thread, before the readers get it."""
        self._thread, self._source = thread, source
        self._received, self._finished = received, finished
        self._bridges: tuple[ThreadBridge[T], ...] = ()
        self._loop: LoopCalls | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._deadline = math.inf
        self.is_started = False
        self.done = threading.Event()

    # -- on the loop --------------------------------------------------------------------------

    def _start_task(self) -> None:
        self._loop = loop_calls(asyncio.get_running_loop())
        self._task = asyncio.ensure_future(self._run())
        # A callback, not a `finally`: a task cancelled before its first step never enters its body.
        self._task.add_done_callback(self._end_task)
        if self._deadline < math.inf:
            # An interrupt ended `start` before it returned.
            self._task.cancel()

    async def _run(self) -> None:
        async with contextlib.aclosing(self._source) as source:
            async for item in source:
                if self._received is not None:
                    self._received(item)
                for bridge in self._bridges:
                    bridge.put(item)
                    if bridge.is_full:
                        await bridge.wait_for_space()

    def _end_task(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            # The coroutines behind it refer to models, and a notebook stores its last error.
            release_frames(error)
        # Afterwards: the task, which is referenced until then, has its own reference to the traceback.
        self._task = None
        asyncio.get_running_loop().call_soon(self._close, error)

    def _close(self, error: BaseException | None) -> None:
        self._error = error
        if self._finished is not None:
            self._finished(error)
        self.done.set()
        for bridge in self._bridges:
            bridge.close(error)

    # -- on any thread ------------------------------------------------------------------------

    @property
    def is_ending(self) -> bool:
        """Whether it was cancelled, or has ended."""
        return self._deadline < math.inf or self.done.is_set()

    def start(self) -> None:
        """Start the generator, unless that was done; nothing of it has run before."""
        if not self.is_started:
            self.is_started = True
            self._loop = self._thread.call(self._start_task)

    def call(self, callback: Callable[[], object]) -> None:
        """Have the loop that it was started on call `callback`; nothing happens if that is closed."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call(callback)

    def attach(self, bridge: ThreadBridge[T], first: Callable[[], object] | None = None) -> None:
        """Give a bridge the items that follow; `first` is called before, on the loop thread."""

        def add() -> None:
            if first is not None:
                first()
            if self.done.is_set():
                bridge.close(self._error)
            else:
                self._bridges = (*(one for one in self._bridges if not one.has_left), bridge)

        try:
            if self._loop is not None:
                self._loop.call(add)
                return
        except RuntimeError:
            # The loop is closed, and with it all that ran on it.
            self.done.set()
        add()

    def cancel(self) -> None:
        """Cancel, only once: a second time would break off the clean-up that the first began."""
        if self._deadline < math.inf or not self.is_started:
            return
        self._deadline = time.monotonic() + GRACE_S
        self.call(lambda: self._task and self._task.cancel())

    def stop(self) -> None:
        """Cancel if it still runs, and wait for its clean-up for the rest of the grace time."""
        if self.is_started and not self.done.is_set():
            self.cancel()
            self.done.wait(max(0.0, self._deadline - time.monotonic()))

    async def _stop_async(self) -> None:
        if not self.done.is_set():
            self.cancel()
        try:
            while not self.done.is_set() and time.monotonic() < self._deadline:
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self._deadline = 0.0
            raise

    # -- readers ------------------------------------------------------------------------------

    def read(
        self,
        bridge: ThreadBridge[T],
        pause: Callable[[], float] | None = None,
        *,
        stops: bool = True,
        deadline: float = math.inf,
    ) -> Iterator[list[T]]:
        """Start, and yield what a bridge has, at least every `CHECK_S` s, until the end or `deadline`.

        The next items are waited for no sooner than after `pause()` seconds. At an interrupt the
        generator is cancelled, unless `stops` is false; what it still yields within the grace time,
        or until a second interrupt, comes before the `KeyboardInterrupt`. Leaving early does not
        cancel it.
        """
        # The panel's ■ stops what cells wait for, not the threads that show background responses.
        is_heard = stops or threading.current_thread() is threading.main_thread()
        with self._thread.interrupting(bridge) if is_heard else contextlib.nullcontext():
            try:
                self.start()
                while True:
                    paused = pause() if pause is not None and not bridge.is_finished else 0.0
                    if interruptible_wait.wait(bridge, CHECK_S, paused):
                        if stops:
                            yield from self._last(bridge)
                        raise KeyboardInterrupt
                    # After the last items there is one more wait, for an interrupt that came with them.
                    if bridge.is_finished or time.monotonic() > deadline:
                        return
                    yield bridge.take()
            finally:
                bridge.leave()

    def _last(self, bridge: ThreadBridge[T]) -> Iterator[list[T]]:
        self.cancel()
        yield bridge.take()
        while not bridge.is_finished and (left := self._deadline - time.monotonic()) > 0:
            if interruptible_wait.wait(bridge, min(left, CHECK_S)):
                self._deadline = 0.0
            yield bridge.take()

    async def read_async(
        self,
        bridge: ThreadBridge[T],
        stopping: Callable[[], None] = lambda: None,
        *,
        stops: bool = True,
        timeout: float | None = None,
    ) -> AsyncGenerator[list[T], None]:
        """Start, and yield what a bridge has until the end, on the caller's loop.

        It also yields when nothing has come for `timeout` seconds. Leaving early stops the generator,
        unless `stops` is false. Where SIGINT cancels the caller, this raises `Interrupted`, which is
        also a `CancelledError`; `stopping` is called first where SIGINT ended the cell, but not this
        wait.
        """
        here = loop_calls(asyncio.get_running_loop())
        with interruptible_wait.translated(stopping), self._thread.interrupting(bridge):
            try:
                self.start()
                while True:
                    yield bridge.take()
                    if bridge.is_finished:
                        return
                    if bridge.take_interrupt():
                        raise Interrupted("Stopped.")
                    with here.woken_regularly():
                        await bridge.wait_async(timeout=timeout)
            finally:
                bridge.leave()
                if stops:
                    await self._stop_async()
