"""The rows of a map on two worker processes, compared with the sum of what each answers alone.

Each worker that is measured alone is the only one of its pool. All pools stay open, and answer chunks
of the same size. The model whose answers are pauses shows what the distribution of the rows costs. The
workers of the other one compute with a thread each, so that two of them need two CPUs, and share the
memory bus.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tests import worker_backend
from tests.benchmarks.notebook import fresh_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.kernels import ROOT, Kernel

_POOLS = {"the first worker alone": 1, "the second worker alone": 1, "two workers": 2}
# The rows of a figure: several chunks, the same number for each worker.
_PAUSES, _LOCAL = "answers that take 0.1 s", "SmolLM2-135M-Instruct, a thread each"
_ROWS = {_PAUSES: 160, _LOCAL: 64}
# With so many, each worker loads the model.
_ROWS_TO_LOAD = 8
_PROMPTS = {_PAUSES: "{item} pauses", _LOCAL: "Tell a story about the number {item}."}
_TARGET = Target(">=", 0.9)


class Pools:
    """Worker processes that are started from a kernel."""

    def __init__(self) -> None:
        spawn = get_context("spawn")
        self._pools = {
            name: ProcessPoolExecutor(size, mp_context=spawn) for name, size in _POOLS.items()
        }
        # Rows that differ from those before.
        self._numbers = itertools.count(1000)

    def rate(self, name: str, model: str, count: int) -> float:
        """Map over `count` rows with the workers of a pool; returns the rows per second."""
        from llm_magic import llm

        rows = list(itertools.islice(self._numbers, count))
        prompt, pool = _PROMPTS[model], self._pools[name]
        began = time.perf_counter()
        mapped = llm.map(prompt, rows, on=pool, temperature=0, max_new_tokens=32)
        seconds = time.perf_counter() - began
        assert not mapped.errors, mapped.errors
        return len(rows) / seconds


def measure(rounds: Rounds) -> Iterator[Row]:
    """Measure the pools in turn, with one model after the other."""
    with tempfile.TemporaryDirectory(prefix="llm_magic-bench-") as folder:
        packages = worker_backend.install(Path(folder, "packages"))
        model = Path(folder, "model")
        model.mkdir()
        for name, load in {_PAUSES: f"{model} -b recorded", _LOCAL: ""}.items():
            with _kernel(packages, load) as kernel:
                for pool in _POOLS:
                    _rate(kernel, pool, name, _ROWS_TO_LOAD)
                ways = {pool: partial(_rate, kernel, pool, name, _ROWS[name]) for pool in _POOLS}
                first, second, both = rounds.in_turn(ways).values()
            alone = tuple(map(sum, zip(first, second, strict=True)))
            yield Row(f"{name}: two workers", "rows/s", both)
            yield Row(f"{name}: sum of two alone", "rows/s", alone)
            yield ratio(f"{name}: two workers / sum of two alone", both, alone, _TARGET)


@contextlib.contextmanager
def _kernel(packages: Path, load: str) -> Iterator[Kernel]:
    """Start a kernel with a loaded model, from which the pools are started."""
    path = os.pathsep.join((str(ROOT), str(packages)))
    with fresh_kernel(PYTHONPATH=path, OMP_NUM_THREADS="1") as kernel:
        kernel.ok("%load_ext llm_magic")
        kernel.ok(f"%llm_load {load}", timeout=300)
        kernel.ok("from tests.benchmarks.workers import Pools\npools = Pools()")
        yield kernel


def _rate(kernel: Kernel, pool: str, model: str, count: int) -> float:
    kernel.ok(f"rate = pools.rate({pool!r}, {model!r}, {count})", timeout=600)
    rate: float = kernel.value("rate")
    return rate
