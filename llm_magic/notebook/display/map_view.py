"""Draws a map in its cell: a line with its progress above the latest rows, then the first rows.

Texts of rows and answers reach HTML only through `Table`, `muted` and `noticed`, which escape them.
"""

from __future__ import annotations

import html
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llm_magic.notebook.display.live_output import (
    LiveArea,
    TerminalLine,
    dimmed,
    muted,
    noticed,
    progress_html,
    write,
)
from llm_magic.notebook.display.messages import incomplete_label, shortened, shown_name
from llm_magic.notebook.display.tables import Table
from llm_magic.text import counted, dollars

if TYPE_CHECKING:
    from llm_magic.session.map.mapped import Estimate, Mapped
    from llm_magic.session.map.outcome import Outcome
    from llm_magic.session.map.progress import MapProgress
    from llm_magic.session.map.run import MapRun

# Faster updates cannot be read.
_PERIOD_S = 0.25
# The first tokens of all rows are slow.
_FIRST_SPEED_S = 2.0
# Rows while it runs, at the end, and of a sample.
_LATEST, _FIRST, _SAMPLE = 5, 10, 50
# References of the template in the table, and errors and labels below it.
_COLUMNS, _ERRORS, _LABELS = 4, 5, 5
_CELL, _ANSWER, _ERROR = 40, 120, 300  # characters
_PENDING = "…"
_PARAGRAPH = "margin-top: 0.6em;"
_BAR = "margin-bottom: 0.4em;"
MISSING = "not sent: a value is missing"


class MapView:
    """Shows a map in an output that is updated in place; without one, in a line of a terminal."""

    def __init__(
        self,
        run: MapRun,
        area: LiveArea | None,
        *,
        show_footer: bool = True,
        stored_in: str = "",
        column: str | None = None,
        label: str = "",
    ) -> None:
        """`stored_in` is where the answers will be, in a `column`; `label` is the name of a job."""
        self._run, self._area, self._show_footer = run, area, show_footer
        self._column = column
        self._state = f"{label or shown_name(run.model)}: incomplete so far"
        if stored_in:
            self._state += f" · when complete: {stored_in}, unless the kernel restarts"
        self._line, self._next, self._end = TerminalLine(), 0.0, 0

    def draw(self) -> None:
        """Show the progress and the latest rows, at most four times a second."""
        if self.pause() > 0:
            return
        self._next = time.monotonic() + _PERIOD_S
        progress = self._run.progress
        text = progress_line(self._run, progress)
        if self._area is None:
            self._line.show(f"{self._run.model} · {text}")
            return
        latest = self._latest(progress)
        tables = [self._table(latest)] if latest else []
        page = progress_bar(text, progress, _BAR) + "".join(t._repr_html_() for t in tables)
        lines = [text, *map(repr, tables), self._state]
        self._area.show("\n".join(lines), page + muted(self._state), more=True)

    def pause(self) -> float:
        """Return the time until the next update."""
        wait = self._next - time.monotonic()
        return wait if self._area is None else min(max(wait, self._area.wait), _PERIOD_S)

    def finish(self, lines: Iterable[str] = ()) -> None:
        """Draw the first rows, what failed or is incomplete, an estimate, and lines about the result."""
        run = self._run
        count = min(len(run.mapped), _SAMPLE if run.is_sample else _FIRST)
        table = self._table(range(count), len(run.mapped) - count)
        notes = list(_problems(run))
        estimate = estimate_line(run.mapped.estimate) if run.state == "done" else ""
        about = [*_missing(run), *lines, *([footer(run)] if self._show_footer else [])]
        if self._area is None:
            self._line.clear()
            texts = [repr(table), *(f"Note: {note}" for note in notes), estimate]
            write("".join(f"{text}\n" for text in texts if text))
            sys.stdout.write("".join(f"{dimmed(f'[{line}]')}\n" for line in about))
            sys.stdout.flush()
            return
        page = table._repr_html_() + (noticed(*notes) if notes else "")
        page += f'<div style="{_PARAGRAPH}">{html.escape(estimate)}</div>' if estimate else ""
        page += "".join(map(muted, about))
        self._area.show("\n".join(filter(None, [repr(table), *notes, estimate, *about])), page)

    def clear(self) -> None:
        """Clear what is shown, where nothing was sent."""
        self._line.clear()
        if self._area is not None:
            self._area.clear()

    def _latest(self, progress: MapProgress) -> range:
        """Return the positions up to the furthest row with an answer."""
        # Rows with a missing value end far ahead of those that are sent.
        sent = (row.position for row in progress.latest if row.outcome.state != "missing")
        self._end = max(self._end, *(position + 1 for position in sent), 0)
        return range(max(0, self._end - _LATEST), self._end)

    def _table(self, positions: Iterable[int], more: int = 0) -> Table:
        run = self._run
        answer_type = run.mapped.answer_type
        fields = answer_type.fields[:_COLUMNS] if answer_type is not None else ()
        references = (shortened(one, _CELL) for one in run.references[:_COLUMNS])
        names = run.mapped.answer_columns(self._column)
        heads = ["index", *references, *(shortened(n, _CELL) for n in names[: len(fields) or 1])]
        rows = []
        for position in positions:
            label, *texts = (shortened(text, _CELL) for text in run.shown(position))
            answers = _answers(run.mapped, position, fields)
            rows.append([label, *texts[:_COLUMNS], *answers])
        return Table(heads, rows, f"… and {counted(more, 'more row')}" if more else "")


