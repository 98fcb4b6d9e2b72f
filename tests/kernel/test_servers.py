"""Servers from the notebook: what is shown, that ■ works, and that a key is nowhere to be found."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import trustme
from nbclient import NotebookClient

from tests.fault_server import CHAT, FaultServer
from tests.kernels import Kernel, kernel, within_a_second
from tests.ollama_server import OllamaServer
from tests.tls_server import tls_server
from tests.wire import (
    Cut,
    Head,
    Hold,
    Pause,
    Send,
    Step,
    busy,
    delta,
    error_answer,
    json_answer,
    ndjson,
    sse,
    sse_words,
    usage,
)

KEY = "sk-kernel-7d1e90b2ac55"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def ollama() -> Iterator[OllamaServer]:
    with OllamaServer() as running:
        yield running


@pytest.fixture(scope="module")
def k(server: FaultServer, ollama: OllamaServer) -> Iterator[Kernel]:
    with kernel(THEIR_KEY=KEY, OLLAMA_BASE_URL=ollama.url, VLLM_BASE_URL="http://127.0.0.1:9") as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        yield k


@pytest.fixture
def remote(k: Kernel, server: FaultServer) -> Kernel:
    server.pace = 0.0
    k.ok(f"%llm_load tiny -b openai --base-url {server.url}/v1/ --key-env THEIR_KEY")
    return k


@pytest.fixture
def pulled(k: Kernel, ollama: OllamaServer) -> Kernel:
    ollama.pace = 0.0
    k.ok("%llm_load llama3.2 -b ollama")
    return k


def test_load_checks_server_and_shows_its_address(k: Kernel, server: FaultServer) -> None:
    ran = k.ok(f"%llm_load big -b openai --base-url {server.url} --key-env THEIR_KEY")
    address = server.url.removeprefix("http://")
    assert ran.text.startswith(f"big · openai {address} · ready in ")
    assert "Not sent" not in ran.text, "nothing was set that it does not get"
    assert k.value("llm.status().status") == "Ready"
    assert address in k.ok("%llm_status").text


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("%llm_load tyny {server}", 'Model "tyny" not found'),
        (
            "%llm_load -b vllm",
            "No server is listening at http://127.0.0.1:9. To start one, run: vllm serve MODEL",
        ),
        (
            "%llm_load {server}",
            "lists 2 models: tiny, big. Name one: %llm_load MODEL -b openai --base-url {url}/v1 --key-env"
            " THEIR_KEY.",
        ),
        (
            "%llm_load tyny {server}",
            "Run %llm_models -b openai --base-url {url}/v1 --key-env THEIR_KEY to list models.",
        ),
        ("%llm_load tiny -d cuda {server}", "--device works only with -b local, not with openai."),
        ("%llm_load llama9 -b ollama", "--pull"),
        ("%llm_load tiny -b olama", "There is no backend 'olama'. Did you mean \"ollama\"?"),
        ("%llm_load tiny -b openai --key-env sk-1", "--key-env takes the name of an environment"),
        (
            "%llm_load tiny -b openai --key-env my-key",
            "my-key is not the name of a variable; write --key-env MY_KEY",
        ),
        ("%llm_load ollama/llama3.2", "Run %llm_load llama3.2 -b ollama."),
        ("%llm_load tiny -b openai --api-key sk-1", "A key in a cell is saved with the notebook."),
        ("%llm_load tiny -b openai api_key=sk-1", "A key in a cell is saved with the notebook."),
        (
            "%llm_load tiny -b openai sk-proj-4f1c90d2be77",
            "A key in a cell is saved with the notebook.",
        ),
        ("%llm_load tiny -b openai --api-key=sk-1", "A key in a cell is saved with the notebook."),
        (
            "%llm_load tiny -b vllm --base-url {url}/x --key-env THEIR_KEY",
            "responds, but has no {url}/x/v1/models. Use --base-url {url}/v1.",
        ),
        (
            "%llm_load tiny -b openai --base-url {url}/v1/v1 --key-env THEIR_KEY",
            "responds, but has no {url}/v1/v1/models. Use --base-url {url}/v1.",
        ),
        ("%llm_load tiny -b vllm --base-url {url}", "requires an API key (401)"),
        (
            "%llm_load tiny -b openai --base-url {url} --key-env NOT_THERE",
            "you cannot be prompted for it here",
        ),
        (
            "%llm_load llama3.2 -b ollama --base-url {ollama}/v1/v1",
            "Ollama's API is not at {ollama}/v1/v1. Use --base-url {ollama}.",
        ),
        (
            "%llm_load llama3.2 -b ollama --base-url {url} --key-env THEIR_KEY",
            "is not an Ollama server",
        ),
        ("%llm --top-k 5 Hello", "openai does not support --top-k. Remove it"),
        ("%llm -p stream=false Hello", "-p stream cannot be set. Every reply is streamed"),
    ],
)
def test_a_mistake_is_one_line_and_loses_nothing(
    remote: Kernel, server: FaultServer, ollama: OllamaServer, cell: str, error: str
) -> None:
    cell, error = (text.replace("{ollama}", ollama.url) for text in (cell, error))
    where = f"-b openai --base-url {server.url}/v1/chat/completions --key-env THEIR_KEY"
    error = error.replace("{url}", server.url)
    ran = remote.run(cell.replace("{server}", where).replace("{url}", server.url))
    assert ran.status == "error"
    assert len(ran.traceback) == 1
    assert "\n" not in ran.error
    assert error in ran.error
    assert "sk-1" not in ran.text
    assert remote.ok("%llm --literal -f text still here").text.startswith("still here")


def test_errors_of_a_server_name_what_to_do(remote: Kernel, server: FaultServer) -> None:
    page: list[Step] = [
        Head(200, {"Content-Type": "text/html"}),
        Send(b"<!doctype html><title>Jupyter</title>"),
    ]
    failed = {"error": {"message": "CUDA out of memory"}}
    log = "Check the log of the server."
    cases: list[tuple[list[Step], str]] = [
        (error_answer(404, "No tiny"), "(404): No tiny. Load a model that it has:"
         f" %llm_models -b openai --base-url {server.url}/v1"),
        (error_answer(405, "No"), "rejected the request (405): No. Check --base-url. To use another address,"
         " load it again: %llm_load tiny -b openai --base-url URL --key-env THEIR_KEY"),
        (error_answer(429, "Slow down", headers={"Retry-After": "60"}),
         "too many requests (429): Slow down. Try again in 60 s."),
        (error_answer(429, "Please try again in 1m7.5s.", headers={"Retry-After": "2"}),
         "too many requests (429): Please try again in 1m7.5s."),
        (sse(failed), f"stopped with an error: CUDA out of memory. {log}"),
        (sse(delta("half"), failed), f"out of memory. {log} The reply is incomplete. The received part is"),
        (page, "sent no reply, but a web page. Check --base-url and -b."),
        (json_answer(200, b""), "sent an empty reply."),
    ]  # fmt: skip
    for script, message in cases:
        server.will(CHAT, *script)
        ran = remote.run("%llm Hello")
        assert message in ran.error
        assert len(ran.traceback) == 1
    for body, reason in (
        (b"", ""),
        (b"<title>500 Internal Server Error</title>", ": Internal Server Error"),
    ):
        for _ in range(3):
            server.will(CHAT, *json_answer(500, body, {"Retry-After": "0"}))
        assert f"failed (500){reason}. {log}" in remote.run("%llm Hello").error
    server.will("/v1/models", *error_answer(400, "No"))
    ran = remote.run(f"%llm_load big -b openai --base-url {server.url} --key-env THEIR_KEY")
    assert ran.error.endswith(
        "rejected the request (400): No. Check --base-url. tiny is still active."
    )


def test_status_has_the_address_the_jobs_and_no_error_from_before_a_success(
    remote: Kernel, server: FaultServer
) -> None:
    load = f"%llm_load tiny -b openai --base-url {server.url}/v1/ --key-env THEIR_KEY"
    hold = Hold()
    server.will(CHAT, *sse(delta("first"), done=False), hold, *sse_words(" second")[1:])
    remote.ok("job = %llm --bg Hello")
    number = remote.value("job.number")
    try:
        remote.ok("while not job.text: pass")
        assert remote.run(load.replace("tiny", "tyny", 1)).ename == "ModelNotFound"
        rows = dict(re.split(r"  +", line) for line in remote.ok("%llm_status").text.splitlines())
        assert rows["server"] == f"{server.url}/v1"
        assert rows[f"job {number}"].startswith("tiny · 5 characters")
        assert rows["last load"].startswith('failed: Model "tyny" not found')
    finally:
        hold.go.set()
    remote.ok("job.result()")
    assert "already loaded" in remote.ok(load).text
    text = remote.ok("%llm_status").text
    assert f"job {number}" not in text
    assert "last load" not in text
    remote.ok(f"%llm_load big -b openai --base-url {server.url} --key-env THEIR_KEY")
    assert f"{server.url}/v1" in remote.ok("%llm_status").text


def test_the_first_word_is_shown_when_it_comes(remote: Kernel, server: FaultServer) -> None:
    hold = Hold()
    server.will(CHAT, *sse(delta("first"), done=False), hold, *sse_words(" second")[1:])
    cell = remote.send("%llm Hello")
    remote.wait_for_output(cell, "first")
    hold.go.set()
    assert "first second" in remote.wait(cell).text


def test_reasoning_is_folded_and_not_sent_again(remote: Kernel, server: FaultServer) -> None:
    server.will(
        CHAT, *sse(delta(reasoning_content="Let me <b>see</b>."), delta("42", finish="stop"))
    )
    ran = remote.ok("%llm -c deep -o reply What is it?")
    assert "<details" in ran.html
    assert "&lt;b&gt;see" in ran.html
    assert ran.text.startswith("42")
    assert remote.value("(reply.text, reply.reasoning)") == ("42", "Let me <b>see</b>.")
    server.will(CHAT, *sse_words("<think>again</think>\n\n", "43"))
    remote.ok("%llm -c deep -o reply And now?")
    assert remote.value("(reply.text, reply.reasoning)") == ("43", "again")
    sent = [message["content"] for message in server.requests_to(CHAT)[-1].json["messages"]]
    assert sent == ["What is it?", "42", "And now?"]


def test_load_of_a_model_that_is_loaded(remote: Kernel, server: FaultServer) -> None:
    same = (
        f"%llm_load tiny -b openai --base-url {server.url}/v1/chat/completions --key-env THEIR_KEY"
    )
    assert "already loaded" in remote.ok(same).text
    ran = remote.ok(f"%llm_load tiny -b openai --base-url {server.url} --key-env THEIR_KEY")
    assert "ready in" in ran.text
    assert "Unloaded" not in ran.text, "it is the same model of the same server"
    remote.ok("%llm_config top_k=7")
    try:
        ran = remote.ok(f"%llm_load big -b openai --base-url {server.url} --key-env THEIR_KEY")
        assert "Not sent, because openai does not support them: top_k.\nUnloaded tiny" in ran.text
        shown = remote.ok("%llm_config").text
        assert re.search(r"top_k +7 \* † ", shown)
        assert re.search(r"repetition_penalty +1.15 † ", shown)
        assert shown.endswith("restores it. † not sent: openai does not support it.")
    finally:
        remote.ok("%llm_config --reset")


def test_lost_server_is_in_the_status_and_is_checked_again(
    remote: Kernel, server: FaultServer
) -> None:
    load = f"%llm_load tiny -b openai --base-url {server.url}/v1/ --key-env THEIR_KEY"
    server.will(CHAT, *sse(delta("half"), done=False), Cut())
    assert remote.run("%llm Hello").ename == "IncompleteReply"
    status = remote.ok("%llm_status").text
    assert re.search(
        r"last answer +failed at \d\d:\d\d:\d\d: The connection to .* was lost", status
    )
    # The status line of the panel
    remote.ok("from llm_magic.notebook.panel.status_bar import status_html")
    bar = remote.value("status_html(llm)")
    assert "last answer failed at " in bar
    assert ("llm-incomplete" in bar, "llm-Ready" in bar, "tokens/s" in bar) == (True, False, False)
    count = len(server.requests_to("/v1/models"))
    assert "ready in" in remote.ok(load).text
    assert len(server.requests_to("/v1/models")) == count + 1
    assert "last answer" not in remote.ok("%llm_status").text
    assert "last answer failed" not in remote.value("status_html(llm)")
    assert "already loaded" in remote.ok(load).text


def test_error_of_a_prompt_names_the_load_that_has_the_option(
    k: Kernel, server: FaultServer
) -> None:
    where = f"-b openai --base-url {server.url}"
    again = f"load it again: %llm_load tiny {where}"
    k.ok("import os; os.environ['OPENAI_API_KEY'] = 'sk-of-openai-000000'")
    wrong = k.run(f"%llm_load tiny {where}")
    assert (
        "requires an API key (401). OPENAI_API_KEY is set, but it is sent only to OpenAI, or to the"
        " address in OPENAI_BASE_URL. Store it in an environment variable and add --key-env NAME."
    ) in wrong.error
    k.ok("del os.environ['OPENAI_API_KEY']")
    k.ok(f"%llm_load tiny {where} --key-env THEIR_KEY --idle-timeout 1")
    server.will(CHAT, *sse(delta("half"), done=False), Hold())
    wrong = k.run("%llm Hello")
    assert (
        "sent no data for 1 s. Check the server, or allow more time with --idle-timeout."
        in wrong.error
    )
    assert f"{again} --key-env THEIR_KEY" in wrong.error


def test_a_retry_is_shown(remote: Kernel, server: FaultServer) -> None:
    hold = Hold()
    server.will(CHAT, *error_answer(429, "slow down", headers={"Retry-After": "1"}))
    server.will(CHAT, hold, *sse_words("Hello", " there"))
    cell = remote.send("%llm Hello there")
    remote.wait_for_output(cell, "429, attempt 2 of 3 after 1 s")
    hold.go.set()
    assert "Hello there" in remote.wait(cell).text


@pytest.mark.parametrize("when", ["waiting", "streaming", "retrying", "busy"])
def test_interrupt_stops_cell_and_server(remote: Kernel, server: FaultServer, when: str) -> None:
    scripts: dict[str, list[Step]] = {
        "waiting": [Hold()],
        "streaming": [*sse(delta("begun"), done=False), Hold()],
        "retrying": [*error_answer(503, "loading", headers={"Retry-After": "20"})],
        "busy": busy({"Retry-After": "20"}),
    }
    server.will(CHAT, *scripts[when])
    count = len(server.requests_to(CHAT))
    shown = {
        "waiting": "waiting for the first token", "streaming": "begun",
        "retrying": "attempt 2 of 3 after 20 s",
        "busy": "waiting: the server is busy with other requests",
    }  # fmt: skip
    cell = remote.send("%llm -o stopped Hello")
    # The line of the wait comes before the request.
    server.wait_for(CHAT, count + 1)
    remote.wait_for_output(cell, shown[when])
    pressed = time.monotonic()
    remote.interrupt()
    ran = remote.wait(cell)
    assert ran.ename == "Interrupted"
    assert ran.finished - pressed < within_a_second()
    assert remote.value("stopped.text") == ("begun" if when == "streaming" else "")
    if when not in {"retrying", "busy"}:
        assert server.requests_to(CHAT)[-1].left.wait(within_a_second()), "the server went on"
    assert len(server.requests_to(CHAT)) == count + 1
    assert "next one" in remote.ok("%llm next one").text


def test_interrupted_stream_keeps_partial_answer_and_label(
    remote: Kernel, server: FaultServer
) -> None:
    server.will(CHAT, *sse(delta("half of"), done=False), Cut())
    ran = remote.run("%llm -o broken Hello")
    assert ran.ename == "IncompleteReply"
    assert "half of" in ran.text
    assert "ended early; incomplete" in ran.text
    assert remote.value("(broken.text, broken.finish_reason)") == ("half of", "truncated")
    assert "Run the cell again" not in ran.text, "the error reports it"
    address = server.url.removeprefix("http://")
    server.will(CHAT, *sse(delta("half of"), done=True))
    ran = remote.ok("%llm -o broken Hello")
    assert "ended early; incomplete" in ran.text
    assert f"{address} did not send the end of the answer. Run the cell again." in ran.text
    assert remote.value("broken.finish_reason") == "truncated"
    server.will(CHAT, *sse(delta("half of"), done=True))
    remote.ok("%llm --bg -o cut Hello")
    rows = remote.ok("%llm_wait").text
    number = remote.value("cut.number")
    assert re.search(rf"{number} +incomplete +tiny +7 characters", rows)
    assert remote.ok("cut").text.startswith(f"<Job {number}: tiny, incomplete, 7 characters, ")
    ran = remote.ok("%llm Repeat {cut}")
    assert f"job {number} ended early: its incomplete answer is inserted" in ran.text


def test_response_without_an_answer_is_an_error(
    remote: Kernel, server: FaultServer, ollama: OllamaServer
) -> None:
    no_choices = (
        "sent no answer: its response has no choices. Try again. If that does not help, check"
    )
    nothing = json_answer(200, {"choices": []})
    for script in (nothing, sse(), sse({"choices": []}), sse(usage(3, 0))):
        server.will(CHAT, *script)
        ran = remote.run("%llm Hello")
        assert (ran.ename, len(ran.traceback)) == ("RequestFailed", 1)
        assert no_choices in ran.error
    server.will(CHAT, *sse(delta("", role="assistant")))
    assert "its response ended before the first word" in remote.run("%llm Hello").error
    server.will(CHAT, *nothing)
    assert remote.run("llm.generate('Hello')").ename == "RequestFailed"
    server.will(CHAT, *nothing)
    assert no_choices in remote.ok("%llm --bg -o none Hello").text + remote.run("%llm_wait").error
    assert re.search(rf"{remote.value('none.number')} +failed +tiny", remote.ok("%llm_jobs").text)
    message = {"content": "", "role": "assistant"}
    choice = {"message": message, "finish_reason": "stop"}
    for script in (json_answer(200, {"choices": [choice]}), sse(delta("", finish="stop"))):
        server.will(CHAT, *script)
        assert "The answer of tiny is empty. Change the prompt." in remote.ok("%llm Hello").text
    remote.ok("%llm_load llama3.2 -b ollama")
    for line, missing in (
        ({"done": True}, "has no message"),
        ({"done": True, "done_reason": "stop"}, "has no message"),
        ({"message": message}, "ended before the first word"),
    ):
        ollama.will("/api/chat", *ndjson(line))
        assert f"sent no answer: its response {missing}." in remote.run("%llm Hello").error
    ollama.will("/api/chat", *ndjson({"message": message, "done": True, "done_reason": "stop"}))
    assert "The answer of llama3.2 is empty." in remote.ok("%llm Hello").text


def test_http_for_https_and_the_reverse_names_the_address_to_use(
    remote: Kernel, server: FaultServer
) -> None:
    address = server.url.removeprefix("http://")
    wrong = remote.run(f"%llm_load tiny -b openai --base-url https://{address}/v1").error
    assert wrong == (
        f"The server at {address} uses http, not https. Use --base-url {server.url}/v1. tiny is still active."
    )
    server.stop()
    try:
        with tls_server(trustme.CA(), server.port) as url:
            use = f"The server at {address} uses https, not http. Use --base-url {url}"
            for backend in ("openai", "ollama"):
                wrong = remote.run(f"%llm_load x -b {backend} --base-url {address}").error
                assert wrong == f"{use}. tiny is still active."
            wrong = remote.run("%llm Hello").error
    finally:
        server.start()
    again = f"%llm_load tiny -b openai --base-url {url}/v1 --key-env THEIR_KEY"
    assert wrong == f"{use}/v1. To do that, load it again: {again}"
    assert "still here" in remote.ok("%llm still here").text


def test_web_page_instead_of_models_is_named(remote: Kernel, server: FaultServer) -> None:
    for path in ("/v1/models", "/models"):
        page = b"<!doctype html><title>Sign in</title>"
        server.will(path, Head(200, {"Content-Type": "text/html"}), Send(page))
    wrong = remote.run(f"%llm_load tiny -b openai --base-url {server.url}").error
    assert wrong.startswith(f'{server.url}/v1/models is a web page ("Sign in"), not the API of')
    assert wrong.endswith(
        "the port and the path of --base-url, and whether a proxy responds instead. tiny is still active."
    )


def test_advice_names_the_server_in_use(remote: Kernel, server: FaultServer) -> None:
    options = f"-b openai --base-url {server.url}/v1 --key-env THEIR_KEY --keep."
    for line in ("%llm_use slow", "%%llm -m slow\nHello"):
        wrong = remote.run(line)
        assert (wrong.ename, wrong.error) == (
            "ModelNotLoaded", f"slow is not loaded. Loaded models: tiny. Run %llm_load slow {options}",
        )  # fmt: skip
    assert remote.run("%llm_use SmolLM2").error == (
        'SmolLM2 is not loaded. Loaded models: tiny. Did you mean "SmolLM2-135M-Instruct"?'
        " Load it with %llm_load -b local --keep."
    )
    assert remote.run("%llm_use SmolLM2-135M-Instruct").error.endswith(
        "Run %llm_load SmolLM2-135M-Instruct -b local --keep."
    )
    remote.ok(f"%llm_load tiny -b vllm --base-url {server.url} --key-env THEIR_KEY")
    wrong = remote.run("%llm_load slow -b vllm")
    assert wrong.ename == "ServerUnreachable"
    assert wrong.error.startswith("No server is listening at http://127.0.0.1:9.")
    assert wrong.error.endswith(
        f"The loaded model is at {server.url}: to use that server, add --base-url {server.url}. tiny is still"
        " active."
    )
    assert "source" not in remote.ok("%llm_status").text, "the line of the model has its name"
    remote.ok(
        f"%llm_load big -b vllm --base-url {server.url} --key-env THEIR_KEY --keep --name alias"
    )
    rows = [line.split() for line in remote.ok("%llm_status").text.splitlines()]
    assert [row[2] for row in rows if row[1] in {"model", "loaded"}] == ["alias", "tiny"]
    assert ["source", "big"] in rows
    assert [line.partition(" ·")[0] for line in remote.ok("%llm_unload all").text.splitlines()] == [
        "Unloaded tiny", "Unloaded alias",
    ]  # fmt: skip
    assert remote.ok("%llm_unload all").text == "No model was loaded."


def test_jobs_of_a_server_show_what_arrived_and_continue_after_an_unload(
    remote: Kernel, server: FaultServer
) -> None:
    hold = Hold()
    server.will(CHAT, *sse(delta("first"), done=False), hold, *sse_words(" end")[1:])
    server.will(CHAT, hold, *sse_words("second"))
    remote.ok("%llm --bg -o one Hello")
    remote.ok("while not one.text: __import__('time').sleep(0.01)")
    remote.ok("%llm --bg -o two Hello")
    host = server.url.removeprefix("http://")
    table = remote.ok("%llm_jobs").text
    assert "5 characters" in table
    assert f"waiting for the first token (1 earlier prompt at {host})" in table
    first, second = remote.value("(one.number, two.number)")
    continue_ = f"Unloaded tiny · it stays on {host} · jobs {first}, {second} continue"
    where = f"-b openai --base-url {server.url} --key-env THEIR_KEY"
    assert remote.ok(f"%llm_load big {where}").text.endswith(continue_)
    remote.ok(f"%llm_load tiny {where}")
    assert remote.ok("%llm_unload").text.endswith(continue_)
    hold.go.set()
    assert remote.value("(str(one.result()), str(two.result()))") == ("first end", "second")


def test_variable_is_unchanged_without_an_answer(remote: Kernel, server: FaultServer) -> None:
    remote.ok("mine = 'precious'")
    server.will(CHAT, *error_answer(400, "no such thing"))
    ran = remote.run("%llm -o mine Hello")
    assert ran.ename == "RequestFailed"
    assert remote.value("mine") == "precious"


def test_ollama_lists_what_it_has_and_holds(pulled: Kernel) -> None:
    pulled.ok("%llm Hello")
    table = pulled.ok("%llm_models -b ollama").text
    assert "llama3.2:latest" in table
    assert "in memory: " in table
    assert "it stays" not in (gone := pulled.ok("%llm_unload").text)
    assert "frees its memory" in gone
    assert "in memory" not in pulled.ok("%llm_models -b ollama").text


def test_a_pull_is_shown_and_can_be_stopped(pulled: Kernel, ollama: OllamaServer) -> None:
    ollama.pace = 5.0
    cell = pulled.send("%llm_load gemma3:270m -b ollama --pull")
    pulled.wait_for_output(cell, "pulling")
    pulled.interrupt()
    ran = pulled.wait(cell)
    assert ran.ename == "Interrupted"
    assert ollama.requests_to("/api/pull")[-1].left.wait(within_a_second()), "the server went on"
    assert pulled.value("llm.status().active_model") == "llama3.2"
    ollama.pace = 0.0
    assert "gemma3:270m · ollama" in pulled.ok("%llm_load gemma3:270m -b ollama --pull").text
    assert "Hello you" in pulled.ok("%llm --literal Hello you").text


def test_many_at_once(remote: Kernel, server: FaultServer) -> None:
    ran = remote.ok(
        "import asyncio\n"
        "replies = await asyncio.gather(*(llm.agenerate(f'number {i}') for i in range(64)))\n"
        "print([r.text for r in replies] == [f'number {i}' for i in range(64)])"
    )
    assert ran.text.strip() == "True"


def test_server_load_unloads_local_model_unless_keep(loaded: Kernel, server: FaultServer) -> None:
    loaded.ok(f"import os; os.environ['THEIR_KEY'] = {KEY!r}\n%llm_unload")
    where = f"-b openai --base-url {server.url} --key-env THEIR_KEY"
    loaded.ok(f"%llm_load tiny {where}")
    ran = loaded.ok(
        "import time; began = time.monotonic()\n%llm_load -b local --keep\n"
        "took = time.monotonic() - began"
    )
    ready, took = re.search(r"ready in (\d+\.\d) s", ran.text), loaded.value("took")
    assert ready
    assert took / 2 - 0.1 < float(ready[1]) <= took + 0.1, took
    loaded.ok(f"%llm_load big {where} --keep")
    assert len(loaded.value("[m.name for m in llm.status().models]")) == 3
    loaded.ok(f"%llm_load tiny {where}")
    assert loaded.value("[m.name for m in llm.status().models]") == ["tiny"]
    loaded.ok("del os.environ['THEIR_KEY']")


def test_hosted_provider_needs_a_model_before_a_key(k: Kernel) -> None:
    ran = k.run("%llm_load -b groq")
    assert (ran.ename, ran.error, len(ran.traceback)) == (
        "OptionError", "Groq has many models. Name one: %llm_load MODEL -b groq (key: GROQ_API_KEY, not set)."
        " %llm_models -b groq lists them.", 1,
    )  # fmt: skip


def test_missing_key_is_prompted_for(k: Kernel, server: FaultServer) -> None:
    where = f"-b openai --base-url {server.url} --key-env NOT_SET_ANYWHERE"
    cell = k.send(f"%llm_load tiny {where}", asks=True)
    question = k.client.get_stdin_msg(timeout=60)["content"]
    assert question["password"], "it would be shown while it is typed"
    assert question["prompt"] == (
        f"Key for {server.url} (NOT_SET_ANYWHERE is not set; Enter without a key cancels): "
    )
    k.client.input("  ")
    cancelled = k.wait(cell)
    assert (cancelled.ename, cancelled.error, len(cancelled.traceback)) == (
        "OptionError", "No key was entered. Run the cell again, or set NOT_SET_ANYWHERE.", 1,
    )  # fmt: skip
    cell = k.send(f"%llm_load tiny {where}", asks=True)
    k.client.get_stdin_msg(timeout=60)
    k.interrupt()
    stopped = k.wait(cell)
    assert (stopped.ename, stopped.error, len(stopped.traceback)) == (
        "Interrupted", "No key was entered. Run the cell again, or set NOT_SET_ANYWHERE."
        " An input box that is still shown is not read.", 1,
    )  # fmt: skip
    cell = k.send(f"%llm_load tiny {where}", asks=True)
    k.client.get_stdin_msg(timeout=60)
    k.client.input(KEY)
    ran = k.wait(cell)
    assert ran.status == "ok"
    assert KEY not in json.dumps(vars(ran), default=str)
    # Once for a session: a cell that is run again, or by nbclient, does not ask.
    assert k.ok(f"%llm_load big {where}").text.startswith("big")
    assert "typed once" in k.ok("%llm --literal typed once").text


def test_the_key_is_nowhere(remote: Kernel, server: FaultServer) -> None:
    server.will(CHAT, *error_answer(400, f"your key {KEY} is nice"))
    server.will(CHAT, *json_answer(500, {"error": KEY}, {"Retry-After": "99"}))
    server.will(CHAT, *sse({"error": {"message": f"key {KEY} expired"}}, done=False))
    server.will(CHAT, *sse(delta("x"), {"error": {"message": f"{KEY}!"}}, done=False), Pause(0.1))
    cells = [
        "%xmode Verbose", "%llm a", "%llm b", "%llm c", "%llm d", "llm", "llm.status()", "vars(llm)",
        "llm.last", "%llm_status", "%llm_config", "%llm --dry-run e", "%tb", "llm.models()",
        "import gc; repr([o for o in gc.get_objects() if 'llm_magic' in type(o).__module__])",
        "%debug_nothing", "1/0", "%xmode Context", "%history -n",
    ]  # fmt: skip
    ran = [vars(remote.run(cell)) for cell in cells]
    shown = json.dumps(ran, default=str, ensure_ascii=False)
    assert "•••" in shown, "none of the server's messages came through"
    assert KEY not in shown
    history = Path(remote.process.environ()["IPYTHONDIR"], "profile_default", "history.sqlite")
    assert KEY.encode() not in history.read_bytes()


def test_the_key_is_in_no_saved_notebook(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", KEY)
    cells = [
        "%load_ext llm_magic",
        f"%llm_load tiny -b openai --base-url {server.url} --key-env THEIR_KEY",
        "%llm -o reply Hello", "reply", "%llm_status", "%llm --top-k 5 x",
    ]  # fmt: skip
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, allow_errors=True, resources={"metadata": {"path": tmp_path}}).execute()
    nbformat.write(book, tmp_path / "book.ipynb")
    saved = (tmp_path / "book.ipynb").read_text("utf-8")
    assert "Hello" in saved
    assert "openai does not support --top-k" in saved
    assert KEY not in saved
