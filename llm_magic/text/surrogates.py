"""Half characters: lone surrogates, which Python's texts can hold and UTF-8 cannot."""

from __future__ import annotations


def has_surrogates(text: str) -> bool:
    """Return whether a text holds halves of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def replace_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: pairs become their character, other halves U+FFFD."""
    if not has_surrogates(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_plain_name(text: str) -> bool:
    """Return whether a text can name something: no control characters, no half characters."""
    return not has_surrogates(text) and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
