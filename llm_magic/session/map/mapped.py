"""The result of a map: a sequence of answers, with everything that is known about them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, overload

from llm_magic.errors import OptionError
from llm_magic.session.map.outcome import Outcome, State
from llm_magic.text import counted, dollars, visible_line
from llm_magic.types import Reply

if TYPE_CHECKING:
    from llm_magic.session.map.progress import Counts, MapProgress
    from llm_magic.session.map.rows import Rows
    from llm_magic.session.schemas import AnswerType
    from llm_magic.session.usage import ModelUsage

_SHOWN, _CHARACTERS = 5, 60
Value = Callable[[Outcome], Any]
# The columns that `Mapped.frame` adds on request.
_MORE: Mapping[str, Value] = {
    "error": lambda outcome: outcome.error or None,
    "finish_reason": lambda outcome: outcome.finish_reason,
    "tokens": lambda outcome: outcome.usage.completion_tokens,
    "reasoning": lambda outcome: outcome.reasoning or None,
    "confidence": lambda outcome: dict(outcome.probabilities).get(outcome.text),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a map over all rows takes, according to a sample of them.

    Attributes:
        rows: The number of all rows.
        prompt_tokens: The tokens of all prompts; None if unknown.
        completion_tokens: The tokens of all answers; None if unknown.
        least_seconds: The time if as many rows as possible run at once, each as fast as in the sample.
        seconds: The time if only as many rows run at once as in the sample.
        cost: The cost in US dollars; None if the server reports none.
    """

    rows: int
    prompt_tokens: int | None
    completion_tokens: int | None
    least_seconds: float
    seconds: float
    cost: float | None

    def __str__(self) -> str:
        parts = [
            counted(count, f"{what} token")
            for count, what in ((self.prompt_tokens, "prompt"), (self.completion_tokens, "answer"))
            if count is not None
        ]
        parts.append(f"{self.least_seconds:,.0f} to {self.seconds:,.0f} s")
        if self.cost is not None:
            parts.append(dollars(self.cost))
        return f"estimate for all {counted(self.rows, 'row')}: {', '.join(parts)}"


