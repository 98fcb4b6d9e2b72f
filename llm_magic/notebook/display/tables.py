"""Small tables, as HTML for notebooks and as aligned text for terminals and diffs."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from llm_magic.text import visible

# No MathJax here: names and errors are untrusted, and TeX can contain links and styles.
NO_MATH = "mathjax_ignore tex2jax_ignore"
_CELL = (
    "text-align: left; padding: 0.15em 1em 0.15em 0; vertical-align: top; white-space: pre-wrap;"
)
_NOTE = "opacity: 0.7; font-size: 0.85em;"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows below column heads, with an optional line at the end."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __repr__(self) -> str:
        return self.fitted(None)

    def fitted(self, width: int | None) -> str:
        """Return the table as text; if it is wider than `width`, the last two columns are wrapped."""
        lines = [self.columns, *self.rows] if any(self.columns) else list(self.rows)
        lines = [[visible(cell) for cell in line] for line in lines]
        widths = [
            max((len(line[i]) for line in lines), default=0) for i in range(len(self.columns))
        ]
        if width is not None and sum(widths) + 2 * len(widths) > width and len(widths) > 2:
            available = max(40, width - sum(widths[:-2]) - 2 * (len(widths) - 1))
            # The last column has text to type, such as commands: no word of it is broken.
            longest_word = max(len(word) for line in lines for word in [*line[-1].split(), " "])
            last = max(longest_word, min(widths[-1], available * 2 // 5))
            widths[-2:] = [min(widths[-2], max(available - last, 20)), last]
            lines = [part for line in lines for part in _wrapped(line, widths)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*text, *([visible(self.note)] if self.note else [])])

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="{_CELL}">{html.escape(visible(c))}</th>' for c in self.columns)
        body = "".join(
            "<tr>"
            + "".join(f'<td style="{_CELL}">{html.escape(visible(cell))}</td>' for cell in row)
            + "</tr>"
            for row in self.rows
        )
        top = f"<thead><tr>{head}</tr></thead>" if any(self.columns) else ""
        note = f'<div style="{_NOTE}">{html.escape(visible(self.note))}</div>' if self.note else ""
        table = f"<table>{top}<tbody>{body}</tbody></table>" if top or body else ""
        return f'<div class="{NO_MATH}">{table}{note}</div>'


def _wrapped(line: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """Return a row as several rows whose cells are no wider than their columns."""
    cells = [textwrap.wrap(c, max(1, w)) or [""] for c, w in zip(line, widths, strict=True)]
    return [list(row) for row in itertools.zip_longest(*cells, fillvalue="")]
