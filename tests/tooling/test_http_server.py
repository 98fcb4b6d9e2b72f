"""The servers of the tests send what their scripts contain, as plain sockets receive it."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fault_server import CHAT, MODELS, FaultServer
from tests.kernels import within_a_second
from tests.wire import Cut, End, Head, Hold, Pause, Raw, Reset, Send, Slow, Step, json_answer

QUESTION = b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n{}"
NOTICED_S = 5.0


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


def dial(server: FaultServer, request: bytes = QUESTION) -> socket.socket:
    """Connect and send a request."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(request)
    return connection


def everything(connection: socket.socket) -> bytes:
    """Receive until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_cut_body_has_no_end_and_complete_one_has(server: FaultServer) -> None:
    server.will(CHAT, Head(), Send(b"abc"), Cut())
    assert everything(dial(server)).endswith(b"chunked\r\n\r\n3\r\nabc\r\n")
    server.will(CHAT, Head(), Send(b"abc"), End(), Raw(b"!"), Cut())
    assert everything(dial(server)).endswith(b"3\r\nabc\r\n0\r\n\r\n!")
    server.will(CHAT, Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"), Cut())
    assert everything(dial(server)).endswith(b"\r\n\r\nff\r\nabc")


def test_wrong_length_is_noticed(server: FaultServer) -> None:
    server.will(MODELS, Head(200, {"Content-Length": "5"}), Send(b"abc"), Cut())
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", MODELS)
    with pytest.raises(http.client.IncompleteRead):
        connection.getresponse().read()
    connection.close()


@pytest.mark.parametrize("before", [(), (Head(), Send(b"abc"))], ids=["at-once", "midway"])
def test_a_reset_is_seen_as_one(server: FaultServer, before: tuple[Step, ...]) -> None:
    server.will(CHAT, *before, Pause(0.05), Reset())
    with pytest.raises(ConnectionResetError):
        everything(dial(server))
    assert server.received[0].wait() == "cut"


def test_bytes_travel_one_by_one(server: FaultServer) -> None:
    server.will(CHAT, Head(headers={"Content-Length": "20"}), Slow(b"x" * 20, 0.01), Cut())
    with dial(server) as connection:
        parts = list(iter(lambda: connection.recv(65536), b""))
    assert len(parts) > 15
    assert b"".join(parts).endswith(b"\r\n\r\n" + b"x" * 20)


def test_a_pause_before_the_head_is_a_pause(server: FaultServer) -> None:
    server.will(CHAT, Pause(0.3), *json_answer(200, {}))
    began = time.monotonic()
    with dial(server) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    assert time.monotonic() - began >= 0.3


def test_hold_ends_when_released(server: FaultServer) -> None:
    hold = Hold()
    server.will(CHAT, hold, *json_answer(200, {}))
    with dial(server) as connection:
        assert hold.reached.wait(5)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(5)
        hold.go.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, _reset], ids=["close", "reset"])
@pytest.mark.parametrize(
    "script",
    [
        [Hold()],
        [Pause(60)],
        [Head(), Send(b"x"), Hold()],
        [Head(), Send(b"x"), Pause(60)],
        [Head(), Slow(b"x" * 1000, 0.3)],
        [Head(), Send(b"x" * 50_000_000)],
        [Head(), *[Send(b"x"), Pause(0.01)] * 1000],
    ],
    ids=["hold", "pause", "body-hold", "body-pause", "slow", "full-socket", "sending"],
)
def test_a_client_that_leaves_is_noticed(
    server: FaultServer, script: list[Step], leave: Callable[[socket.socket], None]
) -> None:
    server.will(CHAT, *script)
    connection = dial(server)
    request = server.wait_for(CHAT)
    time.sleep(0.1)
    assert request.outcome == "open"
    leave(connection)
    assert request.left.wait(NOTICED_S)
    assert (request.outcome, request.over.is_set()) == ("left", True)


def test_closing_waits_for_no_client_and_leaves_no_thread() -> None:
    before = threading.active_count()
    with FaultServer() as server:
        server.will(CHAT, Head(), Send(b"x" * 50_000_000))
        server.will(CHAT, Hold())
        busy, held, idle = dial(server), dial(server), dial(server, b"GET / HT")
        server.wait_for(CHAT, 2)
        began = time.monotonic()
    assert time.monotonic() - began < within_a_second()
    assert threading.active_count() == before
    assert {request.outcome for request in server.received} == {"cut"}
    for connection in (busy, held, idle):
        connection.close()


def _follow_nonsense() -> None:
    with FaultServer() as server:
        server.will(CHAT, Send(b"x"))
        assert everything(dial(server)) == b""


def test_a_script_that_makes_no_sense_is_an_error_of_the_test() -> None:
    with pytest.raises(AssertionError, match="body before its head"):
        _follow_nonsense()
