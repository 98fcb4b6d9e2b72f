"""Fields that a server rejects: which are renamed, which are omitted, and which are errors."""

from __future__ import annotations

from typing import Any

import pytest

from llm_magic.errors import LLMMagicError, RequestFailed
from llm_magic.session import Session
from tests.fault_server import CHAT, FaultServer
from tests.remote_sessions import questions, session_on
from tests.wire import json_answer, sse_words


def sent(server: FaultServer) -> dict[str, Any]:
    """Return the options of the last question."""
    body = questions(server)[-1].json
    return {n: v for n, v in body.items() if n not in {"model", "messages", "stream"}}


def reject(server: FaultServer, parameter: str | None, message: str, status: int = 400) -> None:
    """Refuse the next question as OpenAI does it."""
    error = {"message": message, "type": "invalid_request_error", "param": parameter,
             "code": "unsupported_parameter"}  # fmt: skip
    server.will(CHAT, *json_answer(status, {"error": error}))


NEWER = (
    "Unsupported parameter: 'max_tokens' is not supported with this model."
    " Use 'max_completion_tokens' instead."
)


@pytest.mark.parametrize("about", [{}, {"max_new_tokens": 9}])
def test_newer_field_of_token_limit_is_detected_once(
    server: FaultServer, about: dict[str, Any]
) -> None:
    with session_on(server, "openai") as session:
        reject(server, "max_tokens", NEWER)
        assert session.generate("one two", **about).text == "one two"
        first, second = (request.json for request in questions(server))
        assert (first["max_tokens"], "max_completion_tokens" in first) == (
            about.get("max_new_tokens", 512),
            False,
        )
        assert (second["max_completion_tokens"], "max_tokens" in second) == (
            first["max_tokens"],
            False,
        )
        session.generate("one two")
        assert len(questions(server)) == 3
        assert "max_tokens" not in sent(server)


@pytest.mark.parametrize("name", ["stream_options", "temperature", "top_p"])
def test_rejected_default_is_omitted_from_then_on(server: FaultServer, name: str) -> None:
    with session_on(server, "openai") as session:
        reject(server, name, f"Unsupported value: '{name}'.")
        assert session.generate("one two").text == "one two"
        assert [name in request.json for request in questions(server)] == [True, False]
        session.generate("one two")
        assert name not in sent(server)
        assert len(questions(server)) == 3


def test_several_rejected_defaults_are_omitted(server: FaultServer) -> None:
    with session_on(server, "openai") as session:
        reject(server, "max_tokens", NEWER)
        for name in ("temperature", "top_p", "stream_options"):
            reject(server, name, f"Unsupported parameter: '{name}'.")
        assert session.generate("one two").text == "one two"
        assert sent(server) == {"max_completion_tokens": 512}


def test_field_rejected_by_fastapi_is_omitted(server: FaultServer) -> None:
    with session_on(server, "vllm") as session:
        detail = [{"loc": ["body", "stream_options"], "msg": "extra fields not permitted"}]
        server.will(CHAT, *json_answer(422, {"detail": detail}))
        assert session.generate("one two").text == "one two"
        assert "stream_options" not in sent(server)


def fails_once(session: Session, server: FaultServer, message: str, **about: Any) -> LLMMagicError:
    """Ask, and see the server's own words after one try."""
    before = len(questions(server))
    with pytest.raises(RequestFailed, match=message) as caught:
        session.generate("?", **about)
    assert len(questions(server)) == before + 1
    return caught.value


def test_rejected_requested_option_raises(server: FaultServer) -> None:
    with session_on(server, "openai") as session:
        reject(server, "temperature", "Unsupported value: 'temperature'.")
        fails_once(session, server, "Unsupported value: 'temperature'", temperature=0.2)
        reject(server, "logit_bias", "Unsupported parameter: 'logit_bias'.")
        fails_once(session, server, "'logit_bias'", extra={"logit_bias": {}})
        session.generation.update(top_p=0.5)
        reject(server, "top_p", "Unsupported parameter: 'top_p'.")
        fails_once(session, server, "'top_p'")


def test_omitted_default_is_sent_on_request(server: FaultServer) -> None:
    with session_on(server, "openai") as session:
        reject(server, "temperature", "Unsupported value: 'temperature'.")
        session.generate("one two")
        session.generate("one two", temperature=1.0)
        assert sent(server)["temperature"] == 1.0


@pytest.mark.parametrize(
    "parameter", [None, "messages", "model", "messages.[0].role", "unheard_of"]
)
def test_other_rejections_raise(server: FaultServer, parameter: str | None) -> None:
    with session_on(server, "openai") as session:
        reject(server, parameter, "That does not go.")
        fails_once(session, server, "That does not go")


def test_rejected_value_of_token_limit_raises(server: FaultServer) -> None:
    error = {"message": f"Too large. {NEWER}", "param": "max_tokens", "code": "invalid_value"}
    with session_on(server, "openai") as session:
        server.will(CHAT, *json_answer(400, {"error": error}))
        fails_once(session, server, "Too large")


def test_server_that_rejects_everything_gets_bounded_requests(server: FaultServer) -> None:
    with session_on(server, "vllm") as session:
        for _ in range(40):
            reject(server, "temperature", f"{NEWER} And no temperature.")
        with pytest.raises(RequestFailed):
            session.generate("?")
        assert len(questions(server)) <= 4


def test_dialect_belongs_to_one_model(server: FaultServer) -> None:
    with session_on(server, "openai") as session:
        reject(server, "temperature", "Unsupported value: 'temperature'.")
        session.generate("one two")
        session.load("big", backend="openai", base_url=server.url, keep=True)
        session.generate("one two")
        assert "temperature" in sent(server)
        assert questions(server)[-1].json["model"] == "big"


def test_rejected_option_does_not_count_as_retry(server: FaultServer) -> None:
    with session_on(server, "openai") as session:
        reject(server, "max_tokens", NEWER)
        for _ in range(2):
            server.will(CHAT, *json_answer(503, {"error": "busy"}, {"Retry-After": "0"}))
        server.will(CHAT, *sse_words("Hi"))
        assert session.generate("?").text == "Hi"
        assert len(questions(server)) == 4
