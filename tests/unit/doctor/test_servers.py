"""Checks of servers on real sockets, with and without problems."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.providers import PROVIDERS
from llm_magic.config.settings import ServerLoadConfig, Settings
from llm_magic.doctor.finding import Finding, run_in_thread
from llm_magic.doctor.servers import check_hub, check_keys, check_servers
from tests.fault_server import MODELS, FaultServer
from tests.kernels import within_a_second
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
def test_running_server_is_ok(server: FaultServer, path: str) -> None:
    label = f"127.0.0.1:{server.port}"
    found = look("vllm", server.url + path)
    assert found == Finding("vllm", "ok", f"{label}: 2 models (tiny, big)")


def test_vllm_version_is_reported(server: FaultServer) -> None:
    server.will("/version", *json_answer(200, {"version": "0.21.0"}))
    assert look("vllm", server.url).text.startswith("0.21.0 at 127.0.0.1:")


def test_ollama_version_and_models_are_reported() -> None:
    with OllamaServer() as ollama:
        found = look("ollama", f"{ollama.url}/v1")
        assert found.state == "ok"
        assert (
            found.text
            == f"0.33.0 at 127.0.0.1:{ollama.port}: 2 models (llama3.2:latest, qwen3:0.6b)"
        )


def test_server_without_models_suggests_pull() -> None:
    with OllamaServer(models=()) as ollama:
        found = look("ollama", ollama.url)
    assert (found.state, found.fix) == ("warn", "%llm_load llama3.2 -b ollama --pull")


@pytest.mark.parametrize(
    ("backend", "fix"),
    [("ollama", "To start one, run: ollama serve"), ("vllm", "To start one, run: vllm serve MODEL"),
     ("instructlab", "To start one, run: ilab model serve")],
)  # fmt: skip
def test_stopped_server_suggests_start_command(server: FaultServer, backend: str, fix: str) -> None:
    server.refuse()
    found = look(backend, server.url)
    text = f"no server is listening at 127.0.0.1:{server.port}"
    assert found == Finding(backend, "problem", text, fix)


def test_unknown_host_is_a_problem() -> None:
    found = look("vllm", "http://nowhere.invalid:8000")
    assert found == Finding(
        "vllm", "problem", "there is no host nowhere.invalid", "correct VLLM_BASE_URL"
    )


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_NONAME])
def test_unknown_host_of_a_provider_is_no_wrong_address(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "no network")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-000000000000")
    found = look("openai", "https://api.openai.com")
    assert (found.state, found.fix) == ("problem", "check the network")


def test_wrong_address_of_a_load_is_corrected_in_the_load() -> None:
    used = ServerLoadConfig(backend="openai", base_url="http://nowhere.invalid/v1")
    found = asyncio.run(
        check_servers(settings(), ApiKeys(), lambda name: used if name == "openai" else None)
    )
    fixes = [one.fix for one in found if one.name == "openai"]
    assert fixes == ["load it again with another --base-url"]


def test_invalid_address_is_a_problem() -> None:
    found = look("vllm", "htp:/x")
    assert (found.state, found.fix) == ("problem", "correct VLLM_BASE_URL")


def test_server_on_other_loopback_suggests_address(server: FaultServer) -> None:
    found = look("vllm", f"http://[::1]:{server.port}/v1")
    assert found.state == "problem"
    assert (
        found.text
        == f"no server is listening at [::1]:{server.port}, but a server listens at 127.0.0.1"
    )
    better = f"http://127.0.0.1:{server.port}/v1"
    assert found.fix.startswith(f"VLLM_BASE_URL={better} in .env")
    assert look("vllm", better).state == "ok"


def test_server_on_ipv6_only_suggests_address() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
        found = look("vllm", f"http://127.0.0.1:{port}")
    assert found.fix.startswith(f"VLLM_BASE_URL=http://[::1]:{port} ")


def test_wrong_path_suggests_v1(server: FaultServer) -> None:
    found = look("openai", f"{server.url}/api")
    assert found.state == "problem"
    assert found.text == f"there is no API at {server.url}/api, but there is one at /v1"
    assert found.fix.startswith(f"OPENAI_BASE_URL={server.url}/v1 ")


def test_ollama_at_other_address_suggests_variable() -> None:
    with OllamaServer() as ollama:
        found = look("vllm", ollama.url)
    assert found.fix.startswith(f"OLLAMA_BASE_URL={ollama.url}, ")


def test_other_server_at_ollama_address_is_a_problem(server: FaultServer) -> None:
    found = look("ollama", server.url)
    assert "is not an Ollama server" in found.text
    assert found.fix == "correct OLLAMA_BASE_URL"


def test_missing_and_rejected_keys_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(key="right-one") as server:
        assert look("openai", server.url).fix == "export OPENAI_API_KEY=…"
        assert look("vllm", server.url).fix == "%llm_load -b vllm --key-env NAME"
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-one-here")
        found = look("openai", server.url)
        assert "rejected the key in OPENAI_API_KEY" in found.text
        assert "wrong-on" not in repr(found)
        monkeypatch.setenv("OPENAI_API_KEY", "right-one")
        assert look("openai", server.url).state == "ok"


def test_server_without_response_times_out(server: FaultServer) -> None:
    server.will(MODELS, Hold())
    began = time.monotonic()
    found = look("vllm", server.url)
    assert time.monotonic() - began < 5 + within_a_second()
    assert (
        found.text
        == f"127.0.0.1:{server.port} accepts connections, but does not respond within 5 s"
    )


def test_failing_server_suggests_log(server: FaultServer) -> None:
    for _ in range(3):
        server.will(MODELS, *text_answer(500, "out of memory"))
    found = look("vllm", server.url)
    assert found.state == "problem"
    assert "log" in found.fix


def test_failing_proxy_suggests_no_proxy(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_default_address_without_a_server_is_no_problem(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the usual ports, programs of the person who runs the tests may listen."""
    with FaultServer() as closed:
        closed.refuse()
        running = {"ollama": closed, "vllm": server, "instructlab": closed, "lmstudio": closed,
                   "llamacpp_server": closed}  # fmt: skip
        urls = {f"{name}_base_url": one.url for name, one in running.items()}
        for field, url in urls.items():
            monkeypatch.setattr(Settings.model_fields[field], "default", url)
        found = asyncio.run(check_servers(settings(**urls), ApiKeys()))
    assert found == [
        Finding("vllm", "ok", f"127.0.0.1:{server.port}: 2 models (tiny, big)"),
        Finding(
            "servers",
            "ok",
            f"not running at their usual addresses: ollama (127.0.0.1:{closed.port})",
        ),
    ]


