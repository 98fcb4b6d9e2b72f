"""Reasoning between special tokens, or that the prompt begins, is separate from the answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from llm_magic.backends.local.generation.token_streamer import Detokenizer, ReasoningTokens
from llm_magic.backends.reasoning import ReasoningSplitter
from llm_magic.session import Session
from llm_magic.types import Chunk
from tests.local_models import local_session, parrot
from tests.tiny_models import CHATML, tiny_llama

CHANNELS = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>So."
    "<|end|><|start|>assistant<|channel|>final<|message|>Yes!<|return|>"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: Any = AutoTokenizer.from_pretrained(tiny_llama(tmp_path_factory.mktemp("m") / "m"))
    names = ["channel", "message", "start", "end", "return"]
    special = [*(f"<|{name}|>" for name in names), "[THINK]", "[/THINK]"]
    made.add_tokens([AddedToken(name, special=True) for name in special], special_tokens=True)
    return made


def split(tokenizer: Any, text: str) -> tuple[str, str]:
    """Return reasoning and answer of a text that is read token by token."""
    detokenizer = Detokenizer(tokenizer, ReasoningTokens.find(tokenizer))
    splitter = ReasoningSplitter()
    chunks = [
        piece
        for token in tokenizer(text).input_ids
        for piece in splitter.feed(Chunk(text=detokenizer.step(token), tokens=1))
    ]
    chunks += splitter.flush()
    return "".join(c.reasoning for c in chunks), "".join(c.text for c in chunks)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        (CHANNELS, "Hm.\n\nSo.", "Yes!"),
        ("<|channel|>final<|message|>Yes!", "", "Yes!"),
        ("<|start|>assistant<|message|>Yes!", "", "Yes!"),
        ("<|channel|>analysis<|message|>Hm.", "Hm.", ""),
        ("[THINK]Hm.[/THINK]Yes!", "Hm.", "Yes!"),
        ("Yes! [no tags]", "", "Yes! [no tags]"),
    ],
)
def test_special_tokens_around_reasoning_become_tags(
    tokenizer: Any, text: str, reasoning: str, answer: str
) -> None:
    assert split(tokenizer, text) == (reasoning, answer)


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=20, temperature=0, repetition_penalty=1) as session:
        yield session


@pytest.mark.parametrize(
    ("limit", "reasoning", "answer"), [(20, "0123", "Y!"), (2, "01", "")], ids=["whole", "cut"]
)
def test_reasoning_that_starts_in_the_prompt_is_split(
    session: Session, tmp_path: Path, limit: int, reasoning: str, answer: str
) -> None:
    template = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")
    session.load(str(parrot(tmp_path / "m", "0123</think>Y!", chat_template=template)))
    reply = session.generate("?", max_new_tokens=limit)
    assert reply.reasoning.startswith(reasoning)
    assert reply.text == answer
