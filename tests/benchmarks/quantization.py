"""What quantised weights are worth on this machine, and whether they are quiet about it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.inside import PROMPT
from tests.benchmarks.notebook import ask, fresh_kernel, loaded_kernel
from tests.benchmarks.peers import PEERS
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds

_TOKENS, _WARM_UP_TOKENS = 128, 16
_BF16, _NF4, _LINES = "bf16", "nf4 (-q 4bit)", "int8 (-q 8bit): lines of warnings"


def measure(rounds: Rounds) -> Iterator[Row]:
    """Ask a model of each kind in turn, in kernels of their own."""
    if missing := PEERS["bitsandbytes"].missing:
        yield Row(_NF4, "tok/s", note=missing)
        yield Row(_LINES, "", note=missing)
        return
    with loaded_kernel() as bf16, loaded_kernel("%llm_load -q 4bit") as nf4:
        for kernel in (bf16, nf4):
            ask(kernel, _WARM_UP_TOKENS)
        rates = rounds.in_turn({_BF16: lambda: ask(bf16, _TOKENS), _NF4: lambda: ask(nf4, _TOKENS)})
    for name, values in rates.items():
        yield Row(name, "tok/s", values)
    yield ratio("nf4 / bf16", rates[_NF4], rates[_BF16], Target(">=", 1.15))
    yield Row(_LINES, "", (float(_warnings()),), Target("<=", 0))


def _warnings() -> int:
    """Return how many lines a load and an answer in 8 bit write to stderr."""
    with fresh_kernel() as kernel:
        kernel.ok("%load_ext llm_magic")
        cells = ("%llm_load -q 8bit", f"%%llm -t 0 --max-new-tokens 8\n{PROMPT}")
        outputs = [output for cell in cells for output in kernel.ok(cell, timeout=300).outputs]
    text = "".join(output["text"] for output in outputs if output.get("name") == "stderr")
    return sum(bool(line.strip()) for line in text.splitlines())
