"""Items from one thread to another: in order, bounded, with one wake-up for many of them.

A wake-up is a system call at which the calling thread gives up the GIL: two threads that wake each
other for every token do little else. A reader is therefore woken only while it waits, and only once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llm_magic.types import Chunk

T = TypeVar("T")

# Waits are sliced: on Windows a blocked lock cannot be interrupted before Python 3.14, and an
# awaiting cell only notices that it was cancelled when its loop wakes (ipykernel issue 881).
CHECK_S = 0.1
# The writer pauses while more than this is unread: a server that sends faster than its answer is
# displayed is read no faster than that, and an interrupt leaves a backlog that is quickly taken. The
# reader may hold as much again, in the batch that it has taken.
_MAX_UNREAD_ITEMS = 2_048
_MAX_UNREAD_CHARACTERS = 500_000


class ThreadBridge(Generic[T]):
    """A queue from one writing thread to one reading thread or event loop, with an end.

    `keep` limits how many unread items are stored; the newest stay. A reader that only has to learn
    that there is something new keeps 1, a reader that waits for the end keeps 0.
    """

    def __init__(self, keep: int | None = None) -> None:
        self._items: deque[T] = deque(maxlen=keep)
        # A pair of values of the writer, which resets them when the reader has taken everything.
        self._unread = self._characters = 0
        self._resume: Callable[[], None] | None = None
        # What wakes a reader that blocks: True for an interrupt. Beside the items, so that an interrupt
        # reaches a reader that items must not wake.
        self._inbox: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._wake: Callable[[], None] | None = None
        # Whether items do not wake the reader.
        self._is_pausing = False
        self._is_closed = False
        # Whether the reader has left.
        self.has_left = False
        self.error: BaseException | None = None

    # -- the writer ---------------------------------------------------------------------------

    def put(self, item: T) -> None:
        """Add an item, and wake the reader if it waits."""
        if not self._items:
            self._unread = self._characters = 0
        self._items.append(item)
        self._unread += 1
        if isinstance(item, Chunk):
            self._characters += len(item.text) + len(item.reasoning)
        if self._items and not self._is_pausing:
            self._wake_reader()

    def close(self, error: BaseException | None = None) -> None:
        """End the queue; `error` is what ended the work."""
        self.error = error
        self._is_closed = True
        # Wakes also a reader that pauses.
        self._inbox.put(False)
        self._wake_reader()

    @property
    def is_full(self) -> bool:
        """Whether the writer has to wait for the reader."""
        many = self._unread > _MAX_UNREAD_ITEMS or self._characters > _MAX_UNREAD_CHARACTERS
        return many and not self.has_left

    async def wait_for_space(self) -> None:
        """Return when the reader has caught up; for a writer on an event loop."""
        loop, resumed = loop_calls(asyncio.get_running_loop()), asyncio.Event()
        self._resume = functools.partial(loop.set, resumed)
        # In this order: the reader checks the callback after it has taken the last item.
        while self._items and not self.has_left:
            await resumed.wait()
            resumed.clear()
        self._resume = None

    def _wake_reader(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    # -- the reader ---------------------------------------------------------------------------

    def take(self) -> list[T]:
        """Return the items that are there now."""
        items = [self._items.popleft() for _ in range(len(self._items))]
        resume = self._resume
        if resume is not None and not self._items:
            resume()
        return items

    @property
    def is_finished(self) -> bool:
        """Whether the writer has finished and every item was taken; see `error`."""
        return self._is_closed and not self._items

    def leave(self) -> None:
        """Read no more: the writer waits for nothing."""
        self.has_left = True
        resume = self._resume
        if resume is not None:
            resume()

    def wait(self, timeout: float, pause: float = 0.0) -> bool:
        """Block until there are items or the end; return at once, and True, at an interrupt.

        In the first `pause` seconds items do not end the wait.
        """
        if pause > 0 and self._receive(min(pause, CHECK_S)):
            return True
        self._wake = functools.partial(self._inbox.put, False)
        # In this order: what is put from here on wakes.
        interrupted = self._receive(0.0 if self._items or self._is_closed else timeout)
        self._wake = None
        return interrupted

    def _receive(self, timeout: float) -> bool:
        """Return whether an interrupt comes within `timeout`; anything else ends the wait, too."""
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(timeout=timeout)
        return False

    async def wait_async(self, pause: float = 0.0, timeout: float | None = None) -> None:
        """Wait, on the reader's loop, until there may be items, the end or an interrupt.

        In the first `pause` seconds items do not end the wait; the `timeout` ends it in any case.
        """
        here, woken = asyncio.get_running_loop(), asyncio.Event()
        self._is_pausing = pause > 0
        self._wake = functools.partial(loop_calls(here).set, woken)
        timers = [here.call_later(pause, self._end_pause, woken)] if self._is_pausing else []
        if timeout is not None:
            timers.append(here.call_later(timeout, woken.set))
        try:
            has_items = bool(self._items) and not self._is_pausing
            if not (has_items or self._is_closed) and self._inbox.empty():
                # Not `wait_for`: Python 3.11's loses a cancellation that comes together with an item.
                await woken.wait()
        finally:
            self._is_pausing = False
            for timer in timers:
                timer.cancel()

    def _end_pause(self, woken: asyncio.Event) -> None:
        # In this order: what is put from here on wakes.
        self._is_pausing = False
        if self._items:
            woken.set()

    # -- any thread, and signal handlers ------------------------------------------------------

    def interrupt(self) -> None:
        """End the wait of the reader as SIGINT does."""
        # `SimpleQueue.put` is reentrant.
        self._inbox.put(True)
        self._wake_reader()

    def take_interrupt(self) -> bool:
        """Return whether an interrupt came that no wait has returned; only for the reader."""
        while not self._inbox.empty():
            if self._receive(0.0):
                return True
        return False


class LoopCalls:
    """Calls from other threads to an event loop: the loop is woken once for all that wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weak: the loop is the key of this object in `_loop_calls`.
        self._loop = weakref.ref(loop)
        self._calls: deque[Callable[[], object]] = deque()
        self._is_woken = False
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    def call(self, callback: Callable[[], object]) -> None:
        """Have the loop call `callback`, in turn; raises `RuntimeError` if it is closed.

        From any thread. The callback must return at once and raise nothing.
        """
        self._calls.append(callback)
        if self._is_woken:
            return
        loop = self._loop()
        try:
            self._is_woken = True
            if loop is None:
                raise RuntimeError("the loop is gone")
            loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            self._is_woken = False
            self._calls.clear()
            raise
        except BaseException:
            # KeyboardInterrupt between two lines: no later call would wake the loop.
            self._is_woken = False
            raise

    def set(self, event: asyncio.Event) -> None:
        """Set an event; nothing waits for it if the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self.call(event.set)

    def _run(self) -> None:
        # First this: a call that comes from here on has to wake the loop again.
        self._is_woken = False
        self.call_left()

    def call_left(self) -> None:
        """Call what waits now."""
        while self._calls:
            self._calls.popleft()()

    @contextlib.contextmanager
    def woken_regularly(self) -> Iterator[None]:
        """Wake the loop every `CHECK_S` seconds in the block, so that it notices a cancellation."""
        self._waiting += 1
        if self._timer is None:
            self._wake_again()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wake_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(CHECK_S, self._wake_again)


_lock = threading.Lock()
_loop_calls: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopCalls] = (
    weakref.WeakKeyDictionary()
)


def loop_calls(loop: asyncio.AbstractEventLoop) -> LoopCalls:
    """Return the `LoopCalls` of a loop; there is one for each."""
    with _lock:
        found = _loop_calls.get(loop)
        if found is None:
            found = _loop_calls[loop] = LoopCalls(loop)
        return found
