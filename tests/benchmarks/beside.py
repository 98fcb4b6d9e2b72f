"""Tokens per second beside two processes that compute all the time, and alone.

``%%llm`` and a plain ``generate`` in a process of its own, in turn. Threads of OpenMP that spin while
they wait take time from the busy processes, which the operating system then returns to these.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from tests.benchmarks.notebook import ask, bare, bare_kernel, loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds

_TOKENS, _WARM_UP_TOKENS = 64, 16
_PROCESSES = 2
_TARGET = Target(">=", 0.5)

OURS, PLAIN = "%%llm", "generate, a process of its own"


def measure(rounds: Rounds) -> Iterator[Row]:
    """Run both in turn, alone and beside the busy processes."""
    with ExitStack() as kernels:
        ours, plain = kernels.enter_context(loaded_kernel()), kernels.enter_context(bare_kernel())
        ways: dict[str, Callable[[int], float]] = {
            OURS: lambda n: ask(ours, n),
            PLAIN: lambda n: bare(plain, f"inside.generate(model, tokenizer, {n})", n),
        }
        for way in ways.values():
            way(_WARM_UP_TOKENS)
        alone = {name: partial(way, _TOKENS) for name, way in ways.items()}
        beside = {_beside(name): partial(_crowded, way) for name, way in alone.items()}
        rates = rounds.in_turn({**alone, **beside})
    for name, values in rates.items():
        yield Row(name, "tok/s", values)
    yield ratio(f"{OURS}, beside / alone", rates[_beside(OURS)], rates[OURS], _TARGET)
    yield ratio(f"{PLAIN}, beside / alone", rates[_beside(PLAIN)], rates[PLAIN])
    yield ratio(f"{OURS} / generate, beside", rates[_beside(OURS)], rates[_beside(PLAIN)])


def _beside(name: str) -> str:
    return f"{name}, beside {_PROCESSES} busy processes"


def _crowded(way: Callable[[], float]) -> float:
    with busy_processes():
        return way()


@contextlib.contextmanager
def busy_processes() -> Iterator[None]:
    """Run processes that compute all the time; they have begun when this is entered."""
    code = "print(flush=True)\nwhile True: pass"
    with ExitStack() as stack:
        for _ in range(_PROCESSES):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield
