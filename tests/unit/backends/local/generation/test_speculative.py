"""Guessing ahead changes how many steps an answer takes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_magic.backends.local.generation.speculative import Confidence, PromptLookup
from llm_magic.errors import ModelNotFound, OptionError
from llm_magic.session import Session
from tests.local_models import edited, local_model, local_session
from tests.tiny_models import Architecture, tiny, tiny_llama

CROPPABLE: list[Architecture] = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "gpt2",
    "lfm2",
]
PROMPT = "the other man in a hat on the table sat there and the other man in a hat on the"


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=48, temperature=0, repetition_penalty=1) as session:
        yield session


@contextmanager
def counted(session: Session) -> Iterator[list[int]]:
    """Collect how many tokens each forward pass of the resident model gets."""
    model = local_model(session).model
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _model, _args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield sizes
    finally:
        handle.remove()


def reference(folder: Path, prompt: str, seed: int, **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("architecture", CROPPABLE)
@pytest.mark.parametrize("temperature", [0, 0.5])
def test_an_answer_is_that_of_generate_in_fewer_steps(
    session: Session, tmp_path: Path, architecture: Architecture, temperature: float
) -> None:
    folder = tiny(tmp_path / "m", architecture, chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 2, "top_p": 0.9}
    options: dict[str, Any] = sampling if temperature else {"do_sample": False}
    expected = reference(folder, PROMPT, 5, max_new_tokens=48, **options)
    session.load(str(folder), dtype="float32")
    with counted(session) as sizes:
        reply = session.generate(PROMPT, temperature=temperature, top_k=2, seed=5)
    assert reply.text == expected
    assert reply.usage.completion_tokens == 48
    if temperature == 0 and architecture not in {"qwen3", "mistral"}:
        # Noise of most of these repeats itself when it always takes the likeliest token.
        assert len(sizes) < 48
        assert max(sizes[1:]) > 1


def test_a_guess_past_the_end_is_no_part_of_the_answer(session: Session, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    session.load(str(folder), dtype="float32")
    whole = session.generate(PROMPT).text
    for limit in range(1, 48, 3):
        reply = session.generate(PROMPT, max_new_tokens=limit)
        assert reply.usage.completion_tokens == limit
        assert whole.startswith(reply.text.rstrip("\ufffd"))
    # What was kept of each is right: the same again.
    assert session.generate(PROMPT).text == whole


def test_an_assistant_guesses(session: Session, tmp_path: Path) -> None:
    large = tiny_llama(tmp_path / "large", layers=4, chat_template=None)
    twin = tiny_llama(tmp_path / "twin", layers=4, chat_template=None)
    other = tiny(tmp_path / "other", "gemma3_text", layers=2, seed=3, chat_template=None)
    for folder in (large, twin, other):
        edited(folder, "generation_config.json", eos_token_id=None)
    texts, most = [], []
    for assistant in (None, str(twin), str(other)):
        session.load(str(large), dtype="float32", assistant=assistant)
        with counted(session) as sizes:
            greedy = session.generate(PROMPT)
            sampled = session.generate(PROMPT, temperature=1, seed=3)
        texts.append((greedy.text, sampled.text))
        most.append(max(sizes[1:]))
    assert texts[0] == texts[1] == texts[2]
    assert min(most) > 1, "there were guesses"


def test_an_assistant_that_does_not_fit_the_model_is_refused(
    session: Session, tmp_path: Path, model_cache: Path
) -> None:
    tiny_llama(tmp_path / "m")
    tiny(tmp_path / "state", "mamba")
    session.load()
    for assistant, error, said in (
        ("SmolLM2-135M-Instruct", OptionError, "another vocabulary"),
        (str(tmp_path / "state"), OptionError, "cannot discard rejected tokens"),
        (str(tmp_path / "none"), ModelNotFound, "no file or folder"),
    ):
        with pytest.raises(error, match=said):
            session.load(str(tmp_path / "m"), assistant=assistant, keep=True)
        assert [info.name for info in session.status().models] == ["SmolLM2-135M-Instruct"]


def test_what_never_comes_true_is_left_out() -> None:
    confidence = Confidence(cost=0.2)
    tried = 0
    for _ in range(1000):
        length = confidence.length()
        if length:
            tried += 1
            confidence.learn(length, 0)
    assert tried < 30
    for _ in range(2000):
        length = confidence.length()
        confidence.learn(length, length)
    assert confidence.length() == 8


def test_where_it_went_on_before_is_found() -> None:
    lookup = PromptLookup(Confidence(cost=0.01))
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert lookup.propose(tokens, 3) == [4, 5, 6]
    assert lookup.propose([*tokens, 9], 3) == []
    assert lookup.propose([*tokens, 9, 3, 4, 5], 1) == [6]
    assert PromptLookup(Confidence(0.01)).propose([1, 2], 3) == []