def _answers(mapped: Mapped, position: int, fields: Sequence[str]) -> list[str]:
    """Return the cells of the answer of a row: one for each field of its value, or one."""
    outcome = mapped.outcome(position)
    value = None if outcome is None or mapped.answer_type is None else mapped.plain(outcome)
    if value is None or outcome is None:
        return [_answer(outcome), *("" for _ in fields[1:])]
    if fields:
        return [shortened(_plain(value.get(name)), _ANSWER) for name in fields]
    share = dict(outcome.probabilities).get(outcome.text)
    return [shortened(_plain(value), _ANSWER) + (f" ({share:.2f})" if share is not None else "")]


def _plain(value: object) -> str:
    """Return a value of JSON in a cell."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _answer(outcome: Outcome | None) -> str:
    """Return the cell of a row in the column of answers."""
    if outcome is None:
        return _PENDING
    if outcome.state == "failed":
        return f"failed: {shortened(outcome.error, _ANSWER)}"
    if outcome.finish_reason is None:
        return MISSING
    text = shortened(outcome.text, _ANSWER) or "(empty)"
    if outcome.finish_reason == "length":
        tokens = outcome.usage.completion_tokens
        return f"{text} · cut off{f' at {counted(tokens)}' if tokens else ''}"
    label = incomplete_label(outcome.finish_reason)
    return f"{text} · {label}" if label else text


def progress_bar(text: str, progress: MapProgress, style: str = "") -> str:
    """Return a progress bar in HTML beside a line about a map, which is broken between its counts."""
    sent = progress.total - progress.missing if progress.total else 0
    share = progress.done / sent if sent else None
    whole = " · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in text.split(" · "))
    return progress_html(whole, share, style)


def progress_line(run: MapRun, progress: MapProgress) -> str:
    """Return ``20 of 60 rows · 31 being written · 2,300 tokens · 190 tokens/s · 12 s · 21 s left``."""
    done, total = progress.done, progress.total
    parts = [counted(done, "row") if total is None else f"{done:,} of {counted(total, 'row')}"]
    if progress.writing:
        parts.append(f"{progress.writing:,} being written")
    if progress.rows_per_s is not None:
        parts.append(f"{_number(progress.rows_per_s)} rows/s")
    if progress.completion_tokens:
        parts.append(counted(progress.completion_tokens))
    if progress.tokens_per_s is not None:
        parts.append(f"{_number(progress.tokens_per_s)} tokens/s")
    if progress.seconds >= 1:
        parts.append(duration(progress.seconds))
    return " · ".join([*parts, *_left(run, progress), *_counts(progress)])


def _left(run: MapRun, progress: MapProgress) -> Iterator[str]:
    """Yield the time that the other rows take, or less, if even the longest answers take less."""
    expected, most = progress.eta_s, run.max_new_tokens
    total, speed = progress.total, progress.tokens_per_s
    if total and most and speed and progress.seconds >= _FIRST_SPEED_S:
        rows = total - progress.done - progress.missing
        longest = (rows * most - progress.writing_tokens) / speed
        if rows and (expected is None or longest < expected):
            yield f"at most {duration(longest)} left"
            return
    if expected:
        yield f"{duration(expected)} left"


def _counts(progress: MapProgress) -> Iterator[str]:
    for name in ("failed", "cut", "missing", "cached"):
        if count := getattr(progress, name):
            yield f"{count:,} {name}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Return ``40 s``, ``12 min`` or ``1 h 5 min``."""
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def footer(run: MapRun) -> str:
    """Return the model, the counts, the tokens, the time and the speed of a map in one line."""
    progress, cost = run.progress, run.mapped.usage.cost
    total, amount = run.mapped.sampled_from, run.amount
    if total is not None:
        amount = f"sample: {progress.done:,} of {counted(total, 'row')}"
    parts = [shown_name(run.model), amount, *_counts(progress)]
    sent, generated = progress.prompt_tokens, progress.completion_tokens
    if sent is not None and generated is not None:
        parts.append(f"{sent:,} → {counted(generated)}")
    parts.append(f"{progress.seconds:.1f} s")
    if generated and progress.seconds:
        parts.append(f"{_number(generated / progress.seconds)} tokens/s")
    if cost is not None:
        parts.append(dollars(cost))
    if again := run.mapped.second_tries:
        parts.append(f"{again:,} at the second try")
    return " · ".join(parts)


