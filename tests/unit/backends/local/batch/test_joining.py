"""Requests join, leave and wait while others are answered; each gets the answer that it gets alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_magic.backends.local.generation.cuda_graph import StaticDecoder
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import GenerationFailed, PromptTooLong
from llm_magic.session import Session
from llm_magic.types import Chunk
from tests.local_models import edited, parrot
from tests.many import PROMPTS, SIZE, TEXT, Answer, Arrival, BatchModel, conversations
from tests.tiny_models import Architecture, tiny

GREEDY = GenerationConfig(max_new_tokens=8, temperature=0)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=1.3, top_k=None, top_p=0.95, seed=7)
LONGER = GREEDY.model_copy(update={"max_new_tokens": 24})
# What cannot share a step.
ALONE = GREEDY.model_copy(update={"extra": {"no_repeat_ngram_size": 1}})
DIFFERENT = [
    GREEDY,
    SAMPLED,
    SAMPLED.model_copy(update={"seed": 8, "temperature": 0.7, "max_new_tokens": 5}),
    SAMPLED.model_copy(update={"top_k": 5, "repetition_penalty": 1.3}),
    GREEDY.model_copy(update={"repetition_penalty": 1.5, "max_new_tokens": 12}),
    GREEDY.model_copy(update={"stop": ("e", "t")}),
]
TWO_ARE_DECODED = (2, 1)


def alone(model: BatchModel, arrival: Arrival) -> Answer:
    """Return the answer to a request without others."""
    (answer,) = model.alone(conversations([arrival.prompt]), arrival.config)
    return answer


def check_joins(model: BatchModel, first: Arrival, at: int) -> int:
    """Let a request join before a forward pass; returns how many passes there were."""
    second = Arrival("and " + PROMPTS[5], GREEDY, at)
    expected = [alone(model, first), alone(model, second)]
    model.loaded.prefill_chunk_size.tokens = 16
    answers, passes = model.arrivals([first, second])
    assert answers == expected, f"joined before pass {at}"
    if at < 6:
        assert TWO_ARE_DECODED in passes.shapes
    return len(passes.shapes)


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_request_joins_at_any_pass(llama: BatchModel, config: GenerationConfig) -> None:
    # Three chunks of a prompt, and eight tokens.
    for at in range(12):
        check_joins(llama, Arrival(TEXT * 2, config), at)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
def test_request_joins_another_architecture(
    load: Callable[[Path], BatchModel], tmp_path: Path, architecture: Architecture
) -> None:
    folder = tiny(tmp_path / "m", architecture)
    window = {"sliding_window": 16} if architecture == "gemma3_text" else {}
    model = load(edited(folder, "config.json", **window))
    for at in (1, 4, 8):
        check_joins(model, Arrival(TEXT, SAMPLED), at)


def test_request_joins_between_speculative_steps(
    load: Callable[[Path], BatchModel], tmp_path: Path
) -> None:
    model = load(parrot(tmp_path / "m", "abcdef", ends=False))
    first = Arrival("x abcdef", LONGER.model_copy(update={"repetition_penalty": 1.0}))
    _answers, passes = model.arrivals([first])
    assert max(columns for _size, columns in passes.shapes[1:]) > 1, "no draft"
    for at in range(1, len(passes.shapes)):
        check_joins(model, first, at)


def test_request_joins_steps_of_fixed_shape(
    load: Callable[[Path], BatchModel], tmp_path: Path
) -> None:
    model = load(tiny(tmp_path / "m", "llama"))
    model.loaded.static_decoder = StaticDecoder(model.model, compiled=False, forced=True)
    first = Arrival(TEXT, SAMPLED.model_copy(update={"max_new_tokens": 20}))
    for at in (1, 2, 3, 7, 12):
        check_joins(model, first, at)


def test_requests_with_different_options_share_steps(llama: BatchModel) -> None:
    arrivals = [Arrival(PROMPTS[3 * n], config) for n, config in enumerate(DIFFERENT)]
    expected = [alone(llama, arrival) for arrival in arrivals]
    answers, passes = llama.arrivals(arrivals)
    assert answers == expected
    assert max(size for size, columns in passes.shapes if columns == 1) == len(DIFFERENT)


def test_unseeded_answers_to_equal_prompts_differ(llama: BatchModel) -> None:
    config = SAMPLED.model_copy(update={"seed": None, "temperature": 2.0})
    answers, _passes = llama.arrivals([Arrival("one", config)] * 4)
    assert len({str(answer) for answer in answers}) == 4


@pytest.mark.parametrize("cancelled_at", [2, 4, 9], ids=["prompt", "first tokens", "tokens"])
def test_cancelled_request_leaves_alone(llama: BatchModel, cancelled_at: int) -> None:
    llama.loaded.prefill_chunk_size.tokens = 16
    arrivals = [
        Arrival("one", LONGER, at=0),
        Arrival("x" + TEXT * 3, LONGER, at=1, cancelled_at=cancelled_at),
        Arrival("three", SAMPLED, at=1),
    ]
    expected = [alone(llama, arrivals[0]), None, alone(llama, arrivals[2])]
    answers, passes = llama.arrivals(arrivals)
    assert answers == expected
    sizes = [size for size, columns in passes.shapes[cancelled_at + 2 :] if columns == 1]
    assert max(sizes) <= 2


def test_first_request_leaves_alone(llama: BatchModel) -> None:
    arrivals = [Arrival("one", LONGER, cancelled_at=6), Arrival("two", LONGER, at=2)]
    expected = alone(llama, arrivals[1])
    answers, passes = llama.arrivals(arrivals)
    assert answers == [None, expected]
    assert passes.shapes[-1] == (1, 1)


def test_errors_of_joining_requests_are_their_own(llama: BatchModel) -> None:
    arrivals = [
        Arrival("one", LONGER),
        Arrival("y" * 600, GREEDY, at=2),
        Arrival("z", SAMPLED.model_copy(update={"extra": {"min_p": 7.0}}), at=3),
        Arrival("two", SAMPLED, at=4),
    ]
    expected = [alone(llama, arrivals[0]), alone(llama, arrivals[3])]
    (first, too_long, invalid, last), _passes = llama.arrivals(arrivals)
    assert [first, last] == expected
    assert isinstance(too_long, PromptTooLong)
    assert isinstance(invalid, GenerationFailed)


def test_request_that_cannot_share_waits_and_is_not_overtaken(llama: BatchModel) -> None:
    arrivals = [
        Arrival("one", LONGER),
        Arrival("two", LONGER, at=2),
        Arrival("three", ALONE, at=4),
        Arrival("four", SAMPLED, at=9),
    ]
    expected = [alone(llama, arrival) for arrival in arrivals]
    ends: list[int] = []
    items, _cancelled, _passes = llama.arrival_items(arrivals)
    for number, item in items:
        if getattr(item, "finish_reason", None):
            ends.append(number)
    assert ends[2:] == [2, 3]
    queued = {number for number, item in items if getattr(item, "queued", False)}
    assert queued == {2, 3}
    answers, _passes = llama.arrivals(arrivals)
    assert answers == expected


def test_long_prompt_holds_no_short_one(llama: BatchModel) -> None:
    llama.loaded.prefill_chunk_size.tokens = 16
    arrivals = [Arrival("x" + TEXT * 8, GREEDY), Arrival("two", LONGER, at=2)]
    with llama.passes(lambda ids: time.sleep(ids.numel() * 0.003)):
        items, _cancelled, _passes = llama.arrival_items(arrivals)
    numbers = [number for number, item in items if isinstance(item, Chunk) and item.tokens]
    assert numbers.index(0) > 4


def test_load_and_unload_do_not_wait_for_requests_that_come_later(
    session: Session, llama: BatchModel, tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "m", "llama")
    done = threading.Event()

    def ask(number: int) -> int:
        count = 0
        while not done.is_set():
            session.generate(f"{number} {count}", model=llama.name, max_new_tokens=8)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(ask, number) for number in range(4)]
        try:
            # Requests of the other threads come all the time: the batch would never become empty.
            for _ in range(2):
                session.load(str(folder), name="other", keep=True)
                session.unload("other")
        finally:
            done.set()
    assert all(count.result() > 1 for count in counts)


REQUESTS = st.builds(
    Arrival,
    prompt=st.sampled_from([PROMPTS[3], PROMPTS[14], PROMPTS[30], "x" + TEXT * 2]),
    config=st.sampled_from([*DIFFERENT, ALONE]),
    at=st.integers(0, 30),
    cancelled_at=st.one_of(st.none(), st.none(), st.integers(0, 40)),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    arrivals=st.lists(REQUESTS, min_size=1, max_size=SIZE + 2),
    cache_bytes=st.sampled_from([0, 1 << 24]),
)
def test_any_arrivals_get_the_answers_that_they_get_alone(
    llama: BatchModel, arrivals: list[Arrival], cache_bytes: int
) -> None:
    expected = [alone(llama, arrival) for arrival in arrivals]
    llama.loaded.prefix_cache.budget = cache_bytes
    answers, _passes = llama.arrivals(arrivals)
    llama.loaded.prefix_cache.budget = 0
    llama.loaded.free_caches()
    for arrival, answer, right in zip(arrivals, answers, expected, strict=True):
        assert answer == right or (answer is None and arrival.cancelled_at is not None)
