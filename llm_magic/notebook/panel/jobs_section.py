"""The jobs in a panel: what runs in the background, with a stop button, and what ended last."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import ipywidgets as widgets

from llm_magic.notebook.display.messages import shortened

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel
    from llm_magic.session.response import Response

# Rows are made once: a widget that comes and goes costs the page more than one that is hidden.
_ROWS = 6
# Of those that ended, so many stay in sight.
_ENDED = 3


class JobsSection:
    """A short list of jobs, hidden while there are none."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        # Each keeps its row while it is shown: a click on its button may come late, and means it.
        self._shown: list[Response | None] = [None] * _ROWS
        self.labels = [widgets.HTML() for _ in range(_ROWS)]
        self.stops = [widgets.Button() for _ in range(_ROWS)]
        self.more = widgets.HTML()
        self.rows = [
            widgets.Box(row) for row in map(list, zip(self.labels, self.stops, strict=True))
        ]
        for index, (row, stop) in enumerate(zip(self.rows, self.stops, strict=True)):
            row.add_class("llm-job")
            stop.on_click(lambda _button, at=index: panel.act(partial(self._stop, at)))
        title = widgets.HTML("<h3>In the background</h3>")
        self.box = widgets.VBox([title, *self.rows, self.more])
        self.draw()

    def _stop(self, index: int) -> str | None:
        job = self._shown[index]
        if job is None:
            return None
        job.cancel()
        return f"%llm_stop {job.number}"

    def draw(self) -> None:
        """Show what runs, and what ended last; not the questions of panels, which show them."""
        jobs = [job for job in self._panel.session.jobs.all if job.view is not None]
        running = [job for job in jobs if not job.done]
        ended = [job for job in jobs if job.done][-_ENDED:]
        chosen = [*running, *reversed(ended)][:_ROWS]
        self._place(chosen)
        for job, row, label, stop in zip(
            self._shown, self.rows, self.labels, self.stops, strict=True
        ):
            row.layout.display = "none" if job is None else ""
            if job is None:
                continue
            row.layout.order = str(chosen.index(job))
            label.value = _row(job)
            stop.layout.display = "none" if job.done else ""
            # Not only "Stop": that is the prompt's, and both are read aloud by their names.
            stop.description = f"Stop {job.number}"
        hidden = len(running) + len(ended) - len(chosen)
        self.more.value = (
            f'<span class="llm-quiet">and {hidden} more: %llm_jobs</span>' if hidden > 0 else ""
        )
        self.box.layout.display = "" if chosen else "none"

    def _place(self, chosen: Sequence[Response]) -> None:
        """Give those that are new the rows of those that went."""
        kept = [job if job in chosen else None for job in self._shown]
        new = [job for job in chosen if job not in kept]
        self._shown = [job or (new.pop(0) if new else None) for job in kept]

    def disable(self) -> None:
        """Let nothing be stopped any more."""
        for stop in self.stops:
            stop.disabled = True


def _row(job: Response) -> str:
    amount = f" · {job.amount}" if job.amount else ""
    state = f'<span class="llm-state llm-{job.state}">{job.state}</span>'
    figures = f"job {job.number} · {job.model}{amount}" + (f" · {job.seconds:.1f} s" * job.done)
    return (
        f'<div class="llm-status"><span>{state}</span> '
        f'<span class="llm-quiet">{html.escape(figures)}</span> '
        f"<span>{html.escape(shortened(job.prompt))}</span></div>"
    )
