"""Bytes from the wire to lines, events and objects, however they were cut; pure, no I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

# An answer in one line is long; a line without an end is an attack on the memory.
_HALF = re.compile("[\ud800-\udfff]")
MAX_LINE = 64 * 1024 * 1024


class MalformedStream(ValueError):
    """The bytes are not what the protocol says."""


class Decoder(Protocol):
    """Cuts a stream into events."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the events that `data` completes."""

    def flush(self) -> Iterator[bytes]:
        """Yield what is left at the end."""


class LineDecoder:
    """Splits bytes into lines at \\n, \\r\\n and \\r; each byte is looked at once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._after_return = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that `data` completes, without their ends."""
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
        yield from lines
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
            if self._size > MAX_LINE:
                raise MalformedStream("a line without an end")

    def flush(self) -> bytes:
        """Return the last line, if it had no end."""
        line, self._parts = b"".join(self._parts), []
        return line


class EventDecoder:
    """Server-sent events: yields the data of each; comments and unknown fields are left out.

    An ``error`` event, and llama.cpp's ``error`` field, are yielded as an object with that name.
    """

    def __init__(self) -> None:
        self._lines = LineDecoder()
        self._data: list[bytes] = []
        self._first, self._is_error = True, False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the data of the events that `data` completes."""
        for line in self._lines.feed(data):
            if line:
                self._add(line)
            elif self._data:
                yield self._take()

    def flush(self) -> Iterator[bytes]:
        """Yield an event that the stream ended in: servers forget the empty line after the last."""
        self._add(self._lines.flush())
        if self._data:
            yield self._take()

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
        if not self._held and not _HALF.search(text):
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
    """Newline-delimited JSON: yields each line that is not empty."""

    def __init__(self) -> None:
        self._lines = LineDecoder()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that `data` completes."""
        return filter(None, (line.strip() for line in self._lines.feed(data)))

    def flush(self) -> Iterator[bytes]:
        """Yield the last line, if it had no end."""
        return filter(None, (self._lines.flush().strip(),))


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
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise MalformedStream("what is no JSON") from None
    if not isinstance(value, dict):
        raise MalformedStream("JSON that is no object")
    return value
