"""Answers that look odd on the wire and are whole all the same."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from llm_magic.session import Session
from llm_magic.types import Usage
from tests.fault_server import CHAT, FaultServer
from tests.remote_sessions import last, questions, session_on, still_works
from tests.until import until
from tests.wire import (
    SSE,
    Head,
    Pause,
    Raw,
    Send,
    Slow,
    Step,
    counts,
    delta,
    events,
    json_answer,
    recut,
    split_everywhere,
    sse,
    sse_words,
    usage,
)

TEXT = "Grüße 🦙"


@pytest.fixture(params=["vllm", "openai"])
def session(server: FaultServer, request: pytest.FixtureRequest) -> Iterator[Session]:
    with session_on(server, request.param) as made:
        yield made


def completion(text: str | None, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """Return a chat completion in one piece."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}}
    return {
        "object": "chat.completion",
        "choices": [{**choice, "finish_reason": finish}],
        "usage": counts(3, 2),
    }


def body(*steps: Step) -> bytes:
    """Return what a script sends after its head."""
    return b"".join(step.data for step in steps if isinstance(step, Send))


def packed(data: bytes, bits: int) -> list[Step]:
    """Return a compressed body, in small pieces."""
    packer = zlib.compressobj(wbits=bits)
    return split_everywhere(packer.compress(data) + packer.flush())


def bare(content: str, **more: Any) -> bytes:
    """Return a chunk with nothing in it that is not needed."""
    return json.dumps({"choices": [{"delta": {"content": content}, **more}]}).encode()


def content(value: Any) -> dict[str, Any]:
    """Return a chunk with any content."""
    return {"choices": [{"index": 0, "delta": {"content": value}}]}


def beside(text: str, finish: str | None = None) -> dict[str, Any]:
    """Return a chunk of a second choice, as servers send it that are asked for two."""
    return {"choices": [{"index": 1, "delta": {"content": text}, "finish_reason": finish}]}


def both(other: str, text: str) -> dict[str, Any]:
    """Return a chunk of two choices, the second one first."""
    return {"choices": [*beside(other)["choices"], *delta(text)["choices"]]}


WHOLE = sse_words("Grüße", " 🦙")
ESCAPED = json.dumps(TEXT).encode()
LAST = delta(finish="stop")
GZIP, DEFLATE = ({**SSE, "Content-Encoding": kind} for kind in ("gzip", "deflate"))


