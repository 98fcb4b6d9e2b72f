"""Servers that send without an end, or what grows when it is read: memory stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import psutil
import pytest

from llm_magic.errors import (
    IncompleteReply,
    LLMMagicError,
    RequestFailed,
    ServerTimeout,
    ServerUnreachable,
)
from llm_magic.session import Session
from tests.fault_server import CHAT, MODELS, FaultServer
from tests.http_server import HttpServer
from tests.ollama_server import OllamaServer
from tests.remote_sessions import (
    IDLE_S,
    NOW,
    OLLAMA_CHAT,
    chat_path,
    checked_message,
    fails,
    last,
    questions,
    session_on,
    still_works,
)
from tests.scripted import settings
from tests.until import until
from tests.wire import (
    NDJSON,
    SSE,
    Head,
    Pause,
    Raw,
    Repeat,
    Send,
    Step,
    delta,
    events,
    ndjson,
    sse,
    sse_words,
    zipped,
)

JSON = {"Content-Type": "application/json"}
MIB = 1 << 20
MUCH = 1 << 30
# Far more than one answer takes, far less than what is sent.
MOST = 250 * MIB


@contextlib.contextmanager
def bounded(most: int = MOST) -> Iterator[None]:
    """See that the memory of the process does not grow by more than `most` meanwhile."""
    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peaks = [before]

    def sample() -> None:
        while not over.wait(0.01):
            peaks.append(process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        over.set()
        sampler.join()
    assert max(peaks) - before < most, f"{(max(peaks) - before) / MIB:.0f} MiB"


def body(script: list[Step]) -> bytes:
    """Return what a script sends after its head."""
    return b"".join(step.data for step in script if isinstance(step, Send))


@functools.cache
def deflated(data: bytes, times: int, bits: int = 31, after: bytes = b"") -> bytes:
    """Return `data`, so many times, and what comes after it, compressed."""
    packer = zlib.compressobj(wbits=bits)
    parts = [packer.compress(part) for part in (*[data] * times, after)]
    return b"".join([*parts, packer.flush()])


def gzipped(kind: dict[str, str], data: bytes, times: int, status: int = 200) -> list[Step]:
    """Return an answer with a compressed body."""
    return [Head(status, {**kind, "Content-Encoding": "gzip"}), Send(deflated(data, times))]


LINES = (b"data: " + b"x" * 90 + b"\n") * 1000
ENDLESS: dict[str, tuple[Callable[[], list[Step]], str]] = {
    "event": (lambda: [Head(200, SSE), Repeat(LINES, MUCH)], "an event of more than 16 MiB"),
    "line": (lambda: [Head(200, SSE), Repeat(b"x" * MIB, MUCH)], "a line of more than 16 MiB"),
    "comment": (lambda: [Head(200, SSE), Send(b":"), Repeat(b"x" * MIB, MUCH)], "a line of more than"),
    "json": (lambda: [Head(200, JSON), Repeat(b" " * MIB, MUCH)], "more than 16 MiB in one response"),
    "values": (lambda: sse(b'{"a": [' + b"{}," * 5_000_000 + b"{}]}"), "JSON with too many values"),
    "gzip-event": (lambda: gzipped(SSE, LINES, 1000), "an event of more than 16 MiB"),
    "gzip-line": (lambda: gzipped(SSE, bytes(MIB), 64), "a line of more than 16 MiB"),
    "gzip-json": (lambda: gzipped(JSON, bytes(MIB), 64), "more than 16 MiB in one response"),
    "deflate": (
        lambda: [Head(200, {**SSE, "Content-Encoding": "deflate"}), Send(deflated(bytes(MIB), 64, 15))],
        "a line of more than 16 MiB",
    ),
    "raw-deflate": (
        lambda: [Head(200, {**SSE, "Content-Encoding": "deflate"}), Send(deflated(bytes(MIB), 64, -15))],
        "a line of more than 16 MiB",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("script", "message"), ENDLESS.values(), ids=ENDLESS)
def test_answer_without_end_is_error_in_bounded_memory(
    server: FaultServer, script: Callable[[], list[Step]], message: str
) -> None:
    with session_on(server) as session:
        server.will(CHAT, *script())
        with bounded():
            error = fails(session, RequestFailed)
        assert message in str(error)
        still_works(session)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([Head(200, NDJSON), Repeat(b"x" * MIB, MUCH)], "a line of more than 16 MiB"),
        (gzipped(NDJSON, bytes(MIB), 64), "a line of more than 16 MiB"),
    ],
    ids=["line", "gzip-line"],
)
def test_ollama_without_end_is_error_in_bounded_memory(script: list[Step], message: str) -> None:
    with OllamaServer() as server, session_on(server, "ollama") as session:
        server.will(OLLAMA_CHAT, *script)
        with bounded():
            error = fails(session, RequestFailed)
        assert message in str(error)
        server.will("/api/pull", *script)
        with bounded(), pytest.raises(LLMMagicError, match="a line of more than 16 MiB"):
            session.load("gemma3:270m", backend="ollama", base_url=server.url, pull=True)


@pytest.mark.parametrize("encodings", [["gzip", "gzip"], ["deflate", "gzip"], ["gzip"] * 5])
def test_body_compressed_twice_is_refused(server: FaultServer, encodings: list[str]) -> None:
    bomb: list[Step] = [Head(200, SSE), Send(bytes(100 * MIB))]
    with session_on(server) as session:
        for script in (sse_words("Hi"), bomb):
            server.will(CHAT, *zipped(script, *encodings))
            with bounded(20 * MIB):
                error = fails(session, RequestFailed)
            assert f"compresses its responses ({', '.join(encodings)}), although" in str(error)
            assert "Turn compression off in the server" in str(error)
        still_works(session)


@pytest.mark.parametrize(
    "encoding", ["x-gzip", "identity, gzip", "compress", "aws-chunked", "x" * 500, "gzip, br"]
)
def test_unknown_compression_is_named(server: FaultServer, encoding: str) -> None:
    with session_on(server) as session:
        server.will(CHAT, Head(200, {**SSE, "Content-Encoding": encoding}), Send(b"x"))
        assert encoding[:300] in str(fails(session, RequestFailed))
        still_works(session)


def test_missing_decoder_is_named(server: FaultServer) -> None:
    with session_on(server) as session:
        for _ in range(3):
            server.will(CHAT, Head(200, {**SSE, "Content-Encoding": "br"}), Send(b"x"))
        assert "brotli" in str(fails(session, ServerUnreachable))
        still_works(session)


@pytest.mark.parametrize("encoding", ["", "identity", "GZIP"])
def test_known_compression_is_read(server: FaultServer, encoding: str) -> None:
    script = zipped(sse_words("Hi"), *(["gzip"] if "gzip" in encoding.lower() else []))
    script[0] = Head(200, {**SSE, "Content-Encoding": encoding})
    with session_on(server) as session:
        server.will(CHAT, *script)
        assert session.generate("?").text == "Hi"


ERROR = {**JSON, **NOW}
BODIES: dict[str, Callable[[int], list[Step]]] = {
    "endless": lambda status: [Head(status, ERROR), Repeat(b" " * MIB, MUCH)],
    "gzip": lambda status: gzipped(ERROR, bytes(MIB), 64, status),
    "gzip-twice": lambda status: zipped([Head(status, ERROR), Send(bytes(64 * MIB))], "gzip", "gzip"),
    "unknown": lambda status: [Head(status, {**ERROR, "Content-Encoding": "x"}), Send(b"x")],
}  # fmt: skip


@pytest.mark.parametrize("status", [400, 503])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_error_body_without_end_leaves_status(
    server: FaultServer, status: int, body: Callable[[int], list[Step]]
) -> None:
    with session_on(server) as session:
        for _ in range(3):
            server.will(CHAT, *body(status))
        with bounded(100 * MIB):
            error = fails(session, RequestFailed)
        assert f"({status})" in str(error)
        assert len(str(error)) < 600


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_list_without_end_is_error_in_bounded_memory(
    server: FaultServer, body: Callable[[int], list[Step]]
) -> None:
    server.will(MODELS, *body(200))
    session = Session(settings())
    try:
        with bounded(), pytest.raises(RequestFailed) as caught:
            session.load("tiny", backend="vllm", base_url=f"{server.url}/v1")
        checked_message(caught.value)
        session.load("tiny", backend="vllm", base_url=f"{server.url}/v1")
    finally:
        session.close()


HEADS = {
    "header": [Raw(b"HTTP/1.1 200 OK\r\nX: "), *[Raw(b"x" * 65536)] * 64],
    "headers": [Raw(b"HTTP/1.1 200 OK\r\n"), *[Raw(b"X: " + b"x" * 1000 + b"\r\n")] * 4096],
    "trailers": [Head(200, SSE), Raw(b"0\r\n"), *[Raw(b"X: " + b"x" * 1000 + b"\r\n")] * 4096],
}


@pytest.mark.parametrize("script", HEADS.values(), ids=HEADS)
def test_head_without_end_is_error_in_bounded_memory(
    server: FaultServer, script: list[Step]
) -> None:
    with session_on(server) as session:
        for _ in range(3):
            server.will(CHAT, *script)
        with bounded(50 * MIB):
            fails(session, ServerUnreachable)
        still_works(session)


def test_chunk_extension_without_end_times_out_in_bounded_memory(server: FaultServer) -> None:
    with session_on(server, idle_s=IDLE_S) as session:
        server.will(CHAT, Head(200, SSE), Raw(b"1;"), *[Raw(b"x" * MIB)] * 4096)
        with bounded(50 * MIB):
            fails(session, ServerTimeout)
        assert questions(server)[0].left.wait(5)
        still_works(session)


@pytest.mark.parametrize("backend", ["vllm", "ollama"])
def test_text_without_end_breaks_answer(backend: str) -> None:
    server: HttpServer = OllamaServer() if backend == "ollama" else FaultServer()
    with server, session_on(server, backend) as session:
        text = "x" * MIB
        piece = {"message": {"content": text}, "done": False}
        script = ndjson(piece) if backend == "ollama" else sse(delta(text), done=False)
        server.will(chat_path(server), *script, Repeat(body(script), MUCH))
        with bounded(400 * MIB):
            error = fails(session, IncompleteReply)
        assert "sent more than 32,000,000 characters" in str(error)
        assert 30_000_000 < len(last(session).text) <= 32_000_000
        assert questions(server)[0].left.wait(5)


HEARTBEATS = b"data:\n\n"
FLOODS: dict[str, Callable[[], list[Step]]] = {
    "heartbeats": lambda: [Head(200, SSE), Repeat(HEARTBEATS * 10_000, 100), *sse_words("Hi")[1:]],
    "gzip-heartbeats": lambda: [
        Head(200, {**SSE, "Content-Encoding": "gzip"}),
        Send(deflated(HEARTBEATS * 10_000, 100, after=body(sse_words("Hi")))),
    ],
    "objects": lambda: [Head(200, SSE), Repeat(b"data: {}\n\n" * 10_000, 40), *sse_words("Hi")[1:]],
    "tiny-chunks": lambda: [Head(200, SSE), Raw(b"1\r\n:\r\n" * 40_000), Send(b"\n"), *sse_words("Hi")[1:]],
    "hints": lambda: [Raw(b"HTTP/1.1 103 Hints\r\n\r\n" * 20_000), *sse_words("Hi")],
    "values": lambda: sse(b'{"a": [' + b'{"k":0},' * 200_000 + b"{}]}", *[delta("Hi", finish="stop")]),
}  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_other_answers_go_on_during_flood(
    server: FaultServer, flood: Callable[[], list[Step]]
) -> None:
    async def both(session: Session) -> list[float]:
        pieces = [[Pause(0.02), *events(delta("x"), done=False)] for _ in range(60)]
        end = events(delta(finish="stop"))
        server.will(CHAT, Head(200, SSE), *itertools.chain.from_iterable(pieces), *end)
        steady = session.astream("steady")
        times = [(await anext(steady)).time]
        server.will(CHAT, *flood())
        attack = asyncio.ensure_future(session.agenerate("flood"))
        times += [chunk.time async for chunk in steady if chunk.text]
        await attack
        return times

    with session_on(server) as session, bounded(), standstills() as stood_s:
        times = asyncio.run(both(session))
        gaps = [b - a for a, b in itertools.pairwise(times)]
    # Measured 0.1 s on a quiet machine; without turns for others, as long as the flood takes.
    assert max(gaps) < 1.5 + max(stood_s), max(gaps)
    until(lambda: server.open_now == 0, "a connection is left open")


@contextlib.contextmanager
def standstills() -> Iterator[list[float]]:
    """Collect how long the process did not run, of a thread that wakes a hundred times a second."""
    found, is_over = [0.0], threading.Event()

    def measure() -> None:
        before = time.monotonic()
        while not is_over.wait(0.01):
            now = time.monotonic()
            found.append(now - before)
            before = now

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()
