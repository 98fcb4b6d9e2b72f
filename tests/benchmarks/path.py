"""How much of the package one ``%%llm`` cell enters: the path that its reader has to follow."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.inside import PROMPT
from tests.benchmarks.notebook import fresh_kernel
from tests.benchmarks.report import Row, Target
from tests.benchmarks.rounds import Rounds

_FILES, _FUNCTIONS = Target("<=", 25), Target("<=", 140)


def measure(rounds: Rounds) -> Iterator[Row]:
    """Count the files and functions that the second answer of a kernel enters, on all threads."""
    taken = rounds.run(_once)
    yield Row("files entered by one %%llm", "files", taken["files"], _FILES)
    yield Row("functions entered by it", "functions", taken["functions"], _FUNCTIONS)


def _once() -> dict[str, float]:
    entered = functions()
    return {"files": len({file for file, _ in entered}), "functions": len(entered)}


def functions() -> list[tuple[str, str]]:
    """Return the file and the name of each function that the cell enters."""
    with fresh_kernel() as kernel:
        kernel.ok("from tests.benchmarks import inside\nentered = inside.Entered()")
        kernel.ok("%load_ext llm_magic")
        kernel.ok("%llm_load", timeout=300)
        # The first answer of a kernel imports what later ones only use.
        kernel.ok(f"%%llm -t 0 --max-new-tokens 8\n{PROMPT}")
        kernel.ok("entered.start()")
        kernel.ok(f"%%llm -t 0 --max-new-tokens 8\n{PROMPT}")
        found: list[tuple[str, str]] = kernel.value("entered.functions()")
        return found


if __name__ == "__main__":
    for file, name in functions():
        print(file, name)
