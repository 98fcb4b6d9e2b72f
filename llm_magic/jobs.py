"""Answers that are produced while other things happen: begun, watched, stopped, waited for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from typing import TYPE_CHECKING, Any, Literal

from llm_magic.calls import Draft

if TYPE_CHECKING:
    from llm_magic.types import Reply

JobState = Literal["waiting", "running", "done", "stopped", "failed"]


class Job:
    """One answer in the making; every attribute may be read from any thread at any time."""

    def __init__(self, number: int, draft: Draft) -> None:
        self.id, self.draft = number, draft
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self.notice = ""
        self.future: concurrent.futures.Future[Reply] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._stopping = False

    @property
    def state(self) -> JobState:
        """How far it is."""
        if self.future is None or not self.future.done():
            return "waiting" if self.draft.is_empty else "running"
        if self.future.cancelled():
            return "stopped"
        return "failed" if self.future.exception() is not None else "done"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state not in {"waiting", "running"}

    def starts(self) -> None:
        """Remember the task that does the work; called in it."""
        self._task = asyncio.current_task()
        if self._stopping:
            raise asyncio.CancelledError

    def stop(self) -> None:
        """Stop the work; it is over when it has ended, and what there is of it stays in `reply`."""
        self._stopping = True
        task = self._task
        if task is not None and not task.done():
            # The loop may have been closed under us; then nothing runs any more.
            with contextlib.suppress(RuntimeError):
                task.get_loop().call_soon_threadsafe(task.cancel)

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.draft.call.resident.name}, {self.state}>"
