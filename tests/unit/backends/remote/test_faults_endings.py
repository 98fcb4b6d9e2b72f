"""Servers that do not come to an end after the last word: the limits hold for everything together."""

from __future__ import annotations

import time

import pytest

from llm_magic.backends.remote import http_client, limits
from llm_magic.errors import RequestFailed, ServerTimeout
from llm_magic.session import Session
from tests.fault_server import CHAT, MODELS, FaultServer
from tests.http_server import HttpServer
from tests.kernels import within_a_second
from tests.ollama_server import OllamaServer
from tests.remote_sessions import (
    OLLAMA_CHAT,
    chat_path,
    fails,
    questions,
    session_on,
    still_works,
)
from tests.scripted import settings
from tests.until import until
from tests.wire import SSE, Head, Raw, Repeat, Send, Slow, Step, delta, ndjson, sse, sse_words

# Far longer than the client waits for an end, a byte at a time.
PINGS = b": ping\n\n" * 100
FINISHED = sse(delta("Hi"), delta(finish="stop"), done=False)
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": ""}}]}\n\n'
DONE = ndjson({"message": {"content": "Hi"}, "done": False}, {"message": {}, "done": True})


@pytest.mark.parametrize(
    ("script", "most"),
    [
        ([*FINISHED, Slow(PINGS, 0.05)], 6.0),
        ([*FINISHED, *[Slow(EVENT, 0.002)] * 50], 1.5),
        ([*FINISHED, Repeat(b": ping\n\n" * 1000, 1 << 30)], 1.5),
        ([*FINISHED, Repeat(EVENT * 100, 1 << 30)], 1.5),
        ([*sse_words("Hi"), Slow(PINGS, 0.05)], 1.5),
        ([*sse_words("Hi"), Repeat(b"x" * 65536, 1 << 30)], 1.5),
        ([*sse_words("Hi"), *[Raw(b"0\r\n"), *[Raw(b"X: y\r\n")] * 10], Slow(PINGS, 0.05)], 1.5),
    ],
    ids=["trickle", "events", "flood", "flood-of-events", "done-trickle", "done-flood", "trailers"],
)  # fmt: skip
def test_answer_ends_in_time_whatever_follows(
    server: FaultServer, script: list[Step], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most < limits.END_S:
        monkeypatch.setattr("llm_magic.backends.remote.openai_compatible.END_S", 0.5)
    with session_on(server) as session:
        server.will(CHAT, *script)
        began = time.monotonic()
        reply = session.generate("?")
        assert time.monotonic() - began < most * within_a_second()
        assert (reply.text, reply.finish_reason) == ("Hi", "stop")
        assert questions(server)[0].left.wait(within_a_second())
        still_works(session)


@pytest.mark.parametrize(
    "after", [Slow(b"\n" * 600, 0.05), Repeat(b"\n" * 65536, 1 << 30)], ids=["trickle", "flood"]
)
def test_ollama_ends_in_time_whatever_follows(after: Step) -> None:
    with OllamaServer() as server, session_on(server, "ollama") as session:
        server.will(OLLAMA_CHAT, *DONE, after)
        began = time.monotonic()
        reply = session.generate("?")
        assert time.monotonic() - began < within_a_second()
        assert (reply.text, reply.finish_reason) == ("Hi", "stop")
        server.will("/api/pull", *ndjson({"status": "success"}), after)
        server.models |= server.library
        session.load("gemma3:270m", backend="ollama", base_url=server.url, pull=True)
        assert time.monotonic() - began < 3 + within_a_second()


def test_words_after_reason_for_end_still_belong_to_answer(server: FaultServer) -> None:
    with session_on(server) as session:
        server.will(CHAT, *sse(delta("one", finish="stop"), delta(" two")))
        assert session.generate("?").text == "one two"


def test_error_body_that_trickles_is_left_in_time(server: FaultServer) -> None:
    with session_on(server) as session:
        server.will(CHAT, Head(400, SSE), Slow(b"x" * 600, 0.05))
        began = time.monotonic()
        assert "(400)" in str(fails(session, RequestFailed))
        assert time.monotonic() - began < 6


def test_list_that_trickles_is_left_in_time(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "ANSWER_S", 0.5)
    server.will(MODELS, Head(200, {"Content-Type": "application/json"}), Slow(b" " * 600, 0.05))
    session = Session(settings())
    try:
        began = time.monotonic()
        with pytest.raises(ServerTimeout):
            session.load("tiny", backend="vllm", base_url=server.url)
        assert time.monotonic() - began < 1 + within_a_second()
    finally:
        session.close()


@pytest.mark.parametrize("backend", ["vllm", "ollama"])
def test_end_that_comes_late_leaves_connection_usable(backend: str) -> None:
    server: HttpServer = OllamaServer() if backend == "ollama" else FaultServer()
    with server, session_on(server, backend) as session:
        script = DONE if backend == "ollama" else sse_words("Hi")
        server.will(chat_path(server), *script, Slow(b"\n" * 5, 0.01))
        assert session.generate("?").text == "Hi"
        until(lambda: questions(server)[0].outcome == "whole", "the answer goes on")
        connections = server.connections
        still_works(session)
        assert server.connections == connections


def test_end_without_its_event_is_waited_for(server: FaultServer) -> None:
    # The counts may come a while after the reason for the end.
    late = Slow(b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n', 0.02)
    with session_on(server) as session:
        server.will(CHAT, *FINISHED, late, Send(b"data: [DONE]\n\n"))
        assert session.generate("?").usage.completion_tokens == 1
