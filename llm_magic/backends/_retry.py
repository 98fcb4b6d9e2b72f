"""Whether and when a failed request is made again; only ever before its first token."""

from __future__ import annotations

import functools

import tenacity

from llm_magic.errors import LLMMagicError, RequestRefused, ServerError, ServerUnreachable

# The first one and two more.
_TRIES = 3
# Somebody sits there and waits: a server that wants longer than this gets its error shown.
_LONGEST_S = 30.0
_BACKOFF = tenacity.wait_exponential(multiplier=0.5, max=8) + tenacity.wait_random(0, 0.5)


class Patience:
    """The tries of one request: counts them, and says how long to wait for the next."""

    @functools.cached_property
    def _state(self) -> tenacity.RetryCallState:
        # At the first failure: most requests know none.
        return tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})

    def next_try(self, error: LLMMagicError) -> float | None:
        """Return the seconds to wait before another try, None if there is none."""
        if not _passes(error) or self._state.attempt_number >= _TRIES:
            return None
        asked = error.retry_after if isinstance(error, RequestRefused) else None
        wait = _BACKOFF(self._state) if asked is None else asked
        self._state.attempt_number += 1
        return wait if wait <= _LONGEST_S else None


def _passes(error: LLMMagicError) -> bool:
    """Return whether waiting may help."""
    if isinstance(error, ServerUnreachable):
        return error.brief in {"nothing listens", "no connection", "connection lost"}
    if not isinstance(error, RequestRefused) or error.status is None:
        return False
    return error.status in {408, 429} or error.status >= 500


def waiting(error: LLMMagicError, wait: float) -> str:
    """Return what is told while the next try is waited for."""
    brief = error.brief if isinstance(error, ServerError) else "no answer"
    return f"{brief}, next try in {max(1, round(wait))} s"
