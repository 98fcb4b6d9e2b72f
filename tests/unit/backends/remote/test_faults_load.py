"""Servers that fail while a model is loaded or listed: what was loaded stays, and the error is ours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_magic.errors import (
    AuthenticationFailed,
    Interrupted,
    LLMMagicError,
    ModelNotFound,
    RequestFailed,
    ServerUnreachable,
)
from llm_magic.notebook.display import messages
from llm_magic.session import Session
from tests.fault_server import MODELS, FaultServer
from tests.kernels import within_a_second
from tests.ollama_models import OllamaModel
from tests.ollama_server import OllamaServer
from tests.remote_sessions import NOW, body_of, checked_message, session_on, still_works
from tests.scripted import settings, stop_when
from tests.wire import (
    Head,
    Hold,
    Send,
    Step,
    error_answer,
    html_answer,
    json_answer,
    ndjson,
    redirect,
)

# Longer than a float can be, and almost as long as Python reads.
HUGE = int("9" * 4000)


@pytest.fixture
def ollama() -> Iterator[OllamaServer]:
    with OllamaServer() as running:
        yield running


def refused(session: Session, server: FaultServer, kind: type[LLMMagicError]) -> str:
    """Load another model, see it fail, and that the one before is still there."""
    with pytest.raises(kind) as caught:
        session.load("big", backend="vllm", base_url=server.url)
    assert type(caught.value) is kind
    assert session.status().active_model == "tiny"
    message = checked_message(caught.value)
    still_works(session)
    return message


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (error_answer(401, "No key."), AuthenticationFailed, "--key-env NAME"),
        (html_answer(403), AuthenticationFailed, "--key-env NAME"),
        (error_answer(400, "Bad."), RequestFailed, "Bad."),
        (redirect("https://else.example/v1/models"), RequestFailed, "Redirects are not followed"),
        (
            error_answer(429, "Slow down.", headers={"Retry-After": "90"}),
            RequestFailed,
            "Slow down.",
        ),
    ],
)
def test_error_response_keeps_previous_model(
    session: Session,
    server: FaultServer,
    script: list[Step],
    kind: type[LLMMagicError],
    message: str,
) -> None:
    server.will(MODELS, *script)
    assert message in refused(session, server, kind)


def test_error_body_without_end_is_bounded(session: Session, server: FaultServer) -> None:
    server.will(MODELS, Head(400), Send(b"No. " * 20_000), Hold())
    assert "(400): No. No. No." in refused(session, server, RequestFailed)
    assert server.requests_to(MODELS)[-1].left.wait(within_a_second())


@pytest.mark.parametrize("status", [500, 503])
def test_server_that_is_not_ready_gets_three_requests(
    session: Session, server: FaultServer, status: int
) -> None:
    before = len(server.requests_to(MODELS))
    for _ in range(3):
        server.will(MODELS, *error_answer(status, "Not yet.", headers=NOW))
    assert "Not yet." in refused(session, server, RequestFailed)
    assert len(server.requests_to(MODELS)) == before + 3


@pytest.mark.parametrize(
    "script",
    [html_answer(200), body_of(200, "application/json", b"{"), body_of(200, "application/json", b"")],
)  # fmt: skip
@pytest.mark.parametrize("chats", [False, True])
def test_response_without_list_raises_or_lists_nothing(script: list[Step], chats: bool) -> None:
    session = Session(settings())
    with FaultServer() as server:
        server.will(MODELS, *script)
        if not chats:
            server.will("/v1/chat/completions", *html_answer(404))
        try:
            if chats:
                info = session.load("tiny", backend="openai", base_url=server.url)
                assert info.name == "tiny"
                still_works(session)
            else:
                with pytest.raises(RequestFailed, match="--base-url"):
                    session.load("tiny", backend="openai", base_url=server.url)
                assert session.status().status == "Failed"
        finally:
            session.close()


@pytest.mark.parametrize(
    "listed",
    [{"data": None}, {"data": []}, {}, [], {"data": {"id": "big"}}, {"data": [None, 5, {"id": 5}]},
     {"data": [{"name": "big"}]}, "text", 5, None],
)  # fmt: skip
def test_odd_list_raises_model_not_found(
    session: Session, server: FaultServer, listed: object
) -> None:
    server.will(MODELS, *json_answer(200, listed))
    assert 'Model "big" not found' in refused(session, server, ModelNotFound)


@pytest.mark.parametrize(
    "entry",
    [{"max_model_len": "2048"}, {"max_model_len": None}, {"meta": "x"}, {"meta": {"n_ctx": 1.5}},
     {"meta": {"size": "big"}}, {"owned_by": 5}, {"context_length": [1]},
     {"meta": {"size": HUGE, "n_ctx": HUGE}}, {"max_model_len": HUGE}],
)  # fmt: skip
def test_odd_model_details_are_unknown(entry: dict[str, Any]) -> None:
    with FaultServer({"tiny": entry}) as server, session_on(server) as session:
        (info,) = session.status().models
        assert (info.context_length, info.size) == (None, None)
        still_works(session)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_path_of_api_is_optional(server: FaultServer, path: str) -> None:
    with session_on(server, "openai", base_url=server.url + path) as session:
        still_works(session)


def test_unknown_model_suggests_nearest_name(session: Session, server: FaultServer) -> None:
    with pytest.raises(
        ModelNotFound, match=r"Model \"bigg\" not found on .*\. Did you mean \"big\"\?"
    ):
        session.load("bigg", backend="vllm", base_url=server.url)
    still_works(session)


def test_interrupted_load_keeps_previous_model(session: Session, server: FaultServer) -> None:
    hold = Hold()
    server.will(MODELS, hold)
    stop_when(hold.reached)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="Stopped loading big"):
        session.load("big", backend="vllm", base_url=server.url)
    assert time.monotonic() - began < within_a_second()
    assert server.requests_to(MODELS)[-1].left.wait(within_a_second())
    assert session.status().active_model == "tiny"
    still_works(session)


def test_list_of_models_can_be_interrupted(session: Session, server: FaultServer) -> None:
    hold = Hold()
    server.will(MODELS, hold)
    stop_when(hold.reached)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        session.models("vllm", base_url=server.url)
    assert server.requests_to(MODELS)[-1].left.wait(within_a_second())
    still_works(session)


def test_interrupted_pull_continues() -> None:
    with OllamaServer() as server, session_on(server, "ollama") as session:
        hold = Hold()
        server.will("/api/pull", *ndjson({"status": "pulling", "total": 10, "completed": 5}), hold)
        stop_when(hold.reached)
        with pytest.raises(Interrupted, match="Stopped loading"):
            session.load("gemma3:270m", backend="ollama", base_url=server.url, pull=True)
        assert server.requests_to("/api/pull")[0].left.wait(within_a_second())
        still_works(session)
        assert session.load("gemma3:270m", backend="ollama", base_url=server.url, pull=True).name


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/api"])
def test_ollama_accepts_path_of_openai_api(ollama: OllamaServer, path: str) -> None:
    with session_on(ollama, "ollama", base_url=ollama.url + path) as session:
        still_works(session)


def test_server_of_other_kind_raises() -> None:
    session = Session(settings())
    try:
        with (
            FaultServer() as other,
            pytest.raises(RequestFailed, match=r"is not an Ollama server.*-b openai"),
        ):
            session.load("tiny", backend="ollama", base_url=other.url)
        with pytest.raises(ServerUnreachable, match="To start one, run: ollama serve"):
            session.load("tiny", backend="ollama", base_url=other.url)
    finally:
        session.close()


@pytest.mark.parametrize(
    "tags",
    [{"models": None}, {"models": [5, {"name": 5}, {"name": "a:b"}]}, {}, [], {"models": {"a": 1}},
     {"models": [{"name": "x:y", "details": "none", "size": "big"}]},
     {"models": [{"name": "x:y", "details": []}]},
     {"models": [{"name": "x:y", "size": HUGE, "details": {"context_length": HUGE}}]}],
)  # fmt: skip
def test_odd_list_of_models_is_accepted(ollama: OllamaServer, tags: object) -> None:
    with session_on(ollama, "ollama") as session:
        ollama.will("/api/tags", *json_answer(200, tags))
        listed = session.models("ollama", base_url=ollama.url)
        assert {info.name for info in listed} <= {"a:b", "x:y"}
        shown = repr(messages.models_table(listed, ()))
        # The address is in it, whose port may have these digits.
        assert "999" not in shown.replace(ollama.url.rpartition(":")[2], "")
        still_works(session)


@pytest.mark.parametrize(
    "sizes", [{"total": HUGE, "completed": 1}, {"total": 5, "completed": HUGE}]
)
def test_huge_sizes_of_pull_are_unknown(ollama: OllamaServer, sizes: dict[str, int]) -> None:
    session = Session(settings())
    try:
        ollama.will("/api/pull", *ndjson({"status": "pulling", **sizes}, {"status": "success"}))
        session.load("llama3.2", backend="ollama", base_url=ollama.url, pull=True)
        still_works(session)
    finally:
        session.close()


def test_huge_context_of_modelfile_is_unknown() -> None:
    model = OllamaModel("small", parameters={"num_ctx": (HUGE,)})
    with OllamaServer([model]) as server:
        session = Session(settings())
        try:
            info = session.load("small", backend="ollama", base_url=server.url)
            assert info.context_length is None
        finally:
            session.close()
