"""Help pages of the magics (``%magic?``), generated from the table of magics."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from llm_magic.notebook.arguments.magic_options import (
    HELP,
    MAGICS,
    Argument,
    Magic,
    option_arguments,
    option_specs,
)

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec

_WIDTH = 92
# The column of the descriptions; a longer option has its own line.
_COLUMN = 30
_NO_BREAK = "\N{NO-BREAK SPACE}"


def page(name: str) -> str:
    """Return the help page of a magic: summary, usage, options and examples."""
    magic = MAGICS[name]
    blocks = [magic.summary, f"Usage:  {magic.usage}"]
    for title, rows in _groups(magic):
        if rows:
            blocks.append("\n".join([title, *rows] if title else rows))
    if magic.example:
        title = "Examples:" if "\n\n" in magic.example else "Example:"
        blocks += [title, textwrap.indent(magic.example, "    ")]
    return "\n\n".join(blocks) + "\n"


def _groups(magic: Magic) -> Iterator[tuple[str, list[str]]]:
    """Yield each group of options with its title."""
    table, options = option_specs(magic.options), option_arguments(magic.options)
    positional = (magic.positional,) if magic.positional is not None else ()
    yield "", _rows((*positional, *magic.arguments, HELP), table)
    if magic.options == "session":
        yield (
            "Settings:",
            [
                _row(f"  {name}", _sentence(spec.help, [*_limits(spec), *_backends(spec)]))
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
        return f"With any -b except {', '.join(others)}"
    return f"With -b {', '.join(supporting)}"


def _rows(
    arguments: Iterable[Argument], table: Mapping[str, OptionSpec], *, backends: bool = True
) -> list[str]:
    """Return a row for each argument; with `backends`, it lists those that support the option."""
    rows = []
    for argument in arguments:
        spec = table.get(argument.dest)
        facts = [", ".join(argument.choices)] if argument.choices else []
        if spec is not None:
            facts += _limits(spec)
            facts += _backends(spec) if backends else []
        rows.append(_row(_label(argument), _sentence(argument.help, facts)))
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
        yield f"not {', '.join(others)}"
    elif others:
        yield f"only {', '.join(spec.backends)}"


def _sentence(text: str, facts: list[str]) -> str:
    """Return a text followed by facts; no fact is wrapped that fits into a line."""
    fits = _WIDTH - _COLUMN - 2
    joined = "; ".join(f.replace(" ", _NO_BREAK) if len(f) <= fits else f for f in facts)
    return f"{text} ({joined})" if facts else text


def _row(label: str, text: str) -> str:
    margin = " " * _COLUMN
    wrapped = textwrap.wrap(
        text, _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
    lines = [line.replace(_NO_BREAK, " ") for line in wrapped]
    if len(label) > _COLUMN - 2:
        return "\n".join([label, *lines])
    return "\n".join([label.ljust(_COLUMN) + lines[0].lstrip(), *lines[1:]])


def _label(argument: Argument) -> str:
    """Return the names of an argument; long names are aligned."""
    if not argument.names[0].startswith("-"):
        return f"  {argument.metavar}"
    indent = "      " if argument.names[0].startswith("--") else "  "
    return f"{indent}{', '.join(argument.names)} {argument.metavar}".rstrip()
