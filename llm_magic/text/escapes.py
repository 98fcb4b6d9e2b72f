"""Line breaks and tabs of a text as escape sequences, so that it fits on one line."""

from __future__ import annotations

import re

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def unescape(text: str) -> str:
    """Return a text in which \\n, \\r, \\t and \\\\ are replaced by what they stand for."""
    return re.sub(r"\\([nrt\\])", lambda found: _ESCAPES[found[1]], text)


def escape(text: str) -> str:
    """Return a text on one line, which `unescape` reads."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
