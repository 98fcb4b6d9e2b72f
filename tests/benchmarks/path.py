"""How much of the package one ``%%llm`` cell enters: the path that a reader of the code has to follow."""

from __future__ import annotations

from tests.benchmarks.inside import PROMPT
from tests.benchmarks.notebook import fresh_kernel


def listing() -> str:
    """Return the functions that the second answer of a kernel enters, and how many there are."""
    entered = functions()
    files = {file for file, _name in entered}
    lines = [f"{file} {name}" for file, name in entered]
    return "\n".join([*lines, f"{len(files)} files, {len(entered)} functions"])


def functions() -> list[tuple[str, str]]:
    """Return the file and the name of each function that the cell enters, on all threads."""
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
