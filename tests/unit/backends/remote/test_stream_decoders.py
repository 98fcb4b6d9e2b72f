"""Bytes from the wire to lines, events and objects, however they were cut."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_magic.backends.remote.stream_decoders import (
    MAX_LINE,
    MAX_VALUES,
    Decoder,
    EventDecoder,
    JsonLinesDecoder,
    LineDecoder,
    MalformedStream,
    is_complete,
    parse_object,
)

# What matters to the decoders is far likelier here than among all bytes.
WIRE = st.lists(
    st.sampled_from(
        [b"\n", b"\r", b"\r\n", b"data:", b"data: ", b"data", b": ping", b"event: x", b"id: 1",
         b"retry: 5", b" ", b"{}", "ü🦙".encode(), b"a"]
    )
    | st.binary(max_size=3),
    max_size=30,
).map(b"".join)  # fmt: skip


def cut(data: bytes, boundaries: Sequence[int]) -> list[bytes]:
    """Return `data` in pieces, some of them empty."""
    positions = [0, *sorted(n % (len(data) + 1) for n in boundaries), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(positions)]


def decoded(decoder: Decoder, *pieces: bytes) -> list[bytes]:
    """Return everything that a decoder makes of the pieces."""
    return [*(event for piece in pieces for event in decoder.feed(piece)), *decoder.flush()]


def lines(*pieces: bytes) -> list[bytes]:
    """Return the lines, the one without an end last."""
    decoder = LineDecoder()
    return [*(line for piece in pieces for line in decoder.feed(piece)), decoder.flush()]


@given(WIRE, st.lists(st.integers(0, 200), max_size=12))
@example(b"a\r\nb", [2])
@example(b"\r\r\n\n", [1, 2, 2, 3])
def test_lines_are_independent_of_chunks(data: bytes, boundaries: list[int]) -> None:
    whole = re.split(rb"\r\n|\n|\r", data)
    assert lines(data) == whole
    assert lines(*cut(data, boundaries)) == whole
    assert lines(*(bytes([byte]) for byte in data)) == whole


@pytest.mark.parametrize("kind", [EventDecoder, JsonLinesDecoder])
@given(data=WIRE, boundaries=st.lists(st.integers(0, 200), max_size=12))
def test_events_are_independent_of_chunks(
    kind: Callable[[], Decoder], data: bytes, boundaries: list[int]
) -> None:
    whole = decoded(kind(), data)
    assert decoded(kind(), *cut(data, boundaries)) == whole
    assert decoded(kind(), *(bytes([byte]) for byte in data)) == whole


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"))),
    st.lists(st.sampled_from([b"\n", b"\r", b"\r\n"]), min_size=3, max_size=3),
    st.lists(st.integers(0, 500), max_size=9),
)
def test_any_text_is_decoded_with_any_line_end(
    texts: list[str], ends: list[bytes], boundaries: list[int]
) -> None:
    first, second, third = ends
    parts = [b"data: " + text.encode() + first + second for text in texts]
    if first + second == b"\r\n":
        # Together they end one line, and the event not before the next.
        parts = [part + third + (b"\n" if third == b"\r" else b"") for part in parts]
    assert decoded(EventDecoder(), *cut(b"".join(parts), boundaries)) == [t.encode() for t in texts]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: {}\n\n", [b"{}"]),
        (b"data:{}\n\n", [b"{}"]),
        (b"data:  {}\n\n", [b" {}"]),
        (b"data: {}\n\ndata: [DONE]\n\n", [b"{}", b"[DONE]"]),
        (b"data: {}\n\ndata: [DONE]", [b"{}", b"[DONE]"]),
        (b"data: {}\n", [b"{}"]),
        (b"data: {\ndata: }\n\n", [b"{\n}"]),
        (b": ping\n\ndata: {}\n\n: ping\n\n", [b"{}"]),
        (b"data: 1\n: between\ndata: 2\n\n", [b"1\n2"]),
        (b"event: x\nid: 7\nretry: 10\ndata: {}\n\n", [b"{}"]),
        (b"event: ping\n\n", []),
        (b"database: 1\n\n", []),
        (b" data: 1\n\n", []),
        (b"\n\n\n", []),
        (b"", []),
        (b"data: a\r\n\r\ndata: b\r\r\ndata: c\n\r\n", [b"a", b"b", b"c"]),
    ],
)
def test_event_data_follows_standard(stream: bytes, events: list[bytes]) -> None:
    assert decoded(EventDecoder(), stream) == events


def test_byte_order_mark_is_removed() -> None:
    assert decoded(EventDecoder(), b"\xef\xbb\xbfdata: {}\n\n") == [b"{}"]


def test_json_lines_are_stripped_and_not_empty() -> None:
    assert decoded(JsonLinesDecoder(), b'{"a":1}\r\n\n \n {} \n{"b"', b":2}") == [
        b'{"a":1}',
        b"{}",
        b'{"b":2}',
    ]


def test_split_character_is_joined() -> None:
    value = {"text": "Grüße 🦙"}
    stream = b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
    for size in (1, 2, 3):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        (event,) = decoded(EventDecoder(), *pieces)
        assert parse_object(event) == value


def work(size: int) -> float:
    """Return the processor time that one long line in small pieces takes, the best of three."""
    piece = b"x" * 1000

    def once() -> float:
        decoder = EventDecoder()
        began = time.thread_time()
        taken = [*decoder.feed(b"data: ")]
        for _ in range(size // len(piece)):
            taken += decoder.feed(piece)
        taken += decoder.feed(b"\n\n")
        spent = time.thread_time() - began
        assert [len(event) for event in taken] == [size]
        return spent

    return min(once() for _ in range(3))


def test_time_is_linear_in_length_of_line() -> None:
    # What is read again with every piece would take a hundred times as long.
    assert work(10_000_000) < 40 * work(1_000_000)


def test_line_without_end_raises() -> None:
    decoder, piece = LineDecoder(), b"x" * (1 << 20)
    for _ in range(MAX_LINE // len(piece)):
        assert list(decoder.feed(piece)) == []
    with pytest.raises(MalformedStream, match="a line of more than 16 MiB"):
        list(decoder.feed(b"x"))


def test_limit_applies_to_single_lines() -> None:
    decoder = LineDecoder()
    line = b"x" * (1 << 20) + b"\n"
    seen = sum(1 for _ in range(MAX_LINE // len(line) + 8) for _line in decoder.feed(line))
    assert seen == MAX_LINE // len(line) + 8


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[DONE", b"{", b"nothing", b"{'a': 1}", b'{"a": 1} {"b": 2}', b"\xff\xfe{}", b"\x00",
        b'{"a": "\xff}', b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"1" * 5000 + b"}",
    ],
)  # fmt: skip
def test_invalid_json_raises(data: bytes) -> None:
    with pytest.raises(MalformedStream, match="invalid JSON"):
        parse_object(data)


@pytest.mark.parametrize("data", [b"[]", b"1", b'"text"', b"null", b"NaN", b"true", b"[{}]"])
def test_json_that_is_not_object_raises(data: bytes) -> None:
    with pytest.raises(MalformedStream, match="JSON that is not an object"):
        parse_object(data)


def test_invalid_utf8_is_replaced() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": "\xffb\xe2\x80"}') == {"a": "\ufffdb\ufffd"}


@pytest.mark.parametrize("value", [b"{},", b"[],", b"0,", b'"k":{},'])
def test_json_with_too_many_values_raises(value: bytes) -> None:
    with pytest.raises(MalformedStream, match="JSON with too many values"):
        parse_object(b'{"a": [' + value * MAX_VALUES + b"0]}")


def test_json_extensions_of_python_are_accepted() -> None:
    value = parse_object(b'{"a": NaN, "b": -Infinity, "c": "\\ud83d"}')
    assert math.isnan(value["a"])
    assert (value["b"], value["c"]) == (-math.inf, "\ud83d")


@given(st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_parsed_or_raise(data: bytes) -> None:
    with contextlib.suppress(MalformedStream):
        assert isinstance(parse_object(data), dict)


@pytest.mark.parametrize(
    ("event", "whole"),
    [(b"{}", True), (b'{"a": 1}', True), (b"[DONE]", True), (b" [DONE] ", True), (b"[1]", True),
     (b'{"a": "b', False), (b"[DON", False), (b"", False), (b'{"a": "\xf0\x9f', False),
     (b"[" * 100_000, False)],
)  # fmt: skip
def test_completeness_of_last_event_is_detected(event: bytes, whole: bool) -> None:
    assert is_complete(event) is whole
