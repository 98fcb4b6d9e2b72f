"""Connections to servers: kept, through proxies, over IPv6, and closed when a request is given up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from llm_magic.backends.remote import transport
from llm_magic.errors import Interrupted, ServerUnreachable
from llm_magic.session import Session
from tests.fault_server import FaultServer
from tests.relay import refuse, relay, socks, tunnel
from tests.remote_sessions import checked_message, questions, session_on
from tests.scripted import settings, stop_when
from tests.until import until


def test_many_connections_are_reused_for_few_requests(server: FaultServer) -> None:
    async def ask(session: Session, count: int) -> None:
        await asyncio.gather(*(session.agenerate("one two") for _ in range(count)))

    with session_on(server) as session:
        asyncio.run(ask(session, 16))
        most = server.connections
        assert most <= 16
        for _ in range(3):
            asyncio.run(ask(session, 8))
        assert server.connections == most


def test_unused_connection_is_closed(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "KEEP_S", 0.05)
    with session_on(server) as session:
        session.generate("one")
        time.sleep(0.2)
        before = server.connections
        session.generate("two")
        assert server.connections == before + 1
        until(lambda: server.open_now == 1, "the older one is left open")


def through(monkeypatch: pytest.MonkeyPatch, proxy: str, but_for: str = "") -> None:
    """Name a proxy in the environment."""
    for name, value in (("http_proxy", proxy), ("https_proxy", proxy), ("no_proxy", but_for)):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.upper(), value)


def test_request_is_sent_through_proxy(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, server.url)
    monkeypatch.setenv("FAR_KEY", "a-secret")
    session = Session(settings())
    try:
        session.load("tiny", backend="vllm", base_url="http://far.example/v1", key_env="FAR_KEY")
        assert session.generate("one two").text == "one two"
        for _chunk in session.stream("one two three"):
            break
        assert session.generate("three").text == "three"
    finally:
        session.close()
    until(lambda: server.open_now == 0, "a connection is left open")
    received = server.received[-1]
    assert received.headers["host"] == "far.example"
    assert received.headers["authorization"] == "Bearer a-secret"


@pytest.mark.parametrize(
    ("proxy", "why"),
    [("http://127.0.0.1:9", "Connect call failed"), ("127.0.0.1:9", "Connect call failed"),
     ("http://user:p%20w@127.0.0.1:9", "Connect call failed"),
     ("foo://bar", "Unknown scheme"), ("http://h:port", "port"), ("http://[::1", "[::1"),
     ("http://user:%E2%82%AC@127.0.0.1:9", "latin-1")],
)  # fmt: skip
def test_unusable_proxy_is_reported(proxy: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, proxy)
    session = Session(settings())
    with pytest.raises(ServerUnreachable) as caught:
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    message = checked_message(caught.value)
    host = proxy.rpartition("://")[2].rpartition("@")[2]
    assert message.startswith(f"The proxy {host} cannot connect to")
    assert why in message
    assert message.endswith("HTTP_PROXY, or set NO_PROXY=far.example if no proxy is needed.")


def test_unknown_host_of_proxy_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, "http://no.such.host.invalid:3128")
    session = Session(settings())
    with pytest.raises(ServerUnreachable) as caught:
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    message = checked_message(caught.value)
    assert "[Errno" not in message
    assert "no.such.host.invalid:3128" in message
    assert "HTTP_PROXY" in message


def test_malformed_no_proxy_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    through(monkeypatch, "http://127.0.0.1:9", but_for="[::1, a b")
    session = Session(settings())
    with pytest.raises(ServerUnreachable, match=r"set NO_PROXY=far\.example if no proxy") as caught:
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    checked_message(caught.value)


def test_host_in_no_proxy_is_connected_directly(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, server.url, but_for="far.example")
    session = Session(settings())
    # The second where this machine has no name server.
    with pytest.raises(
        ServerUnreachable, match=r"Host far\.example:\d+ not found|resolve the host of far\.example"
    ):
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    assert server.received == []


def test_headers_of_request(server: FaultServer) -> None:
    with session_on(server) as session:
        session.generate("one two")
        headers = questions(server)[0].headers
    assert headers["host"] == server.url.partition("://")[2]
    assert headers["user-agent"] == "llm_magic"
    assert headers["accept-encoding"] == "identity"
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers


@pytest.fixture
def far_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Return the TLS context of far.example, whose authority is trusted."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    authority.issue_cert("far.example", "127.0.0.1").configure_cert(context)
    return context


def ask_far(scheme: str) -> None:
    """Load a model from a server that only a proxy can reach, and ask it over a kept connection."""
    session = Session(settings())
    try:
        session.load("tiny", backend="vllm", base_url=f"{scheme}://far.example/v1")
        assert session.generate("one two").text == "one two"
    finally:
        session.close()


def test_encrypted_request_is_tunneled_through_proxy_with_credentials(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, far_tls: ssl.SSLContext
) -> None:
    received: list[bytes] = []
    with relay(server.port, negotiate=tunnel(received, far_tls)) as port:
        through(monkeypatch, f"http://user:p%20w@127.0.0.1:{port}")
        ask_far("https")
    assert len(received) == 1
    assert received[0].startswith(b"CONNECT far.example:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic dXNlcjpwIHc=\r\n" in received[0]
    assert all("proxy-authorization" not in request.headers for request in server.received)


def test_request_through_proxy_carries_credentials(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, f"http://user:p%20w@127.0.0.1:{server.port}")
    ask_far("http")
    assert {r.headers["proxy-authorization"] for r in server.received} == {"Basic dXNlcjpwIHc="}


@pytest.mark.parametrize("status", [b"407 Proxy Authentication Required", b"502 Bad Gateway"])
def test_tunnel_that_proxy_refuses_is_reported(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, status: bytes
) -> None:
    with relay(server.port, negotiate=refuse(status)) as port:
        through(monkeypatch, f"http://127.0.0.1:{port}")
        with pytest.raises(
            ServerUnreachable, match=rf"The proxy .*{status[:3].decode()}"
        ) as caught:
            ask_far("https")
    checked_message(caught.value)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_proxy_resolves_host_and_carries_requests(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    received: list[bytes] = []
    with relay(server.port, negotiate=socks(received)) as port:
        through(monkeypatch, f"{scheme}://127.0.0.1:{port}")
        ask_far("http")
    assert received == [b"far.example" + (80).to_bytes(2, "big")]


def test_socks_proxy_that_rejects_is_reported(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with relay(server.port, negotiate=socks([], reply=2)) as port:
        through(monkeypatch, f"socks5://127.0.0.1:{port}")
        with pytest.raises(ServerUnreachable, match=r"The proxy .* cannot connect") as caught:
            ask_far("http")
    checked_message(caught.value)


def test_missing_socks_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, "socks5://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "aiohttp_socks", None)
    with pytest.raises(ServerUnreachable, match="pip install aiohttp-socks"):
        ask_far("http")


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_server_that_listens_on_ipv6_only_is_reached(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    getaddrinfo = socket.getaddrinfo

    def resolve(_host: str, *args: Any, flags: int = 0, **options: Any) -> Any:
        # As glibc on a machine whose only IPv6 address is ::1.
        if flags & socket.AI_ADDRCONFIG:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return getaddrinfo("::1", *args, **options)

    with relay(server.port, "::1") as port:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        session = Session(settings())
        try:
            session.load("tiny", backend="vllm", base_url=f"http://{host}:{port}")
            assert session.generate("one two").text == "one two"
        finally:
            session.close()


def test_encrypted_connection_is_closed_at_once_on_interrupt(far_tls: ssl.SSLContext) -> None:
    """A busy server does not answer the end of TLS: only the end of TCP shows that no client waits."""
    began, finished = threading.Event(), threading.Event()

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            connection = far_tls.wrap_socket(listener.accept()[0], server_side=True)
            if connection.recv(65536).startswith(b"GET"):
                body = b'{"data": [{"id": "tiny"}]}'
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
                connection.close()
        began.set()
        with contextlib.suppress(ConnectionError), socket.socket(fileno=connection.detach()) as raw:
            raw.settimeout(5)
            while raw.recv(65536):
                pass
        finished.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        session = Session(settings())
        session.load(
            "tiny", backend="vllm", base_url=f"https://127.0.0.1:{listener.getsockname()[1]}"
        )
        stop_when(began)
        with pytest.raises(Interrupted):
            session.generate("?")
        assert finished.wait(4)
        session.close()
        thread.join()
