"""Servers through a session: connections, turns, lists, pulls, and what becomes of all that."""

from __future__ import annotations

import asyncio
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ollama import Client

from llm_magic.errors import ModelNotFound, OptionError, PromptTooLong, RequestFailed
from llm_magic.notebook.display.messages import footer, models_table, ready_lines, status_table
from llm_magic.session import Session
from llm_magic.session.requests import Request
from tests.fault_server import CHAT, MODELS, FaultServer
from tests.http_server import HttpServer
from tests.kernels import within_a_second
from tests.ollama_models import OllamaModel
from tests.ollama_server import OllamaServer
from tests.scripted import settings
from tests.until import until
from tests.wire import (
    Head,
    Hold,
    Send,
    delta,
    error_answer,
    events,
    json_answer,
    ndjson,
    sse,
    sse_words,
)


@pytest.fixture
def ollama() -> Iterator[OllamaServer]:
    with OllamaServer() as running:
        yield running


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session(settings())
    yield made
    made.close()


def load(session: Session, server: HttpServer, model: str | None = "tiny", **more: Any) -> None:
    session.load(model, **{"backend": "openai", "base_url": server.url, **more})


def test_reset_settings_apply_to_existing_backend(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session()
    with FaultServer() as other:
        for running in (server, other):
            # As the doctor shows it: in the environment, then %llm_config --reset.
            monkeypatch.setenv("VLLM_BASE_URL", running.url)
            session.generation.reset()
            result = session.load_with_details("big", backend="vllm")
            assert not result.was_loaded
            assert result.info.server == running.url.partition("://")[2]
        assert session.load_with_details("big", backend="vllm").was_loaded
        session.close()


# -- connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
def test_running_reply_survives_unload(session: Session, server: FaultServer, early: bool) -> None:
    load(session, server)
    hold = Hold()
    begun, remaining = sse(delta("one "), done=False), events(delta("two", finish="stop"))
    server.will(CHAT, *([hold, *begun] if early else [*begun, hold]), *remaining)
    job = session.ask(Request("?"), background=True)
    server.wait_for(CHAT)
    session.unload()
    hold.go.set()
    assert job.result(5).text == "one two"
    assert len(server.requests_to(CHAT)) == 1
    until(lambda: server.open_now == 0, "a connection is left open")


def test_program_without_close_ends_silently(server: FaultServer) -> None:
    code = (
        "from llm_magic.session import Session; session = Session();"
        f"session.load('tiny', backend='openai', base_url={server.url!r});"
        "print(session.generate('one').text)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("one\n", "")
    until(lambda: server.open_now == 0, "a connection is left open")


def test_connection_is_reused(session: Session, server: FaultServer) -> None:
    load(session, server)
    for _ in range(10):
        session.generate("one two three")
    assert server.connections == 1


def test_64_requests_run_concurrently(session: Session, server: FaultServer) -> None:
    load(session, server)
    holds = [Hold() for _ in range(64)]
    for number, hold in enumerate(holds):
        server.will(CHAT, *sse(delta(f"{number} "), done=False), hold, *sse_words("end")[1:])

    async def main() -> set[str]:
        replies = [asyncio.create_task(session.agenerate("hi")) for _ in holds]
        while sum(hold.reached.is_set() for hold in holds) < 64:
            await asyncio.sleep(0.01)
        for hold in holds:
            hold.go.set()
        return {(await one).text for one in replies}

    assert asyncio.run(main()) == {f"{number} end" for number in range(64)}
    assert server.connections <= 65


def test_concurrency_limit_is_reported(session: Session, server: FaultServer) -> None:
    load(session, server, concurrency=2)
    server.pace = 0.02
    queued: list[bool] = []

    async def ask() -> None:
        async for chunk in session.astream("one two three"):
            queued.append(chunk.queued)

    async def main() -> None:
        await asyncio.gather(*(ask() for _ in range(6)))

    asyncio.run(main())
    assert server.connections <= 2
    assert sum(queued) == 4


def test_instructlab_gets_one_request_at_a_time(session: Session, server: FaultServer) -> None:
    load(session, server, backend="instructlab")
    server.pace = 0.01

    async def main() -> None:
        await asyncio.gather(*(session.agenerate("one two three") for _ in range(4)))

    asyncio.run(main())
    replies = server.requests_to(CHAT)
    for earlier, later in itertools.pairwise(replies):
        assert earlier.finished_at <= later.began
    assert server.connections == 1


@pytest.mark.parametrize(
    ("backend", "owner", "at_once"),
    [
        ("instructlab", "vllm", 4), ("instructlab", "llamacpp", 4), ("instructlab", "me", 1),
        ("openai", "me", 1), ("openai", "vllm", 4), ("vllm", "vllm", 4), ("instructlab", [1], 1),
    ],
)  # fmt: skip
def test_concurrency_depends_on_server(
    session: Session, backend: str, owner: object, at_once: int
) -> None:
    with FaultServer({"tiny": {"owned_by": owner}}) as server:
        load(session, server, backend=backend)
        assert most_at_once(session, server, at_once) == at_once
        # A number that the user names counts more.
        load(session, server, backend=backend, concurrency=2)
        assert most_at_once(session, server, 2) == 2


def test_concurrency_is_detected_at_each_load(session: Session) -> None:
    """InstructLab's server can be started again with another backend, at the same address."""
    with FaultServer({"tiny": {"owned_by": "me"}}) as server:
        for owner, at_once in (("vllm", 4), ("me", 1)):
            server.models = {"tiny": {"owned_by": owner}, owner: {"owned_by": owner}}
            load(session, server, owner, backend="instructlab")
            assert most_at_once(session, server, at_once) == at_once


def most_at_once(session: Session, server: FaultServer, expected: int) -> int:
    """Ask four questions at once, and return how many of them the server had at the same time."""
    server.received.clear()
    holds = [Hold() for _ in range(4)]
    for hold in holds:
        server.will(CHAT, hold, *sse_words("yes"))

    async def main() -> int:
        replies = [asyncio.create_task(session.agenerate("?")) for _ in holds]
        async with asyncio.timeout(30):
            while sum(hold.reached.is_set() for hold in holds) < expected:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # for those that are too many
        server_has = sum(hold.reached.is_set() for hold in holds)
        for hold in holds:
            hold.go.set()
        await asyncio.gather(*replies)
        return server_has

    return asyncio.run(main())


def test_load_warns_if_server_is_not_vllm(session: Session) -> None:
    owners: dict[str, dict[str, Any]] = {
        "llamacpp": {"owned_by": "llamacpp"},
        "real": {"owned_by": "vllm"},
        "none": {"owned_by": None},
    }
    with FaultServer(owners) as server:
        notes = {
            name: " ".join(
                session.load_with_details(name, backend="vllm", base_url=server.url).notes
            )
            for name in owners
        }
    assert notes["llamacpp"] == (
        f"Warning: 127.0.0.1:{server.port} does not look like vLLM: its models report the owner"
        " 'llamacpp'. It may ignore"
        " top_k and repetition_penalty. Use -b openai for other OpenAI-compatible servers."
    )
    assert notes["real"] == notes["none"] == ""


# -- what a server has ----------------------------------------------------------------------------


def test_context_length_comes_from_server(session: Session) -> None:
    with FaultServer({"m": {"max_model_len": 2048}}) as server:
        load(session, server, "m", backend="vllm")
        assert session.status().models[0].context_length == 2048
        assert session.status().models[0].server == server.url.removeprefix("http://")


def test_server_without_list_can_be_used(session: Session, server: FaultServer) -> None:
    server.will(MODELS, *error_answer(404, "no such route"))
    result = session.load_with_details("tiny", backend="openai", base_url=server.url)
    assert any("lists no models" in note for note in result.notes)
    assert session.generate("hello").text == "hello"


def test_unlisted_model_is_requested_by_name(session: Session, server: FaultServer) -> None:
    server.will(f"{MODELS}/alias", *json_answer(200, {"id": "alias", "object": "model"}))
    load(session, server, "alias")
    assert session.status().active_model == "alias"


def test_v1_in_path_is_optional(session: Session) -> None:
    class Elsewhere(FaultServer):
        """Has its API where some gateways have it."""

        def answer(self, request: Any) -> Any:
            request.path = request.path.replace("/api/paas/v4", "/v1").replace("/bare", "/v1")
            yield from super().answer(request)

    with Elsewhere() as server:
        for path in ("", "/", "/v1", "/v1/", "/api/paas/v4", "/bare"):
            load(session, server, base_url=f"{server.url}{path}")
            assert session.generate("found it").text == "found it"


def test_default_model_belongs_to_default_backend(server: FaultServer) -> None:
    session = Session(settings(backend="local", model="some/local-model"))
    with pytest.raises(OptionError, match=r"lists \d models"):
        load(session, server, None)
    session.close()
    session = Session(settings(backend="vllm", model="big", vllm_base_url=server.url))
    assert session.load().name == "big"
    session.close()


def test_models_lists_server_of_loaded_model(session: Session, server: FaultServer) -> None:
    load(session, server)
    assert [info.name for info in session.models("openai")] == ["tiny", "big"]
    with FaultServer({"other": {}}) as other:
        assert [i.name for i in session.models("openai", base_url=other.url)] == ["other"]
    assert session.generate("still there").text == "still there"


def test_odd_list_entries_are_ignored(session: Session, server: FaultServer) -> None:
    entries = [1, {"id": None}, {"id": "odd", "meta": 3, "max_model_len": "many"}, None]
    server.will(MODELS, *json_answer(200, {"data": entries}))
    assert [info.name for info in session.models("openai", base_url=server.url)] == ["odd"]
    value: Any
    for value in (None, 3, "x", [], {}, {"data": None}):
        server.will(MODELS, *json_answer(200, value))
        assert session.models("openai", base_url=server.url) == []


def test_long_list_is_truncated(session: Session, server: FaultServer) -> None:
    entries = [{"id": f"model-{number:06}"} for number in range(100_000)]
    server.will(MODELS, *json_answer(200, {"data": entries}))
    listed = session.models("openai", base_url=server.url)
    assert len(listed) == len(session.known_models("openai", server.url)) == 10_000
    table = models_table(listed, ())
    assert len(table.rows) == 500
    assert table.note == (
        "… and 9,500 more. Type the start of a name after %llm_load and press Tab."
    )
    server.will(MODELS, *json_answer(200, {"data": entries}))
    began = time.monotonic()
    with pytest.raises(ModelNotFound, match='Did you mean "model-00'):
        load(session, server, "model-00")
    assert time.monotonic() - began < 10
    server.will(MODELS, *json_answer(200, {"data": entries}))
    load(session, server, "model-099999")  # beyond what is listed


def test_long_name_is_truncated_in_display(session: Session, server: FaultServer) -> None:
    long = "m" * 600
    server.models = {long: {"owned_by": "o" * 600}, "x" * 100_000: {}}
    assert [info.name for info in session.models("openai", base_url=server.url)] == [long]
    result = session.load_with_details(long, backend="vllm", base_url=server.url)
    reply = session.generate("hello")
    shown = [
        *ready_lines(result),
        repr(models_table([result.info], ())),
        repr(status_table(session.status())),
        footer(reply),
    ]
    assert all("m" * 199 + "…" in text for text in (shown[0], *shown[-3:]))
    assert max(map(len, "\n".join(shown).splitlines())) < 500
    with pytest.raises(ModelNotFound) as caught:
        load(session, server, "other")
    assert len(str(caught.value)) < 500


def test_failed_load_keeps_previous_model(session: Session, server: FaultServer) -> None:
    load(session, server)
    with pytest.raises(ModelNotFound):
        load(session, server, "nothing-like-it")
    with pytest.raises(OptionError, match="name tiny is already used"):
        load(session, server, "big", name="tiny", keep=True)
    assert session.generate("still there").text == "still there"


# -- answers --------------------------------------------------------------------------------------


def test_reply_does_not_wait_for_end_of_response(session: Session, server: FaultServer) -> None:
    load(session, server)
    server.will(CHAT, *sse_words("all", " of it", prompt_tokens=3), Hold())
    began = time.monotonic()
    reply = session.generate("hello")
    assert time.monotonic() - began < within_a_second()
    assert (reply.text, reply.finish_reason, reply.usage.prompt_tokens) == ("all of it", "stop", 3)


def test_reply_without_streaming_is_accepted(session: Session, server: FaultServer) -> None:
    load(session, server)
    message = {"role": "assistant", "content": "all at once", "reasoning": "why not"}
    choice = {"message": message, "finish_reason": "length"}
    server.will(CHAT, *json_answer(200, {"choices": [choice], "usage": {"completion_tokens": 3}}))
    reply = session.generate("hello")
    assert (reply.text, reply.reasoning, reply.finish_reason) == (
        "all at once", "why not", "length",
    )  # fmt: skip
    assert reply.usage.completion_tokens == 3


def test_empty_reply_raises(session: Session, server: FaultServer) -> None:
    load(session, server)
    server.will(CHAT, Head(200, {"Content-Type": "text/event-stream"}))
    with pytest.raises(RequestFailed, match="Check whether the prompt exceeds its context"):
        session.generate("hello")


def test_token_counts_come_from_server_or_are_none(session: Session, server: FaultServer) -> None:
    load(session, server)
    server.will(CHAT, *sse_words("a", " b", " c"))
    reply = session.generate("hello")
    assert (reply.usage.completion_tokens, reply.timing.tokens_per_s) == (None, None)
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    server.will(CHAT, *sse(delta("x", finish="stop"), {"choices": [], "usage": usage}))
    reply = session.generate("hello")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (9, 4)
    assert (reply.usage.cached_tokens, reply.usage.reasoning_tokens) == (8, None)
    usage["completion_tokens_details"] = {"reasoning_tokens": 3}
    server.will(CHAT, *sse(delta("x", finish="stop"), {"choices": [], "usage": usage}))
    assert session.generate("hello").usage.reasoning_tokens == 3


_CHARGED = {"upstream_inference_cost": 0.2}
_WRONG: list[Any] = ["1", True, -1, math.inf, math.nan, 10**400, {}, [1], None]


@pytest.mark.parametrize(
    ("reported", "cost"),
    [
        # OpenRouter: its charge, which a key of the user's at the provider excludes the provider's from.
        ({"cost": 0.25, "cost_details": {"upstream_inference_cost": 0.25}}, 0.25),
        ({"cost": 0, "is_byok": False}, 0.0),
        ({"cost": 0.05, "is_byok": True, "cost_details": _CHARGED}, 0.25),
        ({"cost": 0.05, "is_byok": True, "cost_details": {"upstream_inference_cost": None}}, None),
        ({"cost": 0.05, "is_byok": True}, None),
        # xAI.
        ({"cost_in_usd_ticks": 37_756_000}, 0.0037756),
        ({}, None),
        *(({"cost": wrong}, None) for wrong in _WRONG),
    ],
)  # fmt: skip
def test_cost_is_that_of_the_server_or_none(
    session: Session, server: FaultServer, reported: dict[str, Any], cost: float | None
) -> None:
    load(session, server)
    usage = {"prompt_tokens": 9, "completion_tokens": 4, **reported}
    server.will(CHAT, *sse(delta("x", finish="stop"), {"choices": [], "usage": usage}))
    reply = session.generate("hello")
    assert reply.usage.cost == (None if cost is None else pytest.approx(cost))
    assert footer(reply).endswith("$0.25") == (cost == 0.25)


# -- Ollama ---------------------------------------------------------------------------------------


def test_ollama_reports_model_details(session: Session, ollama: OllamaServer) -> None:
    info = session.load("qwen3:0.6b", backend="ollama", base_url=ollama.url)
    assert (info.dtype, info.size) == ("Q4_K_M", 522_653_767)
    reply = session.generate("What is it?")
    assert reply.usage.prompt_tokens
    assert reply.usage.completion_tokens
    listed = {info.name: info for info in session.models("ollama")}
    assert listed["qwen3:0.6b"].memory_bytes
    assert listed["llama3.2:latest"].memory_bytes is None


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/api", "/"])
def test_ollama_accepts_address_of_openai_api(
    session: Session, ollama: OllamaServer, path: str
) -> None:
    session.load("llama3.2", backend="ollama", base_url=f"{ollama.url}{path}")
    assert session.generate("found it").text == "found it"


def test_ollama_reasoning_is_separate(session: Session, ollama: OllamaServer) -> None:
    session.load("qwen3:0.6b", backend="ollama", base_url=ollama.url)
    reply = session.generate("What is it?", extra={"think": True})
    assert reply.reasoning
    assert reply.reasoning not in reply.text


def test_missing_ollama_model_suggests_pull(session: Session, ollama: OllamaServer) -> None:
    with pytest.raises(ModelNotFound, match=r"-b ollama --base-url \S+ --pull"):
        session.load("gemma3:270m", backend="ollama", base_url=ollama.url)
    with pytest.raises(ModelNotFound, match=r"could not pull no-such: .*file does not exist"):
        session.load("no-such", backend="ollama", base_url=ollama.url, pull=True)
    seen: list[tuple[str, float | None]] = []

    def sample() -> None:
        if session.progress is not None:
            seen.append((session.progress.stage, session.progress.share))

    ollama.pace = 0.15
    session.load_with_details(
        "gemma3:270m", backend="ollama", base_url=ollama.url, pull=True, on_wait=sample
    )
    shares = [share for stage, share in seen if stage == "pulling on the server" and share]
    assert shares == sorted(shares)
    assert len(shares) > 2
    ollama.pace = 0
    assert session.generate("hello").text == "hello"


def test_interrupted_pull_raises(session: Session, ollama: OllamaServer) -> None:
    ollama.will("/api/pull", *ndjson({"status": "pulling manifest"}))
    from llm_magic.errors import LoadFailed

    with pytest.raises(LoadFailed, match="Load again to continue"):
        session.load("gemma3:270m", backend="ollama", base_url=ollama.url, pull=True)


def test_unload_frees_memory_of_local_ollama(session: Session, ollama: OllamaServer) -> None:
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    assert "it stays on" in session.unload().note
    assert not ollama.requests_to("/api/generate"), (
        "nothing was replies of it, it may be somebody else's"
    )
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    session.generate("hello")
    assert ollama.running
    assert "frees its memory" in session.unload().note
    assert not ollama.running


def test_other_server_at_ollama_address_raises(session: Session, server: FaultServer) -> None:
    with pytest.raises(RequestFailed, match="is not an Ollama server"):
        session.load("tiny", backend="ollama", base_url=server.url)


def test_prompt_beyond_ollama_context_raises(session: Session, ollama: OllamaServer) -> None:
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    with pytest.raises(PromptTooLong) as caught:
        session.generate("fox " * 5000)
    assert str(caught.value) == (
        f"The prompt has 5,001 tokens, but llama3.2 on 127.0.0.1:{ollama.port} reads at most 4,096. Shorten"
        " the prompt, or load the model with more context: -p num_ctx=N (N up to 131,072)."
    )
    assert session.generate("fox " * 5000, extra={"num_ctx": 8192}).text


def test_long_prompt_error_without_counts_names_context(
    session: Session, ollama: OllamaServer
) -> None:
    """Ollama before 0.30 sends no counts."""
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    session.generate("hello")
    old = {"error": "the input length exceeds the context length"}
    ollama.will("/api/chat", *json_answer(400, old))
    with pytest.raises(PromptTooLong, match=r"llama3\.2 reads 4,096 tokens\. Shorten the prompt"):
        session.generate("fox")


def test_alternating_clients_do_not_reload_model(session: Session, ollama: OllamaServer) -> None:
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    with Client(ollama.url) as other:
        for _ in range(3):
            assert session.generate("one two").text == "one two"
            answer = other.chat("llama3.2", [{"role": "user", "content": "three"}])
            assert answer.message.content == "three"
    assert ollama.loads == {"llama3.2:latest": 1}
    session.generate("fox", extra={"num_ctx": 8192})
    session.generate("fox", extra={"shift": False})
    assert ollama.loads == {"llama3.2:latest": 3}, "what somebody asks for is sent"


def test_load_reports_context_of_runner(session: Session, ollama: OllamaServer) -> None:
    with Client(ollama.url) as other:
        other.chat("llama3.2", [], options={"num_ctx": 2048})
        info = session.load("llama3.2", backend="ollama", base_url=ollama.url)
        assert info.context_length == 2048
        assert session.status().backend_details["context"] == (
            "2,048 of at most 131,072 tokens (-p num_ctx=N)"
        )
        session.generate("hello")
        assert session.status().backend_details["context"].startswith("4,096 of"), "reloaded"


def test_first_reply_updates_context_of_runner(session: Session, ollama: OllamaServer) -> None:
    info = session.load("llama3.2", backend="ollama", base_url=ollama.url)
    assert info.context_length is None, "nothing runs yet"
    assert session.status().backend_details["context"] == "at most 131,072 tokens"
    session.generate("hello")
    session.generate("hello")
    assert len(ollama.requests_to("/api/ps")) == 2, "once at the load, once after the first answer"
    context = session.status().backend_details["context"]
    assert context == "4,096 of at most 131,072 tokens (-p num_ctx=N)"


def test_context_of_runner_follows_the_option_of_a_request(
    session: Session, ollama: OllamaServer
) -> None:
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    session.generate("hello")
    for _ in range(2):
        reply = session.generate("fox " * 5000, extra={"num_ctx": 8192}, max_new_tokens=5)
        assert (reply.finish_reason, reply.context_full) == ("length", False)
        assert session.status().backend_details["context"].startswith("8,192 of")
    assert len(ollama.requests_to("/api/ps")) == 3, "once for each length"
    session.generate("hello")
    assert session.status().backend_details["context"].startswith("4,096 of")


def test_load_reports_context_of_modelfile(session: Session) -> None:
    model = OllamaModel("small", parameters={"num_ctx": (64,), "stop": ("x",)})
    with OllamaServer([model]) as server:
        info = session.load("small", backend="ollama", base_url=server.url)
        assert info.context_length == 64


@pytest.mark.parametrize("status", [404, 405])
def test_ollama_without_list_of_runners_can_be_used(
    session: Session, ollama: OllamaServer, status: int
) -> None:
    for _ in range(2):
        ollama.will("/api/ps", *json_answer(status, {"error": "not here"}))
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    assert session.generate("one two").text == "one two"


def test_slow_list_of_runners_does_not_delay_reply(session: Session, ollama: OllamaServer) -> None:
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    ollama.will("/api/ps", Hold())
    began = time.monotonic()
    assert session.generate("one two").text == "one two"
    assert time.monotonic() - began < 1 + within_a_second()
    assert session.generate("three").text == "three"


def test_ollama_finish_reasons_are_mapped(session: Session, ollama: OllamaServer) -> None:
    session.load("llama3.2", backend="ollama", base_url=ollama.url)
    half = {"message": {"role": "assistant", "content": "half"}, "done": False}
    ollama.will("/api/chat", *ndjson(half))
    assert session.generate("hello").finish_reason == "truncated"
    ollama.will("/api/chat", *ndjson(half), Send(b'{"message": {"content": "x"}, "done": tru'))
    reply = session.generate("hello")
    assert (reply.text, reply.finish_reason) == ("half", "truncated")
