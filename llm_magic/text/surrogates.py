"""Lone surrogates, which a Python text can contain and UTF-8 cannot."""

from __future__ import annotations


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
