"""What was done with the mouse, as the magic that does the same; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_magic.config import LoadConfig
from llm_magic.specs import OptionSpec, specs


def load_line(model: str | None, options: Mapping[str, Any], *, keep: bool = False) -> str:
    """Return the ``%llm_load`` of a load."""
    words = ["%llm_load", *([_quoted(model)] if model else [])]
    words += _flags(options, specs(LoadConfig))
    return " ".join([*words, *(["--keep"] if keep else [])])


def config_line(changes: Mapping[str, Any]) -> str:
    """Return the ``%llm_config`` of some changes."""
    return " ".join(["%llm_config", *(f"{name}={_value(v)}" for name, v in changes.items())])


def ask_cell(prompt: str, chat: str | None = None) -> str:
    """Return the ``%%llm`` cell of a question."""
    # Braces mean values in a cell, and themselves in a panel.
    raw = " --raw" if "{" in prompt else ""
    return f"%%llm{f' -c {_quoted(chat)}' if chat else ''}{raw}\n{prompt}"


def _flags(options: Mapping[str, Any], known: Mapping[str, OptionSpec]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        spec = known[name]
        if spec.flag is None or value == spec.default:
            continue
        words.append(spec.flag.names[0])
        if not isinstance(value, bool):
            words.append(_quoted(str(value)))
    return words


def _value(value: object) -> str:
    if value is None or value == ():
        return "none"
    return f"{value:g}" if isinstance(value, float) else _quoted(str(value))


def _quoted(word: str) -> str:
    """Return a word as one word of a magic line, where backslashes mean themselves."""
    if word and not any(c in word for c in " \t\"'"):
        return word
    return f"'{word}'" if "'" not in word else f'"{word}"'
