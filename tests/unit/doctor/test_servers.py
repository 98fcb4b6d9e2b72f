"""What the doctor says about servers: real ones, on real sockets, well and in each way unwell."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from llm_magic.config.api_keys import ApiKeys
from llm_magic.doctor.finding import Finding, run_in_thread
from llm_magic.doctor.servers import check_hub, check_keys, check_servers
from tests.fault_server import MODELS, FaultServer
from tests.ollama_server import OllamaServer
from tests.scripted import settings
from tests.wire import Hold, html_answer, json_answer, text_answer

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the person who runs the tests has set."""
    names = (*_PROXIES, *map(str.lower, _PROXIES))
    for name in (*names, "OPENAI_API_KEY", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def look(backend: str, url: str) -> Finding:
    """Return what is found about one server."""
    configured = settings(**{f"{backend}_base_url": url})
    found = asyncio.run(check_servers(configured, ApiKeys()))
    return next(finding for finding in found if finding.name == backend)


@pytest.mark.parametrize("path", ["", "/v1", "/v1/"])
def test_a_server_that_is_well(server: FaultServer, path: str) -> None:
    label = f"127.0.0.1:{server.port}"
    found = look("vllm", server.url + path)
    assert found == Finding("vllm", "ok", f"{label}: 2 models (tiny, big)")


def test_vllm_tells_its_version(server: FaultServer) -> None:
    server.will("/version", *json_answer(200, {"version": "0.21.0"}))
    assert look("vllm", server.url).text.startswith("0.21.0 at 127.0.0.1:")


def test_ollama_tells_its_version_and_models() -> None:
    with OllamaServer() as ollama:
        found = look("ollama", f"{ollama.url}/v1")
        assert found.state == "ok"
        assert (
            found.text
            == f"0.33.0 at 127.0.0.1:{ollama.port}: 2 models (llama3.2:latest, qwen3:0.6b)"
        )


def test_one_without_models_is_told_how_to_get_one() -> None:
    with OllamaServer(models=()) as ollama:
        found = look("ollama", ollama.url)
    assert (found.state, found.fix) == ("warn", "%llm_load llama3.2 -b ollama --pull")


@pytest.mark.parametrize(
    ("backend", "mend"),
    [("ollama", "Start it: ollama serve"), ("vllm", "Start one: vllm serve MODEL"),
     ("instructlab", "Start one: ilab model serve")],
)  # fmt: skip
def test_one_that_does_not_run(server: FaultServer, backend: str, mend: str) -> None:
    server.refuse()
    found = look(backend, server.url)
    text = f"nothing listens at 127.0.0.1:{server.port}"
    assert found == Finding(backend, "problem", text, mend)


def test_a_host_that_is_not_there() -> None:
    found = look("vllm", "http://nowhere.invalid:8000")
    assert found == Finding(
        "vllm", "problem", "there is no host nowhere.invalid", "correct VLLM_BASE_URL"
    )


def test_an_address_that_is_none() -> None:
    found = look("vllm", "htp:/x")
    assert (found.state, found.fix) == ("problem", "correct VLLM_BASE_URL")


def test_one_that_listens_at_the_other_loopback(server: FaultServer) -> None:
    found = look("vllm", f"http://[::1]:{server.port}/v1")
    assert found.state == "problem"
    assert (
        found.text == f"nothing listens at [::1]:{server.port}, but a server listens at 127.0.0.1"
    )
    better = f"http://127.0.0.1:{server.port}/v1"
    assert found.fix.startswith(f"VLLM_BASE_URL={better} in .env")
    assert look("vllm", better).state == "ok"


def test_one_that_listens_at_ipv6_only() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
        found = look("vllm", f"http://127.0.0.1:{port}")
    assert found.fix.startswith(f"VLLM_BASE_URL=http://[::1]:{port} ")


def test_a_wrong_path_is_told_the_right_one(server: FaultServer) -> None:
    found = look("openai", f"{server.url}/api")
    assert found.state == "problem"
    assert found.text == f"there is no API at {server.url}/api, but there is one at /v1"
    assert found.fix.startswith(f"OPENAI_BASE_URL={server.url}/v1 ")


def test_an_ollama_in_anothers_place() -> None:
    with OllamaServer() as ollama:
        found = look("vllm", ollama.url)
    assert found.fix.startswith(f"OLLAMA_BASE_URL={ollama.url}, ")


def test_something_else_that_listens(server: FaultServer) -> None:
    found = look("ollama", server.url)
    assert "is not an Ollama server" in found.text
    assert found.fix == "correct OLLAMA_BASE_URL"


def test_a_key_that_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(key="right-one") as server:
        assert look("openai", server.url).fix == "export OPENAI_API_KEY=…"
        assert look("vllm", server.url).fix == "%llm_load -b vllm --key-env NAME"
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-one-here")
        found = look("openai", server.url)
        assert "rejected the key in OPENAI_API_KEY" in found.text
        assert "wrong-on" not in repr(found)
        monkeypatch.setenv("OPENAI_API_KEY", "right-one")
        assert look("openai", server.url).state == "ok"


def test_one_that_says_nothing(server: FaultServer) -> None:
    server.will(MODELS, Hold())
    began = time.monotonic()
    found = look("vllm", server.url)
    assert time.monotonic() - began < 8
    assert (
        found.text
        == f"127.0.0.1:{server.port} accepts connections, but does not respond within 5 s"
    )


def test_one_that_is_broken(server: FaultServer) -> None:
    for _ in range(3):
        server.will(MODELS, *text_answer(500, "out of memory"))
    found = look("vllm", server.url)
    assert found.state == "problem"
    assert "log" in found.fix


def test_a_proxy_that_is_in_the_way(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = server.url.replace("//", "//bob:hunter2@")
    monkeypatch.setenv("http_proxy", proxy)
    for path in (MODELS, "/models"):
        server.will(f"http://10.255.255.1:8000{path}", *html_answer(502))
        server.will(path, *html_answer(403))
    found = look("vllm", "http://10.255.255.1:8000")
    assert found.state == "problem"
    assert f"The request used the proxy 127.0.0.1:{server.port}." in found.text
    assert found.fix == "export NO_PROXY=10.255.255.1"
    assert "hunter2" not in repr(found)


def test_what_nobody_asked_for_is_told_only_where_it_is_there() -> None:
    found = asyncio.run(check_servers(settings(), ApiKeys()))
    assert all(finding.state != "problem" for finding in found)


def test_the_hub_answers_and_gets_no_token(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_tulips")
    (found,) = asyncio.run(check_hub())
    assert found == Finding("hub", "ok", f"127.0.0.1:{server.port} responds")
    (request,) = server.received
    assert request.method == "HEAD"
    assert "hf_tulips" not in repr(request.headers)


def test_the_hub_says_nothing(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.will("/", Hold())
    began = time.monotonic()
    (found,) = asyncio.run(check_hub())
    assert time.monotonic() - began < 4.5
    assert (found.state, "does not respond within 3 s" in found.text) == ("warn", True)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://hub.invalid", "there is no host hub.invalid (no network?)"),
        ("http://127.0.0.1:9", "Nothing listens"),
    ],
)  # fmt: skip
def test_the_hub_is_not_there(url: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    (found,) = asyncio.run(check_hub())
    assert found.state == "warn"
    assert words in found.text
    assert found.fix


def test_the_hub_is_left_alone_offline(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (found,) = asyncio.run(check_hub())
    assert (found.state, server.received) == ("ok", [])


def test_keys_are_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_tulips")
    (found,) = check_keys(ApiKeys())
    assert found.text == "OPENAI_API_KEY not set, HF_TOKEN set"


def test_what_hangs_is_left_behind() -> None:
    go = threading.Event()

    async def wait() -> None:
        with pytest.raises(TimeoutError):
            await run_in_thread(lambda: go.wait(10), 0.1)
        with pytest.raises(ZeroDivisionError):
            await run_in_thread(lambda: 1 / 0, 5)
        assert await run_in_thread(lambda: 7, 5) == 7

    asyncio.run(wait())
    go.set()
