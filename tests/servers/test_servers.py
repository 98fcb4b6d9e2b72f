"""The remote backends on real servers: what the doubles cannot prove."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from llm_magic.errors import AuthenticationFailed, LLMMagicError, ModelNotFound, RequestFailed
from llm_magic.session import Session
from llm_magic.session.requests import Request
from llm_magic.types import Reply
from tests.kernels import within_a_second
from tests.scripted import settings
from tests.servers.processes import KEY, Server

pytestmark = pytest.mark.servers
QUESTION = "What is the capital of France?"
STORY = "Write a very long story about a fox, with all details."


@dataclass
class Case:
    """A real server, and the backend that is meant for it."""

    backend: str
    server: Server
    session: Session

    def load(self, **more: Any) -> None:
        """Load its model."""
        load(self.session, self.server, **{"backend": self.backend, **more})

    @property
    def counts(self) -> bool:
        """Whether the server sends the counts of tokens in a stream: llama-cpp-python does not."""
        return self.server.kind not in {"llamacpp", "instructlab"}


def load(session: Session, server: Server, **more: Any) -> None:
    """Load the model of a server, with its key."""
    key = {"key_env": "SERVER_KEY"} if server.key else {}
    session.load(**{"model": server.model, "base_url": server.url, **key, **more})


# The fixture of each server, and the backend for it.
CASES = {
    "vllm": "vllm",
    "llamacpp": "instructlab",
    "ilab": "instructlab",
    "litellm": "openai",
    "transformers_serve": "openai",
}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    session = Session(settings())
    made = Case(CASES[request.param], request.getfixturevalue(request.param), session)
    made.load()
    yield made
    session.close()


def test_reply_streams_with_finish_reason(case: Case) -> None:
    chunks = list(case.session.stream(QUESTION, temperature=0, max_new_tokens=32))
    reply = case.session.last
    assert reply is not None
    assert len([chunk for chunk in chunks if chunk.text]) > 3
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert reply.finish_reason in {"stop", "length"}
    counted = reply.usage.completion_tokens
    # Where the server sends none, none are invented.
    assert counted and counted <= 32 if case.counts else counted is None


def test_default_options_are_accepted(case: Case) -> None:
    reply = case.session.generate(QUESTION, max_new_tokens=12)
    assert reply.finish_reason in {"stop", "length"}


def test_token_limit_is_applied(case: Case) -> None:
    reply = case.session.generate(STORY, max_new_tokens=5)
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens in {5, None}


def test_stop_string_ends_reply(case: Case) -> None:
    reply = case.session.generate("Count: 1, 2, 3, 4, 5, 6, 7, 8", temperature=0, stop="5")
    assert reply.finish_reason == "stop"


def test_same_seed_gives_same_text(case: Case) -> None:
    ask = {"temperature": 1.2, "seed": 7, "max_new_tokens": 24}
    # The first one fills a cache of the prompt, whose figures differ in their last bits.
    _, first, second = (case.session.generate(STORY, **ask).text for _ in range(3))  # type: ignore[arg-type]
    assert first == second


def test_abandoned_stream_stops_server(case: Case) -> None:
    stream = case.session.stream(STORY, max_new_tokens=1500)
    next(chunk for chunk in stream if chunk.text)
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < within_a_second()
    # One that went on would answer this after the other, some 20 s later.
    began = time.monotonic()
    assert case.session.generate(QUESTION, max_new_tokens=2).text
    assert time.monotonic() - began < 10


def test_unknown_model_suggests_nearest_name(case: Case) -> None:
    with pytest.raises(ModelNotFound, match="Did you mean"):
        case.load(model=case.server.model + "x")


def test_load_without_name_uses_only_model(case: Case) -> None:
    case.load(model=None, name="unnamed")
    assert case.session.status().active_model == "unnamed"
    assert [info.name for info in case.session.models(case.backend)] == [case.server.model]


def test_long_prompt_raises_one_line(case: Case) -> None:
    if case.server.kind == "transformers":
        return  # it does not check: it answers after a minute
    with pytest.raises(LLMMagicError, match=r"context|too long|too large") as caught:
        case.session.generate("The fox runs over the hill. " * 1500)
    assert "\n" not in str(caught.value)


def test_many_concurrent_requests_succeed(case: Case) -> None:
    async def main() -> list[str]:
        requests = (case.session.agenerate(QUESTION, max_new_tokens=8) for _ in range(4))
        return [reply.finish_reason for reply in await asyncio.gather(*requests)]

    # InstructLab's server would cut three of them off, if they came at once.
    assert set(asyncio.run(main())) <= {"stop", "length"}


def test_list_of_models_does_not_abort_reply(case: Case) -> None:
    async def main() -> str:
        requests = asyncio.create_task(case.session.agenerate(STORY, max_new_tokens=60))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(case.session.models, case.backend)
        return (await requests).finish_reason

    assert asyncio.run(main()) in {"stop", "length"}


def test_vllm_counts_tokens(vllm: Server) -> None:
    session = Session(settings())
    session.load(vllm.model, backend="vllm", base_url=f"{vllm.url}/v1/")
    dry = session.dry_run(Request(QUESTION))
    reply = session.generate(QUESTION, max_new_tokens=2)
    session.close()
    assert dry.count.prompt_tokens == reply.usage.prompt_tokens
    assert dry.count.context_length == 2048


def test_load_waits_for_busy_ilab(ilab: Server) -> None:
    other, session = Session(settings()), Session(settings())
    try:
        for one in (other, session):
            load(one, ilab, backend="instructlab")
        stream = other.stream(STORY, max_new_tokens=200)
        next(chunk for chunk in stream if chunk.text)
        shown: list[str] = []

        def ask() -> Reply | None:
            for chunk in session.stream(QUESTION):
                shown.extend([chunk.notice] if chunk.notice else [])
            return session.last

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask)
            remaining = "".join(chunk.text for chunk in stream)
            assert str(answer.result())
        assert remaining, "the other's answer was not cut off"
        assert shown == ["waiting: the server is busy with other requests"]
    finally:
        other.close()
        session.close()


def test_ilab_replies_after_interrupt(ilab: Server) -> None:
    session = Session(settings())
    load(session, ilab, backend="instructlab")
    try:
        for _ in range(5):
            stream = session.stream(STORY, max_new_tokens=300)
            next(chunk for chunk in stream if chunk.text)
            stream.close()  # type: ignore[attr-defined]
            assert session.generate(QUESTION, max_new_tokens=4).text
    finally:
        session.close()


def test_ilab_can_be_loaded_repeatedly(ilab: Server) -> None:
    """It closes idle connections at once."""
    session = Session(settings())
    try:
        for _ in range(20):
            load(session, ilab, backend="instructlab", name="again")
            assert session.generate(QUESTION, max_new_tokens=2).text
            session.unload()
    finally:
        session.close()


def test_litellm_requires_key(litellm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-not-the-key-of-this-server")
    session = Session(settings())
    try:
        with pytest.raises(AuthenticationFailed, match=r"rejected the key in OTHER_KEY \(400\)"):
            load(session, litellm, backend="openai", key_env="OTHER_KEY")
        # Without a database, it fails where no key is given.
        with pytest.raises(RequestFailed, match=r"failed \(500\).* Check the log of the server\.$"):
            load(session, litellm, backend="openai", key_env=None)
    finally:
        session.close()


def test_vllm_holds_answer_to_type(vllm: Server) -> None:
    with contextlib.closing(Session(settings())) as session:
        load(session, vllm, backend="vllm")
        about: dict[str, Any] = {"temperature": 0, "max_new_tokens": 60}
        found = session.generate("Ada was born in 1815.", schema="name, born int", **about)
        assert found.value["born"] == 1815
        numbers = session.generate("Numbers?", schema=list[int], **about).value
        assert all(isinstance(number, int) for number in numbers)
        labels = ["Paris", 'the "city" of Rome']
        assert session.generate(QUESTION, choice=labels, **about).value in labels
        year = session.generate("When was Ada born?", regex=r"1[89]\d\d", **about)
        assert re.fullmatch(r"1[89]\d\d", year)
        lark = 'start: "yes" | "no"\n'
        assert session.generate("Is it late?", grammar=lark, **about) in {"yes", "no"}
        rows = session.map("{item}", ["Ada, 1815", "Alan, 1912"], schema="born int", **about)
        assert all(reply is not None and isinstance(reply.value["born"], int) for reply in rows)


def test_vllm_reports_the_probabilities_of_tokens(vllm: Server) -> None:
    with contextlib.closing(Session(settings())) as session:
        load(session, vllm, backend="vllm")
        reply = session.generate(QUESTION, temperature=0, max_new_tokens=12, logprobs=3)
        assert "".join(token.text for token in reply.tokens) == reply
        assert all(token.logprob <= 0 for token in reply.tokens)
        assert {len(token.alternatives) for token in reply.tokens} == {3}
        # Greedy: each token is the likeliest one.
        assert all(t.logprob == pytest.approx(t.alternatives[0][1]) for t in reply.tokens)
