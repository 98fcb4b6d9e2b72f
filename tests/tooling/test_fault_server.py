"""The fault server tested with another project's client, the official `openai`."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.fault_server import CHAT, MODELS, FaultServer
from tests.wire import (
    SSE,
    Cut,
    End,
    Head,
    Hold,
    Pause,
    Reset,
    Slow,
    Step,
    delta,
    error_answer,
    events,
    html_answer,
    recut,
    redirect,
    split_everywhere,
    sse,
    sse_words,
)

NOTICED_S = 5.0


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def client(server: FaultServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-1", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, question: str = "one two") -> openai.Stream[ChatCompletionChunk]:
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], stream=True
    )


def answer_of(client: openai.OpenAI, question: str = "one two") -> str:
    """Return what is streamed as the answer."""
    with ask(client, question) as stream:
        return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def test_the_client_lists_models_with_their_details(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "big"]
    with (
        FaultServer({"m": {"max_model_len": 2048, "owned_by": "vllm"}}) as other,
        openai.OpenAI(base_url=f"{other.url}/v1", api_key="k") as its_client,
    ):
        (model,) = its_client.models.list()
    assert model.to_dict()["max_model_len"] == 2048
    assert model.owned_by == "vllm"


def test_the_client_streams_an_echo_with_its_end_and_its_counts(
    server: FaultServer, client: openai.OpenAI
) -> None:
    with client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Grüße an  alle"}],
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:4]] == ["Grüße", " an", "  alle"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 3)
    (request,) = server.received
    assert (request.method, request.path, request.wait()) == ("POST", CHAT, "whole")
    assert request.headers["AUTHORIZATION"] == request.headers.get("authorization") == "Bearer sk-1"
    assert request.json["messages"][0]["content"] == "Grüße an  alle"
    assert request.chunks_sent == len(chunks) + 1


def test_the_client_gets_a_whole_answer_too_and_one_cut_to_its_length(
    client: openai.OpenAI,
) -> None:
    answer = client.chat.completions.create(
        model="big", messages=[{"role": "user", "content": "one two three"}], max_tokens=2
    )
    assert answer.choices[0].message.content == "one two"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5


def test_connection_stays_open_after_each_complete_answer(
    server: FaultServer, client: openai.OpenAI
) -> None:
    server.will(MODELS, *html_answer(502))
    with pytest.raises(openai.InternalServerError):
        client.models.list()
    client.models.list()
    # This client closes a connection after [DONE], before the body has ended; others do not.
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    for _ in range(3):
        question = {"model": "tiny", "messages": [{"content": "a b"}], "stream": True}
        connection.request("POST", CHAT, json.dumps(question))
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    connection.request("HEAD", MODELS)
    assert connection.getresponse().read() == b""
    assert (server.connections, server.open_now) == (2, 2)
    connection.close()


def test_error_responses_arrive_as_the_error_classes_of_the_client(
    server: FaultServer, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError, match="`none` does not exist") as unknown:
        client.chat.completions.create(model="none", messages=[{"role": "user", "content": "?"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="Invalid URL"):
        client.completions.create(model="tiny", prompt="?")
    with pytest.raises(openai.BadRequestError, match="no chat"):
        client.chat.completions.create(model="tiny", messages=[])
    server.key = "sk-2"
    with pytest.raises(openai.AuthenticationError, match="sk-1"):
        client.models.list()
    server.will(MODELS, *error_answer(429, "slow down", headers={"Retry-After": "3"}))
    with pytest.raises(openai.RateLimitError) as limited:
        client.models.list()
    assert limited.value.response.headers["retry-after"] == "3"
    server.will(MODELS, *html_answer(502))
    with pytest.raises(openai.InternalServerError) as page:
        client.models.list()
    assert "<h1>502 Bad Gateway</h1>" in page.value.response.text


def test_client_retries_as_the_header_requests(server: FaultServer) -> None:
    soon = formatdate(time.time(), usegmt=True)
    server.will(CHAT, *error_answer(503, "loading", headers={"Retry-After": soon}))
    server.will(CHAT, Reset())
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=2) as client:
        assert answer_of(client) == "one two"
    assert [request.wait() for request in server.received] == ["whole", "cut", "whole"]


def test_the_client_follows_a_redirect(server: FaultServer, client: openai.OpenAI) -> None:
    with FaultServer() as other:
        server.will(CHAT, *redirect(other.url + CHAT))
        assert answer_of(client) == "one two"
        assert len(other.requests_to(CHAT)) == 1


@pytest.mark.parametrize(
    "script",
    [
        recut(sse_words("Grüße", " 🦙"), 1),
        recut(sse_words("Grüße", " 🦙"), 7),
        sse(delta("Grüße"), delta(" 🦙", finish="stop"), eol=b"\r\n"),
        [Head(200, SSE, chunked=False), *events(delta("Grüße"), delta(" 🦙"))],
        [Head(200, SSE), Slow(b'data: {"choices": [{"delta": {"content": "Gr', 0.001),
         *split_everywhere('üße 🦙"}}]}\n\n'.encode()), Pause(0.01), End()],
    ],
    ids=["bytes", "sevens", "crlf", "until-close", "slow"],
)  # fmt: skip
def test_the_client_understands_an_answer_however_it_is_cut(
    server: FaultServer, client: openai.OpenAI, script: list[Step]
) -> None:
    server.will(CHAT, *script)
    assert answer_of(client) == "Grüße 🦙"


def test_the_client_gets_a_line_of_ten_megabytes(
    server: FaultServer, client: openai.OpenAI
) -> None:
    server.will(CHAT, *sse_words("x" * 10_000_000))
    assert len(answer_of(client)) == 10_000_000


def test_client_distinguishes_a_cut_body_from_a_complete_one(
    server: FaultServer, client: openai.OpenAI
) -> None:
    server.will(CHAT, *sse(delta("Hel"), done=False), Cut())
    with pytest.raises(openai.APIConnectionError) as caught:
        answer_of(client)
    assert "incomplete chunked read" in str(caught.value.__cause__)
    server.will(CHAT, *sse(delta("Hel"), done=False), End())
    assert answer_of(client) == "Hel"
    assert [request.wait() for request in server.received] == ["cut", "whole"]


def test_a_client_that_closes_its_stream_is_noticed(
    server: FaultServer, client: openai.OpenAI
) -> None:
    server.pace = 0.5
    stream = ask(client, "word " * 1000)
    next(iter(stream))
    stream.close()
    assert server.received[0].left.wait(NOTICED_S)
    assert server.received[0].chunks_sent < 10
    server.pace = 0
    assert answer_of(client) == "one two"


def test_a_hundred_streams_at_once(server: FaultServer, client: openai.OpenAI) -> None:
    everybody = threading.Barrier(100)
    server.pace = 0.01

    def one(number: int) -> str:
        everybody.wait(30)
        if number % 4 == 0:
            with ask(client) as stream:
                next(iter(stream))
            return ""
        return answer_of(client, f"answer number {number}")

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(one, range(100)))
    assert answers == ["" if n % 4 == 0 else f"answer number {n}" for n in range(100)]
    assert {request.wait() for request in server.received} <= {"whole", "left"}


def test_a_server_dies_and_returns(server: FaultServer, client: openai.OpenAI) -> None:
    hold = Hold()
    server.will(CHAT, *sse(delta("Hel"), done=False), hold)
    stream = ask(client)
    url = server.url
    assert hold.reached.wait(5)
    server.stop()
    with pytest.raises(openai.APIConnectionError), stream:
        list(stream)
    assert (server.received[0].outcome, server.open_now) == ("cut", 0)
    for _ in range(2):
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    server.start()
    assert answer_of(client) == "one two"
    assert server.url == url


def test_a_server_that_refuses_goes_on_with_what_is_open(
    server: FaultServer, client: openai.OpenAI
) -> None:
    client.models.list()
    server.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    client.models.list()
    assert server.connections == 1
