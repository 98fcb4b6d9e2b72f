"""What it costs to show an answer while it is written.

The peer is what tutorials do: ``handle.update(Markdown(text so far))`` for every token. Both show
the answer of the same producer, a thread that is bound by the GIL: a token is a millisecond of
Python. How long the producer took is what the display has cost it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.inside import PROMPT
from tests.benchmarks.notebook import fresh_kernel, loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.kernels import Kernel

_TOKENS, _LONG, _REAL = 2000, 8000, 128
_TRAFFIC, _SLOWDOWN = Target("<=", 0.03), Target("<=", 1.02)


def measure(rounds: Rounds) -> Iterator[Row]:
    """Run all of them in turn, in two kernels that stay open."""
    with fresh_kernel() as kernel, loaded_kernel() as real:
        kernel.ok("from tests.benchmarks import producer\nllm = producer.prepare()")
        traffic: dict[str, tuple[int, int]] = {}
        variants = _variants(kernel, real, traffic)
        for run in variants.values():
            run()
        order = deque(variants)

        def once() -> dict[str, float]:
            order.rotate(-1)
            return {name: variants[name]() for name in order}

        taken = rounds.run(once)
    yield from _traffic_rows(traffic)
    for name in variants:
        yield Row(name, "s", taken[name])
    for ours, alone, target in (
        ("%%llm", "not shown", _SLOWDOWN),
        ("%%llm --plain", "not shown", _SLOWDOWN),
        ("the peer", "not shown", None),
        ("8,000 tokens: %%llm", "8,000 tokens: not shown", _SLOWDOWN),
        ("the real model: %%llm", "the real model: not shown", _SLOWDOWN),
    ):
        yield ratio(f"{ours} / {alone}", taken[ours], taken[alone], target)


def _variants(
    kernel: Kernel, real: Kernel, traffic: dict[str, tuple[int, int]]
) -> dict[str, Callable[[], float]]:
    def scripted(name: str, cell: str) -> Callable[[], float]:
        def run() -> float:
            ran = kernel.ok(cell, timeout=300)
            traffic[name] = (ran.messages, ran.bytes)
            return float(kernel.value("producer.seconds()"))

        return run

    def local(cell: str) -> Callable[[], float]:
        def run() -> float:
            real.ok(cell, timeout=300)
            timing: Any = real.value(
                "(llm.last.timing.tokens_per_s, llm.last.usage.completion_tokens)"
            )
            assert timing[1] == _REAL, f"the answer ended after {timing[1]} tokens"
            return _REAL / float(timing[0])

        return run

    options = f"-t 0 --max-new-tokens {_REAL}"
    return {
        "not shown": scripted("", f"_ = llm.generate('{_TOKENS}')"),
        "%%llm": scripted("%%llm", f"%%llm\n{_TOKENS}"),
        "%%llm --plain": scripted("%%llm --plain", f"%%llm --plain\n{_TOKENS}"),
        "the peer": scripted("the peer", f"producer.as_peers_do(llm, '{_TOKENS}')"),
        "8,000 tokens: not shown": scripted("", f"_ = llm.generate('{_LONG}')"),
        "8,000 tokens: %%llm": scripted("8,000 tokens: %%llm", f"%%llm\n{_LONG}"),
        "the real model: not shown": local(
            f"_ = llm.generate({PROMPT!r}, temperature=0, max_new_tokens={_REAL})"
        ),
        "the real model: %%llm": local(f"%%llm {options}\n{PROMPT}"),
    }


def _traffic_rows(traffic: dict[str, tuple[int, int]]) -> Iterator[Row]:
    peer_messages, peer_bytes = traffic["the peer"]
    for name in ("the peer", "%%llm", "%%llm --plain", "8,000 tokens: %%llm"):
        messages, size = traffic[name]
        yield Row(f"{name}: messages", "", (float(messages),))
        yield Row(f"{name}: bytes", "kB", (size / 1000,))
        if name.startswith("%%llm"):
            yield Row(f"{name} / the peer: messages", "x", (messages / peer_messages,), _TRAFFIC)
            yield Row(f"{name} / the peer: bytes", "x", (size / peer_bytes,), _TRAFFIC)
