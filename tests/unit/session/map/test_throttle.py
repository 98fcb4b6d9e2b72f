"""How fast a map sends its rows, in simulated time: the sender, and servers that reject requests."""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from llm_magic.backends.manager import BackendManager
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.errors import OptionError
from llm_magic.session.chats import Chats
from llm_magic.session.generation_settings import GenerationSettings
from llm_magic.session.map.progress import Writing
from llm_magic.session.map.sender import PreparedRow, Sender
from llm_magic.session.map.throttle import Throttle, parse_rate
from llm_magic.session.requests import Request, prepare
from llm_magic.types import Chunk, Message
from tests.scripted import ScriptedBackend, settings


class SkippingSelector(selectors.SelectSelector):
    """Skips the time that a loop would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Wait for nothing."""
        self.now += timeout or 0.0
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while all of its tasks wait."""

    def __init__(self) -> None:
        self.selector = SkippingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        """Return the simulated time."""
        return self.selector.now


class LimitedBackend(ScriptedBackend):
    """Answers after `latency_s`, or rejects a request that `allows` returns False for."""

    name = "limited"

    def __init__(
        self, allows: Callable[[float, int], bool], latency_s: Callable[[int], float]
    ) -> None:
        super().__init__()
        self.allows, self.latency_s = allows, latency_s
        self.running = self.rejected = self.most_running = 0

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer or reject."""
        now = asyncio.get_running_loop().time()
        if not self.allows(now, self.running):
            self.rejected += 1
            yield Chunk(backoff_s=1.0)
            raise AssertionError("the map does not wait in the connection")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.latency_s(self.running))
            yield Chunk("answer", finish_reason="stop")
        finally:
            self.running -= 1


def bucket(rate: float, size: float) -> Callable[[float, int], bool]:
    """Allow a rate, and up to `size` requests at once after a pause."""
    tokens, filled_at = size, 0.0

    def allows(now: float, _running: int) -> bool:
        nonlocal tokens, filled_at
        tokens, filled_at = min(size, tokens + (now - filled_at) * rate), now
        if tokens < 1:
            return False
        tokens -= 1
        return True

    return allows


def window(rate: int) -> Callable[[float, int], bool]:
    """Allow so many in any second."""
    times: deque[float] = deque()

    def allows(now: float, _running: int) -> bool:
        while times and times[0] <= now - 1:
            times.popleft()
        if len(times) >= rate:
            return False
        times.append(now)
        return True

    return allows


def simulate(backend: LimitedBackend, rows: int, throttle_of: Callable[..., Throttle]) -> float:
    """Send rows, and return the simulated seconds."""
    loop = SimulatedLoop()
    manager = BackendManager(lambda _name: backend)
    reported: list[int] = []

    async def run() -> float:
        result = await manager.load("tiny", LoadConfig(backend="limited"))
        prepared = prepare(
            Request("?"),
            manager.find(result.info.name),
            GenerationSettings(settings()).values,
            Chats(),
        )
        sender = Sender(
            prepared, manager, throttle_of(clock=loop.time), {},
            lambda row, _outcome, _is_sent: reported.append(row.position), Writing(),
        )  # fmt: skip
        began = loop.time()
        for i in range(rows):
            sender.accept(PreparedRow(i, i, (Message("user", "?"),), str(i).encode()))
        sender.complete()
        async for _ in sender.run(0):
            pass
        return loop.time() - began

    try:
        seconds = loop.run_until_complete(run())
    finally:
        loop.close()
    assert sorted(reported) == list(range(rows))
    return seconds


def adaptive(**about: Any) -> Throttle:
    """Return a throttle as for a server."""
    return Throttle(256, adapts=True, **about)


@pytest.mark.parametrize(
    ("allows", "latency_s", "rows", "part"),
    [
        (bucket(50, 50), 0.2, 2_000, 0.9),
        (window(50), 0.02, 3_000, 0.88),
        # The start counts, with answers that take two seconds.
        (bucket(50, 5), 2.0, 2_000, 0.6),
        (lambda _now, running: running < 8, 0.16, 1_000, 0.5),
    ],
    ids=["bucket", "window", "small bucket", "8 at once"],
)
def test_most_of_what_a_server_allows_and_no_row_is_lost(
    allows: Callable[[float, int], bool], latency_s: float, rows: int, part: float
) -> None:
    backend = LimitedBackend(allows, lambda _running: latency_s)
    assert rows / simulate(backend, rows, adaptive) > part * 50
    assert 0 < backend.rejected < 50


def test_number_of_requests_grows_while_that_brings_more_answers() -> None:
    batching = LimitedBackend(lambda _now, _running: True, lambda running: 1 + running / 64)
    assert 3_000 / simulate(batching, 3_000, adaptive) > 0.85 * 256 / (1 + 256 / 64)
    assert batching.most_running == 256
    one_by_one = LimitedBackend(lambda _now, _running: True, lambda running: 1.0 * running)
    simulate(one_by_one, 300, adaptive)
    assert one_by_one.most_running < 64


def test_workers_and_rate_limit_the_requests() -> None:
    backend = LimitedBackend(lambda _now, _running: True, lambda _running: 0.5)
    seconds = simulate(backend, 100, lambda clock: Throttle(4, adapts=False, clock=clock))
    assert (backend.most_running, round(seconds, 3)) == (4, 12.5)
    seconds = simulate(
        backend,
        100,
        lambda clock: Throttle(64, adapts=True, rate=parse_rate("600/min"), clock=clock),
    )
    assert 9.5 < seconds < 11


@pytest.mark.parametrize(
    ("text", "per_s"),
    [("500/min", 500 / 60), ("5/s", 5.0), ("7200 per hour", 2.0), (2.5, 2.5), (None, None)],
)
def test_rates(text: str | float | None, per_s: float | None) -> None:
    assert parse_rate(text) == per_s


@pytest.mark.parametrize("text", ["fast", "0/s", "-1/s", "5", 0, True, "5/day"])
def test_what_is_no_rate_is_an_error(text: Any) -> None:
    with pytest.raises(OptionError, match=r"is not a rate. Use a form such as 500/min"):
        parse_rate(text)
