"""One session at a time: what a process has only one of is not shared while it is used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from llm_magic.backends.local.worker import Cancelled

# torch's random numbers and Transformers' progress hook belong to the process, and two answers at
# once on the same cores take longer than one after the other. Within a session its one inference
# thread sees to that already.
_TURN = threading.Lock()
_POLL_S = 0.05


@contextlib.contextmanager
def turn(cancel: threading.Event) -> Iterator[None]:
    """Wait until no other session of this process works; raises `Cancelled` if told to meanwhile."""
    while not _TURN.acquire(timeout=_POLL_S):
        if cancel.is_set():
            raise Cancelled
    try:
        yield
    finally:
        _TURN.release()
