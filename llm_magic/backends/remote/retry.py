"""When a failed request is sent again: only before its first token, after a delay that grows."""

from __future__ import annotations

import random
import time

from llm_magic.errors import LLMMagicError, RequestFailed, ServerBusy, ServerError

_MAX_ATTEMPTS = 3
# A user waits for the reply: the error of a server that asks for more is shown instead.
_MAX_DELAY_S = 30.0


# Too many requests, and a server that takes no more now.
_OVERLOAD = frozenset({429, 503, 529})


def is_overload(error: BaseException) -> bool:
    """Return whether a server failed because it gets too many requests."""
    return isinstance(error, ServerBusy) or (
        isinstance(error, ServerError) and error.status in _OVERLOAD
    )


class Retries:
    """The attempts of one request, and the delays between them."""

    def __init__(self, busy_s: float = 0.0) -> None:
        """`busy_s` is how long to wait for a server that is busy with other requests."""
        self._busy_s = busy_s
        self._busy_since: float | None = None
        self._failures = self._busy_responses = 0

    def next_delay(self, error: LLMMagicError) -> float | None:
        """Return the seconds to wait before the next attempt, None if there is none."""
        if isinstance(error, ServerBusy):
            return self._busy_delay(error)
        self._busy_since = None
        self._failures += 1
        is_temporary = isinstance(error, ServerError) and error.is_temporary
        if not is_temporary or self._failures >= _MAX_ATTEMPTS:
            return None
        requested = error.retry_after if isinstance(error, RequestFailed) else None
        delay = _backoff(self._failures, 0.5, 8.0) if requested is None else requested
        return delay if delay <= _MAX_DELAY_S else None

    def notice(self, error: LLMMagicError, delay: float) -> str:
        """Return the notice that is shown until the next attempt."""
        if isinstance(error, ServerBusy):
            return "waiting: the server is busy with other requests"
        brief = error.brief if isinstance(error, ServerError) else "no answer"
        attempt = f"attempt {self._failures + 1} of {_MAX_ATTEMPTS}"
        return f"{brief}, {attempt} after {max(1, round(delay))} s"

    def _busy_delay(self, busy: ServerBusy) -> float | None:
        """Return the delay for a busy server: limited by time, because it is free at any moment."""
        now = time.monotonic()
        self._busy_since = self._busy_since or now
        left = self._busy_since + self._busy_s - now
        if left <= 0:
            return None
        self._busy_responses += 1
        return min(busy.retry_after or _backoff(self._busy_responses, 0.25, 1.0), left)


def _backoff(failures: int, first: float, longest: float) -> float:
    """Return a delay that doubles with each failure, with jitter of up to `first` seconds."""
    # The exponent is bounded because a busy server is asked many times.
    return min(longest, first * 2.0 ** min(failures - 1, 10)) + random.uniform(0, first)
