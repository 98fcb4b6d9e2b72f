"""Text of models and servers in a form that a terminal only displays.

A terminal executes the control characters in what it displays: they clear the screen, overwrite lines,
set the clipboard, make links. JupyterLab executes some of them in streams. Each control character is
replaced by a visible one, so nothing is executed and nothing is hidden. Because no escape sequence is
parsed, one that arrives in pieces, or that is not complete, is handled like any other.

The functions are applied where text is displayed. Values (`Reply.text`, chats, exported files) keep
every character.
"""

from __future__ import annotations

import re

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