def test_hub_check_sends_no_token(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_tulips")
    (found,) = asyncio.run(check_hub())
    assert found == Finding("hub", "ok", f"127.0.0.1:{server.port} responds")
    (request,) = server.received
    assert request.method == "HEAD"
    assert "hf_tulips" not in repr(request.headers)


def test_hub_without_response_times_out(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.will("/", Hold())
    began = time.monotonic()
    (found,) = asyncio.run(check_hub())
    assert time.monotonic() - began < 3 + within_a_second()
    assert (found.state, "does not respond within 3 s" in found.text) == ("warn", True)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://hub.invalid", "there is no host hub.invalid (no network?)"),
        ("http://127.0.0.1:9", "No server is listening"),
    ],
)  # fmt: skip
def test_unreachable_hub_is_a_warning(
    url: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    (found,) = asyncio.run(check_hub())
    assert found.state == "warn"
    assert expected in found.text
    assert found.fix


def test_hub_is_not_requested_offline(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (found,) = asyncio.run(check_hub())
    assert (found.state, server.received) == ("ok", [])


def test_keys_are_listed_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_tulips")
    for provider in PROVIDERS.values():
        monkeypatch.delenv(provider.key_variable, raising=False)
    (found,) = check_keys(ApiKeys())
    assert found.text.startswith(
        "set: HF_TOKEN; not set: OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY"
    )


def test_set_keys_of_providers_are_listed_with_their_backends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for provider in PROVIDERS.values():
        monkeypatch.delenv(provider.key_variable, raising=False)
    monkeypatch.setenv("GROQ_API_KEY", "gsk-tulips")
    (found,) = check_keys(ApiKeys())
    variables = [p.key_variable for p in PROVIDERS.values() if p.key_variable]
    unset = ", ".join(name for name in (*variables, "HF_TOKEN") if name != "GROQ_API_KEY")
    assert found.text == f"set: GROQ_API_KEY (-b groq); not set: {unset}"
    # A set key is no reason to send a request.
    assert "groq" not in {f.name for f in asyncio.run(check_servers(settings(), ApiKeys()))}


def test_blocking_function_times_out() -> None:
    go = threading.Event()

    async def wait() -> None:
        with pytest.raises(TimeoutError):
            await run_in_thread(lambda: go.wait(10), 0.1)
        with pytest.raises(ZeroDivisionError):
            await run_in_thread(lambda: 1 / 0, 5)
        assert await run_in_thread(lambda: 7, 5) == 7

    asyncio.run(wait())
    go.set()
