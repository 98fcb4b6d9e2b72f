"""How long ``%load_ext`` keeps a fresh kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.benchmarks.notebook import fresh_kernel
from tests.benchmarks.peers import PEERS
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds

_OURS = "llm_magic"
# Jupyter AI's magics as they were until its version 2, and as they are since its version 3.
_PEERS = {"jupyter_ai_magics": Target("<=", 0.02), "jupyter_ai_magic_commands": Target("<=", 0.02)}
# Or litellm asks the network for prices while it is imported, and waits for an answer.
_OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
_TIMED = """
import time
began = time.perf_counter(), time.thread_time()
get_ipython().run_line_magic("load_ext", {name!r})
taken = (time.perf_counter() - began[0]) * 1000, (time.thread_time() - began[1]) * 1000
"""


def measure(rounds: Rounds) -> Iterator[Row]:
    """Load each extension in a fresh kernel of its environment, taking turns."""
    pythons: dict[str, Path | None] = {_OURS: None}
    pythons |= {name: PEERS[name].python for name in _PEERS if not PEERS[name].missing}

    def once() -> dict[str, float]:
        figures = {}
        for name, python in pythons.items():
            with fresh_kernel(python, **_OFFLINE) as kernel:
                kernel.ok(_TIMED.format(name=name))
                figures[name], figures[f"CPU {name}"] = kernel.value("taken")
        return figures

    yield from rows(rounds.run(once))


def rows(taken: Mapping[str, tuple[float, ...]]) -> Iterator[Row]:
    """Yield the times of each, and ours as a share of its peers'."""
    for name in (_OURS, *_PEERS):
        if name not in taken:
            yield Row(f"%load_ext {name}", "ms", note=PEERS[name].missing)
            continue
        target = Target("<=", 40.0) if name == _OURS else None
        yield Row(f"%load_ext {name}", "ms", taken[name], target)
        # What it needs, however busy the machine is.
        yield Row("  its CPU time", "ms", taken[f"CPU {name}"])
    for name, target in _PEERS.items():
        if name in taken:
            yield ratio(f"llm_magic / {name}", taken[_OURS], taken[name], target)
