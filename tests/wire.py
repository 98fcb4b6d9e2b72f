"""What a scripted server does on the wire, step by step, and whole answers made of such steps.

    server.will(CHAT, *sse_words("Hello", " there"))                          # a good answer
    server.will(CHAT, *sse(delta("Hel"), done=False), Hold())             # then silence
    server.will(CHAT, *sse(delta("Hel"), done=False), Cut())              # then a severed body
    server.will(CHAT, *recut(sse_words("Grüße"), 1))                          # byte by byte
    server.will(CHAT, *json_answer(429, {}, {"Retry-After": "1"}))        # an error
    server.will(CHAT, *sse(b"", delta("Hel"), b""))                       # heartbeats
    server.will(CHAT, Head(200, SSE), Repeat(b"data: x\\n", 1 << 30))      # an event without an end
    server.will(CHAT, *sse_words("Hello"), Slow(b": ping\\n\\n" * 99, 0.1))     # a trickle after the end
    server.will(CHAT, *zipped(sse_words("Hello"), "gzip", "gzip"))            # compressed twice

An answer that comes to the end of its script is terminated as HTTP requires it, without `End()`.
"""

from __future__ import annotations

import gzip
import json
import math
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

SSE = {"Content-Type": "text/event-stream; charset=utf-8"}
NDJSON = {"Content-Type": "application/x-ndjson"}
_ZIPPERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@dataclass(frozen=True, slots=True)
class Head:
    """The status and the headers; a body without a named length is sent in chunks.

    With neither a length nor chunks, the body ends where the connection does.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    chunked: bool = True


@dataclass(frozen=True, slots=True)
class Send:
    """A piece of the body, in a chunk of its own where the body is chunked."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Slow:
    """A piece of the body, byte by byte."""

    data: bytes
    per_byte_s: float


@dataclass(frozen=True, slots=True)
class Repeat:
    """A piece of the body, so many times."""

    data: bytes
    count: int


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes put on the socket as they are."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Some seconds of silence."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Silence until the client leaves or `go` is set, from any thread."""

    go: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset: what a crashed machine or a firewall does."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection is closed as if all were well, wherever the body is."""


@dataclass(frozen=True, slots=True)
class End:
    """The body ends as it should."""


Step = Head | Send | Slow | Repeat | Raw | Pause | Hold | Reset | Cut | End


def sse(*objects: Any, done: bool = True, eol: bytes = b"\n") -> list[Step]:
    """Return an answer of server-sent events."""
    return [Head(200, SSE), *events(*objects, done=done, eol=eol)]


def events(*objects: Any, done: bool = True, eol: bytes = b"\n") -> list[Step]:
    """Return one event for each object, without a head; bytes are sent as they are."""
    data = [*map(_dump, objects), *([b"[DONE]"] if done else [])]
    return [Send(b"data: " + one + eol + eol) for one in data]


def ndjson(*objects: Any, eol: bytes = b"\n") -> list[Step]:
    """Return an answer of one line for each object; bytes are sent as they are."""
    return [Head(200, NDJSON), *lines(*objects, eol=eol)]


def lines(*objects: Any, eol: bytes = b"\n") -> list[Step]:
    """Return one line for each object, without a head; bytes are sent as they are."""
    return [Send(_dump(one) + eol) for one in objects]


def delta(
    content: str | None = None, *, finish: str | None = None, model: str = "tiny", **fields: Any
) -> dict[str, Any]:
    """Return a chunk of a chat completion; more fields of its delta have names (``role=``)."""
    change = fields if content is None else {**fields, "content": content}
    choice = {"index": 0, "delta": change, "logprobs": None, "finish_reason": finish}
    return {**_completion(model), "choices": [choice]}


def token_entry(text: str, alternatives: int) -> dict[str, Any]:
    """Return a token with its probability, 1/2, and alternatives with 1/2, 1/4 and so on."""

    def entry(token: str, halves: int) -> dict[str, Any]:
        # As OpenAI writes one: half of a pair is no text of its own.
        data = list(token.encode("utf-8", "surrogatepass"))
        return {"token": token, "bytes": data, "logprob": halves * math.log(0.5)}

    others = [entry(text if n == 1 else f" other{n}", n) for n in range(1, alternatives + 1)]
    return {**entry(text, 1), "top_logprobs": others}


def usage(prompt: int, completion: int, model: str = "tiny") -> dict[str, Any]:
    """Return the chunk after the last one, with the counts of tokens and without choices."""
    return {**_completion(model), "choices": [], "usage": counts(prompt, completion)}


