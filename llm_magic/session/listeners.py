"""Who wants to know that something changed: panels, which then look for themselves."""

from __future__ import annotations

from collections.abc import Callable


class Watchers:
    """Callbacks without arguments; told from whatever thread changed something, and often.

    They must return at once and raise nothing: they mark themselves as out of date, no more.
    """

    def __init__(self) -> None:
        self._callbacks: tuple[Callable[[], None], ...] = ()

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Tell `callback` of every change from now on; returns what ends that."""
        # A new tuple each time, so that telling needs no lock.
        self._callbacks = (*self._callbacks, callback)

        def remove() -> None:
            self._callbacks = tuple(one for one in self._callbacks if one is not callback)

        return remove

    def tell(self) -> None:
        """Tell them all."""
        for callback in self._callbacks:
            callback()
