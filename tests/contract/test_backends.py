"""The contract of every backend and of the example in docs: streams, ends, interrupts, errors."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from llm_magic.errors import (
    IncompleteReply,
    ModelError,
    ModelNotLoaded,
    OptionError,
    ServerUnreachable,
)
from llm_magic.types import Chunk
from tests.contract.conftest import QUESTION, REMOTE, Under
from tests.kernels import within_a_second
from tests.until import until
from tests.wire import Cut, Hold, delta, ndjson, sse

every = pytest.mark.parametrize("under", ["local", "llamacpp", "echo", *REMOTE], indirect=True)
remote = pytest.mark.parametrize("under", REMOTE, indirect=True)


@every
def test_reply_equals_joined_stream(under: Under) -> None:
    under.load()
    chunks = list(under.session.stream(QUESTION, **under.greedy, max_new_tokens=40))
    reply = under.session.last
    assert reply is not None
    assert len([chunk for chunk in chunks if chunk.text]) > 3
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert [c for c in chunks if c.finish_reason] == [chunks[-1]]
    assert reply.finish_reason in {"stop", "length"}
    assert chunks[-1].usage is not None
    assert reply.usage.completion_tokens
    assert reply.usage.prompt_tokens
    assert (reply.backend, reply.timing.first_token_s is not None) == (under.name, True)
    assert str(under.session.generate(QUESTION, **under.greedy, max_new_tokens=40)) == reply.text


@every
def test_token_limit_is_reported(under: Under) -> None:
    under.load()
    reply = under.session.generate(QUESTION, **under.greedy, max_new_tokens=3)
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("length", 3)


@every
def test_async_reply_is_equal(under: Under) -> None:
    under.load()
    plain = under.session.generate(QUESTION, **under.greedy, max_new_tokens=8)

    async def main() -> tuple[str, str]:
        reply = await under.session.agenerate(QUESTION, **under.greedy, max_new_tokens=8)
        parts = [
            chunk.text
            async for chunk in under.session.astream(QUESTION, **under.greedy, max_new_tokens=8)
        ]
        return reply.text, "".join(parts)

    assert asyncio.run(main()) == (plain.text, plain.text)


@every
def test_abandoned_stream_stops_work_and_keeps_partial_reply(under: Under) -> None:
    under.load()
    under.slowly()
    stream = under.session.stream(QUESTION, **under.greedy, max_new_tokens=4000)
    first = next(chunk for chunk in stream if chunk.text)
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < within_a_second()
    reply = under.session.last
    assert reply is not None
    assert reply.finish_reason == "cancelled"
    assert reply.text.startswith(first.text)
    if under.server is not None:
        assert under.server.requests_to(under.chat)[-1].left.wait(within_a_second()), (
            "the server went on"
        )
    assert under.session.generate("hi", max_new_tokens=2).text


@every
def test_cancelled_task_stops_work(under: Under) -> None:
    under.load()
    under.slowly()
    seen: list[Chunk] = []

    async def main() -> None:
        async def ask() -> None:
            async for chunk in under.session.astream(QUESTION, max_new_tokens=4000):
                seen.append(chunk)

        task = asyncio.create_task(ask())
        while not any(chunk.text for chunk in seen):
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(main())
    if under.server is not None:
        assert under.server.requests_to(under.chat)[-1].left.wait(within_a_second()), (
            "the server went on"
        )
    assert under.session.generate("hi", max_new_tokens=2).text


@every
def test_unknown_model_keeps_state(under: Under) -> None:
    under.load()
    with pytest.raises(ModelError, match=r"\.$|\?$|pull$|hub$|[a-z0-9]$") as caught:
        under.load(under.missing)
    assert under.missing.removeprefix("./") in str(caught.value)
    assert under.session.status().status == "Ready"
    assert under.session.generate("hi", max_new_tokens=2).text


@every
def test_invalid_option_raises_before_request(under: Under) -> None:
    under.load()
    before = len(under.server.requests_to(under.chat)) if under.server else 0
    with pytest.raises(OptionError, match="temperature=9"):
        under.session.generate("hi", temperature=9)
    with pytest.raises(OptionError, match=r"has its own option|echo does not support --param"):
        under.session.generate("hi", extra={"temperature": 1})
    if under.server is not None:
        assert len(under.server.requests_to(under.chat)) == before


@every
def test_tokens_of_a_reply_make_up_its_text_or_are_refused(under: Under) -> None:
    under.load()
    about: dict[str, Any] = {**under.greedy, "max_new_tokens": 12, "logprobs": 2}
    if under.name in {"instructlab", "echo"}:
        with pytest.raises(
            OptionError, match=rf"^{under.name} does not support --logprobs\. Remove"
        ):
            under.session.generate(QUESTION, **about)
        return
    reply = under.session.generate(QUESTION, **about)
    assert reply
    assert "".join(token.text for token in reply.tokens) == reply
    for token in reply.tokens:
        assert token.logprob <= 0
        assert len(token.alternatives) == 2
        assert token.alternatives[0][1] >= token.alternatives[1][1]
    # The first token is the likeliest one, also where the temperature allows others.
    if under.name in {"local", "llamacpp"}:
        hot: dict[str, Any] = {
            "temperature": 1.5,
            "seed": 3,
            "repetition_penalty": 1.9,
            "logprobs": 2,
        }
        other = under.session.generate(QUESTION, max_new_tokens=2, **hot)
        expected = [logprob for _, logprob in reply.tokens[0].alternatives]
        found = [logprob for _, logprob in other.tokens[0].alternatives]
        assert found == pytest.approx(expected, abs=0.02), "not of the raw distribution"


@every
def test_texts_are_scored_or_refused(under: Under) -> None:
    under.load()
    if under.name != "local":
        with pytest.raises(
            OptionError, match=rf"^{under.name} cannot score given texts\. Load a local"
        ):
            under.session.score(QUESTION, ["a", "b"])
        return
    likely, other = under.session.score(QUESTION, ["abc", "fed"])
    assert likely.logprob > other.logprob
    assert [token.text for token in likely.tokens] == ["a", "b", "c"]


@every
def test_dry_run_sends_nothing(under: Under) -> None:
    from llm_magic.session.requests import Request

    under.load()
    before = len(under.server.requests_to(under.chat)) if under.server else 0
    dry = under.session.dry_run(Request(QUESTION, system="Be brief."))
    assert [message.role for message in dry.messages] == ["system", "user"]
    assert dry.count.prompt_tokens is None or dry.count.prompt_tokens > 6
    if under.server is not None:
        assert len(under.server.requests_to(under.chat)) == before


@every
def test_unload_leaves_nothing(under: Under) -> None:
    before = {thread.name for thread in threading.enumerate()}
    under.load()
    under.session.generate("hi", max_new_tokens=2)
    under.session.unload()
    with pytest.raises(ModelNotLoaded):
        under.session.generate("hi")
    under.session.close()
    left = {t.name for t in threading.enumerate()} - before
    assert not {name for name in left if name.startswith("llm_magic")}
    if under.server is not None:
        server = under.server
        until(lambda: server.open_now == 0, "a connection is left open")


@remote
def test_stopped_server_error_contains_how_to_start_it(under: Under) -> None:
    under.load()
    assert under.server is not None
    under.server.stop()
    with pytest.raises(ServerUnreachable, match=r"http://127\.0\.0\.1:\d+"):
        under.session.generate("hi")
    with pytest.raises(ServerUnreachable, match=r"No server is listening .* (To start|Check)"):
        under.load(name="again")
    under.server.start()
    assert under.session.generate("hi").text == "hi"


@remote
def test_server_failure_keeps_partial_reply(under: Under) -> None:
    under.load()
    assert under.server is not None
    if under.name == "ollama":
        begun = ndjson({"message": {"role": "assistant", "content": "half"}, "done": False})
    else:
        begun = sse(delta("half"), done=False)
    under.server.will(under.chat, *begun, Cut())
    with pytest.raises(IncompleteReply, match="reply is incomplete") as caught:
        under.session.generate("hi")
    reply = caught.value.reply
    assert reply is under.session.last
    assert reply is not None
    assert (reply.text, reply.finish_reason) == ("half", "truncated")
    assert len(under.server.requests_to(under.chat)) == 1, "before again after a word was said"


@remote
def test_timeout_ends_reply(under: Under) -> None:
    under.load(idle_timeout=1)
    assert under.server is not None
    if under.name == "ollama":
        begun = ndjson({"message": {"role": "assistant", "content": "half"}, "done": False})
    else:
        begun = sse(delta("half"), done=False)
    under.server.will(under.chat, *begun, Hold())
    with pytest.raises(IncompleteReply, match="sent no data for 1 s"):
        under.session.generate("hi")
    assert under.session.last is not None
    assert under.session.last.text == "half"
