"""Servers that take no request while they work on another: they are waited for, and cells can be stopped."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_magic.backends.remote.server_errors import parse_error_body, status_error
from llm_magic.config.server_address import parse_url
from llm_magic.errors import Interrupted, LLMMagicError, RequestFailed, ServerBusy
from llm_magic.session import Session
from llm_magic.session.interruptible_wait import held_back
from llm_magic.types import Chunk
from tests.exchange import Received
from tests.fault_server import CHAT, MODELS, FaultServer
from tests.kernels import within_a_second
from tests.remote_sessions import (
    NOW,
    body_of,
    fails,
    interrupt,
    questions,
    session_on,
    still_works,
)
from tests.scripted import read as read_chunks
from tests.scripted import settings, stop_when
from tests.wire import Step, busy, delta, error_answer, html_answer, json_answer, sse

NOTICE = "waiting: the server is busy with other requests"


class OneAtATime(FaultServer):
    """Refuses every request while it answers one, as `ilab model serve` does."""

    def __init__(self) -> None:
        super().__init__({"tiny": {"owned_by": "me"}})
        self.linger_s = 0.0  # seconds for which it works on after a client has left
        self.refused = 0
        self._busy_until = 0.0
        # The requests that are refused until the request of another client has ended.
        self._left = math.inf

    def answer(self, request: Received) -> Any:
        """Answer one request."""
        if time.monotonic() < self._busy_until:
            self.refused += 1
            self._left -= 1
            if self._left <= 0:
                self._busy_until, self._left = 0.0, math.inf
            yield from busy()
            return
        self._busy_until = math.inf
        is_complete = False
        try:
            yield from super().answer(request)
            is_complete = True
        finally:
            # Not if `work` was called since: the client has its answer before this runs.
            if self._busy_until == math.inf:
                self._busy_until = 0.0 if is_complete else time.monotonic() + self.linger_s

    def work(self, seconds: float = math.inf, requests: float = math.inf) -> None:
        """Be busy with the request of another client, for so long or for so many requests."""
        self._busy_until, self._left = time.monotonic() + seconds, requests


@pytest.fixture
def server() -> Iterator[OneAtATime]:
    with OneAtATime() as running:
        yield running


@pytest.fixture
def session(server: OneAtATime) -> Iterator[Session]:
    with session_on(server, "instructlab") as made:
        yield made


def notices(session: Session) -> list[str]:
    """Ask, and return what was shown while the answer was waited for."""
    shown: list[str] = []

    for chunk in session.stream("one two"):
        shown += [chunk.notice] if chunk.notice else []
    assert session.last is not None
    assert session.last.text == "one two"
    return shown


def test_busy_server_gets_more_than_three_requests(session: Session, server: OneAtATime) -> None:
    server.work(requests=5)
    assert notices(session) == [NOTICE]
    assert len(questions(server)) == 6


def test_wait_for_a_busy_server_ends_with_the_idle_limit(server: OneAtATime) -> None:
    with session_on(server, "instructlab", idle_s=0.2) as session:
        server.work(60)
        began = time.monotonic()
        error = fails(session, ServerBusy)
        assert 1.0 <= time.monotonic() - began < 1 + within_a_second()
        assert str(error) == (
            f"{server.url} is busy with other requests (503). Try again later, or increase"
            " --idle-timeout to wait longer. To change the limit, load it again: %llm_load tiny"
            f" -b instructlab --base-url {server.url}"
        )
        server.work(0)
        still_works(session)


def test_wait_for_a_busy_server_can_be_interrupted(session: Session, server: OneAtATime) -> None:
    server.work(60)
    interrupt(session, lambda chunk: chunk.notice == NOTICE)
    server.work(0)
    still_works(session)


def test_next_cell_after_an_interrupt_waits_until_the_server_is_free(
    session: Session, server: OneAtATime
) -> None:
    server.linger_s, server.pace = 5.0, 0.05
    begun = threading.Event()

    def take(chunk: Chunk) -> None:
        if chunk.text:
            begun.set()

    stop_when(begun)
    with pytest.raises(Interrupted), held_back():
        read_chunks(session.stream("word " * 1000), take)
    server.pace = 0
    assert notices(session) == [NOTICE]


def test_load_from_a_busy_server_waits_and_reports_it(server: OneAtATime) -> None:
    session = Session(settings())
    stages: set[str] = set()

    def sample() -> None:
        if session.progress is not None:
            stages.add(session.progress.stage)

    server.work(requests=3)
    try:
        session.load_with_details(
            "tiny", backend="instructlab", base_url=server.url, on_wait=sample
        )
        assert NOTICE in stages
        still_works(session)
    finally:
        session.close()


def test_two_sessions_share_a_server_that_takes_one_request(server: OneAtATime) -> None:
    server.pace = 0.02
    sessions = [Session(settings()) for _ in range(2)]

    async def main() -> list[str]:
        replies = [session.agenerate("one two three") for session in sessions for _ in range(2)]
        return [reply.text for reply in await asyncio.gather(*replies)]

    try:
        for session in sessions:
            session.load("tiny", backend="instructlab", base_url=server.url)
        assert asyncio.run(main()) == ["one two three"] * 4
        assert server.refused
    finally:
        for session in sessions:
            session.close()


@pytest.mark.parametrize(
    "script",
    [
        html_answer(503, NOW),
        error_answer(503, "The model is down.", headers=NOW),
        body_of(503, "text/plain", b"no available server\n", **NOW),
        body_of(503, "text/plain", b"Service Unavailable\n", **NOW),
    ],
    ids=["proxy-page", "json", "no-server", "go"],
)
def test_other_503_is_reported_after_three_tries(
    session: Session, server: OneAtATime, script: list[Step]
) -> None:
    for _ in range(3):
        server.will(CHAT, *script)
    began = time.monotonic()
    error = fails(session, RequestFailed)
    assert time.monotonic() - began < 5
    assert "is not ready or is overloaded (503)" in str(error)
    assert len(questions(server)) == 3


@pytest.mark.parametrize(
    "body",
    [
        {"error": "server busy, please try again.  maximum pending requests exceeded"},
        {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
    ],
    ids=["ollama", "llama.cpp"],
)
def test_busy_texts_of_servers_are_recognized(
    session: Session, server: OneAtATime, body: object
) -> None:
    for _ in range(3):
        server.will(CHAT, *json_answer(503, body))
    assert notices(session) == [NOTICE]
    assert len(questions(server)) == 4


def test_busy_response_does_not_count_as_retry(session: Session, server: OneAtATime) -> None:
    for script in (busy(), error_answer(500, "Oops.", headers=NOW)) * 2:
        server.will(CHAT, *script)
    assert notices(session) == [
        NOTICE, "500, attempt 2 of 3 after 1 s", NOTICE, "500, attempt 3 of 3 after 1 s",
    ]  # fmt: skip


def test_list_waits_briefly_for_busy_server(server: OneAtATime) -> None:
    session = Session(settings())
    server.work(requests=3)
    try:
        listed = session.models("instructlab", base_url=server.url)
        assert [info.name for info in listed] == ["tiny"]
        assert len(server.requests_to(MODELS)) > 1
    finally:
        session.close()


def test_only_a_503_is_busy() -> None:
    address = parse_url("instructlab", "localhost:8000")
    kinds: list[type[LLMMagicError]] = [
        type(status_error(address, None, status, {}, parse_error_body(b"Service Unavailable")))
        for status in (500, 502, 503)
    ]
    assert kinds == [RequestFailed, RequestFailed, ServerBusy]


def test_started_reply_is_not_retried(session: Session, server: OneAtATime) -> None:
    server.will(CHAT, *sse(delta("one"), {"error": {"message": "server busy", "code": 503}}))
    before = len(questions(server))
    with pytest.raises(LLMMagicError, match="stopped with an error: server busy"):
        session.generate("one")
    assert len(questions(server)) == before + 1


def test_busy_server_is_not_reported_as_missing_api(server: OneAtATime) -> None:
    session = Session(settings())
    for _ in range(2):
        server.will(MODELS, *error_answer(404, "no such route"))
    server.will(CHAT, *busy())
    try:
        result = session.load_with_details("tiny", backend="openai", base_url=server.url)
        assert any("lists no models" in note for note in result.notes)
    finally:
        session.close()


def test_busy_server_is_not_reported_as_missing_model(server: OneAtATime) -> None:
    session = Session(settings())
    server.will(f"{MODELS}/alias", *busy())
    server.will(f"{MODELS}/alias", *json_answer(200, {"id": "alias", "object": "model"}))
    try:
        assert session.load("alias", backend="openai", base_url=server.url).name == "alias"
    finally:
        session.close()
