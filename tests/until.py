"""Wait until something is so."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    true: Callable[[], object], otherwise: str = "it does not come", within: float = 10.0
) -> None:
    """Wait until `true` returns something true; fails with `otherwise` after `within` seconds."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.03)
