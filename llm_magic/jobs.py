"""Answers that are produced while other things happen: begun, watched, stopped, waited for."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Literal

from llm_magic.calls import Draft
from llm_magic.errors import LLMMagicError

if TYPE_CHECKING:
    from llm_magic.types import Reply

JobState = Literal["waiting", "running", "done", "stopped", "failed"]


class Job:
    """One answer in the making; every attribute may be read from any thread at any time."""

    def __init__(self, number: int, draft: Draft) -> None:
        self.id, self.draft = number, draft
        self.reply: Reply | None = None
        self.error: LLMMagicError | None = None
        self.notice = ""
        self.future: concurrent.futures.Future[Reply] | None = None

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

    def stop(self) -> None:
        """Stop the work; what there is of the answer stays in `reply`."""
        if self.future is not None:
            self.future.cancel()

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.draft.call.resident.name}, {self.state}>"