class Mapped(Sequence[Reply | None]):
    """The answers of a map, in the order of the rows.

    An item is a `Reply`, or None for a row that failed, was not sent because a value is missing, or is
    pending. While the map runs, the answers fill in. The `messages` of a reply are empty, because the
    prompts of all rows would take the memory of the data once more. To store or to copy the answers, use
    ``list(mapped)`` or `frame`.
    """

    def __init__(
        self,
        rows: Rows,
        outcomes: Sequence[Outcome | None],
        counts: Counts,
        names: tuple[str, str],
        again: Callable[[Sequence[int]], object],
    ) -> None:
        """`names` are those of the model and its backend; `again` sends rows again."""
        self._rows, self._outcomes, self._counts, self._again = rows, outcomes, counts, again
        self._model, self._backend = names
        # Notes about the template, the data and the options.
        self.notes: tuple[str, ...] = ()
        # Of a sample, the number of all rows.
        self.sampled_from: int | None = None
        # What the answers are values of, if they are typed.
        self.answer_type: AnswerType | None = None
        # How many rows run at once, and the most rows that start in a second.
        self.at_once, self.rate = 1, math.inf

    def __reduce__(self) -> NoReturn:
        raise OptionError(
            "The result of a map cannot be pickled or copied: it can send its rows again. Use list(mapped)"
            " or mapped.frame()."
        )

    # -- the answers --------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of rows; of an iterator, those that were read."""
        total = self._rows.total
        return len(self._outcomes) if total is None else max(total, len(self._outcomes))

    @overload
    def __getitem__(self, index: int) -> Reply | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Reply | None]: ...

    def __getitem__(self, index: int | slice) -> Reply | list[Reply | None] | None:
        """Return the answer of a row by its position, or those of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        outcome = self.outcome(position)
        if outcome is None:
            return None
        return outcome.reply(self._model, self._backend, self.answer_type)

    @property
    def is_table(self) -> bool:
        """Whether the data is a table, a column or a data set, so that `frame` adds a column to it."""
        return self._rows.is_table

    def outcome(self, position: int) -> Outcome | None:
        """Return how a row ended, None if it is pending."""
        return self._outcomes[position] if position < len(self._outcomes) else None

    def to_dict(self) -> dict[Any, Reply | None]:
        """Return the answers by the labels of the rows: the keys of a dict, the index of a table.

        Raises `OptionError` if several rows have the same label.
        """
        if self._rows.repeats_labels:
            raise OptionError(
                "Several rows have the same label. Use list(mapped) or mapped.frame() for the answers."
            )
        labels = self._rows.labels()
        return dict(zip(labels if labels is not None else range(len(self)), self, strict=True))

    @property
    def answer_column(self) -> str:
        """The column that `frame` adds: ``answer``, or ``answer_2`` if the data has an ``answer``."""
        return self._free(_numbered("answer"))

    @property
    def amount(self) -> str:
        """The number of answers in words, after that of the rows if some have no answer."""
        is_answer = (one is not None and one.state in {"done", "cut"} for one in self._outcomes)
        count = sum(is_answer)
        answers = counted(count, "answer" if self.answer_type is None else "value")
        return answers if count == len(self) else f"{counted(len(self), 'row')}, {answers}"

    def frame(self, column: str | None = None, *more: str) -> Any:
        """Return a new table: the data with a column of answers; the data itself does not change.

        Of typed answers it has their values: of objects, a column for each field. For a list or a dict,
        the table is a pandas DataFrame with the answers alone.

        Args:
            column: The name of the column. A column of that name is replaced. None: `answer_column`. A
                field that has the name of a column of the data gets this name at its end, as in
                ``name_answer``.
            more: More columns: ``error``, ``finish_reason``, ``tokens``, ``reasoning``, and
                ``confidence``, the probability of the label of a choice.
        """
        if unknown := [name for name in more if name not in _MORE]:
            raise OptionError(f"There is no column {unknown[0]!r}. Use {', '.join(_MORE)}.")
        outcomes = [self.outcome(i) for i in range(len(self))]
        columns = self._answers(column, outcomes)
        for name in more:
            free = self._free(_longer(name, column), columns) if name in columns else name
            columns[free] = [None if one is None else _MORE[name](one) for one in outcomes]
        if self._rows.is_table:
            return self._rows.with_columns(columns)
        try:
            import pandas as pd
        except ImportError:
            raise OptionError(
                "A table of answers to a list needs pandas. Install it, or use list(mapped)."
            ) from None
        labels = self._rows.labels()
        return pd.DataFrame(columns, index=None if labels is None else pd.Index(list(labels)))

    def _answers(
        self, column: str | None, outcomes: Sequence[Outcome | None]
    ) -> dict[str, list[Any]]:
        """Return the columns of a table with the answers."""
        values = [None if one is None else self.plain(one) for one in outcomes]
        fields, names = self._fields, self.answer_columns(column)
        if not fields:
            return {names[0]: values}
        return {
            name: [None if value is None else value.get(field) for value in values]
            for name, field in zip(names, fields, strict=True)
        }

    @property
    def _fields(self) -> tuple[str, ...]:
        return self.answer_type.fields if self.answer_type is not None else ()

    def answer_columns(self, column: str | None = None) -> tuple[str, ...]:
        """Return the columns with the answers that `frame` adds: one, or one for each field."""
        if not self._fields:
            return (column or self.answer_column,)
        names: dict[str, None] = {}
        for name in self._fields:
            names[self._free(_longer(name, column), names)] = None
        return tuple(names)

    def _free(self, names: Iterable[str], others: Container[str] = ()) -> str:
        """Return the first name that is no column of the data, and none of the `others`."""
        taken = self._rows.columns if self._rows.is_table else ()
        return next(name for name in names if name not in taken and name not in others)

    def plain(self, outcome: Outcome) -> Any:
        """Return an answer for a table: its text, or its value in the types of JSON; None without one."""
        if self.answer_type is None:
            return outcome.text if outcome.state in {"done", "cut"} else None
        value, _ = outcome.checked(self.answer_type)
        return None if value is None else self.answer_type.plain(value)

    # -- what is known about them -------------------------------------------------------------

    def _positions(self, state: State) -> list[int]:
        found = enumerate(self._outcomes)
        return [i for i, outcome in found if outcome is not None and outcome.state == state]

    @property
    def errors(self) -> dict[str, list[int]]:
        """The positions of the rows that failed, by their error, the most frequent error first."""
        groups: dict[str, list[int]] = {}
        for position in self._positions("failed"):
            outcome = self._outcomes[position]
            groups.setdefault(outcome.error if outcome is not None else "", []).append(position)
        return dict(sorted(groups.items(), key=lambda group: -len(group[1])))

    @property
    def cut(self) -> list[int]:
        """The positions of the answers that were cut, at the token limit or for another reason."""
        return self._positions("cut")

    @property
    def missing(self) -> list[int]:
        """The positions of the rows that were not sent, because a value is missing."""
        return self._positions("missing")

    @property
    def second_tries(self) -> int:
        """How many rows have a second answer, because the first one was invalid."""
        return sum(1 for one in self._outcomes if one is not None and one.retry)

    @property
    def pending(self) -> list[int]:
        """The positions of the rows that have no outcome yet."""
        return [i for i in range(len(self)) if self.outcome(i) is None]

    @property
    def usage(self) -> ModelUsage:
        """The answers of this map that the model generated, their tokens, seconds and cost."""
        return self._counts.usage(self._model, self._backend)

    @property
    def progress(self) -> MapProgress:
        """The counts and the speed."""
        return self._counts.snapshot(self._rows.total, 0)

    @property
    def estimate(self) -> Estimate | None:
        """What all rows take, if this is a sample; None if it is none, or if nothing was sent."""
        usage, progress = self.usage, self.progress
        done = progress.done + progress.missing
        if self.sampled_from is None or not done or not usage.answers:
            return None
        scale = self.sampled_from / done
        least, most = self._seconds_of_all(usage, progress.seconds, scale)

        def scaled(count: int | None) -> int | None:
            return None if count is None else round(count * scale)

        return Estimate(
            self.sampled_from,
            scaled(usage.prompt_tokens),
            scaled(usage.completion_tokens),
            least,
            most,
            None if usage.cost is None else usage.cost * scale,
        )

    def _seconds_of_all(
        self, usage: ModelUsage, seconds: float, scale: float
    ) -> tuple[float, float]:
        """Return how long all rows take: if as many run at once as possible, and as in the sample."""
        together = min(usage.answers, self.at_once)
        busy = min(usage.seconds / together, seconds)
        # The start of a map takes as long for all rows.
        start, paced = seconds - busy, usage.answers / self.rate * scale
        most = max(start + busy * scale, paced)
        return min(max(start + usage.seconds / self.at_once * scale, paced), most), most

    def retry(self) -> Mapped:
        """Send the rows that failed again, and return this result, in which they are replaced."""
        if failed := self._positions("failed"):
            self._again(failed)
        return self

    # -- how it is shown ----------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [f"<Mapped: {self.summary()}>"]
        for position in range(min(len(self), _SHOWN)):
            lines.append(f"  {position}: {self._line(position)}")
        if len(self) > _SHOWN:
            lines.append(f"  … {counted(len(self) - _SHOWN, 'more row')}")
        for error, positions in list(self.errors.items())[:_SHOWN]:
            lines.append(f"  {counted(len(positions), 'row')} failed: {error}")
        if self.estimate is not None:
            lines.append(f"  {self.estimate}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the counts, the tokens and the time in one line."""
        counts = Counter(o.state if o is not None else "pending" for o in self._outcomes)
        counts["pending"] += len(self) - len(self._outcomes)
        parts = [counted(len(self), "row")]
        parts += [
            f"{counts[state]:,} {state}"
            for state in ("cut", "failed", "missing", "pending")
            if counts[state]
        ]
        progress = self.progress
        if progress.cached:
            parts.append(f"{progress.cached:,} cached")
        if progress.completion_tokens is not None:
            parts.append(counted(progress.completion_tokens))
        parts.append(f"{progress.seconds:.1f} s")
        if progress.completion_tokens and progress.seconds:
            parts.append(f"{progress.completion_tokens / progress.seconds:,.0f} tokens/s")
        return ", ".join(parts)

    def _line(self, position: int) -> str:
        outcome = self.outcome(position)
        if outcome is None:
            return "pending"
        if outcome.state in {"failed", "missing"}:
            return outcome.error or "missing"
        text = visible_line(outcome.text[: 4 * _CHARACTERS])
        start = text[:_CHARACTERS]
        dots = "…" if len(text) > len(start) or len(outcome.text) > 4 * _CHARACTERS else ""
        cut = f" ({outcome.finish_reason})" if outcome.state == "cut" else ""
        return f"{start!r}{dots}{cut}"

    def __iter__(self) -> Iterator[Reply | None]:
        return (self[i] for i in range(len(self)))


def _numbered(name: str) -> Iterator[str]:
    """Yield a name, then the same with a number from 2 on."""
    yield name
    for number in itertools.count(2):
        yield f"{name}_{number}"


def _longer(name: str, column: str | None) -> Iterator[str]:
    """Yield the name of a field, then longer ones with that of the column of answers."""
    yield name
    yield from _numbered(f"{name}_{column or 'answer'}")
