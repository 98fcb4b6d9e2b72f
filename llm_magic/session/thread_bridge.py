"""The pump between the loop thread and a thread that waits: items one way, interrupts the other."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from llm_magic.errors import release_frames
from llm_magic.session.handover import Handover, handover
from llm_magic.session.interrupts import Inbox, Interrupt
from llm_magic.types import Chunk

# Waits are sliced: on Windows a blocked lock cannot be interrupted before Python 3.14, and an
# awaiting cell only notices that it was cancelled when its loop wakes (ipykernel issue 881).
TICK_S = 0.1
# After the first interrupt the work gets this long to end in an orderly way; then the cell ends
# and the work finishes its stop in the background.
GRACE_S = 0.6
# The work pauses while more than this is unread: a server that sends faster than its answer is
# displayed is read no faster than that, and an interrupt finds a backlog that is quickly taken.
_MAX_UNREAD_ITEMS = 4_096
_MAX_UNREAD_CHARACTERS = 1_000_000


class Backlog:
    """Counts what was put and not yet read; only for the thread that puts it."""

    def __init__(self) -> None:
        self._characters = 0

    def is_full(self, unread: int, item: object) -> bool:
        """Return whether to pause after `item`, the latest of `unread` items."""
        if unread <= 1:
            # All items before this one were read.
            self._characters = 0
        if isinstance(item, Chunk):
            self._characters += len(item.text) + len(item.reasoning)
        return unread > _MAX_UNREAD_ITEMS or self._characters > _MAX_UNREAD_CHARACTERS


class _Call:
    """Put into an inbox where its reader waits for items: there are some, or there is the end."""


class _End:
    """Comes behind the last item; `error` is what ended it, if anything did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Wake:
    """Wakes a waiting loop, once: every further time would cost both threads a turn at the GIL."""

    __slots__ = ("_called", "_event", "_loop")

    def __init__(self, loop: Handover, event: asyncio.Event) -> None:
        self._loop, self._event, self._called = loop, event, False

    def __call__(self) -> None:
        if not self._called:
            self._called = True
            # The waiting loop may have closed meanwhile; then nobody is left to be woken.
            with contextlib.suppress(RuntimeError):
                self._loop.call(self._event.set)


