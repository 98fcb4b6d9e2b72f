"""When a request is repeated, how often, after how long, and with which notices."""

from __future__ import annotations

import itertools
import time
from email.utils import format_datetime, formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.backends.remote.retry import Retries
from llm_magic.backends.remote.server_errors import ErrorResponse, status_error
from llm_magic.config.server_address import parse_url
from llm_magic.errors import LLMMagicError, RequestFailed, ServerError, ServerUnreachable
from llm_magic.session import Session
from tests.fault_server import CHAT, MODELS, FaultServer
from tests.kernels import within_a_second
from tests.remote_sessions import NOW, fails, notices, questions, session_on, still_works
from tests.scripted import settings
from tests.wire import SSE, Head, Pause, Reset, delta, error_answer, html_answer, sse


def pauses(server: FaultServer) -> list[float]:
    """Return the seconds between the questions."""
    began = [request.began for request in questions(server)]
    return [later - earlier for earlier, later in itertools.pairwise(began)]


def limited(server: FaultServer, status: int = 429, **headers: str) -> None:
    """Refuse the next question."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    server.will(CHAT, *error_answer(status, "Slow down.", headers=named))


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_two_failures_are_retried(session: Session, server: FaultServer, failures: int) -> None:
    for _ in range(failures):
        limited(server, 503, Retry_After="0")
    assert session.generate("one two").text == "one two"
    assert len(questions(server)) == failures + 1
    assert {request.body for request in questions(server)} == {questions(server)[0].body}


def test_retry_after_in_seconds_is_read(session: Session, server: FaultServer) -> None:
    # Longer than the pause without it.
    limited(server, Retry_After="2.4")
    assert notices(session) == ["429, attempt 2 of 3 after 2 s"]
    (waited,) = pauses(server)
    assert 2.4 <= waited < 2.4 + within_a_second()
    still_works(session)


def test_retry_after_as_date_is_read(session: Session, server: FaultServer) -> None:
    until = int(time.time()) + 2
    limited(server, 503, Retry_After=formatdate(until, usegmt=True))
    assert notices(session) in (
        ["503, attempt 2 of 3 after 1 s"],
        ["503, attempt 2 of 3 after 2 s"],
    )
    assert time.time() >= until
    assert time.time() < until + 0.7
    assert len(questions(server)) == 2


@pytest.mark.parametrize(
    "value", [formatdate(0, usegmt=True), "-3", "0", "Thu, 01 Jan 1970 00:00:00"]
)
def test_retry_after_in_past_is_zero(session: Session, server: FaultServer, value: str) -> None:
    limited(server, Retry_After=value)
    assert len(notices(session)) == 1
    (waited,) = pauses(server)
    assert waited < 0.4


@pytest.mark.parametrize(
    "value", ["", "soon", "1 2", "nan", "-nan",
              "Thu, 99 Jan 1970 99:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 +99999",
              "Thu, 01 Jan 1970 00:00:00 +99999999999999999999", "9" * 400 + "x"]
)  # fmt: skip
def test_invalid_retry_after_is_ignored(value: str) -> None:
    address = parse_url("vllm", "localhost:8000")
    error = status_error(address, None, 429, {"retry-after": value}, ErrorResponse("Slow down"))
    assert isinstance(error, RequestFailed)
    assert error.retry_after is None


@pytest.mark.parametrize("value", ["inf", "1e400", "Fri, 31 Dec 9999 23:59:59 GMT", "9" * 5000])
def test_retry_after_beyond_week_is_not_in_message(value: str) -> None:
    address = parse_url("vllm", "localhost:8000")
    error = status_error(address, None, 429, {"retry-after": value}, ErrorResponse("Slow down"))
    assert isinstance(error, RequestFailed)
    assert str(error).endswith("(429): Slow down. Try again later.")
    assert error.retry_after == 7 * 24 * 3600


@given(st.text(max_size=40) | st.floats().map(str) | st.datetimes().map(format_datetime))
def test_any_retry_after_is_finite_or_none(value: str) -> None:
    error = status_error(
        parse_url("vllm", "localhost:8000"),
        None,
        503,
        {"retry-after": value},
        ErrorResponse("Busy"),
    )
    assert isinstance(error, RequestFailed)
    assert error.retry_after is None or 0 <= error.retry_after <= 7 * 24 * 3600


def test_retry_without_retry_after_uses_backoff(session: Session, server: FaultServer) -> None:
    limited(server, Retry_After="soon")
    assert notices(session) == ["429, attempt 2 of 3 after 1 s"]
    (waited,) = pauses(server)
    assert 0.4 < waited < 1.5 + within_a_second()


@pytest.mark.parametrize(
    "value", ["90", "1e9", "inf", "31", "9" * 400, formatdate(2**32, usegmt=True)]
)
def test_long_retry_after_raises_at_once(session: Session, server: FaultServer, value: str) -> None:
    limited(server, Retry_After=value)
    began = time.monotonic()
    error = fails(session, RequestFailed)
    assert time.monotonic() - began < within_a_second()
    assert isinstance(error, RequestFailed)
    assert error.retry_after is not None
    assert error.retry_after > 30
    assert len(questions(server)) == 1
    still_works(session)


def test_long_retry_after_is_in_message(session: Session, server: FaultServer) -> None:
    limited(server, Retry_After="90")
    assert "90 s" in str(fails(session, RequestFailed))


def test_backoff_grows(session: Session, server: FaultServer) -> None:
    for _ in range(3):
        server.will(CHAT, *html_answer(503))
    assert [notice[:19] for notice in notices(session)] == [
        "503, attempt 2 of 3", "503, attempt 3 of 3",
    ]  # fmt: skip
    first, second = pauses(server)
    assert 0.4 <= first <= 1.4 + within_a_second()
    assert 0.9 <= second <= 1.9 + within_a_second()


def test_every_api_reports_the_retry(session: Session, server: FaultServer) -> None:
    limited(server, Retry_After="0")
    chunks = list(session.stream("one two"))
    assert [chunk.notice for chunk in chunks if chunk.notice] == ["429, attempt 2 of 3 after 1 s"]
    assert "".join(chunk.text for chunk in chunks) == "one two"


def test_notice_is_not_part_of_reply(session: Session, server: FaultServer) -> None:
    limited(server, Retry_After="0")
    reply = session.generate("one two")
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("one two", "", "stop")


def test_different_failures_share_the_limit(session: Session, server: FaultServer) -> None:
    limited(server, 429, Retry_After="0")
    # Behind its head: on a kept connection, one that breaks before is replaced at once.
    server.will(CHAT, Head(200, SSE), Reset())
    limited(server, 503, Retry_After="0")
    assert [notice.partition(",")[0] for notice in notices(session)] == ["429", "connection lost"]
    assert len(questions(server)) == 3
    still_works(session)


def test_every_request_has_own_retries(session: Session, server: FaultServer) -> None:
    for _ in range(3):
        limited(server, Retry_After="0")
        limited(server, Retry_After="0")
        assert session.generate("one two").text == "one two"
    assert len(questions(server)) == 9


def test_no_retry_after_first_token(session: Session, server: FaultServer) -> None:
    limited(server, Retry_After="0")
    server.will(CHAT, *sse(delta("Hel"), done=False), Pause(0.1), Reset())
    assert len(notices(session)) == 1
    assert session.last is not None
    assert session.last.text == "Hel"
    assert len(questions(server)) == 2


def test_no_notice_without_failure(session: Session, server: FaultServer) -> None:
    assert notices(session) == []
    limited(server, 400)
    assert notices(session) == []


@pytest.mark.parametrize("status", [429, 503])
def test_load_and_list_are_retried(server: FaultServer, status: int) -> None:
    server.will(MODELS, *error_answer(status, "Wait.", headers=NOW))
    with session_on(server) as session:
        server.will(MODELS, *error_answer(status, "Wait.", headers=NOW))
        assert [info.name for info in session.models("vllm", base_url=server.url)] == [
            "tiny",
            "big",
        ]
        assert len(server.requests_to(MODELS)) == 4
        still_works(session)


def test_load_from_unreachable_server_raises_at_once(server: FaultServer) -> None:
    server.stop()
    session = Session(settings())
    began = time.monotonic()
    try:
        with pytest.raises(ServerUnreachable, match="To start one, run: vllm serve MODEL"):
            session.load("tiny", backend="vllm", base_url=server.url)
        assert time.monotonic() - began < within_a_second()
        server.start()
        session.load("tiny", backend="vllm", base_url=server.url)
        still_works(session)
    finally:
        session.close()


def refused(**about: Any) -> LLMMagicError:
    return RequestFailed("No.", **about)


@pytest.mark.parametrize(
    "error",
    [refused(status=s) for s in (408, 429, 500, 502, 503, 504, 529)]
    + [ServerUnreachable("No.", is_temporary=True)],
)
def test_temporary_error_is_retried_twice(error: LLMMagicError) -> None:
    retries = Retries()
    waits = [retries.next_delay(error) for _ in range(4)]
    assert [wait is None for wait in waits] == [False, False, True, True]
    assert all(wait is None or 0 < wait < 2 for wait in waits)


@pytest.mark.parametrize(
    "error",
    [refused(status=s) for s in (301, 400, 401, 403, 404, 405, 409, 413, 422)]
    + [refused(), refused(status=429, retry_after=31), refused(status=503, retry_after=float("inf")),
       ServerUnreachable("No."), ServerError("No.")],
)  # fmt: skip
def test_permanent_error_is_not_retried(error: LLMMagicError) -> None:
    assert Retries().next_delay(error) is None
