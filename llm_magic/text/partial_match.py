"""Marks in a text that comes in pieces: what may be the beginning of one is held back."""

from __future__ import annotations

from collections.abc import Sequence

# What models write around their thoughts.
THOUGHT_OPENS, THOUGHT_ENDS = "<think>", "</think>"


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`, and is not all of it."""
    # Asked for every token of an answer, and mostly there is not even the first letter.
    if mark[0] not in text[-len(mark) :]:
        return 0
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


class StopText:
    """Ends a text before the first of some strings, holding back what may be their beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.reached = False

    def feed(self, text: str) -> str:
        """Return what can be shown now; sets `reached` when a stop string has come."""
        if not self._stops or self.reached:
            return "" if self.reached else text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.reached = True
            # Of several the one that is whole first: so the pieces of a text do not matter.
            _end, begin = min(found)
            shown, self._held = self._held[:begin], ""
            return shown
        keep = max(overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return what was held back: no stop string came of it."""
        rest, self._held = self._held, ""
        return rest
