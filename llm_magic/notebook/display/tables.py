"""Small tables, as HTML for notebooks and as aligned text for terminals and diffs."""

from __future__ import annotations

import html
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_magic.text import visible

# Typeset the formulas found in answers and nothing else: MathJax takes `$5 and $10` for one. The second
# name is the one of MathJax 2, in notebooks exported to HTML.
MATH = "mathjax_process tex2jax_process"
# No MathJax here: names and errors are untrusted, and TeX can contain links and styles.
NO_MATH = "mathjax_ignore tex2jax_ignore"
_CELL = (
    "text-align: left; padding: 0.15em 1em 0.15em 0; vertical-align: top; white-space: pre-wrap;"
)
# A longer cell is not squeezed into a column of a few letters; a long word in it is wrapped.
_LONG_CELL = f"{_CELL} min-width: 11em; overflow-wrap: anywhere;"
_SHORT = 24  # characters of a cell that is not wrapped on a page
_GAP = 2  # characters between two columns
_LEAST = 24  # characters to which a wide column is narrowed at most
_SHORT_CELL = f"{_CELL} white-space: nowrap;"
# JupyterLab removes the second family from the outputs of a notebook that it does not trust yet.
_CODE = f"{_CELL} font-family: monospace; font-family: var(--jp-code-font-family, monospace);"
# As narrow as its text, beside lines that scroll.
_LABEL = f"{_CODE} white-space: nowrap; width: 1%; opacity: 0.7;"
_CONTENT = f"{_CODE} overflow-wrap: anywhere;"
# JupyterLab lays out tables with columns of equal widths.
_AUTO = "table-layout: auto;"
_WIDE = f"{_AUTO} width: 100%;"
# Lines in columns keep their line breaks and scroll; without the width, they would make the table wider.
# The right edge fades out, because many frontends show no scroll bar before someone scrolls.
_ALIGNED = (
    "white-space: pre; overflow-x: auto; width: 0; min-width: 100%;"
    " mask-image: linear-gradient(to left, transparent, black 3em);"
)
# The end of the longest line can be scrolled out of the edge that fades.
_LINES = "display: inline-block; padding-right: 3em;"
# Browsers break lines at hyphens.
_OPTION = re.compile(r"\(?--[a-z]+(?:-[a-z]+)*\)?")
_IN_COLUMNS = re.compile(r"(?:[^\s.!?:;,]|\.\.) {2,}\S|[│┆╞└┌]|^ {3,}\S")
_BLANK_LINE = re.compile(r"(?:\r\n?|\n)(?=[ \t]*[\r\n])")
_SHORT_LINE = 40  # characters of a line that fits in any width
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

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Fit the table into the terminal; a notebook stores it in its full width."""
        printer.text(self.fitted(terminal_width()))

    def fitted(self, width: int | None) -> str:
        """Return the table as text; if it is wider than `width`, its widest columns are wrapped."""
        lines = [self.columns, *self.rows] if any(self.columns) else list(self.rows)
        lines = [part for line in lines for part in _lines(line)]
        widths = [
            max((len(line[i]) for line in lines), default=0) for i in range(len(self.columns))
        ]
        note = visible(self.note)
        if width is not None and lines:
            widths = _narrowed(widths, lines, width)
            lines = [part for line in lines for part in _wrapped(line, widths)]
            note = "\n".join(_filled(line, width) for line in note.split("\n"))
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        gap = [""] if self.verbatim else []
        return "\n".join([*text, *([*gap, note] if note else [])])

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="{_CELL}">{html.escape(visible(c))}</th>' for c in self.columns)
        body = "".join(map(self._row_html, self.rows))
        top = f"<thead><tr>{head}</tr></thead>" if any(self.columns) else ""
        style = f"{_NOTE} white-space: pre-line;" if self.verbatim else _NOTE
        note = f'<div style="{style}">{html.escape(visible(self.note))}</div>' if self.note else ""
        style = _WIDE if self.verbatim else _AUTO
        table = f'<table style="{style}">{top}<tbody>{body}</tbody></table>' if top or body else ""
        # What is wider than the page scrolls.
        scrolled = f'<div style="overflow-x: auto">{table}</div>' if table else ""
        return one_block(f'<div class="{NO_MATH}">{scrolled}{note}</div>')

    def _row_html(self, row: Sequence[str]) -> str:
        styles = [_SHORT_CELL if len(cell) <= _SHORT else _LONG_CELL for cell in row]
        if self.verbatim:
            styles = [_LABEL] * (len(row) - 1) + [_CONTENT]
        content = _content if self.verbatim else escaped
        cells = "".join(
            f'<td style="{style}">{content(cell)}</td>'
            for style, cell in zip(styles, row, strict=True)
        )
        return f'<tr style="{_LINE}">{cells}</tr>' if self.verbatim else f"<tr>{cells}</tr>"


def one_block(page: str) -> str:
    """Return HTML without blank lines, which looks the same.

    In a notebook that is exported to Markdown, a blank line ends the HTML: what follows would be read as
    Markdown, with the images of a model's text.
    """
    return _BLANK_LINE.sub("&#10;", page)


def escape_text(text: str) -> str:
    """Return text as HTML, for the inside of an element."""
    return html.escape(text, quote=False)


def escaped(text: str) -> str:
    """Return a text as HTML in which no option is broken after its hyphens."""
    span = r'<span style="white-space: nowrap">\g<0></span>'
    return _OPTION.sub(span, html.escape(visible(text)))


def _content(text: str) -> str:
    """Return a text to check as HTML; lines in columns scroll together instead of being wrapped."""
    lines = visible(text).split("\n")
    in_columns = [bool(_IN_COLUMNS.search(line)) for line in lines]
    # The names of an index stand between the head and the rows of a table.
    around = zip([False, *in_columns], [*in_columns[1:], False], lines, strict=False)
    is_row = [
        own or (before and after and 0 < len(line) <= _SHORT_LINE)
        for own, (before, after, line) in zip(in_columns, around, strict=True)
    ]
    ends = ["\n"] * (len(lines) - 1) + [""]
    parts = []
    for row, group in itertools.groupby(zip(is_row, lines, ends, strict=True), lambda one: one[0]):
        several = [line + end for _, line, end in group]
        shown = html.escape("".join(several))
        is_table = row and len(several) > 1
        parts.append(_scrolled(shown) if is_table else shown)
    return "".join(parts)


def _scrolled(shown: str) -> str:
    """Return lines in columns as a box that scrolls."""
    return f'<div style="{_ALIGNED}"><span style="{_LINES}">{shown}</span></div>'


def _lines(row: Sequence[str]) -> list[list[str]]:
    """Return a row as one row for each line of its longest cell."""
    cells = [visible(cell).split("\n") for cell in row]
    return [list(line) for line in itertools.zip_longest(*cells, fillvalue="")]


def terminal_width() -> int | None:
    """Return the width of the terminal; None if stdout is not one, as in a notebook."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _narrowed(widths: list[int], lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the widths of the columns of a table that is at most `width` wide, where that is possible."""
    # The last column has text to type, such as commands: no word of it is broken.
    longest_word = max(len(word) for line in lines for word in [*line[-1].split(), " "])
    least = [min(natural, _LEAST) for natural in widths[:-1]]
    least.append(max(longest_word, min(widths[-1], _LEAST)))
    narrowed = [
        min(natural, max(width, at_least)) for natural, at_least in zip(widths, least, strict=True)
    ]
    for _ in range(sum(narrowed) + _GAP * (len(widths) - 1) - width):
        wide = [i for i, at_least in enumerate(least) if narrowed[i] > at_least]
        if not wide:
            break
        narrowed[max(wide, key=narrowed.__getitem__)] -= 1
    return narrowed


def _wrapped(line: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """Return a row as several rows whose cells are no wider than their columns."""
    cells = [_parts(cell, width) for cell, width in zip(line, widths, strict=True)]
    return [list(row) for row in itertools.zip_longest(*cells, fillvalue="")]


def _parts(text: str, width: int) -> list[str]:
    """Return a line in parts that are no wider than `width`; an indentation stays."""
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(text, max(1, width), subsequent_indent=indent) or [""]


def _filled(text: str, width: int) -> str:
    """Return a line as several ones, without breaking a word."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
