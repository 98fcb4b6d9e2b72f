"""Servers that close a reusable connection: the request that meets that is repeated."""

from __future__ import annotations

from typing import Literal

import pytest

from llm_magic.backends.remote import transport
from llm_magic.errors import ServerUnreachable
from llm_magic.session import Session
from tests.fault_server import CHAT, MODELS, FaultServer
from tests.ollama_server import OllamaServer
from tests.remote_sessions import fails, notices, questions, session_on, still_works
from tests.scripted import settings
from tests.unit.backends.remote.test_transport import through
from tests.wire import SSE, Cut, Head, Raw, Reset, Step

Dropping = Literal["end-next", "reset-next"]
DROPPING = pytest.mark.parametrize("how", ["end-next", "reset-next"])


@DROPPING
def test_request_that_reused_connection_drops_is_repeated_at_once(
    server: FaultServer, how: Dropping
) -> None:
    with session_on(server) as session:
        server.after_answer = how
        for count in range(1, 4):
            before = server.connections
            assert notices(session) == []
            assert session.last is not None
            assert session.last.text == "one two"
            # Dropped on a connection that was kept, and asked again on one new connection.
            assert (len(server.dropped), len(questions(server))) == (count, count)
            assert server.connections == before + 1


@DROPPING
def test_load_over_dropped_connections_works(how: Dropping) -> None:
    with FaultServer() as server, OllamaServer() as ollama:
        for each, backend in ((server, "instructlab"), (ollama, "ollama")):
            each.after_answer = how
            with session_on(each, backend) as session:
                still_works(session)
            assert each.dropped


def test_load_from_server_that_closes_at_once_always_works(server: FaultServer) -> None:
    # As `ilab model serve` does it, where half of the loads failed.
    server.after_answer = "close"
    session = Session(settings())
    try:
        for _ in range(30):
            session.load("tiny", backend="instructlab", base_url=server.url)
            assert session.generate("one two").text == "one two"
    finally:
        session.close()
    assert len(questions(server)) == 30


@pytest.mark.parametrize("script", [[Reset()], [Cut()]], ids=["reset", "cut"])
def test_request_is_repeated_once_only(server: FaultServer, script: list[Step]) -> None:
    with session_on(server) as session:
        server.after_answer = "end-next"
        for _ in range(3):
            server.will(CHAT, *script)
        fails(session, ServerUnreachable)
        # Each of three tries reached the server on a new connection, the first after a dropped one.
        assert (len(server.dropped), len(questions(server))) == (1, 3)
        server.after_answer = "keep"
        still_works(session)


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_request_that_breaks_within_headers_is_repeated(server: FaultServer, part: bytes) -> None:
    with session_on(server) as session:
        session.generate("before")
        server.will(CHAT, Raw(part), Cut())
        session.generate("one two")
        assert len(questions(server)) == 3


def test_request_that_breaks_within_body_is_not_repeated_at_once(server: FaultServer) -> None:
    with session_on(server) as session:
        session.generate("before")
        server.will(CHAT, Head(200, SSE), Reset())
        assert notices(session) == ["connection lost, attempt 2 of 3 after 1 s"]
        assert len(questions(server)) == 3


def test_request_that_breaks_on_new_connection_is_not_repeated_at_once(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "KEEP_S", 0.0)
    with session_on(server) as session:
        server.will(CHAT, Reset())
        assert notices(session) == ["connection lost, attempt 2 of 3 after 1 s"]
        assert len(questions(server)) == 2


def test_list_that_breaks_on_new_connection_is_error(server: FaultServer) -> None:
    # aiohttp itself repeats a GET once.
    for _ in range(2):
        server.will(MODELS, Cut())
    session = Session(settings())
    try:
        with pytest.raises(ServerUnreachable, match="was lost"):
            session.load("tiny", backend="vllm", base_url=server.url)
    finally:
        session.close()
    assert len(server.requests_to(MODELS)) == 2


@DROPPING
def test_request_through_proxy_is_repeated_too(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, how: Dropping
) -> None:
    through(monkeypatch, server.url)
    session = Session(settings())
    try:
        session.load("tiny", backend="vllm", base_url="http://far.example/v1")
        server.after_answer = how
        for _ in range(3):
            assert notices(session) == []
        server.will(CHAT, Reset())
        assert notices(session) == ["connection lost, attempt 2 of 3 after 1 s"]
    finally:
        session.close()
    assert len(server.dropped) == 4
