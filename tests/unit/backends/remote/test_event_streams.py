"""Server-sent events by the WHATWG standard: known cases, and a slow parser to compare with."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llm_magic.backends.remote import stream_decoders
from llm_magic.backends.remote.stream_decoders import EventDecoder, MalformedStream

LONG = b"x" * 2048


@dataclass
class Reference:
    """Interprets a whole stream as the standard writes it down, one character at a time.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    events: list[tuple[str, str]] = field(default_factory=list)
    data: str = ""
    kind: str = ""
    unfinished: str = ""

    def read(self, stream: bytes) -> list[tuple[str, str]]:
        """Return the type and the data of every event that the standard dispatches."""
        text = stream.decode("utf-8", "replace")
        if text and text[0] == "\ufeff":
            text = text[1:]
        line, position = "", 0
        while position < len(text):
            character = text[position]
            position += 1
            if character == "\r" and text[position : position + 1] == "\n":
                position += 1
            if character in {"\r", "\n"}:
                self.process(line)
                line = ""
            else:
                line += character
        # The standard drops what the end of the stream cut short.
        self.unfinished = line
        return self.events

    def process(self, line: str) -> None:
        """Process one line."""
        if line == "":
            self.dispatch()
        elif line[0] == ":":
            return
        elif ":" in line:
            name, value = line[: line.index(":")], line[line.index(":") + 1 :]
            self.field(name, value[1:] if value != "" and value[0] == " " else value)
        else:
            self.field(line, "")

    def field(self, name: str, value: str) -> None:
        """Process one field."""
        if name == "event":
            self.kind = value
        if name == "data":
            self.data = self.data + value + "\n"

    def dispatch(self) -> None:
        """Dispatch the event."""
        if self.data != "":
            data = self.data[:-1] if self.data[-1] == "\n" else self.data
            self.events.append((self.kind or "message", data))
        self.data, self.kind = "", ""


def cut(stream: bytes, boundaries: Sequence[int]) -> list[bytes]:
    """Return a stream in pieces, some of them empty."""
    positions = [0, *sorted(n % (len(stream) + 1) for n in boundaries), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(positions)]


def decoded(*pieces: bytes) -> tuple[list[str], list[str]]:
    """Return the data of the events of a stream, and of the one that its end cut short."""
    decoder = EventDecoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return _texts(events), _texts(decoder.flush())


def _texts(events: list[bytes]) -> list[str]:
    return [event.decode("utf-8", "replace") for event in events]


# The names are those of the files in web-platform-tests/eventsource.
WEB_PLATFORM_TESTS = {
    "format-bom": (b"\xef\xbb\xbfdata:1\n\n\xef\xbb\xbfdata:2\n\ndata:3\n\n", ["1", "3"]),
    "format-bom-2": (b"\xef\xbb\xbf\xef\xbb\xbfdata:1\n\ndata:2\n\ndata:3\n\n", ["2", "3"]),
    "format-comments": (
        b"data:1\r:\0\n:\r\ndata:2\n:" + LONG + b"\rdata:3\n:data:fail\r:" + LONG + b"\ndata:4\n\n",
        ["1\n2\n3\n4"],
    ),
    "format-data-before-final-empty-line": (
        b"retry:1000\ndata:test1\n\nid:test\ndata:test2\n",
        ["test1"],
    ),
    "format-field-data": (b"data:\n\ndata\ndata\n\ndata:test\n\n", ["", "\n", "test"]),
    "format-field-event": (b"event:test\ndata:x\n\ndata:x\n\n", ["x", "x"]),
    "format-field-event-empty": (b"event: \ndata:data\n\n", ["data"]),
    "format-field-id": (b"id:1\ndata:1\n\nid\ndata:2\n\n", ["1", "2"]),
    "format-field-id-2": ("id: …\ndata: hello\n\ndata: …\n\n".encode(), ["hello", "…"]),
    "format-field-id-3": (b"id: 1\n\nid: \ndata: hello\n\n", ["hello"]),
    "format-field-id-null": (b"id: \0\0\ndata: hello\n\n", ["hello"]),
    "format-field-parsing": (
        b"data:\0\ndata:  2\rData:1\ndata\0:2\ndata:1\r\0data:4\nda-ta:3\rdata_5\ndata:3\rdata:\r\n"
        b" data:32\ndata:4\n\n",
        ["\0\n 2\n1\n3\n\n4"],
    ),
    "format-field-retry": (b"retry:3000\ndata:x\n\n", ["x"]),
    "format-field-retry-bogus": (b"retry:3000\nretry:1000x\ndata:x\n\n", ["x"]),
    "format-field-retry-empty": (b"retry\ndata:test\n\n", ["test"]),
    "format-field-unknown": (
        b"data:test\n data\ndata\nfoobar:xxx\njustsometext\n:thisisacommentyay\ndata:test\n\n",
        ["test\n\ntest"],
    ),
    "format-leading-space": (b"data:\ttest\rdata: \ndata:test\n\n", ["\ttest\n\ntest"]),
    "format-newlines": (b"data:test\r\ndata\ndata:test\r\n\r\n", ["test\n\ntest"]),
    "format-null-character": (b"data:\0\n\n\n\n", ["\0"]),
    "format-utf-8": ("data:ok…\n\n".encode(), ["ok…"]),
    "event-data": (
        b"data:msg\ndata: msg\n\n:\nfalsefield:msg\n\nfalsefield:msg\nData:data\n\ndata\n\ndata:end\n\n",
        ["msg\nmsg", "", "end"],
    ),
}
# And of the tests of httpx-sse, which begin with the examples of the standard.
HTTPX_SSE = {
    "whatwg_example1": (b"data: YH00\ndata: +2\ndata: 10\n\n", ["YH00\n+2\n10"]),
    "whatwg_example2": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        ["first event", "second event", " third event"],
    ),
    "whatwg_example3": (b"data\n\ndata\ndata\n\ndata:\n", ["", "\n"]),
    "whatwg_example4": (b"data:test\n\ndata: test\n\n", ["test", "test"]),
    "event": (b"event: logline\ndata: New user connected\n\n", ["New user connected"]),
    "id_null": (b"data: test\nid: 123\0\n\n", ["test"]),
    "id_retry": (b"retry: 10000\n\n", []),
    "id_retry_invalid": (b"retry: 1667a\n\n", []),
    "unknown_field": (b"something: ignore\n\n", []),
    "unicode_line_separator": ("data: Hello\u2028World\x85\x0b\n\n".encode(), ["Hello\u2028World\x85\x0b"]),
}  # fmt: skip
CASES = {**WEB_PLATFORM_TESTS, **HTTPX_SSE}


