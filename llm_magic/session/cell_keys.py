"""The key of a turn: the id of its cell where the frontend sends one, the text of the cell otherwise."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import NamedTuple


class Cell(NamedTuple):
    """A running cell; `run` is new each time that it runs, `id` is "" where none was sent."""

    id: str
    text: str
    run: str


class Cells:
    """Returns a key for each turn of a cell: for the first question of a run, the second, ….

    `current` returns the running cell; None outside of cells, where every question is a new turn.
    """

    def __init__(self) -> None:
        self.current: Callable[[], Cell | None] = lambda: None
        self._counts: dict[tuple[str, str], tuple[str, int]] = {}

    def key(self, chat: str, text: str = "", *, peek: bool = False) -> str:
        """Return the key of the next question of this cell; `peek` does not count it.

        `text` identifies the cell where it has no id, and the question where there is no cell.
        """
        cell = self.current()
        if cell is None:
            return text or uuid.uuid4().hex
        name = cell.id or text or cell.text
        run, number = self._counts.get((name, chat), ("", 0))
        number = number + 1 if run == cell.run else 1
        if not peek:
            self._counts[name, chat] = (cell.run, number)
        return name if number == 1 else f"{name} {number}"
