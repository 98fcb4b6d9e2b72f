"""A chat in a small context of a real model: counted by its own template, and trimmed to fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llm_magic.errors import PromptTooLong
from llm_magic.session import Session
from llm_magic.session.requests import Request
from llm_magic.types import Message
from tests.local_models import local_session, parrot


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = parrot(
        tmp_path_factory.mktemp("models") / "small",
        "abcdef",
        ends=False,
        max_position_embeddings=256,
    )
    with local_session(max_new_tokens=8, repetition_penalty=1, temperature=0) as session:
        session.load(str(folder))
        yield session


def test_trim_drops_the_oldest_turns(session: Session) -> None:
    turn = [Message("user", "x" * 20), Message("assistant", "y" * 20)]
    session.chats.put("c", turn * 6)
    tokens = session.chat_tokens("c")
    assert tokens is not None
    assert tokens > 256
    with pytest.raises(
        PromptTooLong, match=r"small reads at most 256\..*Chat 'c' has 6 turns above it"
    ):
        session.generate("now", chat="c")
    reply = session.generate("now", chat="c", trim=True)
    assert reply.usage.prompt_tokens is not None
    assert reply.usage.prompt_tokens + 8 <= 256
    assert reply.usage.completion_tokens == 8
    # One turn more would not have fitted.
    one_more = session.chats.context("c", "new").turns[:-1][reply.dropped_turns - 1 :]
    messages = [m for t in one_more for m in (t.question, t.answer)]
    count = session.dry_run(Request([*messages, Message("user", "now")])).count.prompt_tokens
    assert count is not None
    assert count + 8 > 256


def test_token_count_does_not_wait_for_an_answer(session: Session) -> None:
    session.chats.put("d", [Message("user", "x"), Message("assistant", "y")])
    counted = session.chat_tokens("d")
    assert counted is not None
    chunks = session.stream("go on", max_new_tokens=200)
    next(chunks)
    assert session.chat_tokens("d") is None, "the model has only one thread"
    for _chunk in chunks:
        pass
    assert session.chat_tokens("d") == counted
