"""Token probabilities of servers: what is requested, what is read, and what a server leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llm_magic.errors import OptionError
from llm_magic.types import TokenLogprob
from tests.fault_server import CHAT, FaultServer
from tests.ollama_server import OllamaServer
from tests.remote_sessions import questions, session_on
from tests.wire import delta, json_answer, ndjson, sse, sse_words, token_entry

HALF = math.log(0.5)


def joined(tokens: tuple[TokenLogprob, ...]) -> str:
    return "".join(token.text for token in tokens)


def entry(text: str, data: list[int] | None, logprob: Any = -1.0, top: Any = ()) -> dict[str, Any]:
    return {"token": text, "bytes": data, "logprob": logprob, "top_logprobs": top}


def part(text: str, *entries: Any) -> dict[str, Any]:
    """Return a chunk of a reply with the tokens in it."""
    chunk = delta(text)
    chunk["choices"][0]["logprobs"] = {"content": list(entries), "refusal": None}
    return chunk


@pytest.mark.parametrize("backend", ["openai", "vllm", "ollama"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_tokens_make_up_the_reply(backend: str, count: int) -> None:
    with (
        OllamaServer() if backend == "ollama" else FaultServer() as server,
        session_on(server, backend) as session,
    ):
        reply = session.generate("one two three", logprobs=count)
        sent = questions(server)[-1].json
    assert (reply, joined(reply.tokens)) == ("one two three", "one two three")
    assert {token.logprob for token in reply.tokens} == {HALF}
    alternatives = reply.tokens[0].alternatives
    assert alternatives == tuple((n, h * HALF) for n, h in zip(["one", " other2", " other3"][:count],
                                                               (1, 2, 3), strict=False))  # fmt: skip
    # llama.cpp reports nothing where 0 are requested.
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, max(count, 1))


@pytest.mark.parametrize("backend", ["openai", "ollama"])
def test_nothing_is_requested_by_default(backend: str) -> None:
    with (
        OllamaServer() if backend == "ollama" else FaultServer() as server,
        session_on(server, backend) as session,
    ):
        session.generate("one two")
        assert not {"logprobs", "top_logprobs"} & questions(server)[-1].json.keys()


def test_server_that_sends_none_leaves_the_tokens_empty(server: FaultServer) -> None:
    server.will(CHAT, *sse_words("Hello", " there"))
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=2)
    assert (reply, reply.tokens) == ("Hello there", ())


def test_bytes_of_a_character_in_several_tokens_are_joined(server: FaultServer) -> None:
    data = list("é😀".encode())
    server.will(
        CHAT,
        *sse(
            part("", entry("\\xc3", data[:1])), part("é", entry("\\xa9", data[1:2])),
            part("", entry("\\xf0\\x9f", data[2:4])), part("😀", entry("\\x98\\x80", data[4:])),
            delta(finish="stop"),
        ),
    )  # fmt: skip
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=0)
    assert [token.text for token in reply.tokens] == ["", "é", "", "😀"]
    assert joined(reply.tokens) == reply


def test_tokens_outside_the_text_are_omitted(server: FaultServer) -> None:
    server.will(
        CHAT,
        *sse(
            part("<think>", entry("<think>", None)), part("so", entry("so", None)),
            part("</think>", entry("</think>", None)),
            part("\n\nYes", entry("\n\n", None), entry("Yes", None)),
            part("", entry("<|im_end|>", None)), delta(finish="stop"),
        ),
    )  # fmt: skip
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=0)
    assert (reply, reply.reasoning) == ("Yes", "so")
    assert [token.text for token in reply.tokens] == ["Yes"]


def test_tokens_of_separate_reasoning_are_omitted(server: FaultServer) -> None:
    reasoned = part("", entry("hm", None))
    reasoned["choices"][0]["delta"] = {"reasoning_content": "hm"}
    server.will(CHAT, *sse(reasoned, part("Yes", entry("Yes", None)), delta(finish="stop")))
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=0)
    assert (reply.reasoning, [token.text for token in reply.tokens]) == ("hm", ["Yes"])


def test_tokens_after_a_stop_text_are_omitted(server: FaultServer) -> None:
    pieces = [part(text, token_entry(text, 1)) for text in ("one", " two", " three", " four")]
    server.will(CHAT, *sse(*pieces, delta(finish="stop")))
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=1, stop="o thr")
    assert (reply, [token.text for token in reply.tokens]) == ("one tw", ["one", " tw"])


def test_whole_reply_has_its_tokens(server: FaultServer) -> None:
    choice = {
        "index": 0, "message": {"role": "assistant", "content": "Hi you"}, "finish_reason": "stop",
        "logprobs": {"content": [token_entry("Hi", 2), token_entry(" you", 2)]},
    }  # fmt: skip
    server.will(CHAT, *json_answer(200, {"object": "chat.completion", "choices": [choice]}))
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=2)
    assert (reply, joined(reply.tokens)) == ("Hi you", "Hi you")


@pytest.mark.parametrize(
    "logprobs",
    [
        None, 5, [], {}, {"content": None}, {"content": 5}, {"content": [None, 5, {}, []]},
        {"content": [entry("Hi", None, "x"), entry("Hi", None, float("nan")), entry("Hi", None, True)]},
        {"content": [{"token": 5, "logprob": -1}]},
    ],
)  # fmt: skip
def test_unknown_format_is_no_error(server: FaultServer, logprobs: Any) -> None:
    chunk = delta("Hi")
    chunk["choices"][0]["logprobs"] = logprobs
    server.will(CHAT, *sse(chunk, delta(finish="stop")))
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=2)
    assert (reply, reply.tokens) == ("Hi", ())


@pytest.mark.parametrize("top", [None, 5, [None, 5, {}, {"token": 1, "logprob": -1}]])
@pytest.mark.parametrize("data", [None, 5, ["x"], [300], [True]])
def test_entry_without_valid_bytes_or_alternatives_has_its_text(
    server: FaultServer, top: Any, data: Any
) -> None:
    server.will(CHAT, *sse(part("Hi", entry("Hi", data, -0.5, top)), delta(finish="stop")))
    with session_on(server, "openai") as session:
        reply = session.generate("?", logprobs=2)
    assert reply.tokens == (TokenLogprob("Hi", -0.5),)


def test_older_ollama_sends_none() -> None:
    with OllamaServer() as server, session_on(server, "ollama") as session:
        message = {"role": "assistant", "content": "Hi"}
        end = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
        server.will("/api/chat", *ndjson({"message": message, "done": False}, end))
        reply = session.generate("?", logprobs=2)
    assert (reply, reply.tokens) == ("Hi", ())


def test_instructlab_is_an_error_before_the_request(server: FaultServer) -> None:
    with session_on(server, "instructlab") as session:
        with pytest.raises(OptionError) as caught:
            session.generate("?", logprobs=2)
        assert str(caught.value) == "instructlab does not support --logprobs. Remove it."
        assert questions(server) == []
        session.generation.update(logprobs=2)
        assert session.generate("one").tokens == ()


def test_server_cannot_score(server: FaultServer) -> None:
    with session_on(server, "vllm") as session:
        with pytest.raises(
            OptionError, match=r"^vllm cannot score given texts\. Load a local model"
        ):
            session.score("x", ["a", "b"])
        assert questions(server) == []


@pytest.mark.parametrize("name", ["logprobs", "top_logprobs"])
def test_fields_have_their_own_option(server: FaultServer, name: str) -> None:
    with session_on(server, "openai") as session, pytest.raises(OptionError) as caught:
        session.generate("?", extra={name: 1})
    assert str(caught.value).startswith(f"{name} has its own option. Use --logprobs K")
