"""Calls from other threads to an event loop, handed over together."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator


class Handover:
    """Wakes a loop once for all that it is called for until it wakes.

    Each wake is a system call at which this thread gives the GIL away: two threads that wake each
    other for every one of many answers do little else. `every` keeps the loop awake meanwhile.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, every: float) -> None:
        # Weak, because the loop is the key that this is found under.
        self._loop, self._every = weakref.ref(loop), every
        self._calls: deque[Callable[[], object]] = deque()
        self._told = False
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    def call(self, callback: Callable[[], object]) -> None:
        """Have the loop call `callback`, in turn; raises `RuntimeError` where it is closed.

        From any thread. The callback must return at once and raise nothing.
        """
        self._calls.append(callback)
        if self._told:
            return
        self._told = True
        try:
            self._living().call_soon_threadsafe(self._take_over)
        except RuntimeError:
            self._told = False
            self._calls.clear()
            raise

    def _take_over(self) -> None:
        # First this: who comes from here on has to wake the loop again.
        self._told = False
        while self._calls:
            self._calls.popleft()()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Wake the loop now and then for as long as something waits on it."""
        self._waiting += 1
        if self._timer is None:
            self._tick()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _tick(self) -> None:
        self._timer = self._living().call_later(self._every, self._tick)

    def _living(self) -> asyncio.AbstractEventLoop:
        loop = self._loop()
        if loop is None:
            raise RuntimeError("the loop is gone")
        return loop


_lock = threading.Lock()
_handovers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Handover] = (
    weakref.WeakKeyDictionary()
)


def handover(loop: asyncio.AbstractEventLoop, every: float) -> Handover:
    """Return the one of a loop."""
    with _lock:
        found = _handovers.get(loop)
        if found is None:
            found = _handovers[loop] = Handover(loop, every)
        return found