class Pump:
    """Moves the items of an async generator to another thread, which reads them when it likes.

    The items lie in a deque; the inbox is only for what wakes the reader. So it can be left in
    peace for a while although there are items, and an interrupt reaches it nevertheless. The
    generator is paused while too many items are unread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, source: AsyncGenerator[Any, None], inbox: Inbox
    ) -> None:
        self._loop, self._inbox = handover(loop, TICK_S), inbox
        self._items: deque[Any] = deque()
        self._end: _End | None = None
        self._backlog = Backlog()
        self._is_paused, self._resumed = False, asyncio.Event()
        self._called_for = False
        self._wake: Wake | None = None
        self._done = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self._deadline = math.inf
        self._loop.call(lambda: self._start(source))

    # -- on the loop --------------------------------------------------------------------------

    def _start(self, source: AsyncGenerator[Any, None]) -> None:
        self._task = asyncio.ensure_future(self._move(source))
        # A callback, not a `finally`: a task cancelled before its first step never enters its body.
        self._task.add_done_callback(self._finish)

    async def _move(self, source: AsyncGenerator[Any, None]) -> None:
        async with contextlib.aclosing(source):
            async for item in source:
                self._put(item)
                if self._backlog.is_full(len(self._items), item):
                    await self._until_read()

    async def _until_read(self) -> None:
        """Wait until the reader has taken the items that lie in the deque."""
        self._resumed.clear()
        self._is_paused = True
        # In this order: the reader looks at the flag after it has taken the last item.
        while self._items:
            await self._resumed.wait()
            self._resumed.clear()
        self._is_paused = False

    def _finish(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            # The coroutines behind it refer to models; whoever gets the error may keep it.
            release_frames(error)
        # The task has a reference of its own to the traceback.
        self._task = None
        self._done.set()
        self._put(_End(error))
        # Also to a reader that is left in peace.
        self._inbox.put(_Call())

    def _put(self, item: object) -> None:
        self._items.append(item)
        if self._called_for:
            self._called_for = False
            self._inbox.put(_Call())
        if self._wake is not None:
            self._wake()

    # -- on the thread that reads -------------------------------------------------------------

    def items(
        self, tick: Callable[[], None] | None = None, rest: Callable[[], float] | None = None
    ) -> Iterator[Any]:
        """Yield until the end; raise what ended it, or `KeyboardInterrupt` after a clean stop.

        `tick` is called after the items that were there, and about every `TICK_S` where none are.
        Then this thread is left in peace for `rest()` seconds.
        """
        while True:
            interrupted = self._wait(TICK_S, rest() if rest is not None else 0.0)
            yield from self._last_items() if interrupted else self.ready()
            if interrupted:
                raise KeyboardInterrupt
            if self.ended():
                return
            if tick is not None:
                tick()

    def interrupt(self) -> None:
        """Do what SIGINT does, from any thread."""
        self._inbox.put(Interrupt())
        if self._wake is not None:
            self._wake()

    def is_interrupted(self) -> bool:
        """Return whether an interrupt came that nobody has looked at; only for whoever reads."""
        while not self._inbox.empty():
            if self._is_interrupted(0.0):
                return True
        return False

    def ready(self) -> Iterator[Any]:
        """Yield the items that are there now, and not those that come meanwhile."""
        for _ in range(len(self._items)):
            item = self._items.popleft()
            if isinstance(item, _End):
                self._end = item
            else:
                yield item
        if self._is_paused and not self._items:
            # The loop may have been closed meanwhile; then nothing waits on it.
            with contextlib.suppress(RuntimeError):
                self._loop.call(self._resumed.set)

    def ended(self) -> bool:
        """Whether the last item was yielded; raises what ended them, if anything did."""
        if self._end is not None and self._end.error is not None:
            raise self._end.error
        return self._end is not None

    def _last_items(self) -> Iterator[Any]:
        """Cancel, then yield what still comes within the grace time or until a second interrupt."""
        self._cancel()
        yield from self.ready()
        while self._end is None and (left := self._deadline - time.monotonic()) > 0:
            if self._wait(min(left, TICK_S)):
                self._deadline = 0.0
            yield from self.ready()

    def _wait(self, timeout: float, rest: float = 0.0) -> bool:
        """Wait for items, after a rest from them; returns at once, and True, at an interrupt."""
        if rest > 0 and self._is_interrupted(min(rest, TICK_S)):
            return True
        self._called_for = True
        # In this order: what is put from here on calls.
        interrupted = self._is_interrupted(0.0 if self._items else timeout)
        self._called_for = False
        return interrupted

    def _is_interrupted(self, timeout: float) -> bool:
        with contextlib.suppress(queue.Empty):
            return isinstance(self._inbox.get(timeout=timeout), Interrupt)
        return False

    def _cancel(self) -> None:
        """Cancel, only once: a second time would break off the clean-up that the first began."""
        if self._deadline < math.inf:
            return
        self._deadline = time.monotonic() + GRACE_S
        # The loop may have been closed under us (unload, exit): then nothing runs any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call(lambda: self._task and self._task.cancel())

    def stop(self) -> None:
        """Cancel if it still runs, and give it what is left of the grace time to clean up."""
        if not self._done.is_set():
            self._cancel()
            self._done.wait(max(0.0, self._deadline - time.monotonic()))

    # -- on another loop ----------------------------------------------------------------------

    async def wait_elsewhere(self) -> None:
        """Wait on the caller's own loop until something may be there."""
        here, event = handover(asyncio.get_running_loop(), TICK_S), asyncio.Event()
        self._wake = Wake(here, event)
        if not self._items and self._inbox.empty():
            # Not `wait_for`: Python 3.11's loses a cancellation that comes together with an item.
            with here.awake():
                await event.wait()

    async def stop_elsewhere(self) -> None:
        """Like `stop`, without blocking the caller's loop."""
        self._wake = None
        if not self._done.is_set():
            self._cancel()
        while not self._done.is_set() and time.monotonic() < self._deadline:
            await asyncio.sleep(0.02)
