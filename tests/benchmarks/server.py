"""A server that answers at a set pace and costs nearly nothing, in a process of its own.

The model ``paced-20-10-100`` sends its first piece after 20 ms and then one every 10 ms, 100 in all;
with a pace of 0 everything comes in one write. All bytes are made beforehand and every piece is
timed from the request on, so that what differs between clients is the clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tests.kernels import ROOT

PIECE = " word"
_HOST = "127.0.0.1"
_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Timing:
    """When the pieces of an answer come, in milliseconds after the request, and how many."""

    first_ms: int
    each_ms: int
    count: int

    @property
    def model(self) -> str:
        """The name of a model that answers so."""
        return f"paced-{self.first_ms}-{self.each_ms}-{self.count}"

    @classmethod
    def of(cls, model: str) -> Timing:
        """Read the name of a model."""
        return cls(*map(int, model.removeprefix("paced-").split("-")))

    @property
    def ideal_ms(self) -> int:
        """How long the answer takes where nothing costs anything."""
        return self.first_ms + self.each_ms * (self.count - 1)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Run the server in a process of its own; yields its address."""
    command = [sys.executable, "-m", "tests.benchmarks.server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://{_HOST}:{int(process.stdout.readline())}"
        finally:
            # It serves until its input ends, so that it cannot outlive us whatever happens here.
            process.stdin.close()


@functools.cache
def _answer(model: str) -> tuple[Timing, list[bytes]]:
    """Return the pieces of an answer as they go over the wire, shaped as vLLM's are."""
    pace = Timing.of(model)

    def event(**about: Any) -> bytes:
        value = {
            "id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk",
            "created": 1700000000, "model": model, **about,
        }  # fmt: skip
        return _chunk(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")

    def choice(content: str, finish: str | None) -> dict[str, Any]:
        delta = {"content": content}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    pieces = [event(choices=[choice(PIECE, None)])] * pace.count
    end = event(choices=[choice("", "stop")]) + event(choices=[], usage=_usage(pace))
    pieces[-1] += end + _chunk(b"data: [DONE]\n\n") + _chunk(b"")
    return pace, pieces


@functools.cache
def _whole_answer(model: str) -> tuple[Timing, bytes]:
    """Return an answer in one piece."""
    pace = Timing.of(model)
    message = {"role": "assistant", "content": PIECE * pace.count}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    value = {
        "id": "chatcmpl-0123456789abcdef", "object": "chat.completion", "created": 1700000000,
        "model": model, "choices": [choice], "usage": _usage(pace),
    }  # fmt: skip
    return pace, _whole(value)


def _usage(pace: Timing) -> dict[str, int]:
    return {
        "prompt_tokens": 9, "completion_tokens": pace.count, "total_tokens": pace.count + 9,
    }  # fmt: skip


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _whole(value: Any) -> bytes:
    body = json.dumps(value).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


class _Connection(asyncio.Protocol):
    """Answers the requests of one connection, one after another."""

    _transport: asyncio.WriteTransport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if b"\r\n\r\n" not in self._received or len(body) < size:
            return
        self._received = body[size:]
        self._answer_request(head.split(b" ", 2)[1].decode(), body[:size])

    def _answer_request(self, path: str, body: bytes) -> None:
        if path.endswith("/chat/completions"):
            request = json.loads(body)
            answer = self._stream if request.get("stream") else self._answer_whole
            answer(request["model"])
            return
        # Lists hold no paces, so every one can be asked for by its name.
        name = path.rpartition("/models/")[2]
        entry = {"id": name, "object": "model", "owned_by": "tests"}
        self._transport.write(_whole(entry if "/models/" in path else {"data": []}))

    def _stream(self, model: str) -> None:
        pace, pieces = _answer(model)
        first = self._loop.time() + pace.first_ms / 1000
        if pace.each_ms:
            self._transport.write(_STREAM)
            self._loop.call_at(first, self._send, pieces, 0, first, pace.each_ms / 1000)
        else:
            self._loop.call_at(first, self._transport.write, _STREAM + b"".join(pieces))

    def _answer_whole(self, model: str) -> None:
        pace, answer = _whole_answer(model)
        self._loop.call_later(pace.ideal_ms / 1000, self._transport.write, answer)

    def _send(self, pieces: list[bytes], index: int, first: float, each: float) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(pieces[index])
        index += 1
        if index < len(pieces):
            self._loop.call_at(first + index * each, self._send, pieces, index, first, each)


async def _serve() -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(_Connection, _HOST, 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)

    def wait() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=wait, daemon=True).start()
    await over.wait()


def main() -> None:
    """Serve until the input ends; on uvloop where that is installed."""
    faster = importlib.import_module("uvloop") if find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=faster.new_event_loop if faster else None) as runner:
        runner.run(_serve())


if __name__ == "__main__":
    main()
