"""How many requests of a map run at once, and how fast they start.

A model in this process has a fixed number. For a server both adapt: the number grows while that brings
more answers, and is halved when the server is overloaded; the rate is limited once the server rejects
requests, to what it has answered. The retries themselves are those of the connection, which reports
them in the chunks of an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import deque
from collections.abc import Callable

from llm_magic.errors import OptionError

# The number of requests that a server gets at first, and the growth of its answers a second by which a
# larger number pays off. What does not pay off so often stays as it is.
_FIRST, _GAIN, _MOST_WITHOUT_GAIN = 8, 1.1, 2
_ROUND_GROWTH = 1 / 16
# The rate after a rejection, in parts of what the server accepted in the second before it, and between
# these parts of the rate before. The rate that it can be expected to allow, in parts of that.
_BELOW, _LEAST_PART, _MOST_PART, _ABOVE = 0.95, 0.3, 0.95, 1.05
# The growth of the rate in a second: before the first rejection at a known rate; far below the rate of
# the last rejection; near it; and at it, after this time.
_SEARCH_GROWTH, _FAST_GROWTH, _SLOW_GROWTH = 4.0, 1.1, 1.01
_FAR_BELOW, _NEAR, _HOLD_S = 0.9, 0.97, 20.0
# How often the rate grows, and which part of it must be used for that.
_STEP_S, _USED_PART = 0.2, 0.7
# How late a request may start and still count as on time; how long rejections count as one.
_TOLERANCE_S, _SAME_S = 0.03, 0.25
_MAX_PAUSE_S, _INSTANT_S = 30.0, 1e-6
_RATE = re.compile(
    r"\s*(?P<count>\d+(?:\.\d+)?)\s*(?:/|per\s)\s*(?P<unit>s|sec|second|m|min|minute|h|hour)\s*"
)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_rate(rate: str | float | None) -> float | None:
    """Return requests a second from ``"500/min"``, ``"5/s"`` or a number; None stands for no limit."""
    if rate is None:
        return None
    if isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0:
        return float(rate)
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if found is None or not float(found["count"]):
        raise OptionError(
            f"{rate!r} is not a rate. Use a form such as 500/min or 5/s.", option="rate"
        )
    return float(found["count"]) / _SECONDS[found["unit"][0]]


class Throttle:
    """The number of requests at once, and when the next one starts; used on the event-loop thread."""

    def __init__(
        self,
        most: int,
        *,
        adapts: bool,
        rate: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most` requests run at once; with `adapts`, that is the upper limit. `rate` is in requests/s.

        `clock` returns the seconds of the event loop.
        """
        self._clock = clock
        self._most, self._adapts, self._most_rate = most, adapts, rate
        self.limit = min(_FIRST, most) if adapts else most
        # Requests that run. In each round the limit doubles up to the threshold, and then grows slowly.
        self._running, self._threshold = 0, float(most)
        # The answers in this round, and the most answers a second of a round.
        self._in_round, self._round_began = 0, self._clock()
        self._best, self._without_gain = 0.0, 0
        # When the latest requests started that were not rejected.
        self._starts: deque[float] = deque(maxlen=10_000)
        # The requests a second, the rate at which the server rejected one, and when that was.
        self.rate, self._ceiling, self._rejected_at = rate, 0.0, 0.0
        self._paused_until = self._next_start = self._grown_at = 0.0
        self._same_until = 0.0

    # -- before a request ---------------------------------------------------------------------

    async def turn(self) -> None:
        """Wait until the next request may start."""
        while (delay := self._delay()) > 0:
            await asyncio.sleep(delay)
        self._running += 1
        if self._adapts:
            self._starts.append(self._clock())

    def _delay(self) -> float:
        """Return how long the next request waits; 0 reserves its start."""
        if self.rate is None and not self._paused_until:
            return 0.0
        now = self._clock()
        if self._paused_until - now > _INSTANT_S:
            return self._paused_until - now
        if self.rate is None:
            return 0.0
        self._grow_rate(now)
        if self._next_start - now > _INSTANT_S:
            return self._next_start - now
        self._next_start = max(self._next_start, now - _TOLERANCE_S) + 1.0 / self.rate
        return 0.0

    # -- after a request ----------------------------------------------------------------------

    def finished(self) -> None:
        """Count the end of a request, however it ended."""
        self._running -= 1

    def answered(self) -> None:
        """Count an answer; the number of requests may grow if it was reached."""
        if not self._adapts:
            return
        now = self._clock()
        if self.limit >= self._most or self._running < self.limit:
            return
        self._in_round += 1
        if self._in_round < self.limit:
            return
        answered = self._in_round / max(now - self._round_began, 1e-6)
        self._without_gain = 0 if answered > self._best * _GAIN else self._without_gain + 1
        self._best = max(answered, self._best)
        if self._without_gain >= _MOST_WITHOUT_GAIN:
            self._threshold = self.limit
        if self.rate is not None:
            # The rate keeps the server from an overload.
            grown = 2 * self.limit
        elif self.limit < self._threshold:
            grown = min(2 * self.limit, max(self.limit + 1, int(self._threshold)))
        else:
            grown = self.limit + max(1, int(self.limit * _ROUND_GROWTH))
        self.limit = min(self._most, grown)
        self._start_round(now)

    def _start_round(self, now: float) -> None:
        self._in_round, self._round_began = 0, now

    def overloaded(self, retry_after: float = 0.0) -> None:
        """Halve the number of requests, once for those that run now, and start none for `retry_after` s."""
        now = self._clock()
        if self._starts:
            self._starts.pop()
        self._paused_until = max(self._paused_until, now + min(retry_after, _MAX_PAUSE_S))
        if not self._adapts or now < max(self._rejected_at + _SAME_S, self._same_until):
            return
        self._rejected_at = now
        self._same_until = self._paused_until
        self._threshold, self.limit = self.limit * 0.9, max(1, self.limit // 2)
        self._best, self._without_gain = 0.0, 0
        self._start_round(now)
        self._lower_rate(now)
        self._grown_at = self._paused_until

    def _lower_rate(self, now: float) -> None:
        """Set the rate after a rejection: below that of the second before it."""
        started = self._starts_a_second(now)
        before = self.rate
        if before is None or before == self._most_rate:
            # Too few answers are none of a rate.
            self.rate = max(started, 1.0) if len(self._starts) >= _FIRST // 2 else before
        else:
            self._ceiling = min(before, started * _ABOVE)
            self.rate = min(_MOST_PART * before, max(started * _BELOW, _LEAST_PART * before))
        self._limit_rate()

    def _grow_rate(self, now: float) -> None:
        if self.rate is None or not self._grown_at or now < self._grown_at + _STEP_S:
            return
        seconds, self._grown_at = now - self._grown_at, now
        if self._starts_a_second(now) < _USED_PART * self.rate:
            # Something else limits the answers.
            return
        if not self._ceiling:
            growth = _SEARCH_GROWTH
        elif self.rate < self._ceiling * _FAR_BELOW:
            growth = _FAST_GROWTH
        elif self.rate < self._ceiling * _NEAR or now > self._rejected_at + _HOLD_S:
            growth = _SLOW_GROWTH
        else:
            growth = 1.0
        self.rate *= growth**seconds
        self._limit_rate()

    def _starts_a_second(self, now: float) -> float:
        """Return the requests of the latest second that were not rejected."""
        latest = itertools.takewhile(lambda at: at > now - 1.0, reversed(self._starts))
        return float(sum(1 for _ in latest))

    def _limit_rate(self) -> None:
        if self.rate is not None and self._most_rate is not None:
            self.rate = min(self.rate, self._most_rate)
