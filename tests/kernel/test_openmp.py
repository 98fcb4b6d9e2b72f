"""Threads that helped a thread to compute do not stay: too many of them slow every operation down.

Of libgomp, that is: the OpenMP of torch on Linux.
"""

from __future__ import annotations

import time

import pytest

from tests.kernels import Kernel
from tests.until import until

COMPUTE = "import torch\ntorch.set_num_threads(2)\n_ = torch.ones(512, 512) @ torch.ones(512, 512)"
ASKS = {
    "magic": "%llm -t 0 --max-new-tokens 2 Hello",
    "sync": "_ = llm.generate('Hello', max_new_tokens=2)",
    "stream": "_ = list(llm.stream('Hello', max_new_tokens=2))",
    "async": "_ = await llm.agenerate('Hello', max_new_tokens=2)",
    "job": "%%llm --bg --max-new-tokens 2\nHello",
}


def threads(kernel: Kernel) -> int:
    """Return how many there are once none has come or gone for a while: they end in their own time."""
    counts = [-1]
    for _ in range(100):
        counts.append(kernel.process.num_threads())
        if len(set(counts[-5:])) == 1:
            break
        time.sleep(0.1)
    return counts[-1]


def assert_threads_end(kernel: Kernel, resting: int) -> None:
    """Wait until there are no more threads than a number."""
    until(lambda: kernel.process.num_threads() <= resting, "threads stay", within=30)


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_cells_with_torch_release_openmp_threads_while_model_answers(
    loaded: Kernel, ask: str
) -> None:
    for cell in (COMPUTE, ask, "%llm_wait"):
        loaded.ok(cell)
    resting = threads(loaded)
    loaded.ok(COMPUTE)
    assert loaded.process.num_threads() > resting, (
        "torch computed with one thread: nothing is tested"
    )
    loaded.ok(ask)
    loaded.ok("%llm_wait")
    assert_threads_end(loaded, resting)


def test_the_model_keeps_none_while_it_is_idle(loaded: Kernel) -> None:
    for cell in (COMPUTE, "%llm -t 0 --max-new-tokens 2 Hello"):
        loaded.ok(cell)
    resting = threads(loaded)
    for cell in ("%llm_unload", "%llm_load", "%llm -t 0 --max-new-tokens 2 Hello"):
        loaded.ok(cell)
        assert_threads_end(loaded, resting)