@pytest.mark.parametrize(
    "script",
    [
        recut(WHOLE, 1),
        recut(WHOLE, 7),
        recut(WHOLE, 1 << 20),
        sse(delta("Grüße"), delta(" 🦙"), delta(finish="stop"), eol=b"\r\n"),
        sse(delta("Grüße"), delta(" 🦙"), delta(finish="stop"), eol=b"\r"),
        recut(sse(delta("Grüße"), delta(" 🦙", finish="stop"), eol=b"\r\n"), 1),
        [Head(200, SSE, chunked=False), *WHOLE[1:]],
        [Head(200, {**SSE, "Content-Length": str(len(body(*WHOLE)))}), *WHOLE[1:]],
        [Head(200, {"Content-Type": "text/plain"}), *WHOLE[1:]],
        [Head(200, {}), *WHOLE[1:]],
        # The names of these three are those of files in web-platform-tests/eventsource. The last type is
        # an error for a browser; proxies change types.
        [Head(200, {"Content-Type": "text/event-stream;"}), *WHOLE[1:]],
        [Head(200, {"Content-Type": "text/event-stream;charset=windows-1252"}), *WHOLE[1:]],
        [Head(200, {"Content-Type": "text/x-bogus"}), *WHOLE[1:]],
        [Head(200, GZIP), *packed(body(*WHOLE), 31)],
        [Head(200, DEFLATE), *packed(body(*WHOLE), 15)],
        [Raw(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"), *WHOLE],
        [Head(200, SSE), Slow(b": wait\n\n", 0.001), *WHOLE[1:]],
        [Head(200, SSE), Send(b"event: message\nid: 1\nretry: 3\n"), *WHOLE[1:]],
        [Head(200, SSE), Send(b'data:{"choices":[{"delta":{"content":' + ESCAPED
                              + b'},"finish_reason":"stop"}]}')],
        sse({"choices": [{"delta": {"role": "assistant", "content": None}}]}, delta(TEXT, finish="stop")),
        sse(bare("Grüße"), bare(" 🦙", finish_reason="stop")),
        sse({"choices": []}, {"choices": None}, {}, delta(TEXT, finish="stop")),
        sse(delta(TEXT), {"choices": [{"delta": None, "finish_reason": "stop"}]}),
        sse(delta(TEXT), {"choices": [{"finish_reason": "stop"}]}),
        sse({"choices": [{"delta": {"content": [{"type": "text", "text": TEXT}]}}]}, delta(finish="stop")),
        sse({"choices": [{"message": {"content": TEXT}, "finish_reason": "stop"}]}),
        sse({**delta(TEXT, finish="stop"), "error": None}),
        sse(b"", delta("Grüße"), b" ", delta(" 🦙"), b"", delta(finish="stop"), b"", b" [DONE] "),
        [Head(200, SSE), Send(b"data\n\n"), *WHOLE[1:-1], Send(b"data:  [DONE] \n\n")],
        sse(delta(TEXT), delta(finish="stop"), b"", done=False),
        sse(beside("No"), delta("Grüße"), both("No", " 🦙"), delta(finish="stop"), beside("No", "length")),
        sse({"choices": [{"index": None, "delta": {"content": TEXT}, "finish_reason": "stop"}]}),
        sse(content([{"type": "text", "text": "Grüße"}, {"type": "text", "text": None}, " 🦙"]), LAST),
        sse(content([{"text": {"value": "Grüße"}}, {"text": [{"text": " 🦙"}]}, {"image": 1}, 2]), LAST),
        sse(content(False), delta(TEXT, reasoning={}), LAST),
        sse(content({}), delta(TEXT, reasoning=True, reasoning_content=5), LAST),
        sse(delta(TEXT, finish=""), delta(finish="null"), LAST),
        [Head(200, SSE), Send(b"\n\xef\xbb\xbfdata: {\n\n"), *WHOLE[1:]],
        json_answer(200, completion(TEXT)),
        json_answer(200, b"\xef\xbb\xbf" + json.dumps(completion(TEXT)).encode()),
        json_answer(200, {**completion(TEXT), "choices": [beside("No")["choices"][0],
                                                          completion(TEXT)["choices"][0]]}),
        json_answer(200, completion(TEXT), {"Content-Type": "application/json; charset=utf-8"}),
        [Head(200, {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
         Send(gzip.compress(json.dumps(completion(TEXT)).encode()))],
        [Head(200, {"Content-Type": "application/json"}),
         *split_everywhere(json.dumps(completion(TEXT), indent=1, ensure_ascii=False).encode())],
    ],
    ids=["bytes", "sevens", "at-once", "crlf", "cr", "crlf-bytes", "until-close", "length", "plain",
         "no-type",
         "format-mime-trailing-semicolon", "format-mime-bogus", "format-mime-valid-bogus",
         "gzip", "deflate", "hints", "comments", "fields", "no-blank-line", "null-content", "bare",
         "no-choices", "no-delta", "nothing-but-finish", "parts", "message", "no-error",
         "heartbeats", "bare-data", "heartbeat-at-the-end", "other-choice", "null-index", "null-part",
         "nested-parts", "false-content", "odd-reasoning", "not-finished", "late-mark", "json",
         "json-mark", "json-choices", "json-charset", "json-gzip", "json-bytes"],
)  # fmt: skip
def test_reply_is_independent_of_transport(
    session: Session, server: FaultServer, script: list[Step]
) -> None:
    server.will(CHAT, *script)
    reply = session.generate("?")
    assert (reply.text, reply.finish_reason) == (TEXT, "stop")
    assert len(questions(server)) == 1
    still_works(session)


def test_line_of_ten_megabytes_is_read(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *sse_words("x" * 10_000_000))
    assert len(session.generate("?").text) == 10_000_000
    still_works(session)


def test_reply_without_streaming_has_usage_and_reasoning(
    session: Session, server: FaultServer
) -> None:
    server.will(CHAT, *json_answer(200, completion("Hi", "length", reasoning_content="Hm.")))
    reply = session.generate("?")
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("Hi", "Hm.", "length")
    assert reply.usage == Usage(3, 2, None)
    server.will(CHAT, *json_answer(200, completion("<think>Hm.</think>Hi", None)))
    reply = session.generate("?")
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("Hi", "Hm.", "truncated")


def test_reasoning_is_separated_by_fields_and_tags(session: Session, server: FaultServer) -> None:
    for field in ("reasoning", "reasoning_content"):
        server.will(CHAT, *sse(delta(**{field: "Hm."}), delta("Hi", finish="stop")))
        assert session.generate("?").reasoning == "Hm."
    server.will(CHAT, *sse_words("<th", "ink>", "Hm.", "</thi", "nk>\n\n", "Hi"))
    reply = session.generate("?")
    assert (reply.text, reply.reasoning) == ("Hi", "Hm.")


def test_usage_in_every_chunk_is_not_summed(session: Session, server: FaultServer) -> None:
    one = {**delta("a"), "usage": counts(5, 1)}
    two = {**delta("b", finish="stop"), "usage": counts(5, 2)}
    server.will(CHAT, *sse(one, two))
    assert session.generate("?").usage == Usage(5, 2, None)
    server.will(CHAT, *sse(one, two, {"choices": [], "usage": {}}))
    assert session.generate("?").usage == Usage(5, 2, None)
    cached = usage(5, 2)
    cached["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    server.will(CHAT, *sse(delta("b", finish="stop"), cached))
    assert session.generate("?").usage == Usage(5, 2, 4)
    server.will(
        CHAT, *sse(delta("b", finish="stop"), {"choices": [], "usage": {"prompt_tokens": "x"}})
    )
    assert session.generate("?").usage == Usage(None, None, None)


def test_split_surrogate_pair_is_joined(session: Session, server: FaultServer) -> None:
    # Servers that write JSON in ASCII can cut a character between the tokens it is made of.
    server.will(CHAT, *sse(bare("\ud83e"), bare("\udd99", finish_reason="stop")))
    assert session.generate("?").text == "🦙"


def test_lone_surrogate_is_replaced_in_reply(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *sse(bare("a\ud83e", finish_reason="stop")))
    session.generate("?").text.encode()
    server.will(CHAT, *sse(bare("a\ud83e"), bare("b", finish_reason="stop")))
    session.generate("?").text.encode()


def test_lone_surrogate_is_replaced_in_prompt(session: Session, server: FaultServer) -> None:
    server.will(CHAT, *sse_words("Hi"))
    assert session.generate("a\ud83e").text == "Hi"
    assert questions(server)[0].json["messages"][0]["content"] == "a\ufffd"


def test_tokens_are_not_delayed(session: Session, server: FaultServer) -> None:
    server.will(
        CHAT, *sse(delta("one"), done=False), Pause(0.3), *events(delta(" two", finish="stop"))
    )
    chunks = [chunk for chunk in session.stream("?") if chunk.text]
    assert [chunk.text for chunk in chunks] == ["one", " two"]
    assert chunks[1].time - chunks[0].time > 0.2
    assert last(session).timing.first_token_s is not None


def test_connections_are_reused(session: Session, server: FaultServer) -> None:
    for _ in range(5):
        session.generate("one two")
    server.will(CHAT, *json_answer(200, completion("Hi")))
    session.generate("?")
    still_works(session)
    assert server.connections <= 2


def test_server_can_restart_between_replies(session: Session, server: FaultServer) -> None:
    session.generate("one")
    server.stop()
    server.start()
    assert session.generate("two").text == "two"
    assert len(questions(server)) == 2


def test_closed_connection_is_not_reused(session: Session, server: FaultServer) -> None:
    server.will(CHAT, Head(200, {**SSE, "Connection": "close"}), *sse_words("Hi")[1:])
    assert session.generate("?").text == "Hi"
    until(lambda: questions(server)[0].outcome == "whole", "the answer goes on")
    still_works(session)
    assert len(questions(server)) == 2
