"""How far a map is: counts, speed and the latest rows."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_magic.session.usage import REPORTED, ModelUsage

if TYPE_CHECKING:
    from llm_magic.session.map.outcome import Outcome
    from llm_magic.session.map.sender import PreparedRow

# The rows that a view can show, and the seconds over which the speed is measured.
_LATEST, _WINDOW_S = 5, 10.0
_SAMPLE_S = 0.5
_PROMPT_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class LatestRow:
    """A row that has just ended: its label, the start of its prompt, and its outcome."""

    position: int
    label: object
    prompt: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class MapProgress:
    """The state of a map at one moment.

    Attributes:
        total: The number of rows; None where only reading the data shows it.
        done: The rows that have an answer or failed: the sum of the three below.
        answered: The rows with a complete answer.
        cut: The rows whose answer was cut.
        failed: The rows that failed.
        missing: The rows that were not sent, because a value is missing.
        cached: Of `done`, the rows that needed no call: known from before, or equal to another row.
        prompt_tokens: The tokens of the prompts that were sent; None if unknown.
        completion_tokens: The tokens that were generated so far; None if unknown.
        seconds: The time since the start.
        rows_per_s: The rows that were answered by the model in a second, lately; None at first.
        tokens_per_s: The generated tokens in a second, lately; None if unknown.
        eta_s: The seconds that the other rows take at this speed; None if unknown.
        running: The number of requests that run now at most.
        writing: The rows whose answers have begun and are incomplete.
        writing_tokens: The tokens of these answers so far.
        latest: The rows that have ended last, the oldest first.
    """

    total: int | None
    done: int
    answered: int
    cut: int
    failed: int
    missing: int
    cached: int
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    rows_per_s: float | None
    tokens_per_s: float | None
    eta_s: float | None
    running: int
    writing: int
    writing_tokens: int
    latest: tuple[LatestRow, ...]


class Writing:
    """The rows whose answers have begun and are incomplete, and their tokens so far.

    Written on the event-loop thread, read on any.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._tokens_of: dict[int, int] = {}

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self._tokens_of)

    def add(self, position: int, tokens: int) -> None:
        """Add tokens of a row."""
        self._tokens_of[position] = self._tokens_of.get(position, 0) + tokens
        self.tokens += tokens

    def end(self, position: int) -> None:
        """Remove a row, if it is there: it has an outcome, or is sent again."""
        self.tokens -= self._tokens_of.pop(position, 0)


class Calls:
    """What the rows took that were sent."""

    def __init__(self) -> None:
        self.count = self._failed = 0
        self._seconds = 0.0
        # The sum of each number, and how often it was reported.
        self._sums = dict.fromkeys(REPORTED, 0.0)
        self._reported = dict.fromkeys(REPORTED, 0)

    def add(self, outcome: Outcome) -> None:
        """Add a row that was sent."""
        self.count += 1
        self._failed += bool(outcome.error)
        self._seconds += outcome.seconds
        usage = outcome.usage
        for name in REPORTED:
            value = getattr(usage, name)
            if value is not None:
                self._sums[name] += value
                self._reported[name] += 1

    def usage(self, model: str, backend: str) -> ModelUsage:
        """Return the sums under the name of a model."""
        sums: dict[str, Any] = {
            name: (value if name == "cost" else round(value)) if self._reported[name] else None
            for name, value in self._sums.items()
        }
        low = frozenset(name for name in REPORTED if 0 < self._reported[name] < self.count)
        return ModelUsage(
            model, backend, self.count, 0, self._failed, self._seconds, lower_bounds=low, **sums
        )


class Counts:
    """Counts outcomes; written on the event-loop thread, read on any."""

    def __init__(self) -> None:
        self.started, self.finished_at = time.perf_counter(), 0.0
        self.answered = self.cut = self.failed = self.missing = self.cached = 0
        self.writing = Writing()
        self.latest: deque[tuple[PreparedRow, Outcome]] = deque(maxlen=_LATEST)
        # What the rows took that were sent: since the last `take_usage`, and before that.
        self._calls, self._taken = Calls(), ModelUsage()
        # The rows that were sent and the tokens that were generated, at some times.
        self._sent, self._generated = 0, 0
        self._samples = deque([(self.started, 0, 0)])

    @property
    def done(self) -> int:
        """The number of rows that have an answer or failed."""
        return self.answered + self.cut + self.failed

    def add(self, row: PreparedRow, outcome: Outcome, *, is_sent: bool) -> bool:
        """Count the outcome of a row; it was sent for that, or known from another one.

        Returns True about twice a second.
        """
        state = outcome.state
        if state == "done":
            self.answered += 1
        elif state == "missing":
            self.missing += 1
        elif state == "cut":
            self.cut += 1
        else:
            self.failed += 1
        self.latest.append((row, outcome))
        if not is_sent:
            self.cached += row.outcome is None
            return False
        self._calls.add(outcome)
        self._sent += 1
        self._generated += outcome.usage.completion_tokens or 0
        return self._note_speed()

    def _note_speed(self) -> bool:
        now, samples = time.perf_counter(), self._samples
        if now - samples[-1][0] < _SAMPLE_S:
            return False
        samples.append((now, self._sent, self._generated + self.writing.tokens))
        while now - samples[0][0] > _WINDOW_S and len(samples) > 2:
            samples.popleft()
        return True

    def start_again(self, failed: int) -> None:
        """Continue after the end, to send `failed` rows again."""
        self.failed -= failed
        now = time.perf_counter()
        self.started += now - self.finished_at
        self.finished_at = 0.0
        self._samples = deque([(now, self._sent, self._generated)])

    def take_usage(self, model: str, backend: str) -> ModelUsage:
        """Return what the calls took since the last time, for the usage of the session."""
        usage, self._calls = self._calls.usage(model, backend), Calls()
        self._taken = usage.plus(self._taken)
        return usage

    def usage(self, model: str, backend: str) -> ModelUsage:
        """Return what all calls took."""
        return self._calls.usage(model, backend).plus(self._taken)

    def snapshot(self, total: int | None, running: int) -> MapProgress:
        """Return the state now."""
        now = self.finished_at or time.perf_counter()
        began, calls, tokens = self._samples[0]
        seconds = max(now - began, 1e-9)
        rate = (self._sent - calls) / seconds or None
        left = total - self.done - self.missing if total is not None else None
        usage, written = self.usage("", ""), self.writing.tokens
        generated = usage.completion_tokens
        if written:
            generated = (generated or 0) + written
        return MapProgress(
            total, self.done, self.answered, self.cut, self.failed, self.missing, self.cached,
            usage.prompt_tokens, generated, now - self.started,
            rate, max(0, self._generated + written - tokens) / seconds or None,
            left / rate if left and rate else (0.0 if left == 0 else None),
            running, self.writing.rows, written, tuple(_latest(*one) for one in tuple(self.latest)),
        )  # fmt: skip


def _latest(row: PreparedRow, outcome: Outcome) -> LatestRow:
    prompt = row.messages[-1].content[:_PROMPT_CHARACTERS] if row.messages else ""
    return LatestRow(row.position, row.label, prompt, outcome)
