"""One answer, and many at once, from a server that costs nothing: what is left is the client.

The peers are a bare loop over `httpx` and the `openai` client, each async and sync. All of them
take turns on the same server, and every answer is checked to be whole.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TypeVar

from tests.benchmarks import clients
from tests.benchmarks.clients import Client, SyncClient
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.benchmarks.server import PIECE, Timing, serving

T = TypeVar("T")
# Asks, and returns the milliseconds until the first piece and until the end.
Ask = Callable[[Timing], tuple[float, float]]
Figures = Mapping[str, tuple[float, ...]]
# What the ratios to httpx and to the openai client should be.
Targets = tuple[Target | None, Target | None]

# In each, ours comes first.
_ASYNC: dict[str, type[Client]] = {
    "ours, astream": clients.Ours, "httpx": clients.Httpx, "openai": clients.OpenAI,
}  # fmt: skip
_SYNC: dict[str, type[SyncClient]] = {
    "ours, stream": clients.OursSync, "httpx, sync": clients.HttpxSync,
    "openai, sync": clients.OpenAISync,
}  # fmt: skip
# The bare sockets show what the server and the machine allow.
_MANY: dict[str, type[Client]] = {
    "ours, agenerate": clients.Ours, "httpx": clients.Httpx, "openai": clients.OpenAI,
    "bare sockets": clients.BareSockets,
}  # fmt: skip
_AS_FAST: Targets = Target("<=", 1.05), Target("<=", 1.0)
_RATE: Targets = None, Target(">=", 1.0)
_ANY: Targets = None, None

_BEGINNING, _WHOLE = Timing(20, 10, 2), Timing(20, 10, 100)
_AT_ONCE, _SHORT = Timing(0, 0, 2000), Timing(0, 0, 1)
_PROMPTS, _WORKERS, _STREAMS = 256, 64, Timing(20, 20, 50)


def measure_stream(rounds: Rounds) -> Iterator[Row]:
    """Ask once at a time, by the async and the sync API."""
    with serving() as url:
        with _asking(url) as ways:
            for title, unit, figure, targets in (
                ("first of 20 ms", "ms", _first, _AS_FAST),
                ("all of 1010 ms", "ms", _end, _AS_FAST),
                ("a piece of 2000 at once", "us", _each, _ANY),
                ("CPU of a short answer", "ms", _cpu_of_one, _ANY),
            ):
                taken = _in_turn(rounds, ways, figure)
                yield from _rows(title, unit, _ASYNC, taken, targets)
                yield from _rows(title, unit, _SYNC, taken, targets)
        calls = rounds.run(lambda: _first_calls(url))
    for number in ("first", "second"):
        taken = {name: calls[f"{name} {number}"] for name in _installed(_SYNC)}
        yield from _rows(f"{number} call ever", "ms", _SYNC, taken, _ANY)


def measure_many(rounds: Rounds) -> Iterator[Row]:
    """Ask 256 times, 64 at once, where each answer takes equally long; then follow 64 streams."""
    with serving() as url, asyncio.Runner() as runner, ExitStack() as stack:
        ways: dict[str, Client] = {}
        for name in _installed(_MANY):
            ways[name] = _MANY[name](url)
            stack.callback(_close, runner, ways[name])
        for latency in (50, 200, 1000):
            share = partial(_share, runner, Timing(latency, 0, 8))
            taken = _in_turn(rounds, ways, share)
            yield from _rows(f"{latency} ms, share of ideal", "x", _MANY, taken, _RATE)
        taken = _in_turn(rounds, ways, partial(_cpu_of_a_piece, runner))
        yield from _rows(f"CPU of a piece, {_WORKERS} streams", "us", _MANY, taken, _ANY)


def _rows(
    title: str, unit: str, table: Iterable[str], taken: Figures, targets: Targets
) -> Iterator[Row]:
    """Yield the figures of a table, and the ratios of ours to its peers."""
    ours, httpx, openai, *_ = table
    for name in table:
        ideal = Target(">=", 0.9) if unit == "x" and name == ours else None
        missing = "" if name in taken else "missing: pip install openai"
        yield Row(f"{title}: {name}", unit, taken.get(name, ()), ideal, missing)
    for peer, target in zip((httpx, openai), targets, strict=True):
        if peer in taken:
            yield ratio(f"{title}: ours / {peer}", taken[ours], taken[peer], target)


def _installed(table: Iterable[str]) -> list[str]:
    here = find_spec("openai") is not None
    return [name for name in table if here or not name.startswith("openai")]


def _in_turn(
    rounds: Rounds, ways: Mapping[str, T], figure: Callable[[T], float]
) -> dict[str, tuple[float, ...]]:
    """Take a figure of every way in each round, each round beginning with another one."""
    for way in ways.values():
        figure(way)
    order = deque(ways)

    def once() -> dict[str, float]:
        order.rotate(-1)
        return {name: figure(ways[name]) for name in order}

    return rounds.run(once)


# -- one at a time ----------------------------------------------------------------------------


@contextmanager
def _asking(url: str) -> Iterator[dict[str, Ask]]:
    """Open every client that is installed."""
    with asyncio.Runner() as runner, ExitStack() as stack:
        ways: dict[str, Ask] = {}
        for name in _installed(_ASYNC):
            client = _ASYNC[name](url)
            stack.callback(_close, runner, client)
            ways[name] = partial(_ask, runner, client)
        for name in _installed(_SYNC):
            ways[name] = partial(_ask_sync, stack.enter_context(closing(_SYNC[name](url))))
        yield ways


def _close(runner: asyncio.Runner, client: Client) -> None:
    runner.run(client.aclose())


def _ask(runner: asyncio.Runner, client: Client, pace: Timing) -> tuple[float, float]:
    times = _Times()

    async def ask() -> tuple[float, float]:
        times.started = time.perf_counter()
        async for piece in client.pieces(pace.model):
            times.add(piece)
        return times.result(pace)

    return runner.run(ask())


def _ask_sync(client: SyncClient, pace: Timing) -> tuple[float, float]:
    times = _Times()
    for piece in client.pieces(pace.model):
        times.add(piece)
    return times.result(pace)


class _Times:
    """Measures one answer, and checks that nothing of it is missing."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._first = 0.0
        self.started = time.perf_counter()

    def add(self, piece: str) -> None:
        """Add the next piece."""
        self._first = self._first or time.perf_counter()
        self._pieces.append(piece)

    def result(self, pace: Timing) -> tuple[float, float]:
        """Return the milliseconds until the first piece and until now."""
        now = time.perf_counter()
        assert "".join(self._pieces) == PIECE * pace.count
        return (self._first - self.started) * 1000, (now - self.started) * 1000


