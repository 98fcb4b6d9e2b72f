"""Text for people and files: sizes and counts, escapes, surrogates, control characters made visible.

The functions that make control characters visible are for text of models and servers. A terminal executes
the control characters in what it displays: they clear the screen, overwrite lines, set the clipboard, make
links. JupyterLab executes some of them in streams. Each one is replaced by a visible one, so nothing is
executed and nothing is hidden. Because no escape sequence is parsed, one that arrives in pieces, or that is
not complete, is handled like any other. They are applied where text is displayed: values (`Reply.text`,
chats, exported files) keep every character.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from llm_magic.text.code_blocks import FencedSpan

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


# All controls but newline and tab; what reorders text or ends a line without being a newline; lone
# surrogates, which no output encoding has; tags, which are letters that no terminal displays.
_HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"
    r"\u2028\u2029\u202a-\u202e\u2066-\u2069"
    r"\ud800-\udfff"
    r"\U000e0000-\U000e007f"
)
_UNSAFE = re.compile(rf"\r\n|[{_HIDDEN}]")
_STYLES = re.compile(r"(\x1b\[[0-9;]*m)")
_LINE_END = re.compile(r"[ \t]*\n\s*")
# The messages of Python's parser in terms of what is wrong.
_JSON_PROBLEMS = {
    "Expecting value": "a value is missing",
    "Expecting ',' delimiter": "a comma or the end is missing",
    "Expecting ':' delimiter": "a colon is missing",
    "Expecting property name enclosed in double quotes": "a key in double quotes is missing",
    "Unterminated string starting at": "a string is not closed",
    "Extra data": "there is text after the value",
}
_OPENING, _BRACKET, _INK = re.compile(r"[\[{]"), re.compile(r"[\[\]{}]"), re.compile(r"\S")
# An object or an array, not a bracket in a sentence.
_JSON_START = re.compile(r'\{\s*(?:["}]|\Z)|\[\s*(?:["{\[\]\d-]|true|false|null|\Z)')


def human_bytes(size: float) -> str:
    """Return a size in bytes as text: ``269 MB``, ``14.2 GB``."""
    if abs(size) >= 1e9:
        return f"{size / 1e9:.1f} GB"
    if abs(size) >= 1e6:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e3:.0f} kB"


def generated(tokens: int | None, characters: int) -> str:
    """Return the length of a text: ``12 tokens``, ``331 characters``, ``""`` for none.

    `tokens` is None where it is unknown, as during the answers of most servers.
    """
    if tokens:
        return counted(tokens)
    return counted(characters, "character") if characters else ""


def counted(count: int, thing: str = "token") -> str:
    """Return a number with its unit: ``1 token``, ``2,000 tokens``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends with another mark."""
    return text if text.endswith((".", "?", "!", "…")) else f"{text}."


def dollars(amount: float) -> str:
    """Return an amount of money: ``$1.20``, and below a dime two digits that count: ``$0.00095``."""
    decimals = 2 if amount >= 0.1 or not amount else 1 - math.floor(math.log10(amount))
    return f"${amount:,.{decimals}f}"


def _raise_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


# Without what Python reads as JSON besides: NaN, and infinity in place of a number that is too large.
STRICT_JSON = json.JSONDecoder(parse_constant=_raise_constant, parse_float=_float)


def depth_of(value: Any, most: int) -> int:
    """Return how deep a JSON value is nested, at most one more than `most`."""
    level, depth = [value], 0
    while level and depth <= most:
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        level, depth = inner, depth + bool(inner)
    return depth


def parse_json(text: str) -> Any:
    """Return the JSON value in the answer of a model; raises `ValueError` with the reason.

    The value is the whole text. Else it is the content of the only block of code, or of the only one of
    several that is marked as JSON. In a text without blocks it is the only object or array, and no bracket
    may precede or follow it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        start, end, outside = _json_span(text)
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(json_problem(error)) from None
    if outside.search(text, stop, end):
        raise ValueError("there is more than one value, or text that may be one")
    return value


