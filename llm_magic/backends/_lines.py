"""Bytes from the wire to lines, events and objects, however they were cut; pure, no I/O."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from llm_magic.types import Chunk

# An answer in one line is long; a line without an end is an attack on the memory.
_HALF = re.compile("[\ud800-\udfff]")
_decode = json.JSONDecoder().decode
MAX_LINE = 64 * 1024 * 1024


class MalformedStream(ValueError):
    """The bytes are not what the protocol says."""


class Decoder(Protocol):
    """Cuts a stream into events."""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that `data` completes."""

    def flush(self) -> list[bytes]:
        """Return what is left at the end."""


class LineDecoder:
    """Splits bytes into lines at \\n, \\r\\n and \\r; each byte is looked at once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._after_return = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, without their ends."""
        if self._after_return and data:
            # The other half of a \r\n that was cut in the middle.
            data = data[1:] if data[:1] == b"\n" else data
            self._after_return = False
        if b"\r" in data:
            self._after_return = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = data.split(b"\n")
        if lines and self._parts:
            lines[0] = b"".join([*self._parts, lines[0]])
            self._parts, self._size = [], 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
            if self._size > MAX_LINE:
                raise MalformedStream("a line without an end")
        return lines

    def flush(self) -> bytes:
        """Return the last line, if it had no end."""
        line, self._parts = b"".join(self._parts), []
        return line


class EventDecoder:
    """Server-sent events: returns the data of each; comments and unknown fields are left out.

    An ``error`` event, and llama.cpp's ``error`` field, are returned as an object with that name.
    """

    def __init__(self) -> None:
        self._lines = LineDecoder()
        self._data: list[bytes] = []
        self._first, self._is_error = True, False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of the events that `data` completes."""
        events = []
        for line in self._lines.feed(data):
            if line:
                self._add(line)
            elif self._data:
                events.append(self._take())
        return events

    def flush(self) -> list[bytes]:
        """Return an event that the stream ended in: servers forget the empty line after the last."""
        self._add(self._lines.flush())
        return [self._take()] if self._data else []

    def _add(self, line: bytes) -> None:
        if self._first:
            line, self._first = line.removeprefix(b"\xef\xbb\xbf"), False
        if line.startswith(b"data:"):
            value = line[5:]
            self._data.append(value[1:] if value[:1] == b" " else value)
        elif line.startswith(b"error:"):
            self._data.append(line[6:])
            self._is_error = True
        elif line.startswith(b"event:"):
            self._is_error = line[6:].strip() == b"error"

    def _take(self) -> bytes:
        event, is_error = b"\n".join(self._data), self._is_error
        self._data, self._is_error = [], False
        return _as_error(event) if is_error else event


def _as_error(event: bytes) -> bytes:
    if not is_whole(event):
        event = json.dumps(event.decode("utf-8", "replace")).encode("ascii")
    return b'{"error": %b}' % event


class Surrogates:
    """Joins the halves of a character that came in two pieces; a half alone is no character."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """Return `text` without halves, but for one at its end that the next piece may complete."""
        if not self._held and (text.isascii() or not _HALF.search(text)):
            return text
        text, self._held = self._held + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._held = text[:-1], text[-1]
        # Pairs become one character, what is left of them the mark for what is none.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def flush(self) -> str:
        """Return the mark for a half that nothing completed."""
        held, self._held = self._held, ""
        return "\ufffd" if held else ""


class JsonLinesDecoder:
    """Newline-delimited JSON: returns each line that is not empty."""

    def __init__(self) -> None:
        self._lines = LineDecoder()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes."""
        return [line for line in map(bytes.strip, self._lines.feed(data)) if line]

    def flush(self) -> list[bytes]:
        """Return the last line, if it had no end."""
        line = self._lines.flush().strip()
        return [line] if line else []


def whole_number(value: object) -> int | None:
    """Return a count as a server sent it, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def is_whole(event: bytes) -> bool:
    """Return whether an event that the stream ended in has come to its own end."""
    try:
        json.loads(event)
    except (ValueError, RecursionError):
        return event == b"[DONE]"
    return True


def parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; raises `MalformedStream` for anything else."""
    try:
        # `json.loads` would look for UTF-16 and for options each time.
        value = _decode(str(data, "utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise MalformedStream("what is no JSON") from None
    if not isinstance(value, dict):
        raise MalformedStream("JSON that is no object")
    return value


async def joined(source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks with halves of characters joined: servers cut escaped text anywhere."""
    text, reasoning = Surrogates(), Surrogates()
    async with contextlib.aclosing(source):
        async for chunk in source:
            said, thought = text.feed(chunk.text), reasoning.feed(chunk.reasoning)
            if chunk.finish_reason:
                said, thought = said + text.flush(), thought + reasoning.flush()
            if said is not chunk.text or thought is not chunk.reasoning:
                chunk = dataclasses.replace(chunk, text=said, reasoning=thought)
            yield chunk
