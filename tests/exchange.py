"""One HTTP request on a connection and its answer, byte by byte: the plumbing of `HttpServer`."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from tests import wire
from tests.wire import Send, Step

Outcome = Literal["open", "whole", "left", "cut"]

_POLL_S = 0.01
_TLS = b"\x16"  # the first byte of a client that expects https
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends a reset


def _nothing() -> None:
    pass


class Headers(Mapping[str, str]):
    """The headers of a request; the case of their names does not matter."""

    def __init__(self, fields: Sequence[tuple[str, str]] = ()) -> None:
        self._fields = {name.lower(): value for name, value in fields}

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Headers({self._fields})"


@dataclass(eq=False)
class Received:
    """One request as it arrived, and how its answer ended.

    `outcome` is "open" while we answer, "whole" when everything was sent, "left" when the client
    went away before that, and "cut" when we did (`Cut`, `Reset`, or the server's `stop()`). It
    changes a moment after the last byte, so tests `wait()`.
    """

    method: str
    path: str
    headers: Headers = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    query: str = ""
    began: float = field(default_factory=time.monotonic, repr=False)
    outcome: Outcome = "open"
    finished_at: float = field(default=0.0, repr=False)
    chunks_sent: int = 0  # pieces of the body: one for each `Send`, and for each byte of a `Slow`
    left: threading.Event = field(default_factory=threading.Event, repr=False)
    over: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    def wait(self, timeout: float = 5) -> Outcome:
        """Block until the answer has ended, and return how: "open" where it has not."""
        self.over.wait(timeout)
        return self.outcome

    def end(self, how: Outcome) -> None:
        """Store how the answer finished, and wake the threads that wait for that."""
        self.outcome, self.finished_at = how, time.monotonic()
        if how == "left":
            self.left.set()
        self.over.set()


class Reader(asyncio.StreamReader):
    """A stream that reports at once, and not at the next read, that the client has left."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.gone = False
        self.when_gone: Callable[[], object] = _nothing

    def feed_eof(self) -> None:
        """Notice the end."""
        super().feed_eof()
        self._leave()

    def set_exception(self, exc: Exception) -> None:
        """Notice a reset."""
        super().set_exception(exc)
        self._leave()

    def _leave(self) -> None:
        if not self.gone:
            self.gone = True
            self.when_gone()


async def open_streams(connection: socket.socket) -> tuple[Reader, asyncio.StreamWriter]:
    """Return the two directions of a connection that was accepted."""
    loop = asyncio.get_running_loop()
    reader = Reader(loop)
    transport, protocol = await loop.connect_accepted_socket(
        lambda: asyncio.StreamReaderProtocol(reader, loop=loop), connection
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def read_request(reader: asyncio.StreamReader) -> Received | None:
    """Return the next request, or None where the client closed the connection instead."""
    try:
        head = await reader.readexactly(1)
        if head == _TLS:
            return None
        head += await reader.readuntil(b"\r\n\r\n")
        first, *fields = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, target, _version = first.split(" ")
        pairs = (line.partition(":") for line in fields)
        headers = Headers([(name, value.strip()) for name, _, value in pairs])
        body = await _read_body(reader, headers)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    url = urlsplit(target)
    return Received(method, url.path, headers, body, url.query)


async def _read_body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(pieces)


class Exchange:
    """The answer to one request, which follows a script."""

    def __init__(self, request: Received, reader: Reader, writer: asyncio.StreamWriter) -> None:
        self._request = request
        self._reader = reader
        self._writer = writer
        self._framing = "none"
        self._severed = False

    async def follow(self, steps: Iterable[Step], pace: float) -> bool:
        """Do what the script contains; returns whether the connection may carry another request."""
        task = asyncio.current_task()
        assert task is not None
        self._reader.when_gone = task.cancel
        if self._reader.gone:
            task.cancel()
        try:
            await self._follow(steps, pace)
        except BaseException:
            self._request.end("left" if self._reader.gone else "cut")
            raise
        finally:
            self._reader.when_gone = _nothing
        self._request.end("cut" if self._severed else "whole")
        keep = self._request.headers.get("connection", "").lower() != "close"
        return keep and self._framing == "over"

    async def _follow(self, steps: Iterable[Step], pace: float) -> None:
        for step in steps:
            if pace and isinstance(step, Send):
                await asyncio.sleep(pace)
            await self._do(step)
            if self._severed:
                return
        self._finish()

    async def _do(self, step: Step) -> None:
        match step:
            case wire.Head():
                self._framing = wire.framing(step)
                await self._write(wire.head_bytes(step))
            case Send(data):
                # Others have their turn, and leaving is noticed, before a piece and not after it:
                # no client can leave between the last piece and the end of the body.
                await asyncio.sleep(0)
                await self._send(data)
            case wire.Slow() | wire.Repeat():
                await self._send_many(step)
            case wire.Raw(data):
                await self._write(data)
            case wire.Pause(seconds):
                await asyncio.sleep(seconds)
            case wire.Hold():
                await _hold(step)
            case wire.End():
                self._finish()
            case wire.Cut() | wire.Reset():
                self._sever(is_reset=isinstance(step, wire.Reset))

    async def _send_many(self, step: wire.Slow | wire.Repeat) -> None:
        if isinstance(step, wire.Repeat):
            for _ in range(step.count):
                await self._send(step.data)
            return
        for start in range(len(step.data)):
            await asyncio.sleep(step.per_byte_s)
            await self._send(step.data[start : start + 1])

    async def _send(self, data: bytes) -> None:
        assert self._framing != "none", "a script sends a body before its head"
        if self._request.method == "HEAD" or not data:
            return
        if self._framing == "chunked":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self._write(data)
        self._request.chunks_sent += 1

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def _finish(self) -> None:
        """End the body, once; one that ends with the connection is left to that."""
        if self._framing == "chunked" and self._request.method != "HEAD":
            self._writer.write(b"0\r\n\r\n")
        if self._framing in {"chunked", "length"}:
            self._framing = "over"

    def _sever(self, *, is_reset: bool) -> None:
        self._severed = True
        if is_reset:
            reset(self._writer)
        else:
            self._writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def _hold(step: wire.Hold) -> None:
    step.reached.set()
    while not step.go.is_set():
        await asyncio.sleep(_POLL_S)
