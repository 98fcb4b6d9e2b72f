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
_CODE = f"{_CELL} font-family: var(--jp-code-font-family, monospace);"
_LABEL = f"{_CODE} white-space: nowrap; opacity: 0.7;"
_CONTENT = f"{_CODE} overflow-wrap: anywhere;"
# Not striped, as JupyterLab does: a message may look like several rows.
_LINE = "background: none; border-bottom: 1px solid var(--jp-border-color2, #bbb);"
_NOTE = "opacity: 0.7; font-size: 0.85em;"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows below column heads, with an optional note at the end.

    `verbatim`: the cells are text to check character by character, so they are monospace.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    verbatim: bool = False

    def __repr__(self) -> str:
        return self.fitted(None)

    def fitted(self, width: int | None) -> str:
        """Return the table as text; if it is wider than `width`, the last two columns are wrapped."""
        lines = [self.columns, *self.rows] if any(self.columns) else list(self.rows)
        lines = [part for line in lines for part in _lines(line)]
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
        gap = [""] if self.verbatim else []
        return "\n".join([*text, *([*gap, visible(self.note)] if self.note else [])])

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="{_CELL}">{html.escape(visible(c))}</th>' for c in self.columns)
        body = "".join(map(self._row_html, self.rows))
        top = f"<thead><tr>{head}</tr></thead>" if any(self.columns) else ""
        style = f"{_NOTE} white-space: pre-line;" if self.verbatim else _NOTE
        note = f'<div style="{style}">{html.escape(visible(self.note))}</div>' if self.note else ""
        table = f"<table>{top}<tbody>{body}</tbody></table>" if top or body else ""
        return f'<div class="{NO_MATH}">{table}{note}</div>'

    def _row_html(self, row: Sequence[str]) -> str:
        styles = [_CELL] * len(row)
        if self.verbatim:
            styles = [_LABEL] * (len(row) - 1) + [_CONTENT]
        cells = "".join(
            f'<td style="{style}">{html.escape(visible(cell))}</td>'
            for style, cell in zip(styles, row, strict=True)
        )
        return f'<tr style="{_LINE}">{cells}</tr>' if self.verbatim else f"<tr>{cells}</tr>"


def _lines(row: Sequence[str]) -> list[list[str]]:
    """Return a row as one row for each line of its longest cell."""
    cells = [visible(cell).split("\n") for cell in row]
    return [list(line) for line in itertools.zip_longest(*cells, fillvalue="")]


def _wrapped(line: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """Return a row as several rows whose cells are no wider than their columns."""
    cells = [textwrap.wrap(c, max(1, w)) or [""] for c, w in zip(line, widths, strict=True)]
    return [list(row) for row in itertools.zip_longest(*cells, fillvalue="")]
