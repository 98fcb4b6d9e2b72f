"""One model in four engines: the kernel's own, and three servers, each asked in two ways.

The same weights in bf16, the same prompt, 128 tokens, greedy: tokens per second of the whole cell.
Each server is asked by the `openai` client in a cell, and by ``%%llm -m`` in another kernel: the
quotient of the two is what our way to a server costs.

- The servers stay up for all rounds. One that waits may poll (vLLM took a quarter of a core), so all
  but the one that is asked are held by SIGSTOP meanwhile.
- Every server is set to compute on all cores, as ours does: by themselves llama-cpp-python takes
  half of them, and vLLM keeps one for its front. vLLM runs without compiling, which takes a minute.
- Each question begins with a number of its own: vLLM and llama.cpp keep the last prompt.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from llm_magic.backends.local.files import gguf
from tests.benchmarks.inside import PROMPT
from tests.benchmarks.notebook import fresh_kernel, loaded_kernel, seconds
from tests.benchmarks.peers import PEERS
from tests.benchmarks.report import Row, ratio
from tests.benchmarks.rounds import Rounds
from tests.benchmarks.same_weights import write_bf16
from tests.kernels import Kernel
from tests.servers.processes import Server, running

_TOKENS, _WARM_UP_TOKENS = 128, 8
LOCAL = "%%llm, in the kernel"
_PREPARE = "from tests.benchmarks import inside\nwatch = inside.Stopwatch()\n"
# What only some engines support is left to the model, or one would do more a token than another.
_CONFIG = "%llm_config temperature=0 top_p=none top_k=none repetition_penalty=none"
_PATIENCE_S = 480  # a server takes a minute to start, and several where others compute
# vLLM's; the others do not read it.
_ALL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Engine:
    """A server: what processes.py calls it, and which of our backends is meant for it."""

    kind: str
    backend: str


ENGINES = {
    "transformers serve": Engine("transformers", "openai"),
    "llama.cpp": Engine("llamacpp", "instructlab"),
    "vLLM": Engine("vllm", "vllm"),
}


def measure(rounds: Rounds) -> Iterator[Row]:
    """Ask every engine that is installed, in turn."""
    here = {name: engine for name, engine in ENGINES.items() if not PEERS[name].missing}
    yield from rows(_rates(here, rounds))


def rows(rates: Mapping[str, tuple[float, ...]]) -> Iterator[Row]:
    """Yield what was measured and its quotients; an engine that is missing is a row all the same."""
    yield Row(LOCAL, "tok/s", rates[LOCAL])
    for name in ENGINES:
        for way in (_by_client(name), _by_us(name)):
            note = PEERS[name].missing or ("" if way in rates else PEERS["openai"].missing)
            yield Row(way, "tok/s", rates.get(way, ()), note=note)
    here = [name for name in ENGINES if _by_client(name) in rates]
    for name in here:
        yield ratio(f"{LOCAL} / {name}", rates[LOCAL], rates[_by_client(name)])
    for name in here:
        yield ratio(f"{name}: %%llm / openai", rates[_by_us(name)], rates[_by_client(name)])


def _by_client(name: str) -> str:
    return f"{name}, openai client"


def _by_us(name: str) -> str:
    return f"{name}, %%llm"


def _rates(here: Mapping[str, Engine], rounds: Rounds) -> dict[str, tuple[float, ...]]:
    with ExitStack() as stack:
        local = stack.enter_context(loaded_kernel())
        local.ok(_CONFIG)
        ways: dict[str, Callable[[int], float]] = {LOCAL: lambda n: _ask(local, "", n)}
        servers = _servers(here, stack)
        if servers:
            ours, client = (stack.enter_context(fresh_kernel()) for _ in range(2))
            ours.ok(f"%load_ext llm_magic\n{_PREPARE}")
            client.ok(_PREPARE)
        for name, server in servers.items():
            _point_at(ours, here[name], server)
            ways[_by_us(name)] = partial(_ask_alone, ours, servers, name)
            if not PEERS["openai"].missing:
                client.ok(f"{server.kind} = inside.OpenAIClient({server.url!r})")
                ways[_by_client(name)] = partial(_stream_alone, client, servers, name)
        for way in ways.values():
            way(_WARM_UP_TOKENS)
        return rounds.in_turn({name: partial(way, _TOKENS) for name, way in ways.items()})


def _servers(here: Mapping[str, Engine], stack: ExitStack) -> dict[str, Server]:
    file = gguf.embedded_file()
    assert file is not None
    # The kernel that holds the model has converted it.
    cache = gguf.converted_folder(file).parent.parent
    options: dict[str, list[str]] = {}
    if "llama.cpp" in here:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llm_magic-bf16-"))
        weights, cores = write_bf16(Path(folder, "model.gguf")), str(os.cpu_count())
        threads = ("--n_threads", cores, "--n_threads_batch", cores)
        options["llama.cpp"] = ["--model", str(weights), *threads]
    return {
        name: stack.enter_context(
            running(
                engine.kind,
                cache,
                *options.get(name, ()),
                environment=_ALL_CORES,
                timeout=_PATIENCE_S,
            )
        )
        for name, engine in here.items()
    }


def _point_at(kernel: Kernel, engine: Engine, server: Server) -> None:
    where = f"-b {engine.backend} --base-url {server.url}"
    kernel.ok(f"%llm_load {server.model} {where} --name {engine.kind} --keep")
    kernel.ok(_CONFIG)


def _ask(kernel: Kernel, option: str, tokens: int) -> float:
    """Run one ``%%llm`` cell; returns tokens per second over the whole cell."""
    cell = f"%%llm {option} --max-new-tokens {tokens} -o reply\n{_question()}"
    taken = seconds(kernel, cell)
    return _rate(kernel.value("reply.finish_reason"), tokens, taken)


def _ask_alone(kernel: Kernel, servers: Mapping[str, Server], name: str, tokens: int) -> float:
    with _only(servers, name) as server:
        return _ask(kernel, f"-m {server.kind}", tokens)


def _stream_alone(kernel: Kernel, servers: Mapping[str, Server], name: str, tokens: int) -> float:
    with _only(servers, name) as server:
        call = f"{server.kind}({server.model!r}, {_question()!r}, {tokens})"
        taken = seconds(kernel, f"reason = {call}")
        return _rate(kernel.value("reason"), tokens, taken)


def _question() -> str:
    return f"{next(_numbers)}. {PROMPT}"


def _rate(reason: str, tokens: int, taken: float) -> float:
    # Not all of them count their tokens, but an answer that stops at the limit has as many.
    assert reason == "length", f"the answer ended before {tokens} tokens: {reason}"
    return tokens / taken


@contextlib.contextmanager
def _only(servers: Mapping[str, Server], name: str) -> Iterator[Server]:
    """Hold every server but one still."""
    held = [
        process
        for other, server in servers.items()
        if other != name
        for process in (server.process, *server.process.children(recursive=True))
    ]
    for process in held:
        process.suspend()
    try:
        yield servers[name]
    finally:
        for process in held:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
