"""How long ``%load_ext`` keeps a fresh kernel."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from tests.benchmarks.notebook import fresh_kernel
from tests.benchmarks.report import Row, Target
from tests.benchmarks.rounds import Rounds

_EXTENSIONS = {
    "llm_magic": (Target("<=", 50.0), ""),
    "jupyter_ai_magics": (None, "missing: pip install jupyter-ai-magics"),
}
_TIMED = """
import time
began = time.perf_counter(), time.thread_time()
get_ipython().run_line_magic("load_ext", {name!r})
taken = (time.perf_counter() - began[0]) * 1000, (time.thread_time() - began[1]) * 1000
"""


def measure(rounds: Rounds) -> Iterator[Row]:
    """Load each extension in a kernel of its own, taking turns."""
    here = [name for name in _EXTENSIONS if find_spec(name) is not None]

    def once() -> dict[str, float]:
        figures = {}
        for name in here:
            with fresh_kernel() as kernel:
                kernel.ok(_TIMED.format(name=name))
                figures[name], figures[f"CPU {name}"] = kernel.value("taken")
        return figures

    taken = rounds.run(once)
    for name, (target, missing) in _EXTENSIONS.items():
        if name not in here:
            yield Row(f"%load_ext {name}", "ms", note=missing)
            continue
        yield Row(f"%load_ext {name}", "ms", taken[name], target)
        # What it needs, however busy the machine is.
        yield Row("  its CPU time", "ms", taken[f"CPU {name}"])
