"""Servers that fail before the first word: one short error, nothing lost, and the next one works."""

from __future__ import annotations

import json
import re

import pytest

from llm_magic.errors import (
    AuthenticationFailed,
    LLMMagicError,
    PromptTooLong,
    RequestFailed,
    ServerTimeout,
    ServerUnreachable,
)
from llm_magic.session import Session
from tests.fault_server import CHAT, FaultServer
from tests.kernels import within_a_second
from tests.remote_sessions import (
    IDLE_S,
    NOW,
    body_of,
    checked_message,
    failing,
    fails,
    questions,
    session_on,
    still_works,
)
from tests.wire import (
    SSE,
    Cut,
    Head,
    Hold,
    Raw,
    Reset,
    Send,
    Slow,
    Step,
    delta,
    error_answer,
    events,
    html_answer,
    json_answer,
    redirect,
    sse,
    sse_words,
)

ROLE = delta("", role="assistant")
# The advice of an error message.
ADVICE = re.compile(r"Try again|Check |Start |Shorten |Type |--key-env|--base-url|%llm")


@pytest.mark.parametrize("html", [False, True], ids=["json", "html"])
@pytest.mark.parametrize(
    ("status", "kind", "times"),
    [
        (400, RequestFailed, 1),
        (401, AuthenticationFailed, 1),
        (403, AuthenticationFailed, 1),
        (404, RequestFailed, 1),
        (408, RequestFailed, 3),
        (413, PromptTooLong, 1),
        (422, RequestFailed, 1),
        (429, RequestFailed, 3),
        (500, RequestFailed, 3),
        (502, RequestFailed, 3),
        (503, RequestFailed, 3),
        (504, RequestFailed, 3),
        (529, RequestFailed, 3),
    ],
)
def test_error_status_raises_after_expected_retries(
    server: FaultServer, status: int, kind: type[LLMMagicError], times: int, html: bool
) -> None:
    script = (
        html_answer(status, NOW) if html else error_answer(status, "Some message.", headers=NOW)
    )
    with session_on(server, "openai" if html else "vllm") as session:
        error = failing(session, server, kind, *script, times=times)
    message = str(error)
    assert message.startswith(server.url)
    assert str(status) in message
    assert "<" not in message
    if not isinstance(error, AuthenticationFailed):
        assert ("Some message" in message) is not html
    if isinstance(error, RequestFailed | AuthenticationFailed):
        assert error.status == status


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429, 500, 503])
def test_error_message_has_advice(session: Session, server: FaultServer, status: int) -> None:
    for _ in range(3):
        server.will(CHAT, *error_answer(status, "Some message.", headers=NOW))
    with pytest.raises(LLMMagicError) as caught:
        session.generate("?")
    assert ADVICE.search(checked_message(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "This model's maximum context length is 2048 tokens. However, you requested 4096."),
        (400, "Requested tokens (600) exceed context window of 512"),
        (500, "the request exceeds the available context size, try increasing it"),
        (413, "Request Entity Too Large"),
    ],
)
def test_long_prompt_raises_prompt_too_long(server: FaultServer, status: int, message: str) -> None:
    server.models["tiny"] = {"max_model_len": 2048}
    with session_on(server) as session:
        script = error_answer(status, message, headers=NOW)
        error = failing(session, server, PromptTooLong, *script)
        assert "tiny reads 2,048 tokens. Shorten the prompt" in str(error)
        assert isinstance(error, PromptTooLong)
        assert error.reply is not None
        assert (error.reply.text, error.reply.finish_reason) == ("", "truncated")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(session: Session, server: FaultServer, status: int) -> None:
    with FaultServer() as other:
        script = redirect(f"{other.url}/v1?token=secret", status)
        error = failing(session, server, RequestFailed, *script)
        assert f"{other.url}/v1. Redirects are not followed. If you trust that" in str(error)
        assert "secret" not in str(error)
        assert (other.received, other.connections) == ([], 0)


def test_redirect_error_has_no_secrets(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *redirect("https://user:s3cr3t@else.example/v1?token=s3cr3t#s3cr3t"))
    error = fails(session, RequestFailed)
    assert "s3cr3t" not in str(error)
    assert "else.example/v1" in str(error)


@pytest.mark.parametrize(
    ("script", "match"),
    [
        (html_answer(200), r"--base-url"),
        (body_of(200, "text/plain", b"Hello"), r"--base-url"),
        (body_of(200, "application/json", b"<html>"), r"--base-url"),
        (body_of(200, "application/json", b'"text"'), r"--base-url"),
        (sse(b"nonsense", done=False), r"sent invalid JSON\. Check --base-url and -b"),
        (sse(b"[1]", done=False), r"sent JSON that is not an object\. Check --base-url and -b"),
        (sse(b'{"choices": [1]}'), r"a chunk in an unknown format\. Check --base-url and -b"),
        (sse(b'{"choices": [{"delta": "x"}]}'), r"a chunk in an unknown format"),
        (sse(b'{"choices": "x"}'), r"a chunk in an unknown format"),
        (sse(b'{"choices": [{"delta": {"content": 5}}]}'), r"a chunk in an unknown format"),
        (json_answer(200, {}), r"--base-url"),
        (json_answer(200, {"detail": "Not Found"}), r"Not Found|--base-url"),
        ([Head(200, SSE)], r"an empty reply\. Check whether the prompt exceeds its context"),
        ([Head(200, SSE), Send(b": ping\n\n")], "an empty reply"),
    ],
    ids=["html", "text", "html-as-json", "json-text", "no-json", "no-object", "no-choice",
         "no-delta", "no-choices", "no-text", "json-nothing", "json-detail", "empty", "comments"],
)  # fmt: skip
def test_response_without_reply_raises_once(
    session: Session, server: FaultServer, script: list[Step], match: str
) -> None:
    error = failing(session, server, RequestFailed, *script)
    assert re.search(match, str(error)), str(error)


