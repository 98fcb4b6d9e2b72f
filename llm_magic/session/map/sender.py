"""Sends the rows of a map to the model; runs on the event-loop thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_magic.backends.reasoning import separated_answer
from llm_magic.backends.remote.retry import is_overload
from llm_magic.errors import (
    AuthenticationFailed,
    ModelNotLoaded,
    ServerTimeout,
    ServerUnreachable,
    WorkersFailed,
)
from llm_magic.session.map.outcome import Outcome, failure, name_row
from llm_magic.session.response import AnswerParts
from llm_magic.types import Chunk, Message

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager
    from llm_magic.session.map.executors import Workers
    from llm_magic.session.map.progress import Writing
    from llm_magic.session.map.throttle import Throttle
    from llm_magic.session.requests import PreparedRequest

# How long the rows keep the loop from other tasks.
_TURN_S = 0.005
# How often a row that the server rejected for its rate is sent again.
_MOST_REJECTIONS = 20
# So many rows in a row that do not reach the server end the map: the others would not, either.
_MOST_UNREACHABLE = 20
# Errors of the session, the server or the workers, not of one row.
_FATAL = (ModelNotLoaded, AuthenticationFailed, WorkersFailed)


@dataclass(slots=True, eq=False)
class PreparedRow:
    """A row that can be sent: its position, its label, its messages and its key.

    A row that is not sent has its `outcome` already.
    """

    position: int
    label: object
    messages: tuple[Message, ...]
    key: bytes = b""
    outcome: Outcome | None = None
    rejections: int = 0


Report = Callable[[PreparedRow, Outcome, bool], None]
"""Is given each row with its outcome, and whether it was sent for that."""


class Sender:
    """Sends rows with some tasks, as many as the throttle allows, and reports each outcome once."""

    def __init__(
        self,
        prepared: PreparedRequest,
        manager: BackendManager,
        throttle: Throttle,
        finished: MutableMapping[bytes, Outcome],
        report: Report,
        writing: Writing,
    ) -> None:
        """`finished` has the outcomes of rows by key, and gets those of this map.

        `writing` gets the rows whose answers have begun.
        """
        self._prepared, self._manager, self._throttle = prepared, manager, throttle
        self._finished, self._report, self._writing = finished, report, writing
        self.stops_at_error = False
        # The processes that answer instead of this one.
        self.workers: Workers | None = None
        self._waiting: deque[PreparedRow] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        # Rows with the same key as one that is being sent.
        self._followers: dict[bytes, list[PreparedRow]] = {}
        self._news = asyncio.Event()
        self._is_complete = self._is_closed = False
        self._error: BaseException | None = None
        self._turn_began, self._unreachable = 0.0, 0
        # How many rows were taken from those that wait.
        self.taken = 0

    async def run(self, low: int) -> AsyncGenerator[None, None]:
        """Yield whenever fewer than `low` rows wait, until all rows have an outcome."""
        self._low = low
        self._news.set()
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                if self._error is not None:
                    raise self._error
                if self._is_complete and not self._waiting and not self._workers:
                    return
                yield
        finally:
            self._is_closed = True
            for worker in self._workers:
                worker.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)

    def wake(self) -> None:
        """Have `run` yield; called on the loop."""
        self._news.set()

    def accept(self, row: PreparedRow) -> None:
        """Add a row; called on the loop."""
        self._waiting.append(row)
        if len(self._workers) < self._throttle.limit:
            self._start_workers()

    def complete(self) -> None:
        """End `run` after the rows that wait: there are no others; called on the loop."""
        self._is_complete = True
        self._news.set()

    def _start_workers(self) -> None:
        needed = min(self._throttle.limit, len(self._workers) + len(self._waiting))
        if self._error is not None or self._is_closed:
            return
        while len(self._workers) < needed:
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._end_worker)

    def _end_worker(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if not worker.cancelled() and worker.exception() is not None:
            self._error = self._error or worker.exception()
        # Rows may have come since it ended.
        self._start_workers()
        self._news.set()

    async def _work(self) -> None:
        """Send waiting rows until there are none, or until there are too many workers."""
        while self._waiting and len(self._workers) <= self._throttle.limit and self._error is None:
            row = self._waiting.popleft()
            self.taken += 1
            if len(self._waiting) < self._low and not self._is_complete:
                self._news.set()
            await self._finish(row)
            if len(self._workers) < self._throttle.limit:
                self._start_workers()
            if time.perf_counter() - self._turn_began > _TURN_S:
                await asyncio.sleep(0)
                self._turn_began = time.perf_counter()

    async def _finish(self, row: PreparedRow) -> None:
        """Report the outcome of a row: a known one, that of an equal row, or that of its answer."""
        key = row.key
        known = row.outcome or self._known(key)
        if known is not None:
            if known.error and not known.key:
                # From a file, which has no prompts.
                known = dataclasses.replace(known, messages=row.messages, key=key)
            self._report(row, known, False)
        elif key in self._followers:
            self._followers[key].append(row)
        else:
            self._followers[key] = []
            try:
                outcome = await self._answer(row)
            finally:
                followers = self._followers.pop(key)
            if outcome is None:
                self._waiting.extendleft((*followers, row))
                return
            if not outcome.error:
                self._finished[key] = outcome
            self._report(row, outcome, True)
            for follower in followers:
                self._report(follower, outcome, False)

    def _known(self, key: bytes) -> Outcome | None:
        """Return the outcome of an earlier row that still has a value of the type."""
        known, answer_type = self._finished.get(key), self._prepared.request.answer_type
        return None if known is None or known.checked(answer_type)[1] is not None else known

    async def _answer(self, row: PreparedRow) -> Outcome | None:
        """Return the outcome of a row, None if the server is overloaded: it is sent again."""
        await self._throttle.turn()
        began = time.perf_counter()
        try:
            outcome = await self._collect(row, began)
        except _FATAL:
            raise
        except Exception as error:
            if self._is_put_back(row, error):
                return None
            self._note_unreachable(error)
            if self.stops_at_error:
                name_row(error, row.label)
                raise
            return failure(error, row.messages, row.key, time.perf_counter() - began)
        else:
            if outcome is None:
                return None
            self._unreachable = 0
            self._throttle.answered()
            return self._checked(row, outcome)
        finally:
            self._writing.end(row.position)
            self._throttle.finished()

    def _checked(self, row: PreparedRow, outcome: Outcome) -> Outcome:
        """Return an outcome, with an error if its answer has no value of the type."""
        error = outcome.error_of(self._prepared.request.answer_type)
        if error is None:
            return outcome
        if self.stops_at_error:
            name_row(error, row.label)
            raise error
        failed = failure(error, row.messages, row.key, outcome.seconds)
        return dataclasses.replace(
            outcome, error=failed.error, messages=failed.messages, key=failed.key
        )

    def _is_put_back(self, row: PreparedRow, error: Exception) -> bool:
        """Return whether a row is sent again, because the server answers too many others."""
        if isinstance(error, ServerTimeout):
            self._throttle.overloaded()
        if not is_overload(error):
            return False
        self._throttle.overloaded(getattr(error, "retry_after", None) or 1.0)
        row.rejections += 1
        return row.rejections < _MOST_REJECTIONS

    def _note_unreachable(self, error: Exception) -> None:
        self._unreachable += isinstance(error, ServerUnreachable)
        if self._unreachable >= _MOST_UNREACHABLE:
            raise error

    async def _collect(self, row: PreparedRow, began: float) -> Outcome | None:
        """Return the outcome of one request, None if the server rejected it; raises its error.

        The connection would wait and send it again. Here the row goes back to those that wait, and the
        throttle takes the rejection into account.
        """
        answer = AnswerParts()
        async with contextlib.aclosing(self._stream(row)) as stream:
            async for chunk in stream:
                answer.add(chunk)
                if chunk.text or chunk.reasoning or chunk.tokens:
                    self._writing.add(row.position, chunk.tokens)
                if chunk.backoff_s:
                    self._throttle.overloaded(chunk.backoff_s)
                    row.rejections += 1
                    if row.rejections < _MOST_REJECTIONS:
                        return None
        has_tokens = self._prepared.config.logprobs is not None
        return _outcome(answer, time.perf_counter() - began, has_tokens=has_tokens)

    def _stream(self, row: PreparedRow) -> AsyncGenerator[Chunk, None]:
        """Return the chunks of a row; an answer that its prompt asks a type for may be asked again."""
        answer_type, chunks = self._prepared.request.answer_type, self._sent(row.messages)
        if answer_type is None or answer_type.by == "backend":
            return chunks
        from llm_magic.session.second_try import with_second_try

        return with_second_try(chunks, answer_type, lambda more: self._sent((*row.messages, *more)))

    def _sent(self, messages: tuple[Message, ...]) -> AsyncGenerator[Chunk, None]:
        """Return the chunks of an answer, from a worker process or from the backend."""
        if self.workers is not None:
            return self.workers.stream(messages, self._throttle.limit)
        # Searched again, because it may have been unloaded since.
        loaded = self._manager.find(self._prepared.loaded_model.name)
        return separated_answer(loaded, messages, self._prepared.config)


def _outcome(answer: AnswerParts, seconds: float, *, has_tokens: bool) -> Outcome:
    """Return the outcome of an answer; a stream that reported no reason was cut."""
    usage = answer.usage
    if not usage.completion_tokens:
        usage = dataclasses.replace(usage, completion_tokens=answer.completion_tokens)
    text, reasoning = answer.text.getvalue(), answer.reasoning.getvalue().strip()
    return Outcome(
        text,
        answer.finish_reason or "truncated",
        usage,
        seconds,
        reasoning,
        probabilities=answer.probabilities,
        retry=answer.retry,
        tokens=answer.text_tokens if has_tokens else None,
    )
