"""What the tests of remote backends share: a session on a server, and what must be left of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_magic.errors import Interrupted, LLMMagicError, LLMMagicException
from llm_magic.session import Session
from llm_magic.session.interruptible_wait import held_back
from llm_magic.types import Chunk, Reply
from tests.exchange import Received
from tests.fault_server import CHAT, FaultServer
from tests.http_server import HttpServer
from tests.kernels import within_a_second
from tests.ollama_server import OllamaServer
from tests.scripted import read, settings, stop_when
from tests.until import loop_threads, until
from tests.wire import Head, Raw, Step

OLLAMA_CHAT = "/api/chat"
# A server at once: retries come without a wait.
NOW = {"Retry-After": "0"}
# Five times as long before the first token.
IDLE_S = 0.5


@contextlib.contextmanager
def session_on(
    server: HttpServer, backend: str = "vllm", *, idle_s: float = 120.0, **options: Any
) -> Iterator[Session]:
    """Give a session with a model of `server`; afterwards nothing of it may be left over."""
    session = Session(settings(idle_timeout=idle_s))
    loops: set[asyncio.AbstractEventLoop] = set()

    def note_loop() -> None:
        with contextlib.suppress(RuntimeError):  # not on the thread of a loop
            loops.add(asyncio.get_running_loop())

    session.listen(note_loop)
    model = "llama3.2" if isinstance(server, OllamaServer) else "tiny"
    try:
        session.load(model, **{"backend": backend, "base_url": server.url, **options})
        yield session
        assert loops
        until(lambda: not any(map(asyncio.all_tasks, loops)), "a task is left over")
    finally:
        session.close()
    until(lambda: not loop_threads(), "a thread is left over")
    until(lambda: server.open_now == 0, "a connection is left open")


def chat_path(server: HttpServer) -> str:
    """Return where questions go to."""
    return CHAT if isinstance(server, FaultServer) else OLLAMA_CHAT


def questions(server: HttpServer) -> list[Received]:
    """Return the questions that a server was asked."""
    return server.requests_to(chat_path(server))


def checked_message(error: LLMMagicException) -> str:
    """Return the message of an error, which is one sentence or more in one line."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert ".." not in message.replace("…", "").replace("/..", ""), message
    assert "aiohttp" not in message
    assert (error.__cause__, error.__suppress_context__ or error.__context__ is None) == (
        None,
        True,
    )
    return message


def fails(session: Session, kind: type[LLMMagicError]) -> LLMMagicError:
    """Ask, see it fail as it should, and return the error."""
    with pytest.raises(kind) as caught:
        session.generate("one two")
    assert type(caught.value) is kind
    checked_message(caught.value)
    return caught.value


def still_works(session: Session) -> None:
    """See that the model is loaded, and that the next question is answered."""
    assert session.status().status == "Ready"
    assert session.generate("three four").text == "three four"


def failing(
    session: Session, server: HttpServer, kind: type[LLMMagicError], *script: Step, times: int = 1
) -> LLMMagicError:
    """Ask a server that fails so often, and see that nothing but this answer is lost."""
    before = session.generate("before that")
    server.received.clear()
    for _ in range(times):
        server.will(chat_path(server), *script)
    error = fails(session, kind)
    assert len(questions(server)) == times
    assert session.last is before
    still_works(session)
    return error


def last(session: Session) -> Reply:
    """Return the last reply, which is there."""
    assert session.last is not None
    return session.last


def notices(session: Session) -> list[str]:
    """Ask, and return the notices about waiting, whether or not an answer came."""
    heard: list[str] = []

    with contextlib.suppress(LLMMagicError):
        for chunk in session.stream("one two"):
            heard += [chunk.notice] if chunk.notice else []
    return heard


def interrupt(session: Session, when: threading.Event | Callable[[Chunk], bool]) -> Interrupted:
    """Ask and press the stop button, at an event or at a chunk; it takes less than a second."""
    event = when if isinstance(when, threading.Event) else threading.Event()

    stop_when(event)
    began = time.monotonic()

    def take(chunk: Chunk) -> None:
        if not isinstance(when, threading.Event) and when(chunk):
            event.set()

    # Between two chunks, a signal would belong to the code that reads them.
    with pytest.raises(Interrupted) as caught, held_back():
        read(session.stream("one two"), take)
    assert time.monotonic() - began < within_a_second()
    assert caught.value.reply is session.last
    checked_message(caught.value)
    return caught.value


def body_of(status: int, kind: str, body: bytes, **headers: str) -> list[Step]:
    """Return an answer with a body as it is."""
    named = {"Content-Type": kind, "Content-Length": str(len(body)), **headers}
    return [Head(status, named), Raw(body)]
