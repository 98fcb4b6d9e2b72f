"""Jobs: the responses that run in the background, each with a number."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

from llm_magic.errors import JobNotFound

if TYPE_CHECKING:
    from llm_magic.session.response import Response

# How many finished jobs stay listed: their answers take memory.
_MAX_FINISHED = 20


class Jobs:
    """The jobs of a session: those that run, and the last ones that ended."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._jobs: tuple[Response, ...] = ()
        self._lock = threading.Lock()

    @property
    def all(self) -> tuple[Response, ...]:
        """Those that run and the last ones that ended, oldest first."""
        jobs = self._jobs
        finished = sorted((job for job in jobs if job.done), key=lambda job: job.finished_at)
        dropped = finished[:-_MAX_FINISHED]
        return tuple(job for job in jobs if job not in dropped)

    @property
    def running(self) -> tuple[Response, ...]:
        """Those that have not ended, oldest first."""
        return tuple(job for job in self._jobs if not job.done)

    def add(self, response: Response) -> None:
        """Give a response a number and list it, before it starts: it is never shown without a number."""
        with self._lock:
            response.number = next(self._numbers)
            self._jobs = (*self.all, response)

    def find(self, number: str) -> Response:
        """Return a job by its number; raises `JobNotFound`."""
        found = next((job for job in self.all if str(job.number) == number), None)
        if found is not None:
            return found
        numbers = [str(job.number) for job in self.all]
        listed = f"there are: {', '.join(numbers)}. See %llm_jobs" if numbers else "there is none"
        raise JobNotFound(f"There is no job {number!r}; {listed}.")

    def stop(self) -> None:
        """Stop them all."""
        for job in self.running:
            job.cancel()

    def unreported(self) -> tuple[Response, ...]:
        """Return those that run, and those with a cell that ended before a cell waited for them."""
        return tuple(j for j in self.all if not j.done or (j.view and not j.is_awaited))

    def close(self) -> None:
        """End what the loop could not: it is being closed, and nothing will run any more."""
        for job in self.running:
            job.end("cancelled")
        for job in self.all:
            if job.view is not None:
                job.view.close()
