"""``%llm_jobs``, ``%llm_stop`` and ``%llm_wait``: the background jobs of ``%%llm --bg``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from IPython.core.magic import magics_class

from llm_magic.notebook.arguments import parser
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_magic.notebook.display.tables import Table
    from llm_magic.session.response import Response

# A stop takes effect at the next token; a cell does not wait longer for it.
_STOP_S = 1.0


_NOTHING = "No job is running."


@magics_class
class JobMagics(SessionMagics):
    """The magics for the background jobs of this kernel."""

    @line_magic
    def llm_jobs(self, line: str) -> Table:
        """List background jobs."""
        from llm_magic.notebook.display import messages

        parser.parse("llm_jobs", line)
        return messages.jobs_table(self.session.jobs.all)

    @line_magic
    def llm_stop(self, line: str) -> Table:
        """Stop background jobs."""
        from llm_magic.notebook.display.tables import Table

        jobs = self._named_jobs("llm_stop", line) or list(self.session.jobs.running)
        running = [job for job in jobs if not job.done]
        for job in running:
            job.cancel()
        deadline = time.monotonic() + _STOP_S
        for job in running:
            job.wait(max(0.0, deadline - time.monotonic()))
        lines = [_stop_line(job) for job in running]
        lines += [
            f"Job {job.number} had already ended: {job.state}."
            for job in jobs
            if job not in running
        ]
        return Table(("",), [[line] for line in lines], "" if lines else _NOTHING)

    @line_magic
    def llm_wait(self, line: str) -> None:
        """Wait for background jobs."""
        jobs = self._named_jobs("llm_wait", line) or list(self.session.jobs.unreported())
        progress = _Progress(jobs, live=self.live and hasattr(self.shell, "kernel"))
        self.session.wait(jobs, progress.draw)
        for job in jobs:
            job.is_awaited = True
            if job.view is not None:
                job.view.show_again()
        progress.finish()
        for job in jobs:
            if job.error is not None:
                raise job.error

    def _named_jobs(self, name: str, line: str) -> list[Response]:
        """Return the job that the line names, as a list; an empty list if it names none."""
        number = parser.parse(name, line)["job"]
        return [] if number is None else [self.session.jobs.find(number)]


def _stop_line(job: Response) -> str:
    if not job.done:
        return f"Stopping job {job.number} ({job.model})."
    when = f"after {job.amount}" if job.amount else "before its first token"
    return f"Stopped job {job.number} ({job.model}) {when}."


class _Progress:
    """Shows the jobs that a cell waits for, then how they ended."""

    def __init__(self, jobs: Sequence[Response], *, live: bool) -> None:
        from llm_magic.notebook.display.live_output import LiveArea

        self._jobs, self._began = jobs, time.monotonic()
        self._area = LiveArea(live=live)

    def draw(self) -> None:
        """Show the progress of the first running job; called about ten times a second."""
        from llm_magic.notebook.display.live_output import muted

        left = [job for job in self._jobs if not job.done]
        if not left or self._area.wait > 0:
            return
        first, more = left[0], f" and {len(left) - 1} more" if len(left) > 1 else ""
        amount = f", {first.amount}" if first.amount else ""
        waited = time.monotonic() - self._began
        text = f"Waiting for job {first.number} ({first.state}{amount}){more} … {waited:.0f} s"
        self._area.show(text, muted(text))

    def finish(self) -> None:
        """Show how all of them ended."""
        from llm_magic.notebook.display import messages
        from llm_magic.notebook.display.tables import Table

        table = messages.jobs_table(self._jobs) if self._jobs else Table(("",), [], _NOTHING)
        self._area.show(repr(table), table._repr_html_())
