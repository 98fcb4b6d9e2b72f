"""The magic that does the same as an action in the panel."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llm_magic.backends.registry import load_specs
from llm_magic.config.option_spec import OptionSpec
from llm_magic.text import escape


def load_line(model: str | None, options: Mapping[str, Any], *, keep: bool = False) -> str:
    """Return the ``%llm_load`` of a load."""
    parts = ["%llm_load", *([_argument(model)] if model else [])]
    parts += _flags(options, load_specs())
    return " ".join([*parts, *(["--keep"] if keep else [])])


def config_line(changes: Mapping[str, Any]) -> str:
    """Return the ``%llm_config`` of changed settings."""
    parts: list[str] = []
    for name, value in changes.items():
        several = value if isinstance(value, tuple) and value else (value,)
        parts += [f"{name}={_value(one)}" for one in several]
    return " ".join(["%llm_config", *parts])


def ask_cell(prompt: str, chat: str | None = None) -> str:
    """Return the ``%%llm`` cell of a prompt."""
    # IPython removes what looks like an input prompt from the start of a cell.
    gap = "\n" if prompt.lstrip().startswith((">>>", "In [", "...")) else ""
    return f"%%llm{f' -c {_argument(chat)}' if chat else ''}\n{gap}{prompt}"


def _flags(options: Mapping[str, Any], known: Mapping[str, OptionSpec]) -> list[str]:
    parts: list[str] = []
    for name, value in options.items():
        spec = known[name]
        # Defaults too: they may replace the values of the settings.
        if not spec.flags or value is False:
            continue
        parts.append(spec.flags[0])
        if not isinstance(value, bool):
            parts.append(_argument(str(value)))
    return parts


def _value(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return quoted(escape(str(value)))


def quoted(word: str) -> str:
    """Return a word with quotes if it needs them; backslashes are kept."""
    if word and not any(c in word for c in " \t\n\"'?"):
        return word
    if "'" not in word:
        return f"'{word}'"
    return f'"{word}"' if '"' not in word else shlex.quote(word)


def _argument(word: str) -> str:
    """Return a word of a magic's line, in which a # at the start of a word starts a comment."""
    text = quoted(word)
    return f"'{text}'" if text.startswith("#") else text
