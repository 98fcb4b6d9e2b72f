"""Adds up the answers, tokens, seconds and cost of a session, by model."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_magic.text import counted, dollars
from llm_magic.types import Usage

if TYPE_CHECKING:
    from llm_magic.session.response import Response

# What a backend may report, or not.
REPORTED = tuple(field.name for field in dataclasses.fields(Usage))


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """The sums over the answers of one model; a sum is None if no answer reported the number.

    Attributes:
        model: The name of the model, "" for all models.
        backend: The name of its backend, "" for all models.
        answers: The number of answers that have ended, including those that were stopped or failed.
        stopped: The number of answers that the user stopped.
        failed: The number of answers that failed.
        seconds: The seconds from each request to the end of its answer, added up. Answers that overlap
            all count in full.
        prompt_tokens: The number of tokens in the prompts.
        cached_tokens: How many of the prompt tokens were reused.
        completion_tokens: The number of generated tokens, including the reasoning.
        reasoning_tokens: How many of the generated tokens are reasoning.
        cost: The cost in US dollars that the server reported.
        lower_bounds: The names of the sums that are too low, because an answer did not report its number.
    """

    model: str = ""
    backend: str = ""
    answers: int = 0
    stopped: int = 0
    failed: int = 0
    seconds: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: float | None = None
    lower_bounds: frozenset[str] = frozenset()

    def plus(self, other: ModelUsage) -> ModelUsage:
        """Return the sums of both, under the name of this one."""
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("answers", "stopped", "failed", "seconds")
        }
        lower_bounds = self.lower_bounds | other.lower_bounds
        for name in REPORTED:
            known = [n for n in (getattr(self, name), getattr(other, name)) if n is not None]
            sums[name] = sum(known) if known else None
            if len(known) == 1 and self.answers and other.answers:
                lower_bounds |= {name}
        return dataclasses.replace(self, lower_bounds=lower_bounds, **sums)


@dataclass(frozen=True, slots=True)
class SessionUsage:
    """The sums over the answers of a session.

    Attributes:
        models: The sums for each model, in the order of their first answers.
    """

    models: tuple[ModelUsage, ...]

    @property
    def total(self) -> ModelUsage:
        """The sums over all models."""
        total = ModelUsage()
        for usage in self.models:
            total = total.plus(usage)
        return total

    def __repr__(self) -> str:
        total = self.total
        parts = [counted(total.answers, "answer")]
        if total.prompt_tokens is not None and total.completion_tokens is not None:
            parts.append(f"{total.prompt_tokens:,} → {total.completion_tokens:,} tokens")
        parts.append(f"{total.seconds:.1f} s")
        if total.cost is not None:
            parts.append(dollars(total.cost))
        return f"<SessionUsage: {', '.join(parts)}>"


def usage_of(response: Response) -> ModelUsage:
    """Return what an answer that has ended took."""
    reply = response.reply
    assert reply is not None, "it has ended"
    return ModelUsage(
        reply.model,
        reply.backend,
        answers=1,
        stopped=int(response.state == "stopped"),
        failed=int(response.state == "failed"),
        seconds=reply.timing.total_s,
        **{name: getattr(reply.usage, name) for name in REPORTED},
    )


class UsageCounter:
    """Counts each answer once, when it has ended; from any thread."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], ModelUsage] = {}
        self._lock = threading.Lock()

    def add(self, usage: ModelUsage) -> None:
        """Add answers of one model that have ended."""
        key = (usage.model, usage.backend)
        with self._lock:
            counted_before = self._models.get(key)
            self._models[key] = usage if counted_before is None else counted_before.plus(usage)

    def sums(self, *, reset: bool = False) -> SessionUsage:
        """Return the sums so far; `reset` starts again from 0."""
        with self._lock:
            usage = SessionUsage(tuple(self._models.values()))
            if reset:
                self._models.clear()
        return usage
