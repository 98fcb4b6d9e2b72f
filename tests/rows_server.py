"""A server for maps: fails for the rows with a fault, and rejects requests above a rate."""

from __future__ import annotations

import time
from collections.abc import Generator

from tests.exchange import Received
from tests.fault_server import CHAT, FaultServer
from tests.wire import (
    SSE,
    Cut,
    Head,
    Hold,
    Pause,
    Raw,
    Send,
    Step,
    delta,
    error_answer,
    json_answer,
    sse,
)

FAULTS = ("refuse", "crash", "silence", "garbage", "sever")


class RowsServer(FaultServer):
    """Repeats a prompt word by word, after `latency_s`; a prompt that ends with a fault gets that.

    With `allowed_per_s` it has tokens for that many requests, which are added continuously, and answers
    429 to every other one.
    """

    def __init__(self, allowed_per_s: float = 0.0, latency_s: float = 0.0) -> None:
        super().__init__()
        self.allowed_per_s, self.latency_s = allowed_per_s, latency_s
        self.rejected = 0
        self._tokens, self._filled_at = 1.0, time.monotonic()

    @property
    def prompts(self) -> list[str]:
        """The prompts that were sent, in the order of their requests."""
        return [str(one.json["messages"][-1]["content"]) for one in self.requests_to(CHAT)]

    def answer(self, request: Received) -> Generator[Step, None, None]:
        """Answer, fail or reject."""
        if request.path != CHAT:
            yield from super().answer(request)
        elif self.allowed_per_s and not self._takes_token():
            self.rejected += 1
            yield from json_answer(429, {"error": {"message": "Slow down."}}, {"Retry-After": "1"})
        else:
            yield Pause(self.latency_s)
            fault = str(request.json["messages"][-1]["content"]).rpartition(" ")[2]
            yield from _fault(fault) if fault in FAULTS else super().answer(request)

    def _takes_token(self) -> bool:
        now = time.monotonic()
        added = (now - self._filled_at) * self.allowed_per_s
        self._tokens, self._filled_at = min(self.allowed_per_s, self._tokens + added), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _fault(fault: str) -> list[Step]:
    if fault == "refuse":
        return error_answer(400, "The prompt is not acceptable.")
    if fault == "crash":
        return json_answer(500, {"error": {"message": "Out of order."}}, {"Retry-After": "0"})
    if fault == "silence":
        return [Head(200, SSE), Hold()]
    if fault == "garbage":
        return [Head(200, SSE), Send(b"data: <html>\n\n"), Raw(b"")]
    return [*sse(delta("Hel"), done=False), Cut()]
