"""The jobs in a panel: those that run in the background, each with a stop button, and the latest others."""

from __future__ import annotations

import html
from functools import partial
from typing import TYPE_CHECKING

import ipywidgets as widgets

from llm_magic.notebook.display.messages import shortened
from llm_magic.notebook.panel.controls import MessageLine, QueueNotice

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel
    from llm_magic.session.jobs import Job

# Rows are created once: a widget that is added and removed costs the page more than a hidden one.
_ROWS = 6


class JobsSection:
    """A short list of jobs, hidden while there are none."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        # A job stays in its row while it is shown, so that a late click on its button stops no other.
        self._shown: list[Job | None] = [None] * _ROWS
        self.labels = [widgets.HTML() for _ in range(_ROWS)]
        self.stops = [widgets.Button() for _ in range(_ROWS)]
        self.more = widgets.HTML()
        self.clear = widgets.Button(
            description="Clear finished", tooltip="Hide them here; %llm_jobs lists them"
        )
        # The finished jobs that the user has hidden.
        self._hidden: set[Job] = set()
        self.message = MessageLine()
        self.rows = [
            widgets.Box([label, stop]).add_class("llm-job")
            for label, stop in zip(self.labels, self.stops, strict=True)
        ]
        for index, stop in enumerate(self.stops):
            stop.on_click(
                lambda _button, at=index: panel.act(partial(self._stop, at), self.message.show)
            )
        self.clear.on_click(lambda _button: panel.act(self._clear, self.message.show))
        buttons = widgets.Box([self.clear]).add_class("llm-buttons")
        title = widgets.HTML("<h3>In the background</h3>")
        # Of their own box: the rows have an order, and what has none would come before the second row.
        rows = widgets.VBox(self.rows)
        parts = [title, rows, self.more, buttons, self.message, QueueNotice()]
        self.box = widgets.VBox(parts).add_class("llm-section")
        self.draw()

    def _stop(self, index: int) -> str | None:
        job = self._shown[index]
        if job is None:
            return None
        job.cancel()
        return f"%llm_stop {job.number}"

    def _clear(self) -> None:
        self._hidden = {job for job in self._panel.session.jobs.all if job.done}

    def draw(self) -> None:
        """Show the running jobs and the latest finished ones, without the prompts of panels."""
        listed = (job for job in self._panel.session.jobs.all if job.view is not None)
        jobs = [job for job in listed if job not in self._hidden]
        running = [job for job in jobs if not job.done]
        finished = [job for job in jobs if job.done]
        chosen = [*running, *reversed(finished)][:_ROWS]
        # The new ones get the rows of those that are not shown any more.
        shown = [job if job in chosen else None for job in self._shown]
        new = (job for job in chosen if job not in shown)
        self._shown = [job or next(new, None) for job in shown]
        rows = zip(self._shown, self.rows, self.labels, self.stops, strict=True)
        for job, row, label, stop in rows:
            row.layout.display = "none" if job is None else ""
            if job is None:
                continue
            row.layout.order = str(chosen.index(job))
            label.value = _row(job)
            stop.layout.display = "none" if job.done else ""
            # Screen readers announce buttons by their names: "Stop" is the one of the prompt.
            stop.description = f"Stop {job.number}"
        self.clear.layout.display = "" if finished else "none"
        hidden = len(jobs) - len(chosen)
        self.more.value = (
            f'<span class="llm-quiet">and {hidden} more: %llm_jobs</span>' if hidden > 0 else ""
        )
        self.box.layout.display = "" if chosen else "none"


def _row(job: Job) -> str:
    amount = f" · {job.amount}" if job.amount else ""
    state = f'<span class="llm-state llm-{job.state}">{job.state}</span>'
    figures = f"job {job.number} · {job.model}{amount}" + (f" · {job.seconds:.1f} s" * job.done)
    return (
        f'<div class="llm-status"><span>{state}</span> '
        f'<span class="llm-quiet">{html.escape(figures)}</span> '
        f"<span>{html.escape(shortened(job.prompt))}</span></div>"
    )
