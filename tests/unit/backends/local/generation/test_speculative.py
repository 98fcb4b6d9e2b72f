"""Drafts change how many forward passes an answer takes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.local.generation.speculative import DraftLengthController, PromptLookup
from llm_magic.errors import ModelNotFound, OptionError
from llm_magic.session import Session
from tests.local_models import edited, forward_sizes, local_session
from tests.plain_generate import PlainGenerate
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


@pytest.mark.parametrize("architecture", CROPPABLE)
@pytest.mark.parametrize("temperature", [0, 0.5])
def test_answer_is_that_of_generate_in_fewer_passes(
    session: Session, tmp_path: Path, architecture: Architecture, temperature: float
) -> None:
    folder = tiny(tmp_path / "m", architecture, chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 2, "top_p": 0.9}
    options: dict[str, Any] = sampling if temperature else {"do_sample": False}
    expected = PlainGenerate(folder).answer(PROMPT, 5, max_new_tokens=48, **options)
    session.load(str(folder), dtype="float32")
    with forward_sizes(session) as sizes:
        reply = session.generate(PROMPT, temperature=temperature, top_k=2, seed=5)
    assert reply.text == expected
    assert reply.usage.completion_tokens == 48
    if temperature == 0 and architecture not in {"qwen3", "mistral"}:
        # Greedy answers of most random models repeat themselves.
        assert len(sizes) < 48
        assert max(sizes[1:]) > 1


def test_draft_beyond_the_limit_is_not_in_the_answer(session: Session, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    session.load(str(folder), dtype="float32")
    whole = session.generate(PROMPT).text
    for limit in range(1, 48, 3):
        reply = session.generate(PROMPT, max_new_tokens=limit)
        assert reply.usage.completion_tokens == limit
        assert whole.startswith(reply.text.rstrip("\ufffd"))
    # The cached prefixes are correct.
    assert session.generate(PROMPT).text == whole


def test_answer_with_an_assistant_is_the_same(session: Session, tmp_path: Path) -> None:
    large = tiny_llama(tmp_path / "large", layers=4, chat_template=None)
    twin = tiny_llama(tmp_path / "twin", layers=4, chat_template=None)
    other = tiny(tmp_path / "other", "gemma3_text", layers=2, seed=3, chat_template=None)
    for folder in (large, twin, other):
        edited(folder, "generation_config.json", eos_token_id=None)
    texts, most = [], []
    for assistant in (None, str(twin), str(other)):
        session.load(str(large), dtype="float32", assistant=assistant)
        with forward_sizes(session) as sizes:
            greedy = session.generate(PROMPT)
            sampled = session.generate(PROMPT, temperature=1, seed=3)
        texts.append((greedy.text, sampled.text))
        most.append(max(sizes[1:]))
    assert texts[0] == texts[1] == texts[2]
    assert min(most) > 1, "no drafts"


def test_unsuitable_assistant_is_an_error_and_keeps_the_loaded_model(
    session: Session, tmp_path: Path, model_cache: Path
) -> None:
    tiny_llama(tmp_path / "m")
    tiny(tmp_path / "state", "mamba")
    session.load()
    for assistant, error, message in (
        ("SmolLM2-135M-Instruct", OptionError, "a different vocabulary"),
        (str(tmp_path / "state"), OptionError, "cannot discard rejected tokens"),
        (str(tmp_path / "none"), ModelNotFound, "no file or folder"),
    ):
        with pytest.raises(error, match=message):
            session.load(str(tmp_path / "m"), assistant=assistant, keep=True)
        assert [info.name for info in session.status().models] == ["SmolLM2-135M-Instruct"]


def test_draft_length_follows_the_acceptance() -> None:
    lengths = DraftLengthController(cost=0.2)
    proposed = 0
    for _ in range(1000):
        length = lengths.next_length()
        if length:
            proposed += 1
            lengths.update(length, 0)
    assert proposed < 30
    for _ in range(2000):
        length = lengths.next_length()
        lengths.update(length, length)
    assert lengths.next_length() == 8


def test_prompt_lookup_finds_the_last_occurrence() -> None:
    lookup = PromptLookup(DraftLengthController(cost=0.01))
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert lookup.propose(tokens, 3) == [4, 5, 6]
    assert lookup.propose([*tokens, 9], 3) == []
    assert lookup.propose([*tokens, 9, 3, 4, 5], 1) == [6]
    assert PromptLookup(DraftLengthController(0.01)).propose([1, 2], 3) == []
