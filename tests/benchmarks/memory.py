"""How long a load takes beside Transformers alone, and how much memory an unload frees."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.notebook import fresh_kernel, loaded_kernel, seconds
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.benchmarks.weights import write_llama
from tests.kernels import Kernel

_BARE = "from tests.benchmarks import inside\nmodel, tokenizer = inside.load_bare()"
_OURS = "%load_ext llm_magic\n%llm_load"


def measure_load(rounds: Rounds) -> Iterator[Row]:
    """Load from the converted files: again in one kernel, and first in fresh kernels."""
    with loaded_kernel() as kernel:
        again = rounds.run(lambda: _load_again(kernel))
    yield Row("%llm_load again", "s", again["ours"], Target("<=", 1.0))
    yield Row("from_pretrained again", "s", again["bare"])
    yield ratio("ratio", again["ours"], again["bare"], Target("<=", 1.1))
    yield Row("%llm_load of what is loaded", "ms", again["reload"], Target("<=", 5.0))
    first = rounds.run(lambda: {"ours": _first(_OURS), "bare": _first(_BARE)})
    yield Row("%llm_load, imports and all", "s", first["ours"])
    yield Row("from_pretrained, imports and all", "s", first["bare"])
    yield ratio("ratio, imports and all", first["ours"], first["bare"])


def _load_again(kernel: Kernel) -> dict[str, float]:
    reload = seconds(kernel, "%llm_load") * 1000
    kernel.ok("%llm_unload")
    kernel.ok("taken = inside.load_bare_and_drop()")
    bare = kernel.value("taken")
    return {"reload": reload, "bare": bare, "ours": seconds(kernel, "%llm_load")}


def _first(code: str) -> float:
    with fresh_kernel() as kernel:
        kernel.ok("import time")
        began = time.perf_counter()
        kernel.ok(code, timeout=300)
        return time.perf_counter() - began


def measure_load_large(rounds: Rounds) -> Iterator[Row]:
    """Load the 1B shape and generate a token in fresh kernels that have imported what it takes.

    Without the token, `from_pretrained` only maps the file, and reads the weights later.
    """
    with tempfile.TemporaryDirectory(prefix="llm_magic-bench-") as temporary:
        path = Path(temporary) / "one-billion"
        write_llama(path)
        ours = f"%llm_load {path}\n%llm -t 0 --max-new-tokens 1 Hello"
        bare = f"pair = inside.load_bare({str(path)!r})\ninside.generate(*pair, 1, prompt='Hello')"

        def once() -> dict[str, float]:
            taken = {}
            for name, cell in (("ours", ours), ("bare", bare)):
                taken[name], taken[f"{name}, peak"] = _load_large(cell)
            return taken

        once()
        taken = rounds.run(once)
    yield Row("%llm_load", "s", taken["ours"])
    yield Row("from_pretrained", "s", taken["bare"])
    yield ratio("ratio", taken["ours"], taken["bare"], Target("<=", 1.15))
    yield Row("%llm_load, peak", "MB", taken["ours, peak"])
    yield Row("from_pretrained, peak", "MB", taken["bare, peak"])
    yield ratio("ratio of the peaks", taken["ours, peak"], taken["bare, peak"], Target("<=", 1.1))


def _load_large(cell: str) -> tuple[float, float]:
    """Return the seconds of a load and a token in a fresh kernel, and its peak memory in MB."""
    with loaded_kernel() as kernel:
        # Everything is imported, and both have had the same model before.
        kernel.ok("%llm_unload\ninside.load_bare_and_drop()", timeout=300)
        kernel.ok("from pathlib import Path\n_ = Path('/proc/self/clear_refs').write_text('5')")
        taken = seconds(kernel, cell)
        lines: str = kernel.value("Path('/proc/self/status').read_text()")
    (peak,) = [line.split()[1] for line in lines.splitlines() if line.startswith("VmHWM")]
    return taken, int(peak) / 1000


def measure_unload(rounds: Rounds) -> Iterator[Row]:
    """Load, answer and unload; compare what the process freed with the size of the model."""
    left: list[float] = []

    def once() -> dict[str, float]:
        kernel.ok("llm.load()")
        kernel.ok("%llm -t 0 --max-new-tokens 8 Hello")
        kernel.ok("gone = llm.unload()")
        before, after, size = kernel.value("(gone.before.process, gone.after.process, gone.size)")
        left.append(after / 1e6)
        return {"share": (before - after) / size}

    with loaded_kernel() as kernel:
        taken = rounds.run(once)
    yield Row("bytes freed / size", "x", taken["share"], Target(">=", 0.95))
    yield Row("the process afterwards", "MB", tuple(left))
    yield Row("grown from the first to the last time", "MB", (left[-1] - left[0],))
