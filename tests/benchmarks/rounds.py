"""Rounds of measurements taken side by side, and how busy others kept the machine meanwhile."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import psutil

# Of the CPU, by processes that are not ours: above it a round measures them.
_QUIET = 0.10
_ENOUGH, _EXTRA = 3, 3


class Load(Protocol):
    """Measures what share of the CPU others take from its creation on."""

    def share(self) -> float:
        """Return it, between 0 and 1."""


class Rounds:
    """Repeats a round until enough were quiet; where none is, all count and the table has a note."""

    def __init__(self, count: int, others: Callable[[], Load] | None = None) -> None:
        self.count = count
        self._others = others or Others
        self.shares: list[float] = []

    def run(self, once: Callable[[], Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
        """Call `once` for the figures of one round; returns all figures of the rounds that count."""
        taken: list[tuple[float, Mapping[str, float]]] = []
        while self._more([share for share, _ in taken]):
            others = self._others()
            figures = once()
            taken.append((others.share(), figures))
        quiet = [pair for pair in taken if pair[0] <= _QUIET]
        chosen = quiet if len(quiet) >= min(_ENOUGH, self.count) else taken
        self.shares += [share for share, _ in chosen]
        return {name: tuple(figures[name] for _, figures in chosen) for name in chosen[0][1]}

    def in_turn(self, ways: Mapping[str, Callable[[], float]]) -> dict[str, tuple[float, ...]]:
        """Take one figure of every way in each round, each round beginning with another one."""
        order = deque(ways)

        def once() -> dict[str, float]:
            order.rotate(-1)
            return {name: ways[name]() for name in order}

        taken = self.run(once)
        return {name: taken[name] for name in ways}

    def _more(self, shares: list[float]) -> bool:
        quiet = sum(share <= _QUIET for share in shares)
        return quiet < self.count and len(shares) < self.count + _EXTRA

    @property
    def noisy(self) -> bool:
        """Whether rounds count in which others were busy: there were not enough quiet ones."""
        return any(share > _QUIET for share in self.shares)

    @property
    def remark(self) -> str:
        """How far the figures can be trusted."""
        if not self.shares:
            return "nothing was measured"
        share = statistics.median(self.shares)
        text = f"other processes used {share:.0%} of the CPU meanwhile"
        return f"{text}: NOISE, take it again" if self.noisy else text


class Others:
    """Measures what share of the CPU other processes take from now on."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), busy_seconds(), own_seconds()

    def share(self) -> float:
        """Return it, between 0 and 1."""
        capacity = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        others = (busy_seconds() - self._busy) - (own_seconds() - self._own)
        return max(0.0, others / capacity)


def busy_seconds() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts the time of guests twice.
    return float(sum(times) - idle - getattr(times, "guest", 0.0))


def own_seconds() -> float:
    """The CPU time of this process, of its living descendants, and of those it has waited for."""
    total = 0.0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
        total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total
