"""The time from the first token of the model to its display in the frontend.

Both processes read the clock of the machine, so their times can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.inside import PROMPT
from tests.benchmarks.notebook import loaded_kernel
from tests.benchmarks.report import Row, Target
from tests.benchmarks.rounds import Rounds
from tests.kernels import Kernel

_TARGET = Target("<=", 15.0)
_SHOWN = {"display_data", "update_display_data"}


def measure(rounds: Rounds) -> Iterator[Row]:
    """Measure the first token of two answers in each of several kernels.

    The first answer may import something before it is shown.
    """

    def once() -> dict[str, float]:
        with loaded_kernel() as kernel:
            kernel.ok("first = inside.FirstToken()")
            both = {"first": _follow(kernel), "later": _follow(kernel)}
        return {f"{which} {to}": ms for which, times in both.items() for to, ms in times.items()}

    taken = rounds.run(once)
    for which, answer in (("first", "the first answer of a kernel"), ("later", "a later answer")):
        yield Row(f"{answer}: until the main thread has it", "ms", taken[f"{which} received"])
        yield Row(f"{answer}: until its message is sent", "ms", taken[f"{which} sent"], _TARGET)
        yield Row(f"{answer}: until the client has it", "ms", taken[f"{which} arrived"])


def _follow(kernel: Kernel) -> dict[str, float]:
    kernel.ok("first.reset()")
    ran = kernel.ok(f"%%llm -t 0 --max-new-tokens 16\n{PROMPT}")
    produced, received, sent, number = kernel.value("first.times()")
    arrivals = [when for when, kind, _text in ran.arrivals if kind in _SHOWN]
    moments = {"received": received, "sent": sent, "arrived": arrivals[number - 1]}
    return {name: (when - produced) * 1000 for name, when in moments.items()}
