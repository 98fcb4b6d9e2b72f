"""How requests travel: connections that are kept, and proxies where the environment names them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from llm_magic.backends.remote import transport
from llm_magic.errors import ServerUnreachable
from llm_magic.session import Session
from tests.fault_server import FaultServer
from tests.remote_sessions import eventually, questions, session_on, told
from tests.scripted import settings


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def test_connections_that_many_needed_are_used_again_by_few(server: FaultServer) -> None:
    async def ask(session: Session, count: int) -> None:
        await asyncio.gather(*(session.agenerate("one two") for _ in range(count)))

    with session_on(server) as session:
        asyncio.run(ask(session, 16))
        most = server.connections
        assert most <= 16
        for _ in range(3):
            asyncio.run(ask(session, 8))
        assert server.connections == most


def test_a_connection_that_nobody_used_for_long_is_closed(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "KEEP_S", 0.05)
    with session_on(server) as session:
        session.generate("one")
        time.sleep(0.2)
        before = server.connections
        session.generate("two")
        assert server.connections == before + 1
        eventually(lambda: server.open_now == 1, "the older one is left open")


def through(monkeypatch: pytest.MonkeyPatch, proxy: str, but_for: str = "") -> None:
    """Name a proxy in the environment."""
    for name, value in (("http_proxy", proxy), ("no_proxy", but_for)):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.upper(), value)


def test_a_server_elsewhere_is_asked_through_the_proxy(
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
    eventually(lambda: server.open_now == 0, "a connection is left open")
    asked = server.received[-1]
    assert asked.headers["host"] == "far.example"
    assert asked.headers["authorization"] == "Bearer a-secret"


@pytest.mark.parametrize(
    ("proxy", "why"),
    [("http://127.0.0.1:9", "All connection attempts failed"),
     ("socks5://127.0.0.1:9", "socksio"),
     ("foo://bar", "Unknown scheme"), ("http://h:port", "port"), ("http://[::1", "[::1")],
)  # fmt: skip
def test_a_proxy_that_leads_nowhere_is_named(
    proxy: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, proxy)
    session = Session(settings())
    with pytest.raises(ServerUnreachable) as caught:
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    message = told(caught.value)
    assert message.startswith(f"The proxy {proxy.partition('://')[2]} cannot connect to")
    assert why in message
    assert message.endswith("HTTP_PROXY, or set NO_PROXY=far.example if no proxy is needed.")


def test_proxy_whose_host_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, "http://no.such.host.invalid:3128")
    session = Session(settings())
    with pytest.raises(ServerUnreachable) as caught:
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    message = told(caught.value)
    assert "[Errno" not in message
    assert "no.such.host.invalid:3128" in message
    assert "HTTP_PROXY" in message


def test_hosts_without_proxy_that_cannot_be_read_are_reported_with_the_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    through(monkeypatch, "http://127.0.0.1:9", but_for="[::1, a b")
    session = Session(settings())
    with pytest.raises(ServerUnreachable, match=r"set NO_PROXY=far\.example if no proxy") as caught:
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    assert "Invalid port" in told(caught.value)


def test_a_host_without_a_proxy_is_asked_directly(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, server.url, but_for="far.example")
    session = Session(settings())
    # The second where this machine has no name server.
    with pytest.raises(ServerUnreachable, match=r"no host far\.example|far\.example.* looked up"):
        session.load("tiny", backend="vllm", base_url="http://far.example:8000")
    session.close()
    assert server.received == []


def test_what_is_sent_says_what_it_is(server: FaultServer) -> None:
    with session_on(server) as session:
        session.generate("one two")
        headers = questions(server)[0].headers
    assert headers["host"] == server.url.partition("://")[2]
    assert headers["user-agent"] == "llm_magic"
    assert headers["accept-encoding"] == "identity"
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers
