"""The stop button while a server hangs, streams, or is waited for: it ends within a second."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from llm_magic.session import Session
from llm_magic.session.requests import Request
from tests.fault_server import CHAT, FaultServer
from tests.http_server import HttpServer
from tests.kernels import within_a_second
from tests.ollama_server import OllamaServer
from tests.remote_sessions import (
    OLLAMA_CHAT,
    chat_path,
    interrupt,
    last,
    questions,
    session_on,
    still_works,
)
from tests.scripted import show
from tests.until import until
from tests.wire import (
    NDJSON,
    SSE,
    Head,
    Hold,
    Pause,
    Raw,
    Send,
    Slow,
    Step,
    delta,
    error_answer,
    events,
    json_answer,
    ndjson,
    sse,
)

ROLE = delta("", role="assistant")
HEL = sse(ROLE, delta("Hel"), done=False)


def piece(text: str, **more: object) -> dict[str, object]:
    """Return an object of Ollama's stream."""
    return {"model": "m", "message": {"role": "assistant", "content": text}, "done": False, **more}


@pytest.fixture(params=["vllm", "openai", "ollama"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Session, HttpServer]]:
    server = OllamaServer() if request.param == "ollama" else FaultServer()
    with server, session_on(server, request.param) as session:
        yield session, server


def has_left(server: HttpServer) -> None:
    """See that the server noticed that the question was given up, and that it is not repeated."""
    (request,) = questions(server)
    assert request.left.wait(within_a_second())
    assert server.open_now == 0 or request.outcome == "left"


@pytest.mark.parametrize("head", ["none", "half", "whole"])
def test_interrupt_without_data(both: tuple[Session, HttpServer], head: str) -> None:
    session, server = both
    kind = SSE if isinstance(server, FaultServer) else NDJSON
    begun: dict[str, list[Step]] = {
        "none": [], "half": [Raw(b"HTTP/1.1 200")], "whole": [Head(200, kind)]
    }  # fmt: skip
    hold = Hold()
    server.will(chat_path(server), *begun[head], hold)
    assert interrupt(session, hold.reached).reply is not None
    assert (last(session).text, last(session).finish_reason) == ("", "cancelled")
    has_left(server)
    still_works(session)


def test_interrupt_in_middle_of_reply(both: tuple[Session, HttpServer]) -> None:
    session, server = both
    script = HEL if isinstance(server, FaultServer) else ndjson(piece("Hel"))
    server.will(chat_path(server), *script, Hold())
    error = interrupt(session, lambda chunk: chunk.text == "Hel")
    assert str(error) == "Stopped after 3 characters; the answer so far is in llm.last."
    assert (last(session).text, last(session).finish_reason) == ("Hel", "cancelled")
    has_left(server)
    still_works(session)


def test_interrupt_during_constant_data(both: tuple[Session, HttpServer]) -> None:
    session, server = both
    more = (
        [step for n in range(5000) for step in (*events(delta(f" {n}"), done=False), Pause(0.005))]
        if isinstance(server, FaultServer)
        else [step for n in range(5000) for step in (*ndjson(piece(f" {n}"))[1:], Pause(0.005))]
    )
    head = Head(200, SSE if isinstance(server, FaultServer) else NDJSON)
    server.will(chat_path(server), head, *more)
    interrupt(session, lambda chunk: chunk.text == " 5")
    assert last(session).text.startswith(" 0 1 2 3 4 5")
    assert last(session).finish_reason == "cancelled"
    has_left(server)
    assert questions(server)[0].chunks_sent < 4000
    still_works(session)


@pytest.mark.parametrize(
    "script",
    [
        sse(ROLE, done=False),
        [Head(200, SSE), Send(b": ping\n\n")],
        [Head(200, SSE), Send(b'data: {"choices": [{"delta": {"content": "He')],
        [Head(200, {"Content-Type": "application/json"}), Send(b'{"choices": [')],
        [Head(429, {"Content-Type": "application/json"}), Send(b'{"error": ')],
    ],
    ids=["role", "comment", "half-an-event", "half-a-json", "half-a-refusal"],
)
def test_interrupt_before_first_token(
    session: Session, server: FaultServer, script: list[Step]
) -> None:
    hold = Hold()
    server.will(CHAT, *script, hold)
    interrupt(session, hold.reached)
    assert last(session).text == ""
    has_left(server)
    still_works(session)