def counts(prompt: int, completion: int) -> dict[str, int]:
    """Return the counts of tokens as OpenAI names them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def sse_words(
    *texts: str,
    finish: str | None = "stop",
    prompt_tokens: int | None = None,
    model: str = "tiny",
    done: bool = True,
    logprobs: int | None = None,
) -> list[Step]:
    """Return a whole streamed chat completion; with counts where `prompt_tokens` is given.

    With `logprobs`, each text is a token with so many alternatives.
    """
    pieces = [delta(text, model=model) for text in texts]
    if logprobs is not None:
        for piece, text in zip(pieces, texts, strict=True):
            piece["choices"][0]["logprobs"] = {"content": [token_entry(text, logprobs)]}
    chunks = [delta("", role="assistant", model=model), *pieces]
    if finish is not None:
        chunks.append(delta(finish=finish, model=model))
    if prompt_tokens is not None:
        chunks.append(usage(prompt_tokens, len(texts), model))
    return sse(*chunks, done=done)


def json_answer(status: int, value: Any, headers: Mapping[str, str] | None = None) -> list[Step]:
    """Return an answer of one JSON value; bytes are sent as they are."""
    return _sized(status, "application/json", _dump(value), headers)


def text_answer(status: int, text: str) -> list[Step]:
    """Return an answer of plain text."""
    return _sized(status, "text/plain; charset=utf-8", text.encode())


def html_answer(status: int, headers: Mapping[str, str] | None = None) -> list[Step]:
    """Return the page of a proxy that could not reach the server behind it."""
    title = f"{status} {_phrase(status)}"
    page = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return _sized(status, "text/html", page.encode(), headers)


def error_answer(
    status: int,
    message: str,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> list[Step]:
    """Return an error as OpenAI and most who are compatible with it write it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return json_answer(status, {"error": error}, headers)


def busy(headers: Mapping[str, str] | None = None) -> list[Step]:
    """Return what uvicorn sends beyond its `limit_concurrency`, as `ilab model serve` does while it works."""
    named = {"Connection": "close", **(headers or {})}
    return _sized(503, "text/plain; charset=utf-8", b"Service Unavailable", named)


def redirect(url: str, status: int = 307) -> list[Step]:
    """Return an answer that sends the client elsewhere."""
    return _sized(status, "text/plain", b"", {"Location": url})


def split_everywhere(data: bytes) -> list[Step]:
    """Return a step for each byte."""
    return [Send(data[i : i + 1]) for i in range(len(data))]


def zipped(script: Iterable[Step], *encodings: str) -> list[Step]:
    """Return a script of a head and sends with its body compressed, in the order of `encodings`."""
    head, *sends = script
    assert isinstance(head, Head)
    data = b"".join(step.data for step in sends if isinstance(step, Send))
    for encoding in encodings:
        data = _ZIPPERS[encoding](data)
    named = {name: value for name, value in head.headers.items() if name != "Content-Length"}
    return [Head(head.status, {**named, "Content-Encoding": ", ".join(encodings)}), Send(data)]


def recut(script: Iterable[Step], size: int) -> list[Step]:
    """Return the script with its body, up to the first step that is no `Send`, cut anew."""
    steps = list(script)
    heads = [step for step in steps if isinstance(step, Head)]
    sends = [step for step in steps if isinstance(step, Send)]
    others = steps[len(heads) + len(sends) :]
    assert steps == [*heads, *sends, *others], "only a script of heads, sends and a others is recut"
    data = b"".join(step.data for step in sends)
    pieces = [Send(data[i : i + size]) for i in range(0, len(data), size)]
    return [*heads, *pieces, *others]


def head_bytes(head: Head) -> bytes:
    """Return the head of an answer as it travels."""
    fields = dict(head.headers)
    if not _has_length(head):
        fields |= {"Transfer-Encoding": "chunked"} if head.chunked else {"Connection": "close"}
    first = f"HTTP/1.1 {head.status} {_phrase(head.status)}"
    others = [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([first, *others, "", ""]).encode("latin-1")


def framing(head: Head) -> str:
    """Return where the body after this head ends: at its length, in chunks, or at the close."""
    if _has_length(head):
        return "length"
    return "chunked" if head.chunked else "close"


def _has_length(head: Head) -> bool:
    return any(name.lower() == "content-length" for name in head.headers)


def _sized(
    status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None
) -> list[Step]:
    named = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
    return [Head(status, named), Send(body)]


def _completion(model: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_760_000_000,
        "model": model,
    }


def _dump(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return json.dumps(value, ensure_ascii=False).encode()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
