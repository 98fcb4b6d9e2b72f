"""Redrawing after changes: soon, not too often, and always once more after the last one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Often enough to look alive; each drawing is a few messages to every open page.
PERIOD_S = 0.2
_COST_FACTOR = 10
# The first drawing imports what it needs, and another thread may hold it up: no reason to fall asleep.
LONGEST_S = 2.0


class Refresher:
    """Calls `draw` after `nudge`, at most every `PERIOD_S`, less often where drawing is slow.

    Drawing happens on a timer's thread: the loop thread is there for the words, the main thread for
    cells.
    """

    def __init__(self, draw: Callable[[], None]) -> None:
        self._draw = draw
        self._lock = threading.Lock()
        # There while one is waited for or drawn: a nudge meanwhile only says that it is not enough.
        self._timer: threading.Timer | None = None
        self._dirty = self._stopped = False
        self._next = 0.0

    def nudge(self) -> None:
        """Draw soon; cheap, because it is called for every token."""
        self._dirty = True
        if self._timer is not None:
            return
        with self._lock:
            if self._timer is None and not self._stopped:
                wait = max(0.0, self._next - time.monotonic())
                self._timer = threading.Timer(wait, self._run)
                self._timer.daemon = True
                self._timer.start()

    def _run(self) -> None:
        self._dirty = False
        began = time.monotonic()
        try:
            self._draw()
        finally:
            now = time.monotonic()
            self._next = now + min(max(PERIOD_S, _COST_FACTOR * (now - began)), LONGEST_S)
            self._timer = None
        if self._dirty:
            self.nudge()

    def stop(self) -> None:
        """Draw no more."""
        with self._lock:
            self._stopped = True
            if self._timer is not None:
                self._timer.cancel()
