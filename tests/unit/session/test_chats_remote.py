"""Chats that are too long for a server, with and without token counts; lists send no request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from llm_magic.errors import PromptTooLong, RequestFailed
from llm_magic.session import Session
from llm_magic.session.requests import Request
from llm_magic.types import Message
from tests.exchange import Received
from tests.fault_server import CHAT, FaultServer
from tests.remote_sessions import NOW, checked_message, last, questions, session_on, still_works
from tests.wire import Step, error_answer, json_answer

TOKENIZE = "/tokenize"


class SmallServer(FaultServer):
    """Reads 20 words, and counts them for who asks."""

    def _reply(self, request: Received) -> Iterable[Step]:
        if (request.method, request.path) == ("POST", TOKENIZE):
            return json_answer(200, {"count": _word_count(request), "max_model_len": 20})
        return super()._reply(request)

    def _chat(self, request: Received) -> Iterable[Step]:
        if _word_count(request) > 20:
            message = (
                f"This model's maximum context length is 20 tokens, not {_word_count(request)}."
            )
            return error_answer(400, message, headers=NOW)
        return super()._chat(request)


def _word_count(request: Received) -> int:
    return sum(len(message["content"].split()) for message in request.json["messages"])


@pytest.fixture
def server() -> Iterator[SmallServer]:
    with SmallServer({"tiny": {"max_model_len": 20}}) as running:
        yield running


def chat_of(session: Session, turns: int) -> None:
    """Begin the chat ``c`` with a system prompt and turns of four words each."""
    messages = [Message("system", "be brief")]
    for number in range(turns):
        messages += [Message("user", f"q {number}"), Message("assistant", f"a {number}")]
    session.chats.put("c", messages)


def test_server_that_counts_gets_one_request(server: SmallServer) -> None:
    with session_on(server, "vllm") as session:
        chat_of(session, 10)
        reply = session.generate("and now", chat="c", trim=True)
        # 20 less a quarter for the answer, the system prompt and the question: room for 2 turns.
        assert (reply.dropped_turns, reply.text) == (8, "and now")
        assert len(questions(server)) == 1
        assert len(server.requests_to(TOKENIZE)) <= 5


def test_server_without_counts_gets_shorter_requests(server: SmallServer) -> None:
    with session_on(server, "openai") as session:
        chat_of(session, 10)
        reply = session.generate("and now", chat="c", trim=True)
        assert [_word_count(request) for request in questions(server)] == [44, 32, 24, 20]
        assert (reply.dropped_turns, reply.text) == (6, "and now")
        assert reply.messages[0] == Message("system", "be brief")
        assert len(session.chats.get("c").turns) == 11
        assert session.chat_tokens("c") is None


def test_a_question_that_alone_is_too_long_is_one_line(server: SmallServer) -> None:
    with session_on(server, "openai") as session:
        chat_of(session, 3)
        with pytest.raises(PromptTooLong) as caught:
            session.generate("word " * 30, chat="c", trim=True)
        assert checked_message(caught.value).endswith(
            "Even without the 3 turns above it, it is too long."
        )
        assert len(questions(server)) == 4
        with pytest.raises(PromptTooLong) as caught:
            session.generate("word " * 10, chat="c")
        assert "Chat 'c' has 3 turns above it: --trim drops" in checked_message(caught.value)
        still_works(session)


def test_error_response_without_a_reason_is_reported_as_unclear(server: SmallServer) -> None:
    with session_on(server, "openai") as session:
        chat_of(session, 3)
        server.will(CHAT, *error_answer(400, "No.", headers=NOW))
        with pytest.raises(RequestFailed) as caught:
            session.generate("?", chat="c", trim=True)
        assert "The 3 turns above may be too long" in checked_message(caught.value)
        assert len(questions(server)) == 1


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_size_of_a_chat_is_that_of_its_last_reply_without_a_request(
    server: SmallServer, backend: str
) -> None:
    with session_on(server, backend) as session:
        chat_of(session, 2)
        server.received.clear()
        assert session.chat_tokens("c") is None
        assert server.received == []
        session.generate("and now", chat="c")
        usage = last(session).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (12, 2)
        assert session.chat_tokens("c") == 14
        assert len(server.received) == 1


def test_turn_waits_for_the_turn_before_it_at_a_server(server: SmallServer) -> None:
    with session_on(server, "openai") as session:
        jobs = [
            session.ask(Request(text, chat="c", key=text), background=True)
            for text in ("one", "two", "three")
        ]
        assert [job.result().text for job in jobs] == ["one", "two", "three"]
        sent = [message["content"] for message in questions(server)[-1].json["messages"]]
        assert sent == ["one", "one", "two", "two", "three"]
        assert not any(turn.stale for turn in session.chats.get("c").turns)
