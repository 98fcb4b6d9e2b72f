"""A kernel and servers on every supported version of IPython, ipykernel, aiohttp and Pydantic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fault_server import CHAT, FaultServer
from tests.kernels import Kernel, kernel, within_a_second
from tests.ollama_server import OllamaServer
from tests.until import until
from tests.wire import Hold, delta, sse, sse_words


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture(scope="module")
def ollama() -> Iterator[OllamaServer]:
    with OllamaServer() as running:
        yield running


@pytest.fixture(scope="module")
def k(server: FaultServer, ollama: OllamaServer) -> Iterator[Kernel]:
    with kernel(OLLAMA_BASE_URL=ollama.url, OPENAI_BASE_URL=server.url) as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        yield k


@pytest.mark.parametrize("load", ["llama3.2 -b ollama", "tiny -b openai"])
def test_each_protocol_answers_in_magics_python_and_async_cells(k: Kernel, load: str) -> None:
    assert "ready in" in k.ok(f"%llm_load {load}").text
    assert "Hello there" in k.ok("%%llm -o reply\nHello there").text
    assert k.value("(reply.text, reply.finish_reason)") == ("Hello there", "stop")
    assert k.value("llm.generate('one two').text") == "one two"
    assert k.value("''.join(c.text for c in llm.stream('one two'))") == "one two"
    k.ok("reply = await llm.agenerate('three four')")
    assert k.value("reply.text") == "three four"
    k.ok("parts = [c.text async for c in llm.astream('three four')]")
    assert k.value("''.join(parts)") == "three four"


def test_interrupt_keeps_partial_reply(k: Kernel, server: FaultServer) -> None:
    k.ok("%llm_load tiny -b openai")
    server.will(CHAT, *sse(delta("first"), done=False), Hold())
    cell = k.send("%llm Hello")
    k.wait_for_output(cell, "first")
    k.interrupt()
    ran = k.wait(cell, timeout=20)
    assert (ran.ename, len(ran.traceback)) == ("Interrupted", 1)
    assert k.value("(llm.last.text, llm.last.finish_reason)") == ("first", "cancelled")
    assert k.ok("%llm after").seconds < within_a_second()


def test_background_cell_streams_while_others_run(k: Kernel, server: FaultServer) -> None:
    k.ok("%llm_load tiny -b openai")
    hold = Hold()
    server.will(CHAT, *sse(delta("early"), done=False), hold, *sse_words(" late")[1:])
    k.ok("%%llm --bg -o answer\nHello")
    assert k.value("1 + 1") == 2
    hold.go.set()
    assert "done" in k.ok("%llm_wait").text
    assert k.value("answer.text") == "early late"


def test_magics_complete_help_and_report_state(k: Kernel) -> None:
    k.ok("%llm_load llama3.2 -b ollama")
    assert "--temperature" in k.complete("%llm --temp")
    assert "--temperature" in k.help("%%llm")
    assert "llama3.2" in k.ok("%llm_status").text
    assert "0.25" in k.ok("%llm_config temperature=0.25").text
    assert "qwen3:0.6b" in k.ok("%llm_models -b ollama").text
    assert "1 + 1 = 2" in k.ok("total = 1 + 1\n%llm 1 + 1 = {total}").text


def test_error_is_one_line_and_fails_the_cell(k: Kernel) -> None:
    ran = k.run("%llm_load nothing -b ollama")
    assert (ran.status, ran.ename, len(ran.traceback)) == ("error", "ModelNotFound", 1)
    assert k.run("%llm --temperatur 1 Hello").ename == "OptionError"


def test_extension_unloads_and_loads_again(k: Kernel) -> None:
    k.ok("%unload_ext llm_magic")
    until(lambda: not any(name.startswith("llm_magic") for name in k.threads()), "a thread stays")
    k.ok("%load_ext llm_magic")
    k.ok("%llm_load llama3.2 -b ollama")
    assert "again" in k.ok("%llm again").text
