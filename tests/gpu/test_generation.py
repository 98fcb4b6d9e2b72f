"""Answers on the device: streamed, stopped, seeded, and out of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_magic.errors import OutOfMemory
from llm_magic.session import Session
from tests.gpu import devices
from tests.local_models import local_model

pytestmark = pytest.mark.gpu

_MIB = 1 << 20
# What is left must be too little for the prompt, and enough for a short question.
_LEAVE = 64 * _MIB if devices.ON_GPU else 16 * _MIB
_LONG = "word " * 1200  # 6,000 tokens


def test_each_token_is_a_chunk_when_it_is_generated(loaded: Session) -> None:
    arrived, produced = [], []
    for chunk in loaded.stream("Hello", max_new_tokens=64):
        if chunk.tokens:
            arrived.append(time.perf_counter())
            produced.append(chunk.time)
    assert len(produced) == 64
    assert produced == sorted(produced)
    assert arrived[0] < produced[-1]
    assert loaded.last is not None
    assert loaded.last.finish_reason == "length"


def test_closed_stream_stops_within_two_steps(loaded: Session) -> None:
    steps = _Steps(local_model(loaded).model)
    late = []
    for _ in range(5):
        stream: Any = loaded.stream("Hello", max_new_tokens=500)
        for _ in range(10):
            next(stream)
        seen = steps.count
        stream.close()
        late.append(steps.count - seen)
        stopped = steps.count
        time.sleep(0.1)
        assert steps.count == stopped
    assert statistics.median(late) <= 2, late
    assert loaded.generate("Hello", max_new_tokens=4).finish_reason == "length"


def test_graph_generates_the_text_of_single_steps(loaded: Session) -> None:
    how = loaded.status().backend_details["decoding"]
    assert how == "captured graph" if devices.ON_GPU else how.startswith("step by step")
    options: dict[str, Any] = {"max_new_tokens": 64, "temperature": 0, "repetition_penalty": 1.1}
    replayed = loaded.generate("Hello", **options).text
    loaded_model = local_model(loaded)
    loaded_model.free_caches()
    decoder = loaded_model.static_decoder
    reason, decoder.unavailable_reason = decoder.unavailable_reason, "for this test"
    try:
        assert loaded.generate("Hello", **options).text == replayed
    finally:
        decoder.unavailable_reason = reason


def test_same_seed_gives_the_same_text(loaded: Session) -> None:
    before = devices.random_state()
    first = loaded.generate("Hello", max_new_tokens=32, seed=7)
    assert devices.random_state() == before
    assert loaded.generate("Hello", max_new_tokens=32, seed=7).text == first.text
    assert loaded.generate("Hello", max_new_tokens=32, seed=8).text != first.text
    assert devices.random_state() == before


def test_out_of_memory_within_a_prompt(loaded: Session) -> None:
    before = devices.allocated()
    with devices.ballast(_LEAVE):
        held = devices.allocated()
        with pytest.raises(OutOfMemory) as failed:
            loaded.generate(_LONG, max_new_tokens=4)
        # Less where what was kept only to be faster was given up.
        assert devices.allocated() <= held
        assert loaded.generate("Hello", max_new_tokens=4).finish_reason == "length"
    _one_line_that_helps(failed.value)
    assert devices.allocated() <= before
    assert loaded.status().status == "Ready"
    assert loaded.generate(_LONG, max_new_tokens=4).finish_reason == "length"
    assert devices.allocated() <= before


@pytest.mark.skipif(not devices.ON_GPU, reason="only a GPU can be filled in the middle")
def test_out_of_memory_within_an_answer(loaded: Session) -> None:
    before = devices.allocated()
    # The cache grows by 32 KiB a token: 8 MiB and what torch has kept last for some hundreds.
    stream = loaded.stream("word " * 180, max_new_tokens=4000)
    _take(stream, 10)
    with devices.ballast(8 * _MIB), pytest.raises(OutOfMemory) as failed:
        _take(stream, 4000)
    _one_line_that_helps(failed.value)
    assert loaded.last is not None
    assert loaded.last.finish_reason == "truncated"
    assert (loaded.last.usage.completion_tokens or 0) >= 10
    assert devices.allocated() <= before
    assert loaded.generate("Hello", max_new_tokens=4).finish_reason == "length"


def _take(stream: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(stream)


def _one_line_that_helps(error: OutOfMemory) -> None:
    assert str(error).startswith(f"{devices.LABEL} ran out of memory while ")
    assert "is free now" in str(error)
    assert "still loaded" in str(error)
    assert "\n" not in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None


class _Steps:
    """Counts how often the model computes."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._step)

    def _step(self, _model: object, _inputs: object) -> None:
        self.count += 1
