"""Which cell asks: its id where the frontend sends one, its text where not."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    """A running cell; `run` is another each time that it runs, `id` is "" where none was sent."""

    id: str
    text: str
    run: str


class Cells:
    """Names the turns of cells: the first question that a run of a cell asks, the second, ….

    `current` returns the running cell; None outside of cells, where every question is a new turn.
    """

    def __init__(self) -> None:
        self.current: Callable[[], Cell | None] = lambda: None
        self._asked: dict[tuple[str, str], tuple[str, int]] = {}

    def key(self, chat: str, text: str = "", *, peek: bool = False) -> str:
        """Return the key of the next question of this cell; `peek` only looks.

        `text` stands for the cell where it has no id, and where there is no cell.
        """
        cell = self.current()
        if cell is None:
            return text or uuid.uuid4().hex
        name = cell.id or text or cell.text
        run, number = self._asked.get((name, chat), ("", 0))
        number = number + 1 if run == cell.run else 1
        if not peek:
            self._asked[name, chat] = (cell.run, number)
        return name if number == 1 else f"{name} {number}"