def _first(ask: Ask) -> float:
    return statistics.median(ask(_BEGINNING)[0] for _ in range(10))


def _end(ask: Ask) -> float:
    return ask(_WHOLE)[1]


def _each(ask: Ask) -> float:
    return statistics.median(ask(_AT_ONCE)[1] for _ in range(3)) * 1000 / _AT_ONCE.count


def _cpu_of_one(ask: Ask) -> float:
    began = time.process_time()
    for _ in range(50):
        ask(_SHORT)
    return (time.process_time() - began) * 1000 / 50


def _first_calls(url: str) -> dict[str, float]:
    """Time the first two calls of new clients; making them is not counted, nor is loading."""
    taken = {}
    for name in _installed(_SYNC):
        with closing(_SYNC[name](url)) as client:
            if isinstance(client, clients.OursSync):
                client.load(_SHORT.model)
            for number in ("first", "second"):
                taken[f"{name} {number}"] = _ask_sync(client, _SHORT)[1]
    return taken


# -- many at once -----------------------------------------------------------------------------


def _share(runner: asyncio.Runner, pace: Timing, client: Client) -> float:
    """Return the share of the ideal rate: `_WORKERS` answers in the time of one."""
    left = iter(range(_PROMPTS))

    async def work() -> None:
        for _ in left:
            assert await client.whole(pace.model) == PIECE * pace.count

    async def all_of_them() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(_WORKERS)))
        return time.perf_counter() - began

    return _PROMPTS / _WORKERS * pace.ideal_ms / 1000 / runner.run(all_of_them())


def _cpu_of_a_piece(runner: asyncio.Runner, client: Client) -> float:
    """Return the microseconds that this process computes for a piece of many paced streams."""

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(client.whole(_STREAMS.model) for _ in range(_WORKERS)))

    began = time.process_time()
    texts = runner.run(all_of_them())
    taken = time.process_time() - began
    assert set(texts) == {PIECE * _STREAMS.count}
    return taken * 1e6 / (_WORKERS * _STREAMS.count)
