"""Stopping is quick at any moment, and several who ask at once get each their own answer."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from llm_magic.backends.local.generation.model_runner import PrefillChunkSize
from llm_magic.errors import Interrupted
from llm_magic.session import Session
from tests.kernels import within_a_second
from tests.local_models import local_model, local_session, parrot
from tests.tiny_models import tiny_llama

LONG = "word " * 600  # about 3000 tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    parrot(folder / "endless", "abcdef", ends=False, max_position_embeddings=8192)
    tiny_llama(folder / "noise")
    tiny_llama(folder / "deep", layers=300, hidden=32)
    tiny_llama(folder / "less deep", layers=60, hidden=32)
    return folder


@pytest.fixture(scope="module")
def session(models: Path) -> Iterator[Session]:
    with local_session(max_new_tokens=4000, repetition_penalty=1, temperature=0) as session:
        session.load(str(models / "noise"))
        session.load(str(models / "endless"), keep=True)
        yield session


class Steps:
    """Records the number of tokens and the thread of each forward pass."""

    def __init__(self, pause: float) -> None:
        self.lengths: list[int] = []
        self.threads: set[str] = set()
        self.pause = pause

    def __call__(self, _module: Any, _args: Any, named: dict[str, Any]) -> None:
        self.lengths.append(named["input_ids"].shape[1])
        self.threads.add(threading.current_thread().name)
        time.sleep(self.pause)


@contextlib.contextmanager
def recorded_steps(session: Session, name: str = "endless", pause: float = 0.0) -> Iterator[Steps]:
    """Record the forward passes of a model, with a pause in each."""
    steps = Steps(pause)
    model = local_model(session, name).model
    handle = model.register_forward_pre_hook(steps, with_kwargs=True)
    try:
        yield steps
    finally:
        handle.remove()


def after_closing(stream: Any, steps: Steps) -> tuple[float, int]:
    """Close a stream; returns how long that took and how many passes there were from then on."""
    # Slow passes: on a busy machine, a fast model computes many until the request arrives.
    steps.pause = 0.4
    passes, began = len(steps.lengths), time.perf_counter()
    stream.close()
    took = time.perf_counter() - began
    time.sleep(1)
    return took, len(steps.lengths) - passes


def still_works(session: Session) -> bool:
    return session.generate("x", max_new_tokens=8).text == "abcdefab"


def test_closed_stream_stops_within_two_steps(session: Session) -> None:
    with recorded_steps(session, pause=0.02) as steps:
        stream = session.stream("Go")
        for _ in range(6):
            next(stream)
        took, passes = after_closing(stream, steps)
    assert passes <= 2
    assert took < within_a_second()
    assert session.last is not None
    assert session.last.finish_reason == "cancelled"
    assert "abcdef".startswith(session.last.text[:6])
    assert still_works(session)


def test_closed_stream_stops_within_the_prompt(session: Session) -> None:
    with recorded_steps(session, pause=0.4) as steps:
        stream = session.stream(LONG)
        first = next(stream)
        assert first.progress is not None
        assert first.progress.share == 0
        while not steps.lengths:
            time.sleep(0.01)
        took, passes = after_closing(stream, steps)
    assert passes <= 1
    assert took < within_a_second()
    assert session.last is not None
    # The prompt was counted before it was read.
    assert session.last.usage.prompt_tokens is not None
    assert sum(steps.lengths) < session.last.usage.prompt_tokens / 2
    assert still_works(session)


def test_a_prompt_is_read_in_pieces_that_change_seldom(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PrefillChunkSize.update
    # As long as they take on an idle machine.
    monkeypatch.setattr(PrefillChunkSize, "update", lambda one, size, _s: update(one, size, 0.1))
    with recorded_steps(session) as steps:
        session.generate(LONG, max_new_tokens=2)
        session.generate("other " + LONG, max_new_tokens=2)
    pieces = [length for length in steps.lengths if length > 1]
    assert len(pieces) > 4
    assert len(set(pieces)) == 3, "two prompts: the same pieces, and what is left of each"


@pytest.mark.parametrize(("per_token", "size"), [(0.001, 256), (0.01, 32), (0.1, 8)])
def test_pieces_of_a_slow_model_become_shorter(per_token: float, size: int) -> None:
    chunk_size = PrefillChunkSize(256)
    for _ in range(12):
        chunk_size.update(chunk_size.tokens, per_token * chunk_size.tokens)
    assert chunk_size.tokens == size


# A busy machine: shorter pieces take as long, so only the first one is made shorter.
@pytest.mark.parametrize(("seconds", "size"), [(0.2, 256), (1.0, 128), (0.01, 4096)])
def test_a_piece_takes_neither_long_nor_next_to_nothing(seconds: float, size: int) -> None:
    chunk_size = PrefillChunkSize(256)
    for _ in range(12):
        chunk_size.update(chunk_size.tokens, seconds)
        chunk_size.update(1, 0.0)  # the last tokens of a prompt are not measured
    assert chunk_size.tokens == size


def test_a_large_model_reads_smaller_pieces() -> None:
    sizes = [
        PrefillChunkSize.for_model(size, "cpu").tokens for size in (10**5, 135_000_000, 8 * 10**9)
    ]
    assert sizes == [1024, 128, 8]
    assert PrefillChunkSize.for_model(8 * 10**9, "cuda").tokens == 512


def test_pieces_stay_long_enough_to_be_worth_reading_the_weights() -> None:
    chunk_size = PrefillChunkSize.for_model(8 * 10**9, "cpu", smallest=64)
    assert chunk_size.tokens == 64
    for _ in range(12):
        chunk_size.update(chunk_size.tokens, 2.0)
    assert chunk_size.tokens == 64


def interrupt_when(ready: Callable[[], bool]) -> threading.Thread:
    """Press the stop button as soon as `ready()`."""

    def press() -> None:
        deadline = time.monotonic() + 30
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_interrupt_keeps_partial_reply(session: Session) -> None:
    with recorded_steps(session, pause=0.005) as steps:
        presser = interrupt_when(lambda: len(steps.lengths) > 20)
        with pytest.raises(Interrupted) as caught:
            session.generate("Go")
        presser.join()
    reply = caught.value.reply
    assert reply is not None
    assert reply is session.last
    assert len(reply.text) >= 15
    assert ("abcdef" * 100).startswith(reply.text)
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("cancelled", len(reply.text))
    assert still_works(session)


def test_interrupted_load_leaves_the_session_usable(models: Path) -> None:
    with local_session(max_new_tokens=2) as session:

        def reading() -> bool:
            progress = session.progress
            return progress is not None and bool(progress.share)

        session.load(str(models / "noise"))
        presser = interrupt_when(reading)
        with pytest.raises(Interrupted, match=r"^Stopped loading .*deep\.$"):
            session.load(str(models / "deep"), keep=True)
        presser.join()
        assert session.status().active_model == "noise"
        assert session.generate("x").usage.completion_tokens
        assert session.load(str(models / "deep"), keep=True).name == "deep"
    # What was put into Transformers for the progress is out of it again.
    assert transformers_logging.set_tqdm_hook(None) is None


def test_concurrent_requests_return_the_replies_of_single_ones(session: Session) -> None:
    def ask(seed: int) -> str:
        return session.generate(
            "Hi", model="noise", temperature=1.5, seed=seed, max_new_tokens=40
        ).text

    alone = [ask(seed) for seed in range(6)]
    with recorded_steps(session, "noise") as steps, ThreadPoolExecutor(3) as pool:
        together = list(pool.map(ask, range(6)))
    assert together == alone
    assert steps.threads == {"llm_magic-inference"}


def test_two_sessions_use_separate_random_numbers(models: Path, session: Session) -> None:
    def ask(which: Session, seed: int) -> str:
        return which.generate(
            "Hi", model="noise", temperature=1.5, seed=seed, max_new_tokens=40
        ).text

    with local_session(repetition_penalty=1) as other:
        other.load(str(models / "noise"))
        alone = [ask(session, seed) for seed in range(6)]
        state = torch.get_rng_state()
        with ThreadPoolExecutor(2) as pool:
            pairs = [(session, other)[seed % 2] for seed in range(6)]
            together = list(pool.map(ask, pairs, range(6)))
    assert together == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_two_sessions_load_concurrently(models: Path) -> None:
    def load(which: Session) -> str:
        return which.load(str(models / "less deep")).name

    with local_session() as one, local_session() as other, ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert list(pool.map(load, [one, other])) == ["less deep", "less deep"]
            one.unload_all()
            other.unload_all()
    assert transformers_logging.set_tqdm_hook(None) is None
