"""Whether and when a failed request is made again; only ever before its first token."""

from __future__ import annotations

import functools
import time

import tenacity

from llm_magic.errors import (
    LLMMagicError,
    RequestFailed,
    ServerBusy,
    ServerError,
)

# The first one and two more.
_TRIES = 3
# Somebody sits there and waits: a server that wants longer than this gets its error shown.
_LONGEST_S = 30.0
_BACKOFF = tenacity.wait_exponential(multiplier=0.5, max=8) + tenacity.wait_random(0, 0.5)
# A busy server is free at any moment, and others wait for that moment too.
_BUSY_BACKOFF = tenacity.wait_exponential(multiplier=0.25, max=1) + tenacity.wait_random(0, 0.25)


class Patience:
    """The tries of one request: counts them, and returns how long to wait for the next."""

    def __init__(self, busy_s: float = 0.0) -> None:
        """`busy_s` is how many seconds to wait for a server that is busy with other requests."""
        self._busy_s = busy_s
        self._busy_since: float | None = None

    @functools.cached_property
    def _busy(self) -> tenacity.RetryCallState:
        return tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})

    @functools.cached_property
    def _state(self) -> tenacity.RetryCallState:
        # At the first failure: most requests know none.
        return tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})

    def next_try(self, error: LLMMagicError) -> float | None:
        """Return the seconds to wait before another try, None if there is none."""
        if isinstance(error, ServerBusy):
            return self._next_turn(error)
        self._busy_since = None
        if not _is_temporary(error) or self._state.attempt_number >= _TRIES:
            return None
        asked = error.retry_after if isinstance(error, RequestFailed) else None
        wait = _BACKOFF(self._state) if asked is None else asked
        self._state.attempt_number += 1
        return wait if wait <= _LONGEST_S else None

    def _next_turn(self, busy: ServerBusy) -> float | None:
        """Return the seconds until the next try; the tries are limited by time, not by number."""
        now = time.monotonic()
        self._busy_since = self._busy_since or now
        left = self._busy_since + self._busy_s - now
        if left <= 0:
            return None
        wait = busy.retry_after or _BUSY_BACKOFF(self._busy)
        self._busy.attempt_number += 1
        return min(wait, left)


def _is_temporary(error: LLMMagicError) -> bool:
    return isinstance(error, ServerError) and error.is_temporary


def waiting(error: LLMMagicError, wait: float) -> str:
    """Return the words that are shown until the next try."""
    if isinstance(error, ServerBusy):
        return "waiting: the server is busy with other requests"
    brief = error.brief if isinstance(error, ServerError) else "no answer"
    return f"{brief}, next try in {max(1, round(wait))} s"
