"""The values of ``-p key=value``: JSON where they are JSON, else text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from llm_magic.errors import OptionError

# An object or a list whose first item is a string. `[a-z]+` and `{3}` are regular expressions.
_LIKE_JSON = re.compile(r"""[\[{][\[{\s]*["']""")
# Servers and the encoders of JSON give up far beyond this.
_DEEPEST = 64
_SHOWN = 40
_BLANKS = " \t\r\n"


class _NoNumber(ValueError):
    """A number that Python's parser accepts and that is no JSON, or no float."""


def _constant(text: str) -> NoReturn:
    raise _NoNumber(f"{text} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NoNumber(f"{text[:_SHOWN]} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float)


def json_end(line: str, start: int, name: str) -> int | None:
    """Return where the JSON value that begins at `start` ends, or None if the word there is text.

    Raises `OptionError` for what begins as an object or a list of strings and is not valid.
    """
    is_meant = _LIKE_JSON.match(line, start) is not None
    try:
        value, end = _DECODER.raw_decode(line, start)
    except json.JSONDecodeError as error:
        if is_meant:
            _refuse(line[start:], name, error.msg)
        return None
    except ValueError as error:
        # A constant, or more digits than Python reads as a number.
        if is_meant:
            _refuse(line[start:], name, str(error).partition(":")[0])
        return None
    except RecursionError:
        _refuse(line[start:], name, "nested too deeply")
    if _is_deep(value):
        _refuse(line[start:], name, "nested too deeply")
    if line[end : end + 1].strip(_BLANKS):
        if is_meant:
            _refuse(line[start:], name, "something follows its end")
        return None
    return end


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _items(outer)]
        if not level:
            return False
    return True


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse(text: str, name: str, why: str) -> NoReturn:
    text = " ".join(text.split())
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    raise OptionError(
        f"-p {name}: this is no valid JSON: {shown} ({why}). Strings and names stand in double quotes."
    )
