"""Conversations are made of keyed turns: running a cell again replaces its turn."""

from __future__ import annotations

import pytest

from llm_magic.chats import Chats, Turn
from llm_magic.errors import OptionError
from llm_magic.types import Message


def turn(key: str, question: str = "", answer: str = "") -> Turn:
    return Turn(
        key,
        Message("user", question or f"question {key}"),
        Message("assistant", answer or f"answer {key}"),
    )


def contents(messages: list[Message]) -> list[str]:
    return [message.content for message in messages]


def test_a_question_sees_the_turns_before_it() -> None:
    chats = Chats()
    assert chats.before("c", "1") == []
    for key in ("1", "2"):
        chats.record("c", turn(key))
    assert contents(chats.before("c", "3")) == [
        "question 1", "answer 1", "question 2", "answer 2",
    ]  # fmt: skip
    assert [m.role for m in chats.before("c", "3")] == ["user", "assistant"] * 2


def test_a_cell_run_again_sees_only_what_is_above_it_and_replaces_its_turn_in_place() -> None:
    chats = Chats()
    for key in ("1", "2", "3"):
        chats.record("c", turn(key))
    assert contents(chats.before("c", "2")) == ["question 1", "answer 1"]
    chats.record("c", turn("2", "other", "new"))
    assert contents(chats.before("c", "4")) == [
        "question 1", "answer 1", "other", "new", "question 3", "answer 3",
    ]  # fmt: skip


def test_looking_makes_no_chat() -> None:
    chats = Chats()
    chats.before("c", "1", "be brief")
    assert chats.all() == []


def test_a_system_prompt_stays_until_another_is_given() -> None:
    chats = Chats()
    assert contents(chats.before("c", "1", "be brief")) == ["be brief"]
    chats.record("c", turn("1"), "be brief")
    assert contents(chats.before("c", "2")) == ["be brief", "question 1", "answer 1"]
    chats.record("c", turn("2"))
    assert chats.before("c", "3")[0] == Message("system", "be brief")
    assert chats.before("c", "3", "be long")[0] == Message("system", "be long")
    chats.record("c", turn("3"), "be long")
    assert chats.before("c", "4")[0] == Message("system", "be long")


def test_chats_do_not_know_each_other() -> None:
    chats = Chats()
    chats.record("a", turn("1"), "system of a")
    chats.record("b", turn("1", "other"))
    assert contents(chats.before("b", "2")) == ["other", "answer 1"]
    assert [(chat.name, len(chat.turns)) for chat in chats.all()] == [("a", 1), ("b", 1)]


def test_reset_forgets_one_or_all() -> None:
    chats = Chats()
    assert chats.reset() == []
    for name in ("first", "second", "third"):
        chats.record(name, turn("1"), "system")
    assert chats.reset("second") == ["second"]
    assert chats.before("second", "2") == []
    assert chats.reset() == ["first", "third"]
    assert chats.all() == []


def test_forgetting_what_is_not_there_names_what_is() -> None:
    chats = Chats()
    with pytest.raises(OptionError, match=r"no chat 'c'; there are: none\."):
        chats.reset("c")
    chats.record("summary", turn("1"))
    with pytest.raises(OptionError, match=r"there are: summary\. Did you mean summary\?"):
        chats.reset("sumary")
    assert len(chats.all()) == 1
