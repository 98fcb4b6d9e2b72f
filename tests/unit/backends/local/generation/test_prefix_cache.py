"""The next turn of a conversation reads only what is new, and the answers stay the same."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.local.generation.model_runner import PrefillChunkSize
from llm_magic.config.settings import Settings
from llm_magic.session import Session
from llm_magic.types import Message, Reply
from tests.local_models import forward_sizes, local_model, local_session
from tests.tiny_models import CHATML, Architecture, tiny, tiny_llama

ARCHITECTURES: list[Architecture] = [
    "llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mamba", "jamba", "granitemoehybrid",
    "lfm2", "phi3",
]  # fmt: skip
# Caches that cannot be cropped: only prompts that start with all of it can use one.
STATES = {"mamba", "jamba", "granitemoehybrid"}
TURNS = [
    "the other man in a hat",
    "on the table sat there a hat and the other man",
    "and then? " * 9,
]
# Templates of reasoning models omit the reasoning of earlier turns.
REWRITING = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last or message['role'] != 'assistant' else message['content'][:3] }}",
)


@contextmanager
def session_with(prefix_cache: str) -> Iterator[Session]:
    settings: Any = {"LLM_PREFIX_CACHE": prefix_cache, "DEFAULT_LLM_MAX_NEW_TOKENS": 8}
    session = Session(Settings(**settings, _env_file=None))
    session.generation.update(temperature=0, repetition_penalty=1.05)
    try:
        yield session
    finally:
        session.close()


def conversation(session: Session, turns: Sequence[str]) -> list[Reply]:
    messages: list[Message] = []
    replies = []
    for turn in turns:
        messages.append(Message("user", turn))
        reply = session.generate(messages)
        messages.append(Message("assistant", reply.text))
        replies.append(reply)
    return replies


def cached(replies: Sequence[Reply]) -> list[int]:
    return [reply.usage.cached_tokens or 0 for reply in replies]


@pytest.mark.parametrize("template", [CHATML, REWRITING], ids=["plain", "rewriting"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_without_the_prefix_cache(
    tmp_path: Path, architecture: Architecture, template: str
) -> None:
    folder = tiny(
        tmp_path / "m", architecture, chat_template=template, max_position_embeddings=2048
    )
    texts, reused = [], []
    for prefix_cache in ("off", "on"):
        with session_with(prefix_cache) as session:
            session.load(str(folder), dtype="float32")
            # Another conversation in between, and one that differs from its third turn on.
            replies = [
                *conversation(session, TURNS),
                *conversation(session, TURNS[1:]),
                *conversation(session, [*TURNS[:2], "no"]),
            ]
        texts.append([reply.text for reply in replies])
        reused.append(cached(replies))
    assert texts[1] == texts[0]
    assert not any(reused[0])
    assert any(reused[1])
    if template == CHATML and architecture not in {*STATES, "phi3"}:
        assert all(reused[1][1:3])


def test_status_shows_the_size_of_the_cache_or_that_it_is_off(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    for prefix_cache, shown in (("off", r"off"), ("on", r"0 kB of at most \d.*")):
        with session_with(prefix_cache) as session:
            session.load(str(folder))
            assert re.fullmatch(shown, session.status().backend_details["prompt cache"])


def test_next_turn_reads_only_new_tokens(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", max_position_embeddings=2048)
    with session_with("on") as session:
        session.load(str(folder), dtype="float32")
        first, second, third = conversation(session, TURNS)
        # All of the turn before except its last token, which was not read. Less where the random
        # text of an answer is encoded as other tokens than it was generated with.
        for before, after in ((first, second), (second, third)):
            prompt, answer = before.usage.prompt_tokens or 0, before.usage.completion_tokens or 0
            assert prompt <= (after.usage.cached_tokens or 0) <= prompt + answer - 1


def test_same_seed_repeats_the_text(model_cache: Path) -> None:
    """In bfloat16 too, where a matrix product of another shape rounds differently."""
    with local_session(max_new_tokens=12) as session:
        session.load()
        options: Any = {"seed": 11, "temperature": 1.0}
        question = "Describe a lighthouse, its keeper and the sea around it. " * 12
        first = session.generate(question, **options)
        again = session.generate(question, **options)
        assert (again.usage.cached_tokens or 0) > 0
        assert again.text == first.text
        towns = session.generate("Which towns?", **options)
        turns = [*towns.messages, Message("assistant", towns.text)]
        once = session.generate([*turns, Message("user", "And which rivers?")], **options)
        twice = session.generate([*turns, Message("user", "And which rivers?")], **options)
        assert (once.usage.cached_tokens or 0) > 0
        assert once.text == twice.text


def test_oldest_prefixes_are_dropped_beyond_the_budget(tmp_path: Path) -> None:
    with session_with("on") as session:
        session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
        cache = local_model(session).prefix_cache
        # Three of 40 tokens: layers, keys and values, heads, their size, bytes.
        cache.budget = 3 * 40 * 2 * 2 * 2 * 16 * 4
        for number in range(20):
            session.generate(f"{number} the other man", max_new_tokens=4)
            assert 0 < cache.nbytes <= cache.budget
        cache.budget = 10
        session.generate("something else", max_new_tokens=4)
        assert cache.nbytes == 0


def test_closed_stream_leaves_a_prefix_for_the_next_turn(tmp_path: Path) -> None:
    with session_with("on") as session:
        session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
        stream = session.stream(TURNS[1])
        for _ in range(4):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert session.last is not None
        messages = [*session.last.messages, Message("assistant", session.last.text)]
        reply = session.generate([*messages, Message("user", "go on")])
        assert (reply.usage.cached_tokens or 0) >= 20


def test_unload_frees_the_prefixes(tmp_path: Path) -> None:
    with session_with("on") as session:
        session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
        session.generate(TURNS[0])
        layer: Any = local_model(session).prefix_cache.prefixes[0].cache.layers[0]
        keys = weakref.ref(layer.keys)
        del layer
        assert isinstance(keys(), torch.Tensor)
        session.unload()
        assert keys() is None


class FixedChunkSize(PrefillChunkSize):
    """A chunk size that does not adapt to the time that a chunk takes."""

    def update(self, size: int, seconds: float) -> None:
        """Keep the size."""


def test_same_prompt_is_read_in_the_same_chunks(tmp_path: Path) -> None:
    """Another chunk size, of a model that became slower or faster, is for new tokens only."""
    with session_with("on") as session:
        session.load(str(tiny_llama(tmp_path / "m", max_position_embeddings=2048)), dtype="float32")
        read = []
        for tokens in (64, 16, 256):
            local_model(session).prefill_chunk_size = FixedChunkSize(tokens)
            with forward_sizes(session) as sizes:
                session.generate("the other man in a hat " * 12, max_new_tokens=1)
            read.append(sizes)
        first, again, once_more = read
        assert first[:-1] == [64] * (len(first) - 1)
        # All chunks but the last one are cached, and that one is the same.
        assert again == once_more == first[-1:]
