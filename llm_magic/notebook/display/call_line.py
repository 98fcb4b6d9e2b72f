"""The line that a cell shows while its Python code waits for an answer or a map."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

from llm_magic.notebook.frontend import running_cell
from llm_magic.session.response import Response

if TYPE_CHECKING:
    from llm_magic.notebook.display.live_output import LiveArea
    from llm_magic.notebook.magics.base import SessionMagics
    from llm_magic.session.jobs import Job
    from llm_magic.session.map.run import MapRun

# Faster updates cannot be read.
_PERIOD_S = 0.25
# Shorter calls show nothing.
_SHORT_ANSWER_S, _SHORT_MAP_S = 3.0, 1.0


class CallLines:
    """Makes the line of a call. A cell has one line at a time, in one output for all its calls."""

    def __init__(self, magics: SessionMagics) -> None:
        self._magics = magics
        # The runs of cells whose line is in use.
        self.in_use: set[str] = set()
        # The output of the cell that used it last.
        self._last: tuple[str, LiveArea] | None = None

    def __call__(self, running: Job) -> CallLine | None:
        """Return the line of a call, or None where nothing is shown.

        Other threads would display in whichever cell runs, and calls at the same time share one line.
        """
        run, is_main = self.run, threading.current_thread() is threading.main_thread()
        if not run or run in self.in_use or not self._magics.live or not is_main:
            return None
        return CallLine(self, running, run)

    @property
    def run(self) -> str:
        """The run of the cell whose code runs, or an empty string."""
        cell = running_cell(self._magics.shell)
        return cell.run if cell is not None else ""

    def area(self, run: str) -> LiveArea:
        """Return the output of the running cell."""
        if self._last is None or self._last[0] != run:
            self._last = run, self._magics.live_area()
        return self._last[1]

    def keep_output(self) -> None:
        """Leave the output as it is: the next call has another one."""
        self._last = None


class CallLine:
    """Shows how far an answer or a map is, once the call is not short any more."""

    def __init__(self, lines: CallLines, running: Job, run: str) -> None:
        self._lines, self._running, self._run = lines, running, run
        self._began = time.monotonic()
        is_answer = isinstance(running, Response)
        self._next = self._began + (_SHORT_ANSWER_S if is_answer else _SHORT_MAP_S)
        self._area: LiveArea | None = None

    def pause(self) -> float:
        """Return the time until the next update."""
        return min(max(self._next - time.monotonic(), 0.0), _PERIOD_S)

    def draw(self) -> None:
        """Show the line, at most four times a second, and only while its cell runs."""
        if time.monotonic() < self._next or self._running.done:
            return
        self._next = time.monotonic() + _PERIOD_S
        if self._lines.run == self._run:
            self._area = self._area or self._lines.area(self._run)
            self._area.show(*self._line(), more=True)
            self._next = time.monotonic() + max(_PERIOD_S, self._area.wait)

    def _line(self) -> tuple[str, str]:
        """Return the line as text and as HTML."""
        from llm_magic.notebook.display.live_output import muted
        from llm_magic.notebook.display.messages import activity, shown_name

        running = self._running
        name = shown_name(running.model)
        if not isinstance(running, Response):
            return _map_line(running, name)
        what = running.amount if running.has_text else activity(running)
        text = f"{name} · {what} · {time.monotonic() - self._began:.0f} s"
        return text, muted(text)

    def __enter__(self) -> Self:
        self._lines.in_use.add(self._run)
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the line; the counts of a map with failed rows stay."""
        self._lines.in_use.discard(self._run)
        if self._area is None:
            return
        text, page = self._last_line()
        self._area.show(text, page)
        if text:
            self._lines.keep_output()

    def _last_line(self) -> tuple[str, str]:
        from llm_magic.notebook.display.live_output import muted
        from llm_magic.notebook.display.map_view import footer

        run = self._running
        if isinstance(run, Response) or run.state != "done" or not run.progress.failed:
            return "", ""
        return footer(run), muted(footer(run))


def _map_line(run: MapRun, name: str) -> tuple[str, str]:
    from llm_magic.notebook.display.map_view import progress_bar, progress_line

    progress = run.progress
    text = f"{name} · {progress_line(run, progress)}"
    return text, progress_bar(text, progress)
