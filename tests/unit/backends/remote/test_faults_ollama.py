"""Ollama that fails, by its own protocol: before the first word, in the middle, and at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llm_magic.errors import (
    AuthenticationFailed,
    GenerationError,
    IncompleteReply,
    LLMMagicError,
    PromptTooLong,
    RequestFailed,
    ServerTimeout,
)
from llm_magic.session import Session
from llm_magic.types import Usage
from tests.ollama_server import OllamaServer
from tests.remote_sessions import (
    IDLE_S,
    NOW,
    OLLAMA_CHAT,
    failing,
    fails,
    last,
    notices,
    questions,
    session_on,
    still_works,
)
from tests.wire import (
    NDJSON,
    Cut,
    End,
    Head,
    Hold,
    Pause,
    Raw,
    Reset,
    Send,
    Step,
    html_answer,
    json_answer,
    lines,
    ndjson,
    recut,
    redirect,
    text_answer,
)


def piece(text: str | None = "", **more: Any) -> dict[str, Any]:
    """Return one object of a streamed answer."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return {"model": "llama3.2", "created_at": "2026-01-01T00:00:00Z", "message": message,
            "done": False, **more}  # fmt: skip


def done(text: str | None = "", reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    """Return the last object."""
    counts = {"prompt_eval_count": 5, "eval_count": 2}
    why = {} if reason is None else {"done_reason": reason}
    return piece(text, **{"done": True, **why, **counts, **more})


HEL = [*ndjson(piece("Hel")), Pause(0.1)]
TEXT = "Grüße 🦙"
WHOLE = ndjson(piece("Grüße"), piece(" 🦙"), done())


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer() as running:
        yield running


@pytest.fixture
def session(server: OllamaServer) -> Iterator[Session]:
    with session_on(server, "ollama") as made:
        yield made


@pytest.mark.parametrize("html", [False, True], ids=["json", "html"])
@pytest.mark.parametrize(
    ("status", "kind", "times"),
    [
        (400, RequestFailed, 1),
        (401, AuthenticationFailed, 1),
        (403, AuthenticationFailed, 1),
        (404, RequestFailed, 1),
        (413, PromptTooLong, 1),
        (429, RequestFailed, 3),
        (500, RequestFailed, 3),
        (503, RequestFailed, 3),
    ],
)
def test_error_status_raises_after_expected_retries(
    session: Session,
    server: OllamaServer,
    status: int,
    kind: type[LLMMagicError],
    times: int,
    html: bool,
) -> None:
    message = json_answer(status, {"error": "some words"}, NOW)
    script = html_answer(status, NOW) if html else message
    error = failing(session, server, kind, *script, times=times)
    assert str(error).startswith(server.url)
    assert "<" not in str(error)
    if kind is not AuthenticationFailed:
        assert ("some words" in str(error)) is not html


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (ndjson({"error": "llama runner process has terminated"}), RequestFailed,
         "has terminated. Check the log of the server."),
        (ndjson({"error": "it stopped, check ollama server logs for details"}), RequestFailed,
         "check ollama server logs for details."),
        (ndjson(piece(), {"error": {"message": "Out of memory."}}), RequestFailed, "Out of memory."),
        (ndjson(b"nonsense"), RequestFailed, "invalid JSON. Check --base-url and -b."),
        (ndjson([1]), RequestFailed, "JSON that is not an object. Check --base-url"),
        (ndjson({"message": "text"}), RequestFailed, "a chunk in an unknown format"),
        (html_answer(200), RequestFailed, "Check --base-url and -b."),
        (text_answer(200, "Ollama is running"), RequestFailed, "Check --base-url and -b."),
        (redirect("https://else.example/api/chat"), RequestFailed, "Redirects are not followed"),
        (json_answer(400, {"error": "the input length exceeds the context length"}), PromptTooLong,
         "-p num_ctx=N"),
        ([Head(200, NDJSON)], RequestFailed, "empty reply"),
        (ndjson({}), RequestFailed, "empty reply"),
    ],
    ids=["error", "error-names-log", "error-object", "nonsense", "no-object", "no-message", "html", "text",
         "redirect", "too-long", "empty", "nothing-in-it"],
)  # fmt: skip
def test_response_without_reply_raises_once(
    session: Session,
    server: OllamaServer,
    script: list[Step],
    kind: type[LLMMagicError],
    message: str,
) -> None:
    assert message in str(failing(session, server, kind, *script))


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ([Reset()], "was lost"),
        ([Cut()], "was lost"),
        ([Raw(b"no size\r\n"), Hold()], "was lost"),
        (lines(b"nonsense"), "sent invalid JSON"),
        (
            lines({"error": "an error was encountered while running the model"}),
            "running the model.",
        ),
        (lines({"message": {"content": "x"}}, 5), "JSON that is not an object"),
        (lines({"message": [1]}), "a chunk in an unknown format"),
        (lines({"message": {"content": 5}}), "a chunk in an unknown format"),
        (lines({"message": {"content": ["lo"]}}), "a chunk in an unknown format"),
    ],
    ids=[
        "reset",
        "cut",
        "no-chunk",
        "nonsense",
        "error",
        "no-object",
        "no-message",
        "number",
        "list",
    ],
)
def test_failure_keeps_partial_reply_without_retry(
    session: Session, server: OllamaServer, ending: list[Step], message: str
) -> None:
    server.will(OLLAMA_CHAT, *HEL, *ending)
    error = fails(session, IncompleteReply)
    assert message in str(error)
    assert isinstance(error, GenerationError)
    assert error.reply is session.last
    assert last(session).text in {"Hel", "Helx"}
    assert last(session).finish_reason == "truncated"
    assert len(questions(server)) == 1
    still_works(session)


