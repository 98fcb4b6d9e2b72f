"""``%llm_jobs``, ``%llm_stop`` and ``%llm_wait``: the background jobs of ``%%llm --bg``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from IPython.core.magic import magics_class

from llm_magic.errors import JobNotFound, did_you_mean
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
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
        rows = [[_stop_line(job, was_running=job in running)] for job in jobs]
        return Table(("",), rows, "" if rows else _NOTHING)

    @line_magic
    def llm_wait(self, line: str) -> None:
        """Wait for background jobs."""
        jobs = self._named_jobs("llm_wait", line) or list(self.session.jobs.unreported())
        self._wait(jobs)
        for job in jobs:
            if job.error is not None:
                raise job.error

    def _wait(self, jobs: list[Response]) -> None:
        """Show the progress of jobs until they end, then their answers and states."""
        from llm_magic.notebook.display.live_output import JobsView, LiveArea
        from llm_magic.notebook.display.messages import jobs_table
        from llm_magic.notebook.display.tables import Table

        area = LiveArea(live=self.live and hasattr(self.shell, "kernel"))
        view = JobsView(area, jobs)
        try:
            self.session.wait(jobs, view.draw)
        finally:
            view.clear_line()
        for job in jobs:
            job.is_awaited = True
            if job.view is not None:
                job.view.show_again()
        table = jobs_table(jobs) if jobs else Table(("",), [], _NOTHING)
        area.show(repr(table), table._repr_html_())

    def _named_jobs(self, name: str, line: str) -> list[Response]:
        """Return the job that the line names, as a list; an empty list if it names none, or ``all``."""
        from llm_magic.session.response import Response

        named = self.parse(name, line)["job"]
        if named in {None, "all"}:
            return []
        value = self.shell.user_ns.get(named)
        if isinstance(value, Response) and value.number is not None:
            return [value]
        try:
            return [self.session.jobs.find(named)]
        except JobNotFound as error:
            values = self.shell.user_ns.items()
            names = [n for n, one in values if isinstance(one, Response) and one.number is not None]
            raise error.append(did_you_mean(named, names).strip()) from None


def _stop_line(job: Response, *, was_running: bool) -> str:
    if not was_running:
        return f"Job {job.number} had already ended: {job.state}."
    if not job.done:
        return f"Stopping job {job.number} ({job.model})."
    when = f"after {job.amount}" if job.amount else "before its first token"
    return f"Stopped job {job.number} ({job.model}) {when}."
