"""Sequences that start alike share the keys of their prefix; each gets the answer that it gets alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.batch import shared_prefix
from llm_magic.config.settings import GenerationConfig
from llm_magic.types import Message
from tests.many import SIZE, TEXT, Arrival, BatchModel, conversations
from tests.tiny_models import tiny_llama

GREEDY = GenerationConfig(max_new_tokens=10, temperature=0)
PENALTY = GREEDY.model_copy(update={"repetition_penalty": 1.4})
SAMPLED = GenerationConfig(max_new_tokens=10, temperature=1.3, top_k=None, top_p=0.95, seed=7)
LONGER = GREEDY.model_copy(update={"max_new_tokens": 24})
SYSTEM = Message("system", "Answer as the other man would. " * 8)
# More than share a step, so that some join those that are decoded.
MANY = [[SYSTEM, Message("user", f"{number}, {TEXT[:number]}")] for number in range(SIZE + 5)]


@contextlib.contextmanager
def columns_of_steps(model: BatchModel) -> Any:
    """Collect how many columns of keys the steps of several sequences have."""
    found: list[int] = []
    cache = compat.cache_name(model.model)

    def before(_module: Any, _args: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > 1 and named["input_ids"].shape[1] == 1:
            found.append(named[cache].get_seq_length())

    handle = model.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@pytest.fixture
def llama_of_long_prompts(load: Callable[[Path], BatchModel], tmp_path: Path) -> BatchModel:
    return load(tiny_llama(tmp_path / "m", max_position_embeddings=2048))


@pytest.mark.parametrize("config", [GREEDY, PENALTY, SAMPLED], ids=["greedy", "penalty", "sampled"])
def test_keys_of_a_common_prefix_are_not_copied(
    llama_of_long_prompts: BatchModel, config: GenerationConfig
) -> None:
    model = llama_of_long_prompts
    with columns_of_steps(model) as columns:
        answers = model.together(MANY, config)
    assert answers == model.alone(MANY, config)
    assert 0 < max(columns) < 150


def test_a_short_prefix_is_copied(
    llama_of_long_prompts: BatchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SHARED_TOKENS", 100_000)
    model = llama_of_long_prompts
    with columns_of_steps(model) as columns:
        answers = model.together(MANY, GREEDY)
    assert answers == model.alone(MANY, GREEDY)
    assert min(columns) > 200


def test_sequences_with_another_prefix_join(llama: BatchModel) -> None:
    beginnings = ["One man sat " * 6, "One man in a hat " * 4, "The table " * 7]
    arrivals = [
        Arrival(beginnings[number // 4 % 3] + TEXT[:number], LONGER, at=number // 4 * 3)
        for number in range(2 * SIZE)
    ]
    expected = [llama.alone(conversations([one.prompt]), one.config)[0] for one in arrivals]
    answers, _passes = llama.arrivals(arrivals)
    assert answers == expected


def test_equal_prompts_share_all_but_their_end(llama: BatchModel) -> None:
    many = conversations([TEXT] * 6)
    with columns_of_steps(llama) as columns:
        answers = llama.together(many, GREEDY)
    assert answers == llama.alone(many, GREEDY)
    assert max(columns) < 20


def test_prefix_is_copied_for_a_model_whose_attention_cannot_be_replaced(
    llama_of_long_prompts: BatchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama_of_long_prompts
    monkeypatch.setattr(compat, "attention_replaced", lambda *_arguments: contextlib.nullcontext())
    with columns_of_steps(model) as columns:
        answers = model.together(MANY, GREEDY)
    assert answers == model.alone(MANY, GREEDY)
    assert columns[-1] > 200
    assert not model.loaded.traits.shares_prefix
