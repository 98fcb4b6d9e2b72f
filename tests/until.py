"""Wait until something is so, such as that no loop runs any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def until(
    true: Callable[[], object], otherwise: str = "it does not come", within: float = 30.0
) -> None:
    """Wait until `true` returns something true; fails with `otherwise` after `within` seconds."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.03)


def loop_threads() -> list[str]:
    """Return the threads that sessions run their loops on."""
    return [thread.name for thread in threading.enumerate() if thread.name == "llm_magic-loop"]
