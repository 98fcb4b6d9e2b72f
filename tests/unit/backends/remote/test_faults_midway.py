"""Servers that fail in the middle of an answer: the received part is stored and labeled."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from llm_magic.errors import IncompleteReply
from llm_magic.session import Session
from llm_magic.types import Chunk
from tests.fault_server import CHAT, FaultServer
from tests.kernels import within_a_second
from tests.remote_sessions import IDLE_S, fails, last, questions, session_on, still_works
from tests.scripted import read
from tests.wire import (
    SSE,
    Cut,
    End,
    Head,
    Hold,
    Pause,
    Raw,
    Reset,
    Send,
    Step,
    delta,
    events,
    html_answer,
    sse,
    usage,
)

HEL = [*sse(delta("", role="assistant"), delta("Hel"), done=False), Pause(0.1)]


@pytest.fixture(params=["vllm", "openai"])
def session(server: FaultServer, request: pytest.FixtureRequest) -> Iterator[Session]:
    with session_on(server, request.param) as made:
        yield made


def incomplete(
    session: Session, server: FaultServer, *script: Step, text: str = "Hel"
) -> IncompleteReply:
    """Ask, see the answer break in the middle, and see what is kept of it."""
    server.will(CHAT, *script)
    error = fails(session, IncompleteReply)
    assert isinstance(error, IncompleteReply)
    assert error.reply is session.last
    reply = last(session)
    assert (reply.text, reply.finish_reason) == (text, "truncated")
    assert "The reply is incomplete. The received part is in llm.last." in str(error)
    assert len(questions(server)) == 1
    still_works(session)
    return error


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ([Reset()], "was lost"),
        ([Cut()], "was lost"),
        ([Raw(b"5\r\ndat"), Cut()], "was lost"),
        ([Raw(b"no size of a chunk\r\n"), Hold()], "was lost"),
        (events(b"nonsense", done=False), "sent invalid JSON"),
        (events(b'{"choices": [{"delta"', done=False), "sent invalid JSON"),
        (events(b"[]", done=False), "sent JSON that is not an object"),
        (events(b'{"choices": [0]}', done=False), "a chunk in an unknown format"),
        (events({"choices": [{"delta": {"content": 5}}]}), "a chunk in an unknown format"),
        (events({"choices": [{"delta": {"content": [{"text": 5}]}}]}), "a chunk in an unknown format"),
        (events({"choices": [{"delta": {"content": [{"text": [{"text": {"a": 1}}]}]}}]}), "unknown format"),
        ([Send(b"event: error\n\nevent: error\ndata:\n\n"), End()], "no reason given"),
        (events({"error": {"message": "CUDA out of memory.", "code": 500}}), "CUDA out of memory."),
        (events({"error": "CUDA out of memory"}), "CUDA out of memory."),
        (events({"object": "error", "message": "Out", "code": "oom"}), "stopped with an error: Out."),
        (events({"error": {"message": "Try later.", "code": 429}}), "Try later."),
        ([Send(b'error: {"code": 500, "message": "Out."}\n\n'), End()], "Out."),
        ([Send(b'event: error\ndata: {"code": 500, "message": "Out."}\n\n'), End()], "Out."),
        ([Send(b'data: {"choices": [{"delta": {"content": "lo"'), Cut()], "was lost"),
    ],
    ids=["reset", "cut", "half-a-chunk", "no-chunk", "nonsense", "half-json", "no-object",
         "no-choice", "number", "number-in-part", "deep-part", "empty-error", "error",
         "error-text", "error-object", "error-429",
         "error-field", "error-event", "half-event"],
)  # fmt: skip
def test_failure_keeps_partial_reply_without_retry(
    session: Session, server: FaultServer, ending: list[Step], message: str
) -> None:
    assert message in str(incomplete(session, server, *HEL, *ending))


@pytest.mark.parametrize("behind", [b"nonsense", b'{"error": "Out of memory."}'])
def test_data_after_error_is_not_read(server: FaultServer, behind: bytes) -> None:
    with session_on(server) as session:
        incomplete(session, server, *HEL, *events(behind, done=False), Hold())
        assert questions(server)[0].left.wait(within_a_second())


def test_timeout_in_middle_of_reply_is_the_limit(server: FaultServer) -> None:
    with session_on(server, idle_s=IDLE_S) as session:
        error = incomplete(session, server, *HEL, Hold())
        assert "sent no data for 0 s" in str(error)
        assert questions(server)[0].left.wait(within_a_second())


def test_idle_timeout_of_one_second_is_accepted(server: FaultServer) -> None:
    with session_on(server, idle_timeout=1) as session:
        error = incomplete(session, server, *HEL, Hold())
        assert "sent no data for 1 s" in str(error)
        assert "--idle-timeout" in str(error)


def test_pauses_below_limit_do_not_time_out(server: FaultServer) -> None:
    with session_on(server, idle_timeout=3) as session:
        # Together they are longer than the limit.
        pause = Pause(1.2)
        server.will(CHAT, *HEL, pause, Send(b": ping\n\n"), pause, *events(delta("lo")), pause,
                    *events(delta(finish="stop")))  # fmt: skip
        assert session.generate("?").text == "Hello"


def test_server_can_be_used_after_restart(session: Session, server: FaultServer) -> None:
    hold, seen = Hold(), threading.Event()
    server.will(CHAT, *HEL, hold)

    def die() -> None:
        assert seen.wait(5)
        server.stop()

    def take(chunk: Chunk) -> None:
        if chunk.text:
            seen.set()

    killer = threading.Thread(target=die)
    killer.start()
    with pytest.raises(IncompleteReply, match="was lost"):
        read(session.stream("?"), take)
    killer.join()
    assert last(session).text == "Hel"
    server.start()
    still_works(session)


@pytest.mark.parametrize(
    ("ending", "finish"),
    [
        ([End()], "truncated"),
        (events(), "truncated"),
        ([Send(b'data: {"choices": [{"delta": {"content": "lo"'), End()], "truncated"),
        ([Send(b'data: {"choices": [{"delta": {"content": "\xf0\x9f'), End()], "truncated"),
        (events(delta(finish="stop"), done=False), "stop"),
        (events(delta(finish="stop")), "stop"),
        (events(delta(finish="length")), "length"),
        (events(delta(finish="content_filter")), "truncated"),
        (events(delta(finish="abort")), "truncated"),
        (events(delta(finish="eos_token")), "stop"),
        (events(delta(finish="tool_calls")), "stop"),
        (events(delta(finish="STOP")), "stop"),
        (events(delta(finish="model_length")), "length"),
        (events(delta(finish="insufficient_system_resource")), "truncated"),
        (events({"choices": [{"delta": {}, "finish_reason": ["stop"]}]}), "truncated"),
        (events({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}), "truncated"),
        ([Send(b"event: error\n\n"), *events(delta(finish="stop"))], "stop"),
        ([*events(delta(finish="stop"), done=False), Pause(0.1), Reset()], "stop"),
        ([*events(delta(finish="stop"), done=False), Cut()], "stop"),
        (events(delta(finish="stop"), b"nonsense"), "stop"),
        ([*events(), Hold()], "truncated"),
        ([*events(delta(finish="stop")), Cut()], "stop"),
        ([*events(delta(finish="stop")), Hold()], "stop"),
        ([*events(delta(finish="stop")), Send(b"what is no event\n\ndata: {"), End()], "stop"),
    ],
    ids=["end", "done-only", "half-an-event", "half-a-character", "no-done",
         "stop", "length", "filter", "abort", "eos", "tools", "capitals", "its-length", "no-resource",
         "odd-reason", "other-choice", "error-without-data",
         "stop-reset", "stop-cut", "stop-nonsense", "done-hold", "done-cut", "stop-done-hold",
         "rubbish-behind"],
)  # fmt: skip
def test_finish_reason_comes_from_server(
    session: Session, server: FaultServer, ending: list[Step], finish: str
) -> None:
    server.will(CHAT, *HEL, *ending)
    reply = session.generate("?")
    assert (reply.text, reply.finish_reason) == ("Hel", finish)
    assert session.last is reply
    assert len(questions(server)) == 1
    still_works(session)


def test_usage_after_finish_reason_is_read(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *HEL, *events(delta(finish="stop"), usage(7, 1)))
    counts = session.generate("?").usage
    assert (counts.prompt_tokens, counts.completion_tokens) == (7, 1)


def test_truncated_reply_is_not_recorded_in_chat(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *HEL, End())
    assert session.generate("?", chat="c").finish_reason == "truncated"
    assert session.chats.all() == []


def test_reasoning_alone_counts_as_partial_reply(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *sse(delta(reasoning_content="Hm."), done=False), Pause(0.1), Reset())
    error = fails(session, IncompleteReply)
    assert isinstance(error, IncompleteReply)
    assert (last(session).text, last(session).reasoning) == ("", "Hm.")
    assert error.reply is session.last
    assert len(questions(server)) == 1


def test_html_in_stream_is_not_the_end(session: Session, server: FaultServer) -> None:
    page = next(step for step in html_answer(502) if isinstance(step, Send))
    server.will(CHAT, *HEL, page)
    assert session.generate("?").finish_reason == "truncated"
    still_works(session)


def test_body_that_ends_with_connection_needs_finish_reason(
    session: Session, server: FaultServer
) -> None:
    head = Head(200, SSE, chunked=False)
    server.will(CHAT, head, *events(delta("Hel"), done=False), Cut())
    assert session.generate("?").finish_reason == "truncated"
    server.will(CHAT, head, *events(delta("Hello", finish="stop"), done=False), Cut())
    assert session.generate("?").finish_reason == "stop"
    still_works(session)
