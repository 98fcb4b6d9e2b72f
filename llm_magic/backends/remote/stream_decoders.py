"""Decodes bytes incrementally to lines, events and JSON objects; no I/O."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from llm_magic.text import replace_surrogates
from llm_magic.types import Chunk

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_decode = json.JSONDecoder().decode
# Limits on the memory that a server can occupy. A reply that is not streamed is one line.
MAX_LINE = MAX_EVENT = 16 * 1024 * 1024
MAX_TEXT = 32_000_000
# Python objects take up to 25 times the size of their JSON: 16 MiB of `{},` are 400 MB.
MAX_VALUES = 500_000
MAX_NUMBER = 2**63


class MalformedStream(ValueError):
    """The bytes do not follow the protocol. The message is the object of 'the server sent'."""


class Decoder(Protocol):
    """Handles incrementally reading events from bytes."""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that `data` completes."""

    def flush(self) -> list[bytes]:
        """Return the events that end with the stream."""


class LineDecoder:
    """Handles incrementally reading lines that end with \\n, \\r\\n or \\r; reads each byte once."""

    def __init__(self) -> None:
        # A list of tiny pieces would take 20 times their size.
        self._buffer = bytearray()
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, without their ends."""
        if self._after_cr and data:
            # The \n of a \r\n that was split between two calls.
            data = data[1:] if data[:1] == b"\n" else data
            self._after_cr = False
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, remainder = data.split(b"\n")
        if lines and self._buffer:
            self._buffer += lines[0]
            lines[0] = bytes(self._buffer)
            self._buffer = bytearray()
        if remainder:
            self._buffer += remainder
            if len(self._buffer) > MAX_LINE:
                self._buffer = bytearray()
                raise MalformedStream(f"a line of more than {MAX_LINE >> 20} MiB")
        return lines

    def flush(self) -> bytes:
        """Return the last line if it has no line end."""
        line, self._buffer = bytes(self._buffer), bytearray()
        return line


class EventDecoder:
    """Handles incrementally reading the data of server-sent events (WHATWG standard).

    Differences from the standard, for the sake of language model servers:

    - `flush` returns an event that the end of the stream has truncated, because some servers omit the
      empty line after the last event. Callers check `is_complete`.
    - An event of the type ``error``, and one with llama.cpp's field ``error``, is returned as a JSON
      object with that name.
    - Events of other types are returned like those without a type. ``id`` and ``retry`` have no
      effect, because streams are not resumed.
    - The data is returned as bytes. `parse_object` decodes them.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    def __init__(self) -> None:
        self._lines = LineDecoder()
        # Bytes for the first line of data, and a buffer from the second line on.
        self._data: bytes | bytearray | None = None
        self._type, self._has_error_field = b"", False
        self._first = True

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of the events that `data` completes."""
        lines = self._lines.feed(data)
        if self._first and lines:
            lines[0] = self._without_bom(lines[0])
        events = []
        for line in lines:
            if line:
                self._read_field(line)
                continue
            if self._data is not None:
                events.append(self._pop_event())
            # An event without data is ignored, and so is its type.
            self._type, self._has_error_field = b"", False
        return events

    def flush(self) -> list[bytes]:
        """Return the data of an event that the end of the stream has truncated."""
        line = self._lines.flush()
        self._read_field(self._without_bom(line) if self._first else line)
        return [self._pop_event()] if self._data is not None else []

    def _without_bom(self, line: bytes) -> bytes:
        self._first = False
        return line.removeprefix(_BYTE_ORDER_MARK)

    def _read_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            self._append(value)
        elif name == b"event":
            self._type = value
        elif name == b"error" and value:
            self._has_error_field = True
            self._append(value)

    def _append(self, value: bytes) -> None:
        if self._data is None:
            self._data = value
            return
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        self._data += b"\n"
        self._data += value
        if len(self._data) > MAX_EVENT:
            self._data = None
            raise MalformedStream(f"an event of more than {MAX_EVENT >> 20} MiB")

    def _pop_event(self) -> bytes:
        assert self._data is not None
        event, self._data = bytes(self._data), None
        is_error = self._has_error_field or self._type == b"error"
        return _as_error(event) if is_error else event


def _as_error(event: bytes) -> bytes:
    """Return an error event as a JSON object with a field `error` that is never empty."""
    try:
        value = parse_json(event)
    except MalformedStream:
        value = event.decode("utf-8", "replace").strip()
    return json.dumps({"error": value or "no reason given"}).encode("ascii")


class SurrogateJoiner:
    """Joins the surrogates of a pair that is split between two texts."""

    def __init__(self) -> None:
        self._pending = ""

    def feed(self, text: str) -> str:
        """Return `text` without lone surrogates; a high surrogate at its end is kept for the next call."""
        if not self._pending and (text.isascii() or not _SURROGATE.search(text)):
            return text
        text, self._pending = self._pending + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._pending = text[:-1], text[-1]
        return replace_surrogates(text)

    def flush(self) -> str:
        """Return the replacement character if a high surrogate is pending."""
        pending, self._pending = self._pending, ""
        return "\ufffd" if pending else ""


class JsonLinesDecoder:
    """Handles incrementally reading the lines of newline-delimited JSON."""

    def __init__(self) -> None:
        self._lines = LineDecoder()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, without empty lines."""
        return [line for line in map(bytes.strip, self._lines.feed(data)) if line]

    def flush(self) -> list[bytes]:
        """Return the last line if it has no line end."""
        line = self._lines.flush().strip()
        return [line] if line else []


