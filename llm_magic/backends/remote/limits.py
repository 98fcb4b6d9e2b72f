"""Timeouts of requests, and the limits of one server."""

from __future__ import annotations

from dataclasses import dataclass

# Lists and descriptions: a server that thinks about those is not well.
ANSWER_S = 30.0
# A model may be read from disk, or wait for others, before its first word: this many times longer.
FIRST_FACTOR = 5
# In all, from the last word of an answer to what follows it, and from there to the end of the body.
END_S, DRAIN_S = 5.0, 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of silence within an answer, and how many requests may be under way at once."""

    idle_s: float = 120.0
    concurrency: int = 256
