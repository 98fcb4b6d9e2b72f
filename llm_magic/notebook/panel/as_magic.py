"""What was done with the mouse, as the magic that does the same; pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llm_magic.backends.registry import load_specs
from llm_magic.config.option_spec import OptionSpec
from llm_magic.text.escapes import escape


def load_line(model: str | None, options: Mapping[str, Any], *, keep: bool = False) -> str:
    """Return the ``%llm_load`` of a load."""
    words = ["%llm_load", *([_argument(model)] if model else [])]
    words += _flags(options, load_specs())
    return " ".join([*words, *(["--keep"] if keep else [])])


def config_line(changes: Mapping[str, Any]) -> str:
    """Return the ``%llm_config`` of some changes."""
    words: list[str] = []
    for name, value in changes.items():
        several = value if isinstance(value, tuple) and value else (value,)
        words += [f"{name}={_value(one)}" for one in several]
    return " ".join(["%llm_config", *words])


def ask_cell(prompt: str, chat: str | None = None) -> str:
    """Return the ``%%llm`` cell of a question."""
    # Braces mean values in a cell, and themselves in a panel.
    literal = " --literal" if "{" in prompt else ""
    # IPython takes away what looks like its own prompt, if it stands right below.
    gap = "\n" if prompt.lstrip().startswith((">>>", "In [", "...")) else ""
    return f"%%llm{f' -c {_argument(chat)}' if chat else ''}{literal}\n{gap}{prompt}"


def _flags(options: Mapping[str, Any], known: Mapping[str, OptionSpec]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        spec = known[name]
        # A default, too: it was chosen in the place of what the settings say.
        if spec.flag is None or value is False:
            continue
        words.append(spec.flag.names[0])
        if not isinstance(value, bool):
            words.append(_argument(str(value)))
    return words


def _value(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return quoted(escape(str(value)))


def quoted(word: str) -> str:
    """Return a word as one word among others, where backslashes mean themselves."""
    if word and not any(c in word for c in " \t\n\"'?"):
        return word
    if "'" not in word:
        return f"'{word}'"
    return f'"{word}"' if '"' not in word else shlex.quote(word)


def _argument(word: str) -> str:
    """Return a word of a magic's line, where a # at the beginning of a word begins a comment."""
    written = quoted(word)
    return f"'{written}'" if written.startswith("#") else written