def whole_number(value: object) -> int | None:
    """Return a count or a size; None for other values, negative numbers and those above 2**63."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= MAX_NUMBER else None


def parse_text(value: object) -> str:
    """Return a string, "" for a missing one; raises `MalformedStream` for other values."""
    if isinstance(value, str):
        return value
    if not value:
        return ""
    raise MalformedStream("a chunk in an unknown format")


def is_done(event: bytes) -> bool:
    """Return whether an event is the last one of a stream of chat completions."""
    return event.strip() == b"[DONE]"


def is_complete(event: bytes) -> bool:
    """Return whether an event at the end of a stream is complete."""
    try:
        parse_json(event)
    except MalformedStream:
        return is_done(event)
    return True


def parse_json(data: bytes) -> Any:
    """Return any JSON value; raises `MalformedStream`.

    A byte order mark is removed, and invalid UTF-8 becomes the replacement character, as in a
    browser. Lone surrogates are kept for `SurrogateJoiner`.
    """
    if len(data) > MAX_VALUES:
        # An upper bound, which takes a twentieth of the time of parsing.
        count = sum(map(data.count, (b",", b"{", b"[")))
        if count > MAX_VALUES:
            raise MalformedStream("JSON with too many values")
    try:
        text = str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = str(data, "utf-8", "replace")
    try:
        # `json.loads` detects the encoding and reads options in each call.
        return _decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise MalformedStream("invalid JSON") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; raises `MalformedStream` for anything else."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise MalformedStream("JSON that is not an object")
    return value


async def join_surrogates(source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks with surrogate pairs joined: servers split escaped text at any position.

    Raises `MalformedStream` if the reply exceeds the limit.
    """
    texts, reasonings = SurrogateJoiner(), SurrogateJoiner()
    size = 0
    async with contextlib.aclosing(source):
        async for chunk in source:
            size += len(chunk.text) + len(chunk.reasoning)
            if size > MAX_TEXT:
                raise MalformedStream(f"more than {MAX_TEXT:,} characters")
            text, reasoning = texts.feed(chunk.text), reasonings.feed(chunk.reasoning)
            if chunk.finish_reason:
                text, reasoning = text + texts.flush(), reasoning + reasonings.flush()
            if text is not chunk.text or reasoning is not chunk.reasoning:
                chunk = dataclasses.replace(chunk, text=text, reasoning=reasoning)
            yield chunk
