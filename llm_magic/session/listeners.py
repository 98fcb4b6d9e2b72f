"""Callbacks after a change, for panels, which then read the state of the session."""

from __future__ import annotations

from collections.abc import Callable


class Listeners:
    """Callbacks without arguments, called often, on the thread that changed something.

    A callback must return at once and raise nothing: it only marks its display as out of date.
    """

    def __init__(self) -> None:
        self._callbacks: tuple[Callable[[], None], ...] = ()

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after every change from now on; returns a function that ends that."""
        # A new tuple each time, so that `notify` needs no lock.
        self._callbacks = (*self._callbacks, callback)

        def remove() -> None:
            self._callbacks = tuple(one for one in self._callbacks if one is not callback)

        return remove

    def notify(self) -> None:
        """Call every callback."""
        for callback in self._callbacks:
            callback()
