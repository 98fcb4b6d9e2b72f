"""Waiting with a limit, many times in a row."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Wait:
    """The waits of one answer. They share a timer: `asyncio.timeout` makes one for every piece.

    A timer that rings early, because the wait that it was for is over, is set again.
    """

    __slots__ = ("_cancelling", "_deadline", "_loop", "_rang", "_task", "_timer")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._deadline, self._cancelling, self._rang = 0.0, 0, False

    def at_most(self, seconds: float) -> Wait:
        """Return a context whose waits end with `TimeoutError` after so many seconds."""
        self._deadline = self._loop.time() + seconds
        return self

    def __enter__(self) -> None:
        if self._timer is None or self._timer.when() > self._deadline:
            self._set()
        self._task = asyncio.current_task(self._loop)
        assert self._task is not None
        self._cancelling, self._rang = self._task.cancelling(), False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        # As `asyncio.timeout` does it: somebody else may have cancelled meanwhile, and is obeyed.
        if not self._rang or task is None:
            return
        if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from None

    def over(self) -> None:
        """End the last wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        self.over()
        self._timer = self._loop.call_at(self._deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._deadline:
            self._set()
        else:
            self._rang = True
            self._task.cancel()