def test_interrupt_during_trickle(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *HEL, Slow(b'data: {"choices": [{"delta": {"content": "' + b"x" * 5000, 0.01))
    interrupt(session, lambda chunk: chunk.text == "Hel")
    assert last(session).text == "Hel"
    has_left(server)
    still_works(session)


def test_interrupt_before_end_of_response(session: Session, server: FaultServer) -> None:
    hold = Hold()
    server.will(CHAT, *HEL, *events(delta("lo", finish="stop"), done=False), Pause(0.1), hold)
    interrupt(session, hold.reached)
    assert last(session).text == "Hello"
    has_left(server)
    still_works(session)


@pytest.mark.parametrize("status", [429, 503])
def test_interrupt_between_retries(session: Session, server: FaultServer, status: int) -> None:
    server.will(CHAT, *error_answer(status, "Wait.", headers={"Retry-After": "20"}))
    interrupt(session, lambda chunk: chunk.notice == f"{status}, attempt 2 of 3 after 20 s")
    assert (last(session).text, last(session).finish_reason) == ("", "cancelled")
    assert [request.wait() for request in questions(server)] == ["whole"]
    still_works(session)


def test_interrupt_of_unreachable_server(session: Session, server: FaultServer) -> None:
    server.stop()
    interrupt(session, lambda chunk: chunk.notice.startswith("no server, attempt 2 of 3 after"))
    server.start()
    assert questions(server) == []
    still_works(session)


def test_interrupt_while_other_request_runs(server: FaultServer) -> None:
    with session_on(server, "instructlab") as session:
        hold = Hold()
        server.will(CHAT, *HEL, hold, *events(delta("lo", finish="stop")))
        texts: list[str] = []
        other = threading.Thread(target=lambda: texts.append(session.generate("other").text))
        other.start()
        assert hold.reached.wait(5)
        interrupt(session, lambda chunk: chunk.queued)
        assert len(questions(server)) == 1
        hold.go.set()
        other.join(5)
        assert texts == ["Hello"]
        still_works(session)


def test_abandoned_stream_closes_connection(both: tuple[Session, HttpServer]) -> None:
    session, server = both
    script = HEL if isinstance(server, FaultServer) else ndjson(piece("Hel"))
    server.will(chat_path(server), *script, Hold())
    for chunk in session.stream("?"):
        if chunk.text:
            break
    assert (last(session).text, last(session).finish_reason) == ("Hel", "cancelled")
    has_left(server)
    still_works(session)


def test_cancelled_task_closes_connection(session: Session, server: FaultServer) -> None:
    hold = Hold()
    server.will(CHAT, *HEL, Pause(0.1), hold)

    async def cell() -> None:
        task = asyncio.create_task(session.agenerate("?"))
        await asyncio.to_thread(hold.reached.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cell())
    assert (last(session).text, last(session).finish_reason) == ("Hel", "cancelled")
    has_left(server)
    still_works(session)


def test_hundred_interrupts_leave_no_connections(server: FaultServer) -> None:
    with session_on(server) as session:
        for _ in range(100):
            server.will(CHAT, *HEL, Hold())
            for chunk in session.stream("?"):
                if chunk.text:
                    break
        still_works(session)
        assert all(request.left.wait(within_a_second()) for request in questions(server)[:-1])
        until(lambda: server.open_now <= 2, f"{server.open_now} connections are open")


def test_interrupt_during_load_on_server() -> None:
    with OllamaServer() as server, session_on(server, "ollama") as session:
        server.load_s = 20
        requested = threading.Event()

        def wait() -> None:
            server.wait_for(OLLAMA_CHAT)
            requested.set()

        threading.Thread(target=wait, daemon=True).start()
        interrupt(session, requested)
        has_left(server)
        server.load_s = 0
        still_works(session)


def test_failing_display_closes_connection(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *HEL, Hold())

    response = session.ask(Request("?"))
    with pytest.raises(ZeroDivisionError):
        show(response, lambda: 1 / 0 if response.text else None)
    assert (last(session).text, last(session).finish_reason) == ("Hel", "truncated")
    has_left(server)
    still_works(session)


def test_interrupt_keeps_reply_with_reasoning_only(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *sse(delta(reasoning="Hm."), done=False), Hold())
    interrupt(session, lambda chunk: bool(chunk.reasoning))
    assert (last(session).text, last(session).reasoning) == ("", "Hm.")
    has_left(server)
    server.will(CHAT, *json_answer(200, {"choices": [{"message": {"content": "Hi"}}]}))
    assert session.generate("?").text == "Hi"
