"""Conversations longer than the context: an error with counts, or the oldest turns are left out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest

from llm_magic.backends.base import Capabilities, TokenCount
from llm_magic.errors import OptionError, PromptTooLong, RequestFailed
from llm_magic.notebook.display.messages import dry_run_table, footer
from llm_magic.session import Session
from llm_magic.session.requests import Request
from llm_magic.types import Chunk, Message, Reply, Usage
from tests.scripted import ScriptedBackend, scripted_session, whole_answer

Pair = tuple[Session, ScriptedBackend]
TOO_LONG = "The prompt has 9 tokens, but tiny reads at most 8."


@pytest.fixture
def chatty() -> Iterator[Pair]:
    """Return a session whose chat ``c`` has a system prompt and ten turns of four words each."""
    with scripted_session() as (session, backend):
        messages = [Message("system", "be brief")]
        for number in range(10):
            messages += [Message("user", f"q {number}"), Message("assistant", f"a {number}")]
        session.chats.put("c", messages)
        yield session, backend


def ask(session: Session, text: str = "and now", **about: int) -> Reply:
    return session.generate(text, chat="c", trim=True, **about)  # type: ignore[arg-type]


def first(backend: ScriptedBackend) -> list[str]:
    """Return the system prompt, the oldest question that was sent, and the last one."""
    contents = [message.content for message in backend.requests[-1].messages]
    return [contents[0], contents[1], contents[-1]]


def test_what_fits_is_sent_whole(chatty: Pair) -> None:
    session, backend = chatty
    assert ask(session).dropped_turns == 0
    assert first(backend) == ["be brief", "q 0", "and now"]


@pytest.mark.parametrize(
    ("context", "limit", "dropped"),
    [
        (54, 10, 0),  # 2 + 40 + 2 words, and 10 for the answer
        (53, 10, 1),
        (44, 4, 1),
        (44, 400, 3),  # a quarter of the context is enough for the answer
        (20, 4, 7),
        (4, 400, 10),  # the question alone leaves no such room, but it fits
    ],
)
def test_trim_drops_the_fewest_oldest_turns(
    chatty: Pair, context: int, limit: int, dropped: int
) -> None:
    session, backend = chatty
    backend.context = context
    reply = ask(session, max_new_tokens=limit)
    oldest = f"q {dropped}" if dropped < 10 else "and now"
    assert first(backend) == ["be brief", oldest, "and now"]
    assert reply.dropped_turns == dropped
    assert reply.messages == backend.requests[-1].messages
    turns = session.chats.get("c").turns
    assert len(turns) == 11, "the chat keeps them all"
    assert not any(turn.stale for turn in turns)


def test_footer_reports_the_dropped_turns(chatty: Pair) -> None:
    session, backend = chatty
    backend.context = 53
    assert footer(ask(session, max_new_tokens=10)).endswith("oldest turn dropped (--trim)")
    backend.context = 44
    assert "4 oldest turns dropped" in footer(ask(session, max_new_tokens=10))


def test_every_way_to_ask_trims(chatty: Pair) -> None:
    session, backend = chatty
    backend.context = 53

    async def cell() -> None:
        await session.agenerate("one two", chat="c", trim=True, max_new_tokens=10)
        async for _chunk in session.astream("one two", chat="c", trim=True, max_new_tokens=10):
            pass

    asyncio.run(cell())
    list(session.stream("one two", chat="c", trim=True, max_new_tokens=10))
    assert [call.messages[1].content for call in backend.requests] == ["q 1", "q 2", "q 3"]


def test_a_dry_run_shows_what_would_be_sent(chatty: Pair) -> None:
    session, backend = chatty
    backend.context = 20
    request = Request("and now", chat="c", key="k", trim=True, options={"max_new_tokens": 4})
    dry = session.dry_run(request)
    assert (len(dry.dropped), dry.messages[1].content) == (7, "q 7")
    assert dry.count == TokenCount(16, 20)
    assert dry.problem == ""
    lines = repr(dry_run_table(dry)).splitlines()
    assert lines[1:8] == [
        "not sent   7 oldest turns dropped (--trim)",
        *(f"             q {number}" for number in range(5)),
        "             … and 2 more",
    ]
    assert backend.requests == []


def test_a_dry_run_reports_what_does_not_fit(chatty: Pair) -> None:
    session, backend = chatty
    backend.context = 20
    above = Request("and now", chat="c", key="k", options={"max_new_tokens": 4})
    dry = session.dry_run(above)
    assert dry.problem == (
        f"The prompt has {dry.count.prompt_tokens} tokens, but tiny reads at most 20."
        f" Shorten it by at least {(dry.count.prompt_tokens or 0) - 19}."
        " Chat 'c' has 10 turns above it: --trim drops the oldest, and %llm_reset c deletes all."
    )
    alone = Request("one two three", options={"max_new_tokens": 18})
    assert session.dry_run(alone).problem == (
        "The context leaves 17 tokens for the answer, fewer than max_new_tokens=18."
    )
    backend.counting = False
    assert session.dry_run(above).problem == ""
    too_long = Request("one", options={"max_new_tokens": 10_000})
    assert session.dry_run(too_long).problem == (
        "max_new_tokens 10,000 is more than the context of tiny (8,192 tokens): no answer can be that long."
    )
    trimmed = dataclasses.replace(above, trim=True)
    assert session.dry_run(trimmed).problem == (
        "How many turns --trim drops is unknown until the server answers."
    )


def test_dry_run_shows_every_option_that_is_sent(chatty: Pair) -> None:
    session, _ = chatty
    options = {"stop": ("x", "\n"), "extra": {"known": {"a": [1]}}, "seed": 3, "top_k": None}
    shown = repr(dry_run_table(session.dry_run(Request("and now", options=options))))
    assert 'seed 3, stop "x" "\\n", known {"a": [1]}' in shown
    assert "top_k" not in shown
    shown = repr(dry_run_table(session.dry_run(Request("and now"))))
    assert "stop" not in shown


def test_without_trim_the_error_names_the_turns_and_what_helps(chatty: Pair) -> None:
    session, backend = chatty
    backend.will(PromptTooLong(TOO_LONG))
    with pytest.raises(PromptTooLong) as caught:
        session.generate("?", chat="c")
    assert str(caught.value) == (
        f"{TOO_LONG} Chat 'c' has 10 turns above it: --trim drops the oldest, and %llm_reset c deletes all."
    )
    backend.will(PromptTooLong(TOO_LONG))
    with pytest.raises(PromptTooLong) as alone:
        session.generate("?", chat="new one")
    assert str(alone.value) == TOO_LONG
    assert len(session.chats.all()) == 1


def test_server_without_counts_gets_shorter_requests_until_it_accepts_one(
    chatty: Pair,
) -> None:
    session, backend = chatty
    backend.counting = False
    for _ in range(3):
        backend.will(PromptTooLong(TOO_LONG))
    reply = ask(session)
    sent = [(len(call.messages) - 2) // 2 for call in backend.requests]
    assert sent == [10, 7, 5, 4]
    assert (reply.dropped_turns, reply.text) == (6, "and now")


def test_a_question_that_is_too_long_by_itself_is_the_error(chatty: Pair) -> None:
    session, backend = chatty
    backend.counting = False
    for _ in range(20):
        backend.will(PromptTooLong(TOO_LONG))
    with pytest.raises(PromptTooLong) as caught:
        ask(session)
    assert str(caught.value) == f"{TOO_LONG} Even without the 10 turns above it, it is too long."
    assert len(backend.requests) == 8
    assert [message.content for message in backend.requests[-1].messages] == ["be brief", "and now"]
    assert len(session.chats.get("c").turns) == 10


def test_error_response_without_a_reason_drops_no_turns(chatty: Pair) -> None:
    session, backend = chatty
    backend.counting = False
    backend.will(RequestFailed("It refused.", status=400))
    with pytest.raises(RequestFailed) as caught:
        ask(session)
    assert str(caught.value) == (
        "It refused. The 10 turns above may be too long; %llm_reset c deletes them."
    )
    assert caught.value.status == 400
    backend.will(RequestFailed("Slow down.", status=429))
    with pytest.raises(RequestFailed, match=r"^Slow down\.$"):
        ask(session)
    assert len(backend.requests) == 2


def test_answer_that_has_started_is_not_requested_again(chatty: Pair) -> None:
    session, backend = chatty
    backend.will("half", PromptTooLong(TOO_LONG))
    with pytest.raises(PromptTooLong):
        ask(session)
    assert len(backend.requests) == 1


def test_trim_is_for_chats(chatty: Pair) -> None:
    session, backend = chatty
    with pytest.raises(OptionError, match=r"--trim drops turns of a chat\."):
        session.generate("?", trim=True)
    assert backend.requests == []


# -- what a conversation takes ----------------------------------------------------------------


def test_tokens_are_counted_here_where_the_backend_can(chatty: Pair) -> None:
    session, backend = chatty
    assert session.chat_tokens("c") == 42
    backend.counting = False
    assert session.chat_tokens("c") is None
    session.unload()
    assert session.chat_tokens("c") is None


def test_chat_tokens_are_those_that_the_model_reported_last(
    chatty: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, backend = chatty
    monkeypatch.setattr(ScriptedBackend, "capabilities", Capabilities(in_process=True))
    assert session.chat_tokens("c") is None
    session.generate("?", chat="c")
    assert session.chat_tokens("c") == 8  # 7 → 1
    backend.will("a", Chunk(finish_reason="stop"))
    session.generate("?", chat="c")
    assert session.chat_tokens("c") is None
    backend.will(Chunk(reasoning="hm"), *whole_answer("a"))
    session.generate("?", chat="c")
    assert session.chat_tokens("c") is None, "thoughts are counted, and not sent again"
    backend.will(Chunk(text="a", finish_reason="stop", usage=Usage(3, 4)))
    session.generate("?", chat="c")
    assert session.chat_tokens("c") == 7
    session.load("org/other")
    assert session.chat_tokens("c") is None, "another model counts otherwise"
