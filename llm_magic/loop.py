"""One event loop on one daemon thread, and the doors through which other threads use it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import math
import queue
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Inbox: TypeAlias = "queue.SimpleQueue[Any]"

# Waits are sliced: on Windows a blocked lock cannot be interrupted before Python 3.14, and an
# awaiting cell only notices that it was cancelled when its loop wakes (ipykernel issue 881).
TICK_S = 0.1
# After the first interrupt the work gets this long to end in an orderly way; then the cell ends
# and the work finishes its stop in the background.
GRACE_S = 0.6


class _Interrupt:
    """Put into an inbox by the signal handler."""


class _Nothing:
    """Stands for an inbox that stayed empty: None may be an item."""


class _End:
    """Put into an inbox when a pump is done; `error` is what ended it, if anything did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class LoopThread:
    """Owns the loop that all backends live on; started on first use, closed explicitly."""

    def __init__(self, name: str = "llm_magic-loop") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inboxes: list[Inbox] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, started now if it was not."""
        with self._lock:
            if self._loop is None:
                # Built by hand: a new loop of our own is not touched by nest-asyncio's patches.
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name=self._name, daemon=True
                )
                self._thread.start()
            return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T], tick: Callable[[], None] | None = None) -> T:
        """Run a coroutine and wait; an interrupt cancels it and raises `KeyboardInterrupt`.

        `tick` is called on this thread about every `TICK_S` seconds while waiting.
        """
        result: list[T] = []

        async def once() -> AsyncGenerator[T, None]:
            yield await coroutine

        try:
            self.drain(once(), result.append, tick)
        finally:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()
        return result[0]

    def drain(
        self,
        source: AsyncGenerator[T, None],
        take: Callable[[T], None],
        tick: Callable[[], None] | None = None,
    ) -> None:
        """Iterate `source` on the loop and hand every item to `take` on this thread.

        While it runs, SIGINT arrives as a message in the inbox, never as an exception in the
        middle of a line: nothing that was produced is lost, and no display is torn.
        """
        inbox: Inbox = queue.SimpleQueue()
        with self._listed(inbox), interrupts_to(inbox):
            pump = _Pump(self, source, inbox)
            try:
                for item in pump.items(tick):
                    take(item)
            finally:
                pump.stop()

    @contextlib.contextmanager
    def _listed(self, inbox: Inbox) -> Iterator[None]:
        self._inboxes.append(inbox)
        try:
            yield
        finally:
            self._inboxes.remove(inbox)

    def interrupt(self) -> None:
        """Do to every `drain` what SIGINT does, from any thread."""
        for inbox in tuple(self._inboxes):
            inbox.put(_Interrupt())

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """Iterate `source` on the loop; leaving early cancels it and waits for its clean-up."""
        inbox: Inbox = queue.SimpleQueue()
        with interrupts_to(inbox):
            pump = _Pump(self, source, inbox)
        try:
            items = pump.items(None)
            while True:
                # Only while this thread waits here: between items, SIGINT belongs to the user.
                with interrupts_to(inbox):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
        finally:
            pump.stop()

    async def relay(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Iterate `source` on the loop thread for a coroutine of another loop."""
        pump = _Pump(self, source, queue.SimpleQueue())
        try:
            while True:
                for item in pump.ready():
                    if isinstance(item, _End):
                        if item.error is not None:
                            raise item.error
                        return
                    yield item
                await pump.wait_elsewhere()
        finally:
            await pump.stop_elsewhere()

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine that runs on the loop thread, from a coroutine of another loop."""

        async def once() -> AsyncGenerator[T, None]:
            yield await coroutine

        async with contextlib.aclosing(self.relay(once())) as results:
            return await anext(results)

    def cancel_all(self) -> None:
        """Cancel everything that runs on the loop, and wait a little until it has ended."""
        if self._loop is not None:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                self.submit(_cancel_all()).result(timeout=2)

    def close(self) -> None:
        """Stop the loop and wait for the thread; the next use starts a new one."""
        self.cancel_all()
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Wake:
    """Wakes a waiting loop, once: every further time would cost both threads a turn at the GIL."""

    __slots__ = ("_called", "_event", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        self._loop, self._event, self._called = loop, event, False

    def __call__(self) -> None:
        if not self._called:
            self._called = True
            # The waiting loop may have closed meanwhile; then nobody is left to be woken.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)


class _Pump:
    """Moves the items of an async generator into an inbox that another thread reads."""

    def __init__(self, owner: LoopThread, source: AsyncGenerator[Any, None], inbox: Inbox) -> None:
        self.inbox = inbox
        self._wake: _Wake | None = None
        self._done = threading.Event()
        self._loop = owner.loop
        self._task: asyncio.Task[None] | None = None
        self._deadline = math.inf
        self._loop.call_soon_threadsafe(self._start, source)

    def _start(self, source: AsyncGenerator[Any, None]) -> None:
        self._task = asyncio.ensure_future(self._move(source))
        # A callback, not a `finally`: a task cancelled before its first step never enters its body.
        self._task.add_done_callback(self._finish)

    async def _move(self, source: AsyncGenerator[Any, None]) -> None:
        async with contextlib.aclosing(source):
            async for item in source:
                self._put(item)

    def _finish(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._done.set()
        self._put(_End(error))

    def _put(self, item: object) -> None:
        self.inbox.put(item)
        if self._wake is not None:
            self._wake()

    def items(self, tick: Callable[[], None] | None) -> Iterator[Any]:
        """Yield until the end; raise what ended it, or `KeyboardInterrupt` after a clean stop."""
        while True:
            item = self._get(TICK_S)
            if isinstance(item, _Nothing):
                if tick is not None:
                    tick()
            elif isinstance(item, _Interrupt):
                yield from self._last_items()
                raise KeyboardInterrupt
            elif isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            else:
                yield item

    def _last_items(self) -> Iterator[Any]:
        """Cancel, then yield what still comes within the grace time or until a second interrupt."""
        self._cancel()
        while (left := self._deadline - time.monotonic()) > 0:
            item = self._get(min(left, TICK_S))
            if isinstance(item, _Interrupt):
                self._deadline = 0.0
            elif isinstance(item, _End):
                return
            elif not isinstance(item, _Nothing):
                yield item

    def _get(self, timeout: float) -> Any:
        with contextlib.suppress(queue.Empty):
            return self.inbox.get(timeout=timeout)
        return _Nothing()

    def _cancel(self) -> None:
        """Cancel, only once: a second time would break off the clean-up that the first began."""
        if self._deadline < math.inf:
            return
        self._deadline = time.monotonic() + GRACE_S
        # The loop may have been closed under us (unload, exit): then nothing runs any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def stop(self) -> None:
        """Cancel if it still runs, and give it what is left of the grace time to clean up."""
        if not self._done.is_set():
            self._cancel()
            self._done.wait(max(0.0, self._deadline - time.monotonic()))

    def ready(self) -> Iterator[Any]:
        """Yield what is in the inbox now."""
        while not self.inbox.empty():
            yield self.inbox.get()

    async def wait_elsewhere(self) -> None:
        """Wait on the caller's own loop until something may be in the inbox."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        self._wake = _Wake(loop, event)
        if self.inbox.empty():
            # Not `wait_for`: Python 3.11's loses a cancellation that comes together with an item.
            timer = loop.call_later(TICK_S, event.set)
            try:
                await event.wait()
            finally:
                timer.cancel()

    async def stop_elsewhere(self) -> None:
        """Like `stop`, without blocking the caller's loop."""
        self._wake = None
        if not self._done.is_set():
            self._cancel()
        while not self._done.is_set() and time.monotonic() < self._deadline:
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def interrupts_to(inbox: Inbox) -> Iterator[None]:
    """Deliver SIGINT as a message in `inbox` instead of an exception at a random line.

    `SimpleQueue.put` is re-entrant, so a signal handler may call it. Signals only reach the main
    thread; elsewhere (a subshell, a worker) this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def deliver(_signal: int, _frame: FrameType | None) -> None:
        inbox.put(_Interrupt())

    previous = signal.signal(signal.SIGINT, deliver)
    try:
        yield
    finally:
        # None stands for a handler that was not set from Python; then ours was the better one.
        signal.signal(signal.SIGINT, previous or signal.default_int_handler)
