"""Spells commands and options in messages: magics where they are loaded, Python in other programs."""

from __future__ import annotations

import json
from types import MappingProxyType

# Messages use the short flags; the others are the name of the option.
_SHORT_FLAGS = MappingProxyType(
    {"backend": "-b", "chat": "-c", "device": "-d", "model": "-m", "quantization": "-q"}
)
_has_magics = False


def use_magics(are_loaded: bool) -> None:
    """Set whether the magics are loaded in this process."""
    global _has_magics
    _has_magics = are_loaded


def either(magics: str, python: str) -> str:
    """Return the first text where the magics are loaded, else the second."""
    return magics if _has_magics else python


def command(name: str, argument: str | None = None, /, **options: str | bool | None) -> str:
    """Return a command for a message, without the options that are None or False.

    It is ``%llm_load llama3.2 -b ollama``, or ``llm.load("llama3.2", backend="ollama")``.
    """
    given = [option(key, value) for key, value in options.items() if value]
    if _has_magics:
        return " ".join([f"%llm_{name}", *filter(None, [argument]), *given])
    return f"llm.{name}({', '.join([*map(_in_python, filter(None, [argument])), *given])})"


def option(name: str, value: str | bool | None = None) -> str:
    """Return an option for a message: ``--base-url URL``, or ``base_url="URL"``.

    Without a value it is ``--base-url``, or ``base_url``.
    """
    if not _has_magics:
        return name if value is None else f"{name}={_in_python(value)}"
    flag = _SHORT_FLAGS.get(name) or f"--{name.replace('_', '-')}"
    return f"{flag} {value}" if isinstance(value, str) else flag


def _in_python(value: str | bool) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
