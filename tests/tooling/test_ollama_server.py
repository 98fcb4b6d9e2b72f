"""The double of Ollama tested with another project's client: the official `ollama` package."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import ollama
import pytest

from tests.kernels import within_a_second
from tests.ollama_models import OllamaModel, RefusedError, keep_alive
from tests.ollama_server import OllamaServer
from tests.wire import Cut, Hold, ndjson

CHAT = "/api/chat"


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer() as server:
        yield server


@pytest.fixture
def client(server: OllamaServer) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as client:
        yield client


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def post(server: OllamaServer, path: str, body: Any) -> tuple[int, Any]:
    """Return the status and the answer to a request that the client would not make."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
    response = connection.getresponse()
    answer = json.loads(response.read().splitlines()[-1])
    connection.close()
    return response.status, answer


def test_a_chat_is_answered_whole(client: ollama.Client) -> None:
    answer = client.chat("llama3.2", ask("Grüße an alle"))
    assert answer.message.content == "Grüße an alle"
    assert answer.message.role == "assistant"
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "llama3.2")
    assert (answer.prompt_eval_count, answer.eval_count) == (3, 3)
    assert answer.total_duration is not None
    assert answer.total_duration >= (answer.load_duration or 0) + (answer.eval_duration or 0)
    assert answer.message.thinking is None


def test_a_chat_is_streamed(server: OllamaServer, client: ollama.Client) -> None:
    parts = list(client.chat("llama3.2", ask("one two three"), stream=True))
    assert [part.message.content for part in parts] == ["one", " two", " three", ""]
    assert [part.done for part in parts] == [False, False, False, True]
    assert parts[-1].done_reason == "stop"
    assert parts[-1].eval_count == 3
    assert parts[0].eval_count is None
    assert server.received[0].wait() == "whole"
    assert server.received[0].json["messages"] == ask("one two three")


def test_a_prompt_is_completed(client: ollama.Client) -> None:
    answer = client.generate("llama3.2", "one two", system="be brief")
    assert (answer.response, answer.prompt_eval_count) == ("one two", 4)
    parts = list(client.generate("qwen3:0.6b", "one two", stream=True))
    assert "".join(part.thinking or "" for part in parts) == "Somebody asks: one two"
    assert "".join(part.response or "" for part in parts) == "one two"


def test_a_model_that_can_think_does_unless_requested_otherwise(client: ollama.Client) -> None:
    parts = list(client.chat("qwen3:0.6b", ask("why"), think=True, stream=True))
    assert [part.message.thinking for part in parts] == ["Somebody", " asks:", " why", None, None]
    assert [part.message.content for part in parts] == ["", "", "", "why", ""]
    assert client.chat("qwen3:0.6b", ask("why")).message.thinking == "Somebody asks: why"
    assert client.chat("qwen3:0.6b", ask("why"), think=False).message.thinking is None
    assert client.chat("qwen3:0.6b", ask("why"), think="low").message.thinking
    with pytest.raises(ollama.ResponseError, match=r'"llama3\.2" does not support') as no:
        client.chat("llama3.2", ask("why"), think=True)
    assert no.value.status_code == 400


def test_options_are_honoured(server: OllamaServer, client: ollama.Client) -> None:
    def answer(question: str, **options: Any) -> tuple[str | None, str | None]:
        answer = client.chat("llama3.2", ask(question), options=options)
        return answer.message.content, answer.done_reason

    assert answer("a b c", num_predict=2) == ("a b", "length")
    assert answer("a b c", num_predict=3) == ("a b c", "stop")
    assert answer("a b c", num_predict=-1) == ("a b c", "stop")
    assert answer("a b c", stop=["x", " c"]) == ("a b", "stop")
    many = " ".join(map(str, range(30)))
    assert answer(many, seed=1) == answer(many, seed=1) != answer(many, seed=2)
    assert post(server, CHAT, {"model": "llama3.2", "options": {"seed": "1"}}) == (
        500, {"error": 'option "seed" must be of type integer'},
    )  # fmt: skip
    assert post(server, CHAT, {"model": "llama3.2", "options": {"unknown": "1"}})[0] == 200


def test_the_oldest_messages_are_dropped_in_silence(server: OllamaServer) -> None:
    chat = {
        "model": "llama3.2",
        "messages": [{"role": "system", "content": "be brief"}, *ask("a b c"), *ask("d e")],
        "options": {"num_ctx": 5},
        "stream": False,
    }
    assert post(server, CHAT, chat)[1]["prompt_eval_count"] == 4
    status, refused = post(server, CHAT, chat | {"truncate": False})
    # The body of its runner's error is the text of Ollama's.
    inner = json.loads(refused["error"])["error"]
    assert (status, inner["type"]) == (400, "exceed_context_size_error")
    assert (inner["n_prompt_tokens"], inner["n_ctx"]) == (7, 5)


