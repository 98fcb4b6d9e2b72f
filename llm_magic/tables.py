"""Small tables that read well in a notebook, in a terminal and in a diff."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

# Typeset no formulas here: names and errors come from elsewhere, and TeX can carry links and styles.
NO_MATH = "mathjax_ignore tex2jax_ignore"
_CELL = "text-align: left; padding: 0.15em 1em 0.15em 0; vertical-align: top;"
_NOTE = "opacity: 0.7; font-size: 0.85em;"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under column heads, with an optional line below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows] if any(self.columns) else list(self.rows)
        widths = [
            max((len(line[i]) for line in lines), default=0) for i in range(len(self.columns))
        ]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*text, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="{_CELL}">{html.escape(c)}</th>' for c in self.columns)
        body = "".join(
            "<tr>"
            + "".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row)
            + "</tr>"
            for row in self.rows
        )
        top = f"<thead><tr>{head}</tr></thead>" if any(self.columns) else ""
        note = f'<div style="{_NOTE}">{html.escape(self.note)}</div>' if self.note else ""
        return f'<div class="{NO_MATH}"><table>{top}<tbody>{body}</tbody></table>{note}</div>'
