"""Numbers as text: sizes and counts."""

from __future__ import annotations


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
    """Return a number with its unit: ``1 token``, ``2 tokens``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
