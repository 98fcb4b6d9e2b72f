"""Redraw after changes: soon, at a limited rate, and always once after the last change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Each drawing sends a few messages to every open page.
PERIOD_S = 0.2
_COST_FACTOR = 10
# Between two drawings while only the time changes.
_SECOND_S = 1.0
# An upper bound: imports, or another thread, may make the first drawing slow.
LONGEST_S = 2.0


class Refresher:
    """Calls `draw` after `request`, at most every `PERIOD_S`, less often if drawing is slow.

    If `draw` returns true, what it shows changes with time: it is called again after a second.

    It draws on a timer thread, because the event-loop thread receives text and the main thread runs
    cells.
    """

    def __init__(self, draw: Callable[[], bool | None]) -> None:
        self._draw = draw
        self._lock = threading.Lock()
        # Set while a drawing is scheduled or runs; a request in the meantime only sets `_dirty`.
        self._timer: threading.Timer | None = None
        self._next_second: threading.Timer | None = None
        self._dirty = self._stopped = False
        self._next = 0.0

    def request(self) -> None:
        """Schedule a drawing; called for every token, so it must be fast."""
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
            if self._draw():
                self._request_in_a_second()
        finally:
            now = time.monotonic()
            self._next = now + min(max(PERIOD_S, _COST_FACTOR * (now - began)), LONGEST_S)
            self._timer = None
        if self._dirty:
            self.request()

    def _request_in_a_second(self) -> None:
        with self._lock:
            if self._stopped:
                return
            if self._next_second is not None:
                self._next_second.cancel()
            self._next_second = threading.Timer(_SECOND_S, self.request)
            self._next_second.daemon = True
            self._next_second.start()

    def stop(self) -> None:
        """Cancel the scheduled drawing and ignore later requests."""
        with self._lock:
            self._stopped = True
            for timer in (self._timer, self._next_second):
                if timer is not None:
                    timer.cancel()