@pytest.mark.parametrize(
    ("change", "loads"),
    [
        ({}, 1),
        ({"keep_alive": "1h"}, 1),
        ({"truncate": False}, 1),
        ({"shift": True}, 1),
        ({"options": {"temperature": 0, "num_ctx": 4096, "num_gpu": -1}}, 1),
        ({"shift": False}, 2),
        ({"options": {"num_ctx": 8192}}, 2),
        ({"options": {"num_batch": 64}}, 2),
        ({"options": {"num_thread": 1}}, 2),
        ({"options": {"num_gpu": 0}}, 2),
        ({"options": {"use_mmap": False}}, 2),
    ],
)
def test_changed_load_options_reload_the_model(
    server: OllamaServer, change: dict[str, Any], loads: int
) -> None:
    chat = {"model": "llama3.2", "messages": ask("one two"), "stream": False}
    for body in (chat, chat, chat | change, chat | change):
        assert post(server, CHAT, body)[0] == 200
    assert server.loads == {"llama3.2:latest": loads}


def test_context_of_the_modelfile_is_the_default() -> None:
    model = OllamaModel("small", parameters={"num_ctx": (64,)})
    with OllamaServer([model]) as server, ollama.Client(server.url) as client:
        client.chat("small", ask("one"))
        assert client.ps().models[0].context_length == 64
        client.chat("small", ask("one"), options={"num_ctx": 64})
        assert server.loads["small:latest"] == 1


def test_answer_ends_at_the_context_only_without_shift(server: OllamaServer) -> None:
    chat = {
        "model": "llama3.2", "messages": ask("a b c d"), "options": {"num_ctx": 6}, "stream": False,
    }  # fmt: skip
    assert post(server, CHAT, chat)[1]["done_reason"] == "stop"
    assert post(server, CHAT, chat | {"shift": False})[1]["done_reason"] == "length"
    assert post(server, CHAT, chat | {"shift": False})[1]["message"]["content"] == "a b"


def test_models_are_listed_and_shown(client: ollama.Client) -> None:
    models = client.list().models
    assert [model.model for model in models] == ["llama3.2:latest", "qwen3:0.6b"]
    assert models[0].size == 2_019_393_189
    assert len(models[0].digest or "") == 64
    assert models[0].modified_at == datetime(2026, 5, 10, 8, 6, 48, 639712, tzinfo=UTC)
    shown = client.show("qwen3:0.6b")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.details is not None
    assert (shown.details.family, shown.details.parameter_size) == ("qwen3", "751.63M")
    assert (shown.details.format, shown.details.quantization_level) == ("gguf", "Q4_K_M")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "qwen3"
    assert shown.modelinfo["qwen3.context_length"] == 40_960
    assert 'stop                           "<|eot_id|>"' in (shown.parameters or "")
    assert shown.template


def test_a_model_is_loaded_and_unloaded(server: OllamaServer, client: ollama.Client) -> None:
    assert client.ps().models == []
    server.load_s = 0.2
    began = time.monotonic()
    assert client.chat("llama3.2", []).done_reason == "load"
    assert time.monotonic() - began >= 0.2
    assert (client.chat("llama3.2", ask("again")).load_duration or 0) < 0.1e9
    (running,) = client.ps().models
    assert (running.name, running.context_length) == ("llama3.2:latest", 4096)
    assert (running.size or 0) >= (running.size_vram or 0) > 2_019_393_189
    assert running.expires_at is not None
    left = running.expires_at - datetime.now(UTC)
    assert timedelta(minutes=4) < left < timedelta(minutes=6)
    client.chat("llama3.2", [], options={"num_ctx": 9000}, keep_alive="1h")
    assert client.ps().models[0].context_length == 9000
    unloaded = client.chat("llama3.2", [], keep_alive=0)
    assert (unloaded.done_reason, unloaded.message.content) == ("unload", "")
    assert client.ps().models == []
    assert client.generate("llama3.2").done_reason == "load"
    assert client.generate("llama3.2", keep_alive=0).done_reason == "unload"


def test_a_model_leaves_after_its_time(server: OllamaServer, client: ollama.Client) -> None:
    assert client.chat("llama3.2", ask("and go"), keep_alive=0).message.content == "and go"
    client.chat("qwen3:0.6b", [], keep_alive="10ms")
    time.sleep(0.05)
    assert client.ps().models == []
    client.chat("qwen3:0.6b", [], keep_alive=-1)
    assert client.ps().models[0].expires_at > datetime(2300, 1, 1, tzinfo=UTC)  # type: ignore[operator]
    assert list(server.running) == ["qwen3:0.6b"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, 300), (0, 0), (90, 90), ("0", 0), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25)],
)
def test_keep_alive_is_read_as_go_reads_it(value: Any, seconds: float) -> None:
    assert keep_alive(value).total_seconds() == seconds


