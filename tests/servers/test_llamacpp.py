"""llama.cpp's own server, real and in CI: the doubles of servers are compared with it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import pytest

from llm_magic.errors import PromptTooLong
from llm_magic.session import Session
from tests.kernels import within_a_second
from tests.scripted import settings
from tests.servers.conftest import SHORT
from tests.servers.processes import Server, running

QUESTION = "What is the capital of France?"
STORY = "Write a very long story about a fox."


@pytest.fixture(scope="module")
def session(xllamacpp: Server) -> Iterator[Session]:
    made = Session(settings())
    made.load(xllamacpp.model, backend="llamacpp-server", base_url=xllamacpp.url)
    yield made
    made.close()


def test_reply_streams_with_usage(session: Session) -> None:
    chunks = list(session.stream(QUESTION, temperature=0, max_new_tokens=12))
    reply = session.last
    assert reply is not None
    assert len([chunk for chunk in chunks if chunk.text]) > 3
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert reply.finish_reason in {"stop", "length"}
    assert reply.usage.prompt_tokens
    assert reply.usage.completion_tokens


def test_load_reports_context_of_slot(session: Session) -> None:
    (info,) = session.status().models
    assert info.context_length == SHORT


def test_limit_and_stop_string_end_reply(session: Session) -> None:
    reply = session.generate(STORY, temperature=0, max_new_tokens=12)
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("length", 12)
    word = reply.text.split()[3]
    stopped = session.generate(STORY, temperature=0, max_new_tokens=12, stop=word)
    assert stopped.finish_reason == "stop"
    assert stopped.text == reply.text[: reply.text.index(word)]


def test_server_holds_answer_to_type(session: Session) -> None:
    about = {"temperature": 0, "max_new_tokens": 60}
    found = session.generate("Ada was born in 1815.", schema="name, born int", **about)  # type: ignore[arg-type]
    assert (found.value["name"], found.value["born"]) == ("Ada", 1815)
    numbers = session.generate("Numbers?", schema=list[int], **about).value  # type: ignore[arg-type]
    assert isinstance(numbers, list)
    labels = ["Paris", 'the "city" of Rome']
    assert session.generate(QUESTION, choice=labels, **about).value in labels  # type: ignore[arg-type]
    grammar = 'root ::= "yes" | "no"\n'
    assert session.generate("Is it late?", grammar=grammar, **about).value in {"yes", "no"}  # type: ignore[arg-type]


def test_same_seed_gives_same_text(session: Session) -> None:
    def ask(seed: int) -> str:
        return session.generate(STORY, temperature=1.2, seed=seed, max_new_tokens=8).text

    # The first one fills a cache of the prompt, whose figures differ in their last bits.
    ask(7)
    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_long_prompt_raises_with_counts(session: Session) -> None:
    with pytest.raises(
        PromptTooLong, match=rf"^The prompt has 3\d\d tokens, but .* reads at most {SHORT}\."
    ):
        session.generate("fox " * 280)
    assert session.generate(QUESTION, max_new_tokens=1).text


def test_abandoned_stream_stops_server(session: Session, xllamacpp: Server) -> None:
    stream = session.stream(STORY, max_new_tokens=200, extra={"ignore_eos": True})
    next(chunk for chunk in stream if chunk.text)
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < within_a_second()
    deadline = time.monotonic() + 5
    while "cancel task" not in xllamacpp.logged():
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.05)


def test_json_mode_reaches_the_server(session: Session) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    reply = session.generate("Give a number.", max_new_tokens=24, extra={"response_format": form})
    assert json.loads(reply.text)["n"] in {1, 2}


def test_instructlab_sends_concurrent_requests(xllamacpp: Server) -> None:
    """Its model list names llama.cpp, which does not drop an answer for another question."""
    session = Session(settings())
    session.load(xllamacpp.model, backend="instructlab", base_url=xllamacpp.url)
    notices: list[str] = []

    async def ask() -> None:
        async for chunk in session.astream(QUESTION, max_new_tokens=4, repetition_penalty=1.1):
            notices.append(chunk.notice)

    async def main() -> None:
        await asyncio.gather(*(ask() for _ in range(3)))

    asyncio.run(main())
    session.close()
    assert not any(notices), "none waited for a turn"


def test_context_shift_does_not_accept_longer_prompt() -> None:
    """Ollama's runner is llama.cpp with a context shift: `truncate: false` alone has to refuse."""
    session = Session(settings())
    with running("xllamacpp", None, "--context", str(SHORT), "--context-shift") as server:
        session.load(server.model, backend="openai", base_url=server.url)
        with pytest.raises(
            PromptTooLong, match=rf"^The prompt has 3\d\d tokens, but .* reads at most {SHORT}\."
        ):
            session.generate("fox " * 280)
        session.close()


def test_four_concurrent_requests_succeed(session: Session) -> None:
    async def main() -> list[tuple[str, bool]]:
        replies = (session.agenerate(QUESTION, max_new_tokens=4, seed=n) for n in range(4))
        return [(r.finish_reason, bool(r.text)) for r in await asyncio.gather(*replies)]

    assert asyncio.run(main()) == [("length", True)] * 4