def estimate_line(estimate: Estimate | None) -> str:
    """Return what all rows need according to a sample; an empty string if there is no estimate."""
    if estimate is None:
        return ""
    named = (
        (estimate.prompt_tokens, "prompt tokens"),
        (estimate.completion_tokens, "generated tokens"),
    )
    parts = [f"{_rounded(count):,} {name}" for count, name in named if count is not None]
    if estimate.cost is not None:
        parts.append(dollars(estimate.cost))
    least, most = duration(estimate.least_seconds), duration(estimate.seconds)
    range_note = ", depending on how many rows the model answers at once" if least != most else ""
    parts.append(f"{most if least == most else f'{least} to {most}'}{range_note}")
    return (
        f"All {counted(estimate.rows, 'row')}: about {', '.join(parts)}. To send them, remove --sample"
        " and run the cell again."
    )


def _rounded(value: float) -> int:
    """Return a number with two digits: an estimate is not more exact."""
    number = round(value)
    return round(number, 2 - len(str(number)))


def _problems(run: MapRun) -> Iterator[str]:
    """Yield a line about each error, and about the answers that are cut off or were not requested."""
    mapped, errors = run.mapped, list(run.mapped.errors.items())
    for error, positions in errors[:_ERRORS]:
        rows = counted(len(positions), "row")
        text = shortened(error, _ERROR)
        end = "" if text.endswith((".", "…", "!", "?")) else "."
        yield f"{rows} failed: {text}{end} Example: {_example(run, positions[0])}"
    if more := errors[_ERRORS:]:
        count = sum(len(positions) for _, positions in more)
        yield f"{counted(count, 'row')} failed with {counted(len(more), 'other error')}."
    if cut := mapped.cut:
        reasons = {outcome.finish_reason for i in cut if (outcome := mapped.outcome(i)) is not None}
        limit = " --max-new-tokens is the limit." if reasons == {"length"} else ""
        yield f"{counted(len(cut), 'answer')} cut off: {_labels(run, cut)}.{limit}"
    if run.done and (pending := len(mapped.pending)):
        yield f"{counted(pending, 'row')} without an answer. Run the cell again to go on with them."


def _missing(run: MapRun) -> Iterator[str]:
    if missing := run.mapped.missing:
        rows = counted(len(missing), "row")
        yield f"{rows} not sent, because a value is missing: {_labels(run, missing)}"


def _example(run: MapRun, position: int) -> str:
    """Return the label of a row and its values in one line."""
    label, *texts = run.shown(position)
    named = zip(run.references[:_COLUMNS], texts, strict=False)
    values = ", ".join(f"{name}: {shortened(text, _CELL)}" for name, text in named if text)
    return f"row {_label(run, position, label)}{f' ({values})' if values else ''}"


def _labels(run: MapRun, positions: Sequence[int]) -> str:
    labels = [_label(run, at, run.shown(at)[0]) for at in positions[:_LABELS]]
    more = f" and {len(positions) - _LABELS:,} more" if len(positions) > _LABELS else ""
    return f"row{'s' * (len(positions) > 1)} {', '.join(labels)}{more}"


def _label(run: MapRun, position: int, label: str) -> str:
    """Return the label of a row, with its position if other rows may have the same label."""
    return shortened(label, _CELL) + (f" at position {position:,}" if run.repeats_labels else "")
