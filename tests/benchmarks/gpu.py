"""Decoding on an accelerator: ``python -m tests.benchmarks.gpu [--json FILE]``.

Llamas of 1B and 8B with random weights, a streamed answer beside ``model.generate`` of the same
model and settings: on the main thread, as in a cell, and on the thread that answers. A token reads
every weight once, so the share of the bandwidth of a plain copy shows how far either is from what
the memory allows. ``LLM_MAGIC_TEST_DEVICE=cpu`` measures a small model, to see that this runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_magic.backends.local.generation.parameters import generate_options
from llm_magic.config.settings import GenerationConfig, Settings
from llm_magic.errors import GenerationFailed
from llm_magic.session import Session
from llm_magic.types import Message
from tests.benchmarks import report
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.gpu import devices, shapes

_TOKENS = 128
_PROMPT = "Write a long story about a lighthouse keeper and a whale. Tell every detail."
_OPTIONS: dict[str, Any] = {"temperature": 0, "repetition_penalty": None}
_COPY_BYTES = (4 << 30) if devices.ON_GPU else (256 << 20)


@dataclass(frozen=True, slots=True)
class Subject:
    """A session that holds a model, and the bare model beside it."""

    session: Session
    loaded: Any
    worker: Any

    def streamed(self, tokens: int) -> float:
        """Answer through the session; returns the seconds."""
        began = time.perf_counter()
        self.session.generate(_PROMPT, max_new_tokens=tokens, **_OPTIONS)
        return time.perf_counter() - began

    def bare(self, tokens: int) -> float:
        """Answer with ``model.generate`` on this thread; returns the seconds."""
        began = time.perf_counter()
        prompt = self.loaded.prompt_encoder.encode([Message("user", _PROMPT)])
        ids = torch.tensor([prompt], device=self.loaded.model.device)
        config = GenerationConfig(max_new_tokens=tokens, **_OPTIONS)
        options = generate_options(self.loaded.model, config, None)
        mask = torch.ones_like(ids)
        output = self.loaded.model.generate(input_ids=ids, attention_mask=mask, **options)
        new = output[0, ids.shape[1] :].tolist()
        assert len(new) == tokens
        self.loaded.tokenizer.decode(new, skip_special_tokens=True)
        return time.perf_counter() - began

    def bare_on_its_thread(self, tokens: int) -> float:
        """Answer with ``model.generate`` on the thread of the session; returns the seconds."""
        future, _cancel = self.worker.submit(lambda _flag: self.bare(tokens), _as_ours)
        seconds: float = future.result()
        return seconds

    def bytes_a_token(self) -> int:
        """What decoding must read: all weights, but of the embedding one row."""
        embedding = self.loaded.model.get_input_embeddings().weight
        weights = sum(p.numel() * p.element_size() for p in self.loaded.model.parameters())
        return int(weights - embedding.numel() * embedding.element_size())


def _as_ours(error: BaseException) -> GenerationFailed:
    return GenerationFailed(f"{type(error).__name__}: {error}")


def copy_bandwidth(rounds: Rounds) -> Iterator[Row]:
    """Copy within the device, as torch does it; bytes read and bytes written count."""
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8, device=devices.NAME)
    target = torch.empty_like(source)

    def once() -> dict[str, float]:
        devices.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            target.copy_(source)
        devices.synchronize()
        return {"copy": 10 * _COPY_BYTES / (time.perf_counter() - began) / 1e9}

    once()
    yield Row("device-to-device copy", "GB/s", rounds.run(once)["copy"])


def decoding_speed(folder: Path, bandwidth: float, rounds: Rounds) -> Iterator[Row]:
    """Measure one model: load, decode three ways in turn, first token."""
    session = Session(Settings(_env_file=None, LLM_DEVICE=devices.NAME))
    try:
        began = time.perf_counter()
        info = session.load(str(folder))
        load_s = time.perf_counter() - began
        yield Row("load", "s", (load_s,), note=f"{(info.size or 0) / 1e9:.2f} GB, {info.device}")
        held: Any = session.loaded_model()
        backend: Any = held.backend
        subject = Subject(session, backend.local_model(held.name), backend.inference)
        yield from _rates(subject, bandwidth, rounds)
        yield from _first_tokens(subject, rounds)
    finally:
        session.close()
        devices.free_garbage()


def _rates(subject: Subject, bandwidth: float, rounds: Rounds) -> Iterator[Row]:
    ways: dict[str, Callable[[int], float]] = {
        "streamed": subject.streamed,
        "generate, the same thread": subject.bare_on_its_thread,
        "generate, main thread": subject.bare,
    }
    for way in ways.values():
        way(16)
    order = deque(ways)

    def once() -> dict[str, float]:
        order.rotate(-1)
        return {name: _TOKENS / ways[name](_TOKENS) for name in order}

    rates = rounds.run(once)
    streamed, same_thread, main = (rates[name] for name in ways)
    for name in ways:
        yield Row(name, "tok/s", rates[name])
    yield ratio("streamed / the same thread", streamed, same_thread, Target(">=", 0.97))
    yield ratio("streamed / main thread", streamed, main, Target(">=", 0.97))
    per_token = subject.bytes_a_token() / 1e9
    for name, values in (("streamed", streamed), ("generate, main thread", main)):
        share = tuple(rate * per_token / bandwidth for rate in values)
        yield Row(f"share of copy bandwidth, {name}", "x", share)


def _first_tokens(subject: Subject, rounds: Rounds) -> Iterator[Row]:
    """Time the first token alone: as the session reports it, as it arrives, and bare."""

    def once() -> dict[str, float]:
        began = time.perf_counter()
        stream: Any = subject.session.stream(_PROMPT, max_new_tokens=8, **_OPTIONS)
        first = next(chunk for chunk in stream if chunk.tokens)
        arrived = (time.perf_counter() - first.time) * 1000
        stream.close()
        reported, bare = (first.time - began) * 1000, subject.bare(1) * 1000
        return {"reported": reported, "bare": bare, "more": reported - bare, "arrived": arrived}

    taken = rounds.run(once)
    yield Row("first token: from the call to the model", "ms", taken["reported"])
    yield Row("first token: generate of one token", "ms", taken["bare"])
    yield Row("first token: the difference", "ms", taken["more"])
    yield Row("first token: from the model to the caller", "ms", taken["arrived"], Target("<=", 15))


def main() -> None:
    """Build both models, measure them, and print a table of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--only", action="append", choices=("1B", "8B"), help="only this size")
    args = parser.parse_args()
    about = report.machine() | {"device": devices.versions()}
    print(report.header(about), flush=True)
    tables = [report.measured("bandwidth", "the device's memory", copy_bandwidth, 10)]
    print(f"\n{tables[0].text()}", flush=True)
    bandwidth = tables[0].rows[0].median or 0.0
    devices.free_garbage()
    with tempfile.TemporaryDirectory(prefix="llm_magic-gpu-") as root:
        for shape in (shapes.ONE_B, shapes.EIGHT_B):
            if args.only and shape.name not in args.only:
                continue
            shape = shapes.sized(shape)
            folder = shapes.folder_of(shape, Path(root))
            title = f"Llama {shape.name}, bf16, {_TOKENS} tokens, greedy"
            measure = partial(decoding_speed, folder, bandwidth)
            name = f"decode {shape.name}"
            tables.append(report.measured(name, title, measure, args.repeat))
            print(f"\n{tables[-1].text()}", flush=True)
    if args.json is not None:
        report.save(args.json, about, tables)


if __name__ == "__main__":
    main()
