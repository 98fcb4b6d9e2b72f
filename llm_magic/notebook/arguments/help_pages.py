"""Help pages of the magics (``-h``, ``%magic?``), generated from the table of magics."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_magic.notebook.arguments.magic_options import (
    HELP,
    MAGICS,
    Argument,
    Magic,
    option_arguments,
    option_specs,
)
from llm_magic.notebook.display.tables import NO_MATH, terminal_width

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec

_WIDTH = 92
# The column of the descriptions; a longer option has its own line.
_COLUMN = 30
# In a narrower window, each description is below its option.
_LEAST_WIDTH, _INDENT, _SHORT = 76, 8, 40
_NO_BREAK = "\N{NO-BREAK SPACE}"
_MONOSPACE = "margin: 0; white-space: pre-wrap; font-family: var(--jp-code-font-family, monospace);"
# The browser puts a description below its option where both do not fit into one line.
_ROW = "display: flex; flex-wrap: wrap; column-gap: 1em; margin-bottom: 0.4em;"
_OPTION = f"{_MONOSPACE} flex: 0 0 17em;"
_TITLE = "font-weight: 600;"
_DESCRIPTION = "flex: 1 1 20em; max-width: 45em;"

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class HelpPage:
    """The help of a magic, which fits into the terminal or the notebook that displays it."""

    magic: str

    def __repr__(self) -> str:
        return page(self.magic, terminal_width() or _WIDTH)

    def _repr_html_(self) -> str:
        magic = MAGICS[self.magic]
        parts = [_paragraph(magic.summary), _paragraph(f"Usage:  {magic.usage}", _MONOSPACE)]
        for title, rows in _groups(magic):
            parts += [_paragraph(title, _TITLE)] if title and rows else []
            parts.append("".join(_row_html(label.strip(), text) for label, text in rows))
        if magic.example:
            parts += [_paragraph("Examples:", _TITLE), _paragraph(magic.example, _MONOSPACE)]
        return f'<div class="{NO_MATH}">{"".join(parts)}</div>'


def page(name: str, width: int = _WIDTH) -> str:
    """Return the help page of a magic: summary, usage, options and examples."""
    magic, width = MAGICS[name], min(width, _WIDTH)
    blocks = [_filled(magic.summary, width), _filled(f"Usage:  {magic.usage}", width, " " * 8)]
    for title, rows in _groups(magic):
        if rows:
            lines = [_row(label, text, width) for label, text in rows]
            blocks.append("\n".join([_filled(title, width), *lines] if title else lines))
    if magic.example:
        title = "Examples:" if "\n\n" in magic.example else "Example:"
        blocks += [title, textwrap.indent(magic.example, "    ")]
    return "\n\n".join(blocks) + "\n"


def _groups(magic: Magic) -> Iterator[tuple[str, list[Row]]]:
    """Yield each group of options with its title."""
    table, options = option_specs(magic.options), option_arguments(magic.options)
    positional = (magic.positional,) if magic.positional is not None else ()
    yield "", _rows((*positional, *magic.arguments, HELP), table)
    if magic.options == "session":
        yield (
            "Settings:",
            [
                (f"  {name}", _sentence(spec.help, [*_limits(spec), *_backends(spec)]))
                for name, spec in table.items()
            ],
        )
    if magic.options == "generation":
        title = "Generation options (for this call; %llm_config sets them for the session):"
        yield title, _rows(options, table)
    elif magic.options == "loading":
        groups: dict[tuple[str, ...], list[Argument]] = {}
        for option in options:
            groups.setdefault(table[option.dest].backends, []).append(option)
        # First the options of all backends, then the largest group.
        for backends in sorted(groups, key=lambda names: (bool(names), -len(groups[names]))):
            title = f"{_with_backends(backends)}:" if backends else "Backend:"
            yield title, _rows(groups[backends], table, backends=False)


def _with_backends(supporting: tuple[str, ...]) -> str:
    """Return which backends have an option: these, or all others."""
    from llm_magic.backends.registry import names

    others = [name for name in names() if name not in supporting]
    if len(others) < len(supporting):
        return f"With any -b except {' and '.join(others)}"
    return f"With -b {', '.join(supporting)}"


def _rows(
    arguments: Iterable[Argument], table: Mapping[str, OptionSpec], *, backends: bool = True
) -> list[Row]:
    """Return a row for each argument; with `backends`, it lists those that support the option."""
    rows = []
    for argument in arguments:
        spec = table.get(argument.dest)
        facts = [", ".join(argument.choices)] if argument.choices else []
        if spec is not None:
            facts += ["repeatable"] if spec.kind in {"repeated", "pairs"} else []
            facts += _limits(spec)
            facts += _backends(spec) if backends else []
        rows.append((_label(argument), _sentence(argument.help, facts)))
    return rows


def _limits(spec: OptionSpec) -> Iterator[str]:
    """Yield the allowed values of an option, unless its help has them, and its default."""
    in_help = spec.allowed in spec.help and all(choice in spec.help for choice in spec.choices)
    if spec.range and not (in_help and (spec.allowed or spec.choices)):
        yield spec.range
    if isinstance(spec.default, int | float | str) and not isinstance(spec.default, bool):
        yield f"default {spec.default}"


def _backends(spec: OptionSpec) -> Iterator[str]:
    """Yield the backends that support an option, unless all do."""
    from llm_magic.backends.registry import names

    others = [name for name in names() if not spec.works_on(name)]
    if others and len(others) < len(spec.backends):
        yield f"not with -b {', '.join(others)}"
    elif others:
        yield f"only with -b {', '.join(spec.backends)}"


def _sentence(text: str, facts: list[str]) -> str:
    """Return a text followed by facts; a short fact is not wrapped."""
    joined = "; ".join(f.replace(" ", _NO_BREAK) if len(f) <= _SHORT else f for f in facts)
    return f"{text} ({joined})" if facts else text


def _row(label: str, text: str, width: int) -> str:
    column = _COLUMN if width >= _LEAST_WIDTH else _INDENT
    lines = _filled(" " * column + text, width, " " * column)
    if column == _INDENT:
        return f"  {label.strip()}\n{lines}"
    if len(label) > column - 2:
        return f"{label}\n{lines}"
    return label.ljust(column) + lines.lstrip()


def _filled(text: str, width: int, indent: str = "") -> str:
    """Return a text in lines that fit; no word is broken, and later lines start with `indent`."""
    filled = textwrap.fill(
        text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return filled.replace(_NO_BREAK, " ")


def _paragraph(text: str, style: str = "") -> str:
    return f'<p style="{style} margin: 0.75em 0 0.4em;">{html.escape(text)}</p>'


def _row_html(label: str, text: str) -> str:
    option = f'<span style="{_OPTION}">{html.escape(label)}</span>'
    return (
        f'<div style="{_ROW}">{option}<span style="{_DESCRIPTION}">{html.escape(text)}</span></div>'
    )


def _label(argument: Argument) -> str:
    """Return the names of an argument; long names are aligned."""
    if not argument.names[0].startswith("-"):
        return f"  {argument.metavar}"
    indent = "      " if argument.names[0].startswith("--") else "  "
    return f"{indent}{', '.join(argument.names)} {argument.metavar}".rstrip()
