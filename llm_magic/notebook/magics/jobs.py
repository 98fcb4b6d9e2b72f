"""``%llm_jobs``, ``%llm_stop`` and ``%llm_wait``: the background jobs of ``%%llm --bg``."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, cast

from IPython.core.magic import magics_class

from llm_magic.backends.thread_bridge import CHECK_S
from llm_magic.errors import JobNotFound, OptionError, did_you_mean
from llm_magic.notebook.magics.base import SessionMagics, line_magic
from llm_magic.session.jobs import continuing, to_python

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.live_output import LiveArea
    from llm_magic.notebook.display.tables import Table
    from llm_magic.session import Session
    from llm_magic.session.jobs import Job

# A stop takes effect at the next token; a cell does not wait longer for it.
_STOP_S = 1.0
_NOTHING = "No job is running."


@magics_class
class JobMagics(SessionMagics):
    """The magics for the background jobs of this kernel."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        super().__init__(shell, session)
        session.when_closed(self._stop_at_exit)

    @line_magic
    def llm_jobs(self, line: str) -> Table:
        """List background jobs."""
        from llm_magic.notebook.display import messages

        named, jobs = self._named_jobs("llm_jobs", line)[0], self.session.jobs
        return messages.jobs_table(named) if named else messages.jobs_table(jobs.all, jobs.older)

    @line_magic
    def llm_stop(self, line: str) -> Table:
        """Stop background jobs."""
        from llm_magic.notebook.display.tables import Table

        try:
            named = self._named_jobs("llm_stop", line)[0]
        except JobNotFound as error:
            is_one = len(line.replace(",", " ").split()) == 1
            raise (error if is_one else error.append("Nothing was stopped.")) from None
        rows = [[text] for text in self._stop(named)]
        return Table(("",), rows, "" if rows else _NOTHING)

    def _stop(self, named: list[Job]) -> list[str]:
        """Stop the named jobs, or all answers and the load, and return a line about each job."""
        session, deadline = self.session, time.monotonic() + _STOP_S
        jobs = named or list(session.jobs.running)
        # Those that are no jobs: what a cell, a thread or a task waits for.
        answers = [one for one in session.answering if one.number is None and one.is_generating]
        maps = [one for one in session.mapping if one.number is None]
        if named:
            answers, maps = [], []
        running, loading = (
            [*answers, *maps, *(job for job in jobs if not job.done)],
            session.loading,
        )
        if not named:
            # Before `cancel`: the threads end as they do at ■, also those that an executor starts next.
            session.interrupt_threads(0.0)
        for one in running:
            one.cancel()
        lines = [] if named else self._stop_load(loading, deadline)
        for one in running:
            one.wait(max(0.0, deadline - time.monotonic()))
        for job in jobs:
            if job.done and job.view is not None:
                job.view.update()
        lines += [f"Stopped {to_python(len(answers))}."] if answers else []
        lines += [f"Stopped a map ({one.model}) after {one.amount}." for one in maps]
        return lines + [_stop_line(job, was_running=job in running) for job in jobs]

    def _stop_load(self, loading: str | None, deadline: float) -> list[str]:
        """Stop the load of ``%llm_load --bg`` or of a thread, if one runs, and return a line about it."""

        def is_loading() -> bool:
            return self.session.is_loading_in_background or self.session.loading is not None

        if loading is None and not is_loading():
            return []
        self.session.stop_loading()
        while is_loading() and time.monotonic() < deadline:
            time.sleep(CHECK_S)
        return [f"{'Stopping' if is_loading() else 'Stopped'} loading {loading or 'the model'}."]

    def _stop_at_exit(self) -> None:
        """Stop what runs when a terminal ends, and write what it was."""
        from llm_magic.notebook.display.live_output import is_notebook, write

        registered: Sequence[object] = self.shell.configurables
        if self in registered and not is_notebook(self.shell):
            write("".join(f"{text}\n" for text in self._stop([])))

    @line_magic
    def llm_wait(self, line: str) -> None:
        """Wait for background jobs."""
        jobs, args = self._named_jobs("llm_wait", line)
        timeout, note = _seconds(args["timeout"]), ""
        deadline = time.monotonic() + timeout
        area = self.live_area()
        if not jobs:
            if self.session.is_loading_in_background:
                self.show_load(area, deadline)
                note = self._load_note()
            jobs = list(self.session.jobs.unreported())
        self._wait(jobs, note, deadline, area)
        for job in jobs:
            if job.error is not None:
                raise job.error

    def _load_note(self) -> str:
        """Return that a load still runs, or which model is active after it."""
        if self.session.is_loading_in_background:
            return f"{self.session.loading or 'The model'} is still loading."
        active = self.session.status().active_model
        return f"The active model is {active}." if active else ""

    def _wait(self, jobs: list[Job], load_note: str, deadline: float, area: LiveArea) -> None:
        """Show the progress of jobs until they end, then their answers and states.

        A note names those that still run at the `deadline`; without jobs, there is only a note.
        """
        from llm_magic.notebook.display.live_output import JobsView
        from llm_magic.notebook.display.messages import jobs_table
        from llm_magic.notebook.display.tables import Table

        with JobsView(area, jobs) as view:
            self.session.wait(jobs, view.draw, deadline)
        done = [job for job in jobs if job.done]
        for job in done:
            job.is_awaited = True
            if job.view is not None:
                job.view.show_again(f"Job {job.number}" if len(done) > 1 else "")
        running = continuing(jobs)
        stopped = f"Stopped waiting; {running}." if running else ""
        note = " ".join(filter(None, (stopped, load_note)))
        table = Table(("",), [], note or _NOTHING)
        if jobs:
            table = dataclasses.replace(jobs_table(jobs), note=note)
        area.show(repr(table), table._repr_html_())

    def _named_jobs(self, name: str, line: str) -> tuple[list[Job], Parsed]:
        """Return the jobs that the line names, and its values; no jobs if it names none, or ``all``.

        It names each by its number, or one or more by a variable.
        """
        from llm_magic.notebook.arguments import parser

        jobs = {n: found for n, one in self.shell.user_ns.items() if (found := _jobs_in(one))}
        # {job} is the job, not its text.
        names = {name: name for name in jobs}
        args = parser.parse(name, line, lambda text: self.notebook_names(text) | names)
        numbers = [number for text in args["jobs"] or () for number in text.split(",") if number]
        if "all" in numbers:
            return [], args
        if len(numbers) > 1 and numbers[0] in {"job", "jobs"} and numbers[0] not in jobs:
            # As in the outputs: job 3
            del numbers[0]
        named: list[Job] = []
        for number in numbers:
            several = jobs.get(number) or [self._numbered(number, jobs)]
            named += [job for job in several if job not in named]
        return named, args

    def _numbered(self, number: str, variables: Iterable[str]) -> Job:
        """Return a job by its number; the error suggests a variable with a similar name."""
        try:
            return self.session.jobs.find(number)
        except JobNotFound as error:
            raise error.append(did_you_mean(number, variables).strip()) from None


def _jobs_in(value: object) -> list[Job]:
    """Return the job that a variable has, or the jobs in its list, tuple or dict; else nothing."""
    from llm_magic.session.map.run import MapRun
    from llm_magic.session.response import Response

    several = value.values() if type(value) is dict else value
    values = several if type(value) in {list, tuple, dict} else (value,)
    jobs: list[Job] = []
    # Up to the first other value: a list may be long.
    for one in cast("Iterable[object]", values):
        if not isinstance(one, (Response, MapRun)) or one.number is None:
            return []
        jobs.append(one)
    return jobs


def _seconds(text: str | None) -> float:
    """Return the value of ``--timeout`` (``5`` or ``5s``) in seconds, infinite without one."""
    if text is None:
        return math.inf
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise OptionError(f"--timeout {text} is not a number of seconds. Write --timeout 5.")
    return seconds


def _stop_line(job: Job, *, was_running: bool) -> str:
    if not was_running:
        return f"Job {job.number} had already ended: {job.state}."
    if not job.done:
        return f"Stopping job {job.number} ({job.model})."
    from llm_magic.notebook.display.messages import FIRST_WORD

    when = f"after {job.amount}" if job.amount else FIRST_WORD
    return f"Stopped job {job.number} ({job.model}) {when}."