def test_corrupt_compression_raises(session: Session, server: FaultServer) -> None:
    head = Head(200, {**SSE, "Content-Encoding": "gzip"})
    for _ in range(3):
        server.will(CHAT, head, Send(b"no gzip at all"))
    with pytest.raises(LLMMagicError) as caught:
        session.generate("?")
    checked_message(caught.value)
    for _ in range(3 - len(questions(server))):
        session.generate("?")
    still_works(session)


@pytest.mark.parametrize(
    "value",
    [
        {"error": {"message": "CUDA out of memory.", "type": "server_error", "code": None}},
        {"error": "CUDA out of memory."},
        {"object": "error", "message": "CUDA out of memory.", "type": "x", "code": "oom"},
    ],
)
@pytest.mark.parametrize("shape", ["event", "after-role", "json", "error-field", "error-event"])
def test_error_object_as_reply_raises(
    session: Session, server: FaultServer, value: object, shape: str
) -> None:
    data = json.dumps(value).encode()
    scripts: dict[str, list[Step]] = {
        "event": sse(value),
        "after-role": sse(ROLE, value),
        "json": json_answer(200, value),
        # llama.cpp's server wrote errors into a field of that name.
        "error-field": [Head(200, SSE), Send(b"error: " + data + b"\n\n")],
        "error-event": [Head(200, SSE), Send(b"event: error\ndata: " + data + b"\n\n")],
    }
    error = failing(session, server, RequestFailed, *scripts[shape])
    assert "CUDA out of memory." in str(error)


def test_temporary_error_in_stream_is_retried(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *sse(ROLE, {"error": {"message": "Busy.", "code": 503}}))
    assert session.generate("one two").text == "one two"
    assert len(questions(server)) == 2


@pytest.mark.parametrize(
    "script",
    [
        [Hold()],
        [Raw(b"HTTP/1.1 200 OK\r\n"), Hold()],
        [Head(200, SSE), Hold()],
        [*sse(ROLE, done=False), Hold()],
        [Head(200, SSE), Send(b"data: {"), Hold()],
    ],
    ids=["no-head", "half-a-head", "no-body", "role", "half-an-event"],
)
def test_timeout_before_first_token_is_five_limits_without_retry(
    server: FaultServer, script: list[Step]
) -> None:
    with session_on(server, idle_s=IDLE_S) as session:
        error = failing(session, server, ServerTimeout, *script)
        assert f"{server.url} sent no data for 2 s. Check the server" in str(error)
        assert "--idle-timeout" in str(error)
        held = [request for request in questions(server) if request.outcome != "whole"]
        assert held[0].left.wait(within_a_second())


def test_first_token_may_take_longer_than_pause(server: FaultServer) -> None:
    with session_on(server, idle_s=IDLE_S) as session:
        slow = Slow(b": wait\n\n", 0.15)  # 1.3 s, more than twice the limit
        server.will(CHAT, Head(200, SSE), slow, *events(delta("Hi"), delta(finish="stop")))
        assert session.generate("?").text == "Hi"


@pytest.mark.parametrize(
    "script",
    [[Reset()], [Cut()], [Head(200, SSE), Reset()], [*sse(ROLE, done=False), Cut()],
     [Raw(b"nothing of HTTP\r\n\r\n"), Cut()], [*sse_words("one", " two")[:2], Raw(b"zz\r\n"), Hold()]],
    ids=["reset", "closed", "reset-behind-head", "cut-chunk", "no-http", "no-chunk"],
)  # fmt: skip
def test_disconnect_before_first_token_is_retried(server: FaultServer, script: list[Step]) -> None:
    with session_on(server) as session:
        server.will(CHAT, *script)
        assert session.generate("one two").text == "one two"
        assert len(questions(server)) == 2


def test_repeated_disconnect_raises(server: FaultServer) -> None:
    with session_on(server) as session:
        # The first try meets a kept connection, and is repeated on a new one.
        error = failing(session, server, ServerUnreachable, Reset(), times=4)
        assert "was lost" in str(error)
        assert ADVICE.search(str(error)), str(error)


def test_unreachable_server_error_contains_how_to_start_it(server: FaultServer) -> None:
    with session_on(server) as session:
        before = session.generate("before")
        server.stop()
        error = fails(session, ServerUnreachable)
        assert (
            str(error)
            == f"No server is listening at {server.url}. To start one, run: vllm serve MODEL"
        )
        assert session.last is before
        server.start()
        still_works(session)
