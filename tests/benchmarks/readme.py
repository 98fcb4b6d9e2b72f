"""The README's table: where and when it was taken, and of each benchmark what is compared."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.report import Row, Table, number

START = "<!-- the benchmarks: scripts/bench --readme -->"
END = "<!-- end of the benchmarks -->"
_WIDTH = 130
_VERSIONS = ("torch", "transformers", "ipykernel", "transformers serve", "llama.cpp", "vLLM")
_CLIENTS = ("openai", "litellm", "jupyter_ai_magics", "jupyter_ai_magic_commands")


def write(file: Path, about: Mapping[str, str], tables: Sequence[Table]) -> None:
    """Put the table between its two markers, in place of the old one."""
    text = file.read_text(encoding="utf-8")
    section = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    made = f"{START}\n{markdown(about, tables)}\n{END}"
    changed, count = section.subn(lambda _old: made, text)
    assert count == 1, f"{file.name} has no place for the benchmarks between {START} and {END}"
    file.write_text(changed, encoding="utf-8")


def markdown(about: Mapping[str, str], tables: Sequence[Table]) -> str:
    """Return a paragraph about the machine and its noise, and the table, folded."""
    shares = [share for table in tables for share in table.others]
    noise = (
        f"other processes took {statistics.median(shares):.1%} of the CPU (most: {max(shares):.0%})"
    )
    judged = [row for table in tables for row in table.rows if row.met is not None]
    met = sum(bool(row.met) for row in judged)
    versions = ", ".join(f"{name} {about[name]}" for name in _VERSIONS + _CLIENTS if name in about)
    days = sorted({table.taken[:10] for table in tables})
    taken = " to ".join(dict.fromkeys((days[0], days[-1])))
    heading = (
        f"Taken {taken} on {about['cpu']}, {about['memory']}, Python {about['python']};"
        f" {noise}. {met} of {len(judged)} targets met. Medians of rounds side by side. {versions}."
    )
    return "\n".join(
        [
            *textwrap.wrap(heading, _WIDTH, break_on_hyphens=False),
            "",
            "<details><summary>The figures</summary>",
            "",
            "| | median | smallest to largest | target |",
            "| --- | --- | --- | --- |",
            *(line for table in tables for line in _lines(table)),
            "",
            "</details>",
        ]
    )


def shown_rows(table: Table) -> list[Row]:
    """Return the rows that the README shows: what has a target, else what is a ratio; all that miss.

    Everything else is in the table that is printed and in the JSON.
    """
    judged = any(row.target for row in table.rows)
    return [
        row
        for row in table.rows
        if not row.values or (row.target is not None if judged else row.unit == "x")
    ]


def _lines(table: Table) -> Iterator[str]:
    noisy = " (noisy)" if table.noisy else ""
    yield f"| **{escaped(table.title)}**{noisy} | | | |"
    for row in shown_rows(table):
        yield f"| {escaped(row.name)} | {' | '.join(_cells(row))} |"


def _cells(row: Row) -> tuple[str, str, str]:
    if row.median is None:
        return escaped(row.note), "", ""
    unit = "" if row.unit == "x" else f" {row.unit}"
    spread = f"{number(min(row.values))} to {number(max(row.values))}"
    target = str(row.target) if row.target else ""
    return (
        f"{number(row.median)}{unit}",
        spread,
        target if row.met is not False else f"{target}: missed",
    )


def escaped(text: str) -> str:
    """Keep a name from being read as Markdown."""
    return re.sub(r"([|<>_*`])", r"\\\1", text)
