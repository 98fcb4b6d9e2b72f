"""Jobs: the responses and maps that run in the background, each with a number."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from llm_magic.errors import Interrupted, JobNotFound
from llm_magic.session import interruptible_wait
from llm_magic.text import counted

if TYPE_CHECKING:
    from llm_magic.session.map.run import MapRun
    from llm_magic.session.response import Response

# How many finished jobs stay listed: their answers take memory.
_MAX_FINISHED = 20
# What runs in the background, and what a cell waits for.
Job: TypeAlias = "Response | MapRun"


class ProgressView(Protocol):
    """Shows what Python code waits for; the end of its ``with`` block removes what must not stay."""

    def pause(self) -> float:
        """Return the time until the next update."""

    def draw(self) -> None:
        """Show how far it is, if it is time for that."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> None: ...


def show_until_end(running: Job, view: ProgressView) -> None:
    """Wait until an answer or a map has ended, and show how far it is; an interrupt stops it."""
    with view:
        for _ in running.updates(view.pause):
            view.draw()


def without_view(_running: Job) -> None:
    """Return no view: outside of notebooks nothing is shown."""


def continuing(jobs: Iterable[Job]) -> str:
    """Return which of the jobs still run: ``jobs 1, 2 continue``, or an empty string."""
    running = [job for job in jobs if not job.done]
    numbers = [str(job.number) for job in running if job.number is not None]
    named = f"job{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if numbers else ""
    others = to_python(len(running) - len(numbers))
    verb = "continue" if len(running) > 1 else "continues"
    return f"{' and '.join(filter(None, (named, others)))} {verb}" if running else ""


def to_python(count: int) -> str:
    """Return a number of answers that are no jobs: ``2 answers to Python code``, or an empty string."""
    return f"{counted(count, 'answer')} to Python code" if count else ""


def stopped_waiting(jobs: Iterable[Job], kind: type[Interrupted] = Interrupted) -> Interrupted:
    """Return the error of an interrupt that ends a wait for jobs."""
    error = kind(f"{'; '.join(filter(None, ('Stopped waiting', continuing(jobs))))}.")
    if isinstance(error, interruptible_wait.Interrupted):
        interruptible_wait.Noting.show(error)
    return error


class Jobs:
    """The background jobs of a session: the running ones, and the last finished ones."""

    def __init__(self) -> None:
        self._count = 0
        self._jobs: tuple[Job, ...] = ()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        shown = ", ".join(f"{job.number} {job.state}" for job in self.all)
        return f"<Jobs: {shown or 'none'}>"

    @property
    def all(self) -> tuple[Job, ...]:
        """The running jobs and the last finished ones, oldest first."""
        jobs = self._jobs
        finished = sorted((job for job in jobs if job.done), key=lambda job: job.finished_at)
        dropped = finished[:-_MAX_FINISHED]
        return tuple(job for job in jobs if job not in dropped)

    @property
    def running(self) -> tuple[Job, ...]:
        """The running jobs, oldest first."""
        return tuple(job for job in self._jobs if not job.done)

    @property
    def older(self) -> int:
        """How many finished jobs are no longer listed."""
        # First: a job that starts meanwhile is not counted.
        count = self._count
        return max(0, count - len(self.all))

    def add(self, job: Job) -> None:
        """Give a job a number and list it, before it starts: it is never shown without a number."""
        with self._lock:
            self._count += 1
            job.number = self._count
            self._jobs = (*self.all, job)

    def find(self, number: int | str) -> Job:
        """Return a job by its number; raises `JobNotFound`."""
        number = str(number)
        found = next((job for job in self.all if str(job.number) == number), None)
        if found is not None:
            return found
        if number.isdecimal() and 0 < int(number) <= self._count:
            raise JobNotFound(
                f"Job {int(number)} is older than the last {_MAX_FINISHED} finished ones and no longer"
                " listed. Only the variable of its -o still has it."
            )
        numbers = [str(job.number) for job in self.all]
        listed = (
            f"there are: {', '.join(numbers)}. See %llm_jobs" if numbers else "none has started"
        )
        raise JobNotFound(f"There is no job {number!r}; {listed}.")

    def stop(self) -> None:
        """Stop all jobs."""
        for job in self.running:
            job.cancel()

    def unreported(self) -> tuple[Job, ...]:
        """Return those that run, and those with a cell that ended before a cell waited for them.

        A stop has reported those that it ended.
        """
        finished = (j for j in self.all if j.done and j.state != "stopped" and not j.is_awaited)
        shown = {job.number for job in finished if job.view is not None}
        return tuple(job for job in self.all if not job.done or job.number in shown)

    def close(self) -> None:
        """End what the loop could not: it is being closed, and nothing will run any more."""
        for job in self.running:
            job.end("cancelled")
        for job in self.all:
            if job.view is not None:
                job.view.close()