def test_timeout_is_shorter_after_first_token(server: OllamaServer) -> None:
    with session_on(server, "ollama", idle_s=IDLE_S) as session:
        failing(session, server, ServerTimeout, Hold())
        server.will(OLLAMA_CHAT, *ndjson(piece("Hel")), Hold())
        error = fails(session, IncompleteReply)
        assert "--idle-timeout" in str(error)
        assert last(session).text == "Hel"
        assert all(request.wait() in {"left", "whole"} for request in questions(server))
        still_works(session)


@pytest.mark.parametrize(
    ("ending", "finish"),
    [
        ([End()], "truncated"),
        ([Send(b'{"message": {"content": "lo"'), End()], "truncated"),
        (lines(done()), "stop"),
        (lines(done(reason="length")), "length"),
        (lines(done(reason=None)), "stop"),
        ([*lines(done()), Cut()], "stop"),
        ([*lines(done()), Hold()], "stop"),
        ([*lines(done(), b"nonsense")], "stop"),
        ([Send(b'{"message": {"content": ""}, "done": true}'), End()], "stop"),
    ],
    ids=["end", "half-a-line", "stop", "length", "no-reason", "cut", "hold", "rubbish", "no-eol"],
)
def test_finish_reason_comes_from_server(
    session: Session, server: OllamaServer, ending: list[Step], finish: str
) -> None:
    server.will(OLLAMA_CHAT, *HEL, *ending)
    reply = session.generate("?")
    assert (reply.text, reply.finish_reason) == ("Hel", finish)
    still_works(session)


@pytest.mark.parametrize(
    "script",
    [
        recut(WHOLE, 1),
        recut(WHOLE, 5),
        recut(WHOLE, 1 << 20),
        ndjson(piece("Grüße"), piece(" 🦙"), done(), eol=b"\r\n"),
        ndjson(piece("Grüße"), b"", piece(" 🦙"), done(), eol=b"\n\n"),
        [Head(200, NDJSON, chunked=False), *WHOLE[1:]],
        ndjson(piece("Grüße"), done(" 🦙")),
        json_answer(200, done(TEXT)),
        ndjson({"message": {"content": TEXT}}, {"done": True}),
        ndjson(piece(None), piece("Grüße", message={"thinking": None}), piece(" 🦙"), done(None)),
        ndjson({"message": None}, piece(TEXT, message={"thinking": False}), {"message": {}, "done": True}),
    ],
    ids=["bytes", "fives", "at-once", "crlf", "blank-lines", "until-close", "text-at-the-end",
         "one-piece", "bare", "null", "nothing"],
)  # fmt: skip
def test_reply_is_independent_of_chunks(
    session: Session, server: OllamaServer, script: list[Step]
) -> None:
    server.will(OLLAMA_CHAT, *script)
    reply = session.generate("?")
    assert (reply.text, reply.finish_reason) == (TEXT, "stop")
    still_works(session)


def test_line_of_ten_megabytes_is_read(session: Session, server: OllamaServer) -> None:
    server.will(OLLAMA_CHAT, *ndjson(piece("x" * 10_000_000), done()))
    assert len(session.generate("?").text) == 10_000_000


def test_usage_and_reasoning_are_read(session: Session, server: OllamaServer) -> None:
    server.will(OLLAMA_CHAT, *ndjson(piece("", message={"thinking": "Hm."}), piece("Hi"), done()))
    reply = session.generate("?")
    assert (reply.text, reply.reasoning, reply.usage) == ("Hi", "Hm.", Usage(5, 2, None))


@pytest.mark.parametrize(
    "odd", ["many", None, [2], {}, 1.5, -1, 10**400, 1e400], ids=lambda odd: repr(odd)[:9]
)
def test_odd_counts_are_unknown(session: Session, server: OllamaServer, odd: object) -> None:
    last_one = done(prompt_eval_count=odd, eval_count=odd)
    server.will(OLLAMA_CHAT, *HEL, *lines(piece("lo"), last_one))
    reply = session.generate("?")
    assert (reply.text, reply.usage) == ("Hello", Usage(None, None, None))


@pytest.mark.parametrize(
    ("script", "waits"),
    [([Reset()], []), ([Cut()], []),
     ([Head(200, NDJSON), Reset()], ["connection lost, attempt 2 of 3 after 1 s"])],
)  # fmt: skip
def test_disconnect_before_first_token_is_retried(
    session: Session, server: OllamaServer, script: list[Step], waits: list[str]
) -> None:
    server.will(OLLAMA_CHAT, *script)
    # A kept connection that breaks without a byte of an answer is replaced at once.
    assert notices(session) == waits
    assert last(session).text == "one two"


def test_server_can_restart_between_replies(session: Session, server: OllamaServer) -> None:
    session.generate("one")
    server.stop()
    server.start()
    assert session.generate("two").text == "two"
    assert len(questions(server)) == 2
