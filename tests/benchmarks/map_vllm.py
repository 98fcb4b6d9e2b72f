"""The same prompts to a real vLLM server, by ``llm.map`` and by vLLM's own client, ``vllm bench serve``.

The server takes turns with both. Every prompt begins with a number of its own, because vLLM keeps the
beginnings of prompts, and has as many tokens as the others; every answer has the same length, too.
The time of `llm.map` is that of the whole cell, with its display. The client's is what it reports
itself, without its start; it is a process of its own, which is started anew for every figure.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from llm_magic.backends.local.files import gguf
from tests.benchmarks.notebook import fresh_kernel, loaded_kernel, seconds
from tests.benchmarks.peers import PEERS
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.kernels import Kernel
from tests.servers.processes import Server, running

ROWS, _WORKERS, _TOKENS, _WARM_UP_TOKENS = 64, 16, 32, 2
# As the server counts them, with the chat template.
_PROMPT_TOKENS = 77
OURS, THEIRS = f"llm.map, {_WORKERS} at once", f"vllm bench serve, {_WORKERS} at once"
OURS_ADAPTS = "llm.map without workers="
# A server takes a minute to start, and several where others compute; so does the client.
_PATIENCE_S = 480
_TEXT = (
    "A lighthouse keeper has looked after the same lamp for thirty years. One winter night a whale comes"
    " close to the rocks, and the keeper has to choose between the ships and the whale. Tell the story."
)
_PREPARE = "%load_ext llm_magic\nfrom llm_magic import llm\nfrom tests.benchmarks import inside\n"
# What the other client does not send either.
_CONFIG = "%llm_config temperature=0 top_p=none top_k=none repetition_penalty=none"

_numbers = itertools.count(10_000)


def measure(rounds: Rounds) -> Iterator[Row]:
    """Send the prompts in each of the ways, in turn."""
    rates = {} if PEERS["vLLM"].missing else _rates(rounds)
    yield from rows(rates)


def rows(rates: Mapping[str, tuple[float, ...]]) -> Iterator[Row]:
    """Yield what was measured and its quotients; all of it is missing without the server."""
    note = PEERS["vLLM"].missing
    for name in (OURS, THEIRS, OURS_ADAPTS):
        yield Row(name, "rows/s", rates.get(name, ()), note=note)
    if rates:
        yield ratio(f"{OURS} / vllm bench serve", rates[OURS], rates[THEIRS], Target(">=", 0.95))
        yield ratio(f"{OURS_ADAPTS} / {THEIRS}", rates[OURS_ADAPTS], rates[THEIRS])


def _rates(rounds: Rounds) -> dict[str, tuple[float, ...]]:
    folder = _converted()
    with (
        running("vllm", folder.parent.parent, environment={}, timeout=_PATIENCE_S) as server,
        fresh_kernel() as kernel,
    ):
        kernel.ok(f"{_PREPARE}watch = inside.Stopwatch()")
        kernel.ok(f"%llm_load {server.model} -b vllm --base-url {server.url}")
        kernel.ok(_CONFIG)
        ways: dict[str, Callable[[int], float]] = {
            OURS: partial(_map, kernel, f", workers={_WORKERS}"),
            THEIRS: partial(_bench, server, folder),
            OURS_ADAPTS: partial(_map, kernel, ""),
        }
        for way in (OURS, OURS_ADAPTS):
            ways[way](_WARM_UP_TOKENS)
        return rounds.in_turn({name: partial(way, _TOKENS) for name, way in ways.items()})


def _converted() -> Path:
    """Return the folder with the bundled model, converted by a kernel if it is not there."""
    file = gguf.embedded_file()
    assert file is not None
    folder = gguf.converted_folder(file)
    if not folder.exists():
        with loaded_kernel():
            assert folder.exists()
    return folder


def _prompts() -> list[str]:
    return [f"{next(_numbers)}. {_TEXT}" for _ in range(ROWS)]


def _map(kernel: Kernel, options: str, tokens: int) -> float:
    """Run one cell with `llm.map`; returns rows per second over the whole cell."""
    kernel.ok(f"prompts = {_prompts()!r}")
    about = f"max_new_tokens={tokens}, extra={{'ignore_eos': True}}{options}"
    taken = seconds(kernel, f"mapped = llm.map('{{item}}', prompts, {about})")
    assert kernel.value("dict(mapped.errors)") == {}
    usage = kernel.value("(mapped.usage.prompt_tokens, mapped.usage.completion_tokens)")
    assert usage == (ROWS * _PROMPT_TOKENS, ROWS * tokens)
    return ROWS / taken


def _bench(server: Server, folder: Path, tokens: int) -> float:
    """Run vLLM's client once; returns the rows per second that it reports."""
    with tempfile.TemporaryDirectory(prefix="llm_magic-bench-") as home:
        data = Path(home, "prompts.jsonl")
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in _prompts()))
        command = [
            str(PEERS["vLLM"].python), "-m", "vllm.entrypoints.cli.main", "bench", "serve",
            "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
            "--base-url", server.url, "--model", server.model, "--tokenizer", str(folder),
            "--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template",
            "--custom-output-len", str(tokens), "--num-prompts", str(ROWS),
            "--max-concurrency", str(_WORKERS), "--ignore-eos", "--temperature", "0",
            "--disable-tqdm", "--save-result", "--result-dir", home,
            "--result-filename", "result.json",
        ]  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True,
            timeout=_PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = json.loads(Path(home, "result.json").read_text())
    assert result["completed"] == ROWS
    usage = (result["total_input_tokens"], result["total_output_tokens"])
    assert usage == (ROWS * _PROMPT_TOKENS, ROWS * tokens)
    return float(result["request_throughput"])
