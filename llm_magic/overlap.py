"""Marks in a text that comes in pieces: what may be the beginning of one is held back."""

from __future__ import annotations

# What models write around their thoughts.
THOUGHT_OPENS, THOUGHT_ENDS = "<think>", "</think>"


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`, and is not all of it."""
    # Asked for every token of an answer, and mostly there is not even the first letter.
    if mark[0] not in text[-len(mark) :]:
        return 0
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