@pytest.mark.parametrize(("stream", "events"), CASES.values(), ids=CASES)
def test_known_case_follows_standard(stream: bytes, events: list[str]) -> None:
    assert [data for _kind, data in Reference().read(stream)] == events
    assert decoded(stream)[0] == events
    assert decoded(*(bytes([byte]) for byte in stream))[0] == events


FIELDS = [
    b"data", b"data:", b"data: ", b"data: a", b"data:{}", b"data:  x", b" data: x", b"Data: x", b"data\0: x",
    b"event", b"event:", b"event: x", b"id: 1", b"retry: 5", b":", b": ping", b"x", b"x: y", b"\0",
    b"\xef\xbb\xbf", "ü🦙\u2028\x85".encode(), b"\xf0\x9f", b" ", b"",
]  # fmt: skip
ERRORS = [
    b"event: error",
    b"event:error",
    b"event: error ",
    b"event: errors",
    b"error",
    b"errors: x",
]
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b""])


def streams(fields: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return a strategy of streams in which what matters is far likelier than in random bytes."""
    lines = st.tuples(st.sampled_from(fields) | st.binary(max_size=4), ENDS).map(b"".join)
    return st.lists(lines, max_size=24).map(b"".join)


@settings(max_examples=1000, deadline=None)
@given(streams(FIELDS), st.lists(st.integers(0, 300), max_size=12))
@example(b"\n\xef\xbb\xbfdata: x\n\n", [])
@example(b"data\n\n", [])
@example(b"data: \xe2\x80\n\n", [7])
def test_any_stream_follows_standard(stream: bytes, boundaries: list[int]) -> None:
    reference = Reference()
    expected = [data for _kind, data in reference.read(stream)]
    events, remaining = decoded(*cut(stream, boundaries))
    assert events == expected
    # The departure: the event that the end of the stream cut short comes too, for `is_complete` to judge.
    reference.events.clear()
    if reference.unfinished:
        reference.process(reference.unfinished)
    reference.dispatch()
    assert remaining == [data for _kind, data in reference.events]


@settings(max_examples=500, deadline=None)
@given(streams([*FIELDS, *ERRORS]), st.lists(st.integers(0, 300), max_size=12))
@example(b"event: error\n\ndata: {}\n\n", [])
@example(b"event: error\nevent\ndata: {}\n\n", [])
def test_only_error_events_are_errors(stream: bytes, boundaries: list[int]) -> None:
    # `error:` is a field of llama.cpp's server, which the standard does not have.
    assume(not re.search(rb"(^|[\r\n])(\xef\xbb\xbf)?error:", stream))
    expected = Reference().read(stream)
    events, _remaining = decoded(*cut(stream, boundaries))
    assert len(events) == len(expected)
    for event, (kind, data) in zip(events, expected, strict=True):
        if kind == "error":
            assert json.loads(event)["error"]
        else:
            assert event == data


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b'event: error\ndata: {"message": "Out."}\n\n', {"message": "Out."}),
        (b"event: error\ndata: Out of\ndata: memory.\n\n", "Out of\nmemory."),
        (b"event: error\ndata:\n\n", "no reason given"),
        (b"event: error\ndata: {}\n\n", "no reason given"),
        (b'error: {"code": 500}\n\n', {"code": 500}),
        (b"error:Out.\nevent: message\n\n", "Out."),
        (b"event: error\ndata: \xff\n\n", "\ufffd"),
    ],
)
def test_error_event_becomes_object_with_error(stream: bytes, error: object) -> None:
    ((event,), remaining) = decoded(stream)
    assert (json.loads(event), remaining) == ({"error": error}, [])


@pytest.mark.parametrize("line", [b"data:\n", b"data: x\n", b"data: " + b"x" * 1000 + b"\n"])
def test_event_without_end_raises(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_decoders, "MAX_EVENT", 1 << 20)
    counted = len(line.removeprefix(b"data:").lstrip(b" "))
    with pytest.raises(MalformedStream, match="an event of more than 1 MiB"):
        EventDecoder().feed(line * (2 + (1 << 20) // counted))
