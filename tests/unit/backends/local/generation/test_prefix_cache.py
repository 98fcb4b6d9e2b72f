"""A conversation pays only for what is new in it, and says the same as if it paid for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.config.settings import Settings
from llm_magic.session import Session
from llm_magic.types import Message, Reply
from tests.local_models import local_model, local_session
from tests.tiny_models import CHATML, Architecture, tiny, tiny_llama

ARCHITECTURES: list[Architecture] = [
    "llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mamba", "jamba", "granitemoehybrid",
    "lfm2", "phi3",
]  # fmt: skip
# What these keep cannot be cut: it serves what begins with all of it.
STATES = {"mamba", "jamba", "granitemoehybrid"}
TURNS = [
    "the other man in a hat",
    "on the table sat there a hat and the other man",
    "and then? " * 9,
]
# As templates of reasoning models do: what was thought in earlier turns is left out.
FORGETFUL = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last or message['role'] != 'assistant' else message['content'][:3] }}",
)


@contextmanager
def session_with(prefix_cache: str) -> Iterator[Session]:
    settings: Any = {"LLM_PREFIX_CACHE": prefix_cache, "DEFAULT_LLM_MAX_NEW_TOKENS": 8}
    session = Session(Settings(**settings, _env_file=None))
    session.configure(temperature=0, repetition_penalty=1.05)
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


@pytest.mark.parametrize("template", [CHATML, FORGETFUL], ids=["plain", "rewriting"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_answers_are_those_without(
    tmp_path: Path, architecture: Architecture, template: str
) -> None:
    folder = tiny(
        tmp_path / "m", architecture, chat_template=template, max_position_embeddings=2048
    )
    texts, spared = [], []
    for keeping in ("off", "on"):
        with session_with(keeping) as session:
            session.load(str(folder), dtype="float32")
            # Another conversation in between, the same one again, and one that leaves it midway.
            replies = [
                *conversation(session, TURNS),
                *conversation(session, TURNS[1:]),
                *conversation(session, [*TURNS[:2], "no"]),
            ]
        texts.append([reply.text for reply in replies])
        spared.append(cached(replies))
    assert texts[1] == texts[0]
    assert not any(spared[0])
    assert any(spared[1])
    if template == CHATML and architecture not in {*STATES, "phi3"}:
        assert all(spared[1][1:3]), "each turn goes on from the one before"


def test_what_is_new_is_what_is_read(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", max_position_embeddings=2048)
    with session_with("on") as session:
        session.load(str(folder), dtype="float32")
        first, second, third = conversation(session, TURNS)
        # All of the turn before but for its last token, which nobody read; less where the text of
        # an answer, which is noise, is written with other tokens than it was said with.
        for before, after in ((first, second), (second, third)):
            asked, said = before.usage.prompt_tokens or 0, before.usage.completion_tokens or 0
            assert asked <= (after.usage.cached_tokens or 0) <= asked + said - 1


def test_the_same_seed_gives_the_same_text_again(model_cache: Path) -> None:
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


def test_they_go_when_they_are_too_many(tmp_path: Path) -> None:
    with session_with("on") as session:
        session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
        kept = loaded(session).prefixes
        kept.budget = (
            3 * 40 * 2 * 2 * 2 * 16 * 4
        )  # three of 40 tokens: layers, k and v, heads, bytes
        for number in range(20):
            session.generate(f"{number} the other man", max_new_tokens=4)
            assert 0 < kept.nbytes <= kept.budget
        kept.budget = 10
        session.generate("something else", max_new_tokens=4)
        assert kept.nbytes == 0


def test_an_answer_that_was_stopped_is_gone_on_with(tmp_path: Path) -> None:
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


def test_unloading_frees_them(tmp_path: Path) -> None:
    import weakref

    with session_with("on") as session:
        session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
        session.generate(TURNS[0])
        tensor = weakref.ref(loaded(session).prefixes._kept[0].cache.layers[0].keys)
        assert isinstance(tensor(), torch.Tensor)
        session.unload()
        assert tensor() is None


def loaded(session: Session) -> Any:
    """Reach for the resident model."""
    return local_model(session)


def test_what_is_read_again_is_read_in_the_same_pieces(tmp_path: Path) -> None:
    """A model that has become slower, or faster, reads other pieces, of what is new."""
    with session_with("on") as session:
        session.load(str(tiny_llama(tmp_path / "m", max_position_embeddings=2048)), dtype="float32")
        model = loaded(session)
        model.pace._FAST_S, model.pace._SLOW_S = 0.0, 1e9
        sizes: list[int] = []
        model.model.register_forward_pre_hook(
            lambda _model, _args, kwargs: sizes.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        read = []
        for piece in (64, 16, 256):
            model.pace.piece = piece
            session.generate("the other man in a hat " * 12, max_new_tokens=1)
            read.append(sizes.copy())
            sizes.clear()
        first, again, once_more = read
        assert first[:-1] == [64] * (len(first) - 1)
        # All but the last piece is known; that one is as it was.
        assert again == once_more == first[-1:]