def json_problem(error: json.JSONDecodeError) -> str:
    """Return what is wrong in a text that is not JSON, and where."""
    problem = _JSON_PROBLEMS.get(error.msg, f"{error.msg[:1].lower()}{error.msg[1:]}")
    return f"{problem.removesuffix(' at')} (line {error.lineno}, character {error.colno})"


def is_cut_json(text: str) -> bool:
    """Return whether a text without valid JSON begins one, or a block of code, that it does not end."""
    if any(not block.closed for block in _json_blocks(text)):
        return True
    try:
        start, end, _ = _json_span(text)
    except ValueError:
        return False
    return _JSON_START.match(text, start, end) is not None


def around_json(text: str) -> str:
    """Return what surrounds the value that `parse_json` returns, and its block of code."""
    if (whole := text.strip())[:1] in {"{", "["} and whole[-1:] in {"}", "]"}:
        return ""
    with suppress(ValueError):
        # A text in double quotes is JSON, too.
        json.loads(text)
        return ""
    if blocks := _json_blocks(text):
        start, end = blocks[0].start, blocks[0].end
    else:
        first, last = _OPENING.search(text), max(text.rfind("}"), text.rfind("]"))
        start, end = (first.start(), last + 1) if first is not None else (0, len(text))
    return f"{text[:start]} {text[end:]}".strip()


def _json_blocks(text: str) -> list[FencedSpan]:
    """Return the blocks of code that are marked as JSON, or all blocks if none is."""
    # The parser of code blocks uses this module.
    from llm_magic.text.code_blocks import fenced_spans

    spans = fenced_spans(text)
    blocks = [one for one in spans if text[one.code_start : one.code_end].strip()]
    return [one for one in blocks if one.language == "json"] or blocks


def _json_span(text: str) -> tuple[int, int, re.Pattern[str]]:
    """Return where JSON starts and must have ended, and what must not be between its end and that."""
    blocks = _json_blocks(text)
    if len(blocks) > 1:
        raise ValueError(f"there are {len(blocks)} blocks of code")
    first, end = (blocks[0].code_start, blocks[0].code_end) if blocks else (0, len(text))
    found = (_INK if blocks else _OPENING).search(text, first, end)
    if found is None:
        raise ValueError("there is no object or array in it")
    return found.start(), end, _INK if blocks else _BRACKET


def unescape(text: str) -> str:
    """Return a text in which \\n, \\r, \\t and \\\\ are replaced by what they stand for."""
    return re.sub(r"\\([nrt\\])", lambda found: _ESCAPES[found[1]], text)


def escape(text: str) -> str:
    """Return a text on one line, which `unescape` reads."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def has_surrogates(text: str) -> bool:
    """Return whether a text contains lone surrogates."""
    return replace_surrogates(text) != text


def replace_surrogates(text: str) -> str:
    """Return a text for UTF-8: surrogate pairs become their character, lone ones U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_plain_name(text: str) -> bool:
    """Return whether a text can be a name: without control characters and lone surrogates."""
    return not has_surrogates(text) and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


def visible(text: str) -> str:
    r"""Return `text` with control characters in a visible form: ``␛[2J`` for ``ESC[2J``.

    Newlines and tabs stay, and ``\r\n`` becomes a newline. Controls of the first 32 code points get
    their Unicode picture, all others their escape (``\u202e``).
    """
    return _UNSAFE.sub(_picture, text)


def visible_line(text: str) -> str:
    """Return `text` like `visible`, in one line."""
    return _LINE_END.sub(" ", visible(text).strip("\n"))


def visible_but_styled(text: str) -> str:
    """Return `text` like `visible`, but keep colors and styles: for tracebacks of IPython."""
    parts = _STYLES.split(text)
    return "".join(part if i % 2 else visible(part) for i, part in enumerate(parts))


def unstyled(text: str) -> str:
    """Return `text` like `visible`, without colors and styles."""
    return visible(_STYLES.sub("", text))


class VisibleStream:
    r"""Handles text incrementally as `visible` does: a ``\r\n`` cut in two stays one line end."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        r"""Return what can be displayed now; a ``\r`` at the end is held back."""
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        return visible(text.removesuffix("\r"))

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return visible(held)


def _picture(match: re.Match[str]) -> str:
    char = match[0]
    if char == "\r\n":
        return "\n"
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
