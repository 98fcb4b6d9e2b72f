"""Parse the values of ``-p key=value``: JSON where they are valid JSON, else text."""

from __future__ import annotations

import json
import re
from typing import NoReturn

from llm_magic.errors import OptionError
from llm_magic.text import STRICT_JSON, depth_of

# An object or a list whose first item is a string: `[a-z]+` and `{3}` may be regular expressions.
_LIKE_JSON = re.compile(r"""[\[{][\[{\s]*["']""")
# Servers and JSON encoders fail only at much deeper nesting.
_MAX_DEPTH = 64
_MAX_SHOWN = 40
_BLANKS = " \t\r\n"


def json_end(line: str, start: int, name: str) -> int | None:
    """Return the end of the JSON value that starts at `start`, or None if the word is plain text.

    Raises `OptionError` for an invalid object or list of strings.
    """
    is_json = _LIKE_JSON.match(line, start) is not None
    try:
        value, end = STRICT_JSON.raw_decode(line, start)
    except json.JSONDecodeError as error:
        if is_json:
            _raise_invalid(line[start:], name, error.msg)
        return None
    except ValueError as error:
        # A constant such as NaN, or more digits than Python parses as a number.
        if is_json:
            _raise_invalid(line[start:], name, str(error).partition(":")[0])
        return None
    except RecursionError:
        _raise_invalid(line[start:], name, "nested too deeply")
    if depth_of(value, _MAX_DEPTH) >= _MAX_DEPTH:
        _raise_invalid(line[start:], name, "nested too deeply")
    if line[end : end + 1].strip(_BLANKS):
        if is_json:
            _raise_invalid(line[start:], name, "unexpected text after its end")
        return None
    return end


def _raise_invalid(text: str, name: str, reason: str) -> NoReturn:
    text = " ".join(text.split())
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    raise OptionError(
        f"-p {name}: invalid JSON: {shown} ({reason}). Put strings and keys in double quotes."
    )
