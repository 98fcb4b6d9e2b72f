"""Bytes from the wire to lines, events and objects, however they were cut; pure, no I/O."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from llm_magic.text.surrogates import replace_surrogates
from llm_magic.types import Chunk

_HALF = re.compile("[\ud800-\udfff]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_decode = json.JSONDecoder().decode
# Limits on the memory that one server can take. An answer in one piece is one line.
MAX_LINE = MAX_EVENT = 16 * 1024 * 1024
MAX_TEXT = 32_000_000
# JSON takes up to 25 times its size as Python objects: 16 MiB of `{},` are 400 MB.
MAX_VALUES = 500_000
MAX_NUMBER = 2**63


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
        # One buffer, not a list: a list of tiny pieces takes 20 times their size.
        self._rest = bytearray()
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
        if lines and self._rest:
            self._rest += lines[0]
            lines[0] = bytes(self._rest)
            self._rest = bytearray()
        if rest:
            self._rest += rest
            if len(self._rest) > MAX_LINE:
                self._rest = bytearray()
                raise MalformedStream(f"a line of more than {MAX_LINE >> 20} MiB")
        return lines

    def flush(self) -> bytes:
        """Return the last line, if it had no end."""
        line, self._rest = bytes(self._rest), bytearray()
        return line


class EventDecoder:
    """Server-sent events, by the WHATWG standard: returns the data of each.

    Departures, because servers of language models differ from it:

    - `flush` returns an event that the end of the stream cut short; callers keep it if it is whole.
      Some servers omit the empty line after the last event.
    - An event of the type ``error``, and one with llama.cpp's field ``error``, is returned as a JSON
      object with that name.
    - Events of other types are returned like those without a type. ``id`` and ``retry`` have no
      effect, because nothing reconnects.
    - The data is returned as bytes. `parse_object` decodes them.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    def __init__(self) -> None:
        self._lines = LineDecoder()
        # The first line of data, and a buffer for it and the others where there are more.
        self._data: bytes | bytearray | None = None
        self._type, self._has_error_field = b"", False
        self._first = True

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of the events that `data` completes."""
        lines = self._lines.feed(data)
        if self._first and lines:
            lines[0] = self._without_mark(lines[0])
        events = []
        for line in lines:
            if line:
                self._add(line)
                continue
            if self._data is not None:
                events.append(self._take())
            # Also after an event without data, which is none.
            self._type, self._has_error_field = b"", False
        return events

    def flush(self) -> list[bytes]:
        """Return the data of the event that the stream ended in."""
        line = self._lines.flush()
        self._add(self._without_mark(line) if self._first else line)
        return [self._take()] if self._data is not None else []

    def _without_mark(self, line: bytes) -> bytes:
        self._first = False
        return line.removeprefix(_BYTE_ORDER_MARK)

    def _add(self, line: bytes) -> None:
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

    def _take(self) -> bytes:
        assert self._data is not None
        event, self._data = bytes(self._data), None
        is_error = self._has_error_field or self._type == b"error"
        return _as_error(event) if is_error else event


def _as_error(event: bytes) -> bytes:
    """Return an error event as an object that says `error`, which is never empty."""
    try:
        value = parse_json(event)
    except MalformedStream:
        value = event.decode("utf-8", "replace").strip()
    return json.dumps({"error": value or "no reason given"}).encode("ascii")


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
        return replace_surrogates(text)

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
    """Return a count or a size as a server sent it; None for anything else, and above 2**63.

    JSON has integers of thousands of digits, which no float can hold and no table has space for.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= MAX_NUMBER else None


def text_of(value: object) -> str:
    """Return a text as a server sent it, empty where there is none; raises `MalformedStream`."""
    if isinstance(value, str):
        return value
    if not value:
        return ""
    raise MalformedStream("a chunk of an unknown shape")


def is_done(event: bytes) -> bool:
    """Return whether an event is the one that OpenAI and others end a stream with."""
    return event.strip() == b"[DONE]"


def is_whole(event: bytes) -> bool:
    """Return whether an event that the stream ended in has come to its own end."""
    try:
        parse_json(event)
    except MalformedStream:
        return is_done(event)
    return True


def parse_json(data: bytes) -> Any:
    """Return any JSON value; raises `MalformedStream`.

    A byte order mark is left out, and bytes that are no UTF-8 become the replacement character, as
    in a browser. Halves of surrogate pairs are kept for `Surrogates` to join.
    """
    if len(data) > MAX_VALUES:
        # An upper bound, found 20 times faster than by parsing.
        count = sum(map(data.count, (b",", b"{", b"[")))
        if count > MAX_VALUES:
            raise MalformedStream("JSON of too many values")
    try:
        text = str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = str(data, "utf-8", "replace")
    try:
        # `json.loads` would look for UTF-16 and for options each time.
        return _decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise MalformedStream("what is no JSON") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; raises `MalformedStream` for anything else."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise MalformedStream("JSON that is no object")
    return value


async def joined(source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks with halves of characters joined: servers cut escaped text anywhere.

    Raises `MalformedStream` for an answer without an end.
    """
    text, reasoning = Surrogates(), Surrogates()
    size = 0
    async with contextlib.aclosing(source):
        async for chunk in source:
            size += len(chunk.text) + len(chunk.reasoning)
            if size > MAX_TEXT:
                raise MalformedStream(f"more than {MAX_TEXT:,} characters")
            said, thought = text.feed(chunk.text), reasoning.feed(chunk.reasoning)
            if chunk.finish_reason:
                said, thought = said + text.flush(), thought + reasoning.flush()
            if said is not chunk.text or thought is not chunk.reasoning:
                chunk = dataclasses.replace(chunk, text=said, reasoning=thought)
            yield chunk