@pytest.mark.parametrize("value", ["-1", "5", "5 m", "", "soon", [5]])
def test_keep_alive_needs_a_unit(value: Any) -> None:
    with pytest.raises(RefusedError):
        keep_alive(value)


def test_pull_reports_its_progress(server: OllamaServer, client: ollama.Client) -> None:
    progress = list(client.pull("gemma3:270m", stream=True))
    assert progress[0].status == "pulling manifest"
    assert [one.status for one in progress[-3:]] == [
        "verifying sha256 digest", "writing manifest", "success",
    ]  # fmt: skip
    weights = [one for one in progress if one.total == 291_554_930]
    assert weights[0].completed is None
    assert weights[-1].completed == 291_554_930
    done = [one.completed or 0 for one in weights]
    assert done == sorted(done)
    assert (weights[0].digest or "").startswith("sha256:")
    assert weights[0].status == f"pulling {(weights[0].digest or '')[7:19]}"
    assert "gemma3:270m" in [model.model for model in client.list().models]
    assert client.pull("gemma3:270m").status == "success"
    assert client.chat("gemma3:270m", ask("here")).message.content == "here"


def test_a_pull_that_was_left_goes_on_where_it_was(
    server: OllamaServer, client: ollama.Client
) -> None:
    server.pace = 0.05
    pull = client.pull("gemma3:270m", stream=True)
    while (next(pull).completed or 0) < 100_000_000:
        pass
    pull.close()  # type: ignore[attr-defined]
    (request,) = server.requests_to("/api/pull")
    assert request.left.wait(within_a_second())
    assert "gemma3:270m" not in server.models
    server.pace = 0
    progress = list(client.pull("gemma3:270m", stream=True))
    assert (progress[1].completed or 0) > 50_000_000
    assert progress[-1].status == "success"


def test_errors_arrive_as_errors(server: OllamaServer, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'none' not found") as unknown:
        client.chat("none", ask("?"))
    assert unknown.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="model 'none' not found") as unknown:
        list(client.chat("none", ask("?"), stream=True))
    assert unknown.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.show("none")
    with pytest.raises(ollama.ResponseError, match="pull model manifest: file does not exist"):
        list(client.pull("none", stream=True))
    with pytest.raises(ollama.ResponseError, match="pull model manifest: file does not exist"):
        client.pull("none")
    assert post(server, CHAT, {}) == (400, {"error": "model is required"})
    assert post(server, "/api/show", {}) == (400, {"error": "model is required"})
    assert post(server, "/api/generate", {}) == (404, {"error": "model '' not found"})
    assert post(server, CHAT, b"") == (400, {"error": "missing request body"})
    assert post(server, CHAT, b"{")[0] == 400
    assert post(server, CHAT, {"model": "llama3.2", "keep_alive": "-1"}) == (
        400, {"error": 'time: missing unit in duration "-1"'},
    )  # fmt: skip


def test_an_answer_breaks_off_with_an_error(server: OllamaServer, client: ollama.Client) -> None:
    first = {"model": "llama3.2", "message": {"role": "assistant", "content": "Hel"}}
    server.will(CHAT, *ndjson(first, {"error": "llama runner process has terminated"}))
    stream = client.chat("llama3.2", ask("?"), stream=True)
    assert next(stream).message.content == "Hel"
    with pytest.raises(ollama.ResponseError, match="has terminated"):
        next(stream)
    server.will(CHAT, *ndjson(first), Cut())
    with pytest.raises(Exception, match="incomplete chunked read"):
        list(client.chat("llama3.2", ask("?"), stream=True))


def test_a_client_that_leaves_is_noticed(server: OllamaServer, client: ollama.Client) -> None:
    server.pace = 0.01
    stream = client.chat("llama3.2", ask("word " * 1000), stream=True, keep_alive=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert server.received[0].left.wait(within_a_second())
    assert server.received[0].chunks_sent < 100
    assert server.running == {}
    server.will(CHAT, Hold())
    with ollama.Client(server.url, timeout=0.2) as hasty, pytest.raises(Exception, match="timed"):
        hasty.chat("llama3.2", ask("?"))
    assert server.received[1].left.wait(within_a_second())


def test_root_page_reports_that_it_runs(server: OllamaServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    answer = {}
    for method, path in [("GET", "/"), ("HEAD", "/"), ("GET", "/api/version"), ("GET", "/nowhere"),
                         ("GET", "/api/chat")]:  # fmt: skip
        connection.request(method, path)
        response = connection.getresponse()
        answer[method, path] = (response.status, response.read().decode())
    connection.close()
    assert list(answer.values()) == [
        (200, "Ollama is running"),
        (200, ""),
        (200, '{"version": "0.33.0"}'),
        (404, "404 page not found"),
        (405, "405 method not allowed"),
    ]
    assert server.connections == 1
