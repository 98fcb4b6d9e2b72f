"""Help pages of the magics (``%magic?``), generated from the table of magics."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from llm_magic.notebook.arguments.table import MAGICS, Argument, Magic, dest, option_arguments

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec

_WIDTH = 92
# The column of the descriptions; a longer option has its own line.
_COLUMN = 30
_ONLY_LOCAL = ("local",)
_NO_BREAK = "\N{NO-BREAK SPACE}"


def page(name: str) -> str:
    """Return the help page of a magic: summary, usage, options and examples."""
    magic = MAGICS[name]
    blocks = [magic.summary, f"Usage:  {magic.usage}"]
    blocks += [_block(title, rows) for title, rows in _groups(magic) if rows]
    if magic.example:
        title = "Examples:" if "\n\n" in magic.example else "Example:"
        blocks += [title, textwrap.indent(magic.example, "    ")]
    return "\n\n".join(blocks) + "\n"


def _groups(magic: Magic) -> Iterator[tuple[str, list[str]]]:
    """Yield each group of options with its title."""
    table = _specs(magic)
    positional = (magic.positional,) if magic.positional is not None else ()
    yield "", _rows((*positional, *magic.arguments), table)
    if magic.positional is not None and magic.positional.complete == "settings":
        yield "Settings:", _settings()
    options = option_arguments(magic.options)
    if magic.options == "generation":
        yield (
            "Generation options (for this call; %llm_config sets them for the session):",
            _rows(options, table),
        )
    elif magic.options == "loading":
        only = {argument: table[dest(argument)].only for argument in options}
        yield "Backend:", _rows([a for a in options if not only[a]], table)
        local = [a for a in options if only[a] == _ONLY_LOCAL]
        yield "Local models:", _rows(local, table, backends=False)
        remote = [a for a in options if only[a] and only[a] != _ONLY_LOCAL]
        servers = max((only[a] for a in remote), key=len)
        yield f"Models on a server ({', '.join(servers)}):", _rows(remote, table, usual=servers)


def _specs(magic: Magic) -> Mapping[str, OptionSpec]:
    if not magic.options:
        return {}
    from llm_magic.config.option_spec import specs
    from llm_magic.config.settings import GenerationConfig, LoadConfig

    return specs(LoadConfig if magic.options == "loading" else GenerationConfig)


def _settings() -> list[str]:
    from llm_magic.config.option_spec import specs
    from llm_magic.config.settings import GenerationConfig

    return [
        _row(f"  {name}", _sentence(spec.help, [*_limits(spec), *_backends(spec)]))
        for name, spec in specs(GenerationConfig).items()
        # A setting on a line is a text or a number.
        if not isinstance(spec.default, Mapping)
    ]


def _block(title: str, rows: list[str]) -> str:
    return "\n".join([title, *rows] if title else rows)


def _rows(
    arguments: Iterable[Argument],
    table: Mapping[str, OptionSpec],
    *,
    backends: bool = True,
    usual: tuple[str, ...] = (),
) -> list[str]:
    """Return a row for each argument; `backends` adds its backends unless they are the `usual` ones."""
    rows = []
    for argument in arguments:
        spec = table.get(dest(argument))
        facts = [", ".join(argument.choices)] if argument.choices else []
        if spec is not None:
            facts += _limits(spec)
            facts += _backends(spec) if backends and spec.only != usual else []
        rows.append(_row(_label(argument), _sentence(argument.help, facts)))
    return rows


def _limits(spec: OptionSpec) -> Iterator[str]:
    """Yield the range and the default of an option."""
    in_help = bool(spec.choices) and all(choice in spec.help for choice in spec.choices)
    if spec.range and not in_help:
        yield spec.range
    if isinstance(spec.default, int | float | str) and not isinstance(spec.default, bool):
        yield f"default {spec.default}"


def _backends(spec: OptionSpec) -> Iterator[str]:
    """Yield the backends that support an option, unless all do."""
    from llm_magic.backends.registry import BACKENDS

    others = [name for name in BACKENDS if not spec.works_on(name)]
    if others and len(others) < len(spec.only):
        yield f"not {', '.join(others)}"
    elif others:
        yield f"only {', '.join(spec.only)}"


def _sentence(text: str, facts: list[str]) -> str:
    """Return a text followed by facts; no fact is wrapped."""
    joined = "; ".join(fact.replace(" ", _NO_BREAK) for fact in facts)
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
