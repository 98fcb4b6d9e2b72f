"""Compressed bodies come out the same however they were cut, in steps of a bounded size."""

from __future__ import annotations

import contextlib
import gzip
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_magic.backends.remote.compression import (
    STEP,
    Decompressor,
    UnsupportedEncodingError,
    decompressor,
)


def packed(encoding: str, data: bytes) -> bytes:
    """Return `data` compressed; "raw" is what some servers take for deflate."""
    if encoding == "raw":
        packer = zlib.compressobj(wbits=-15)
        return packer.compress(data) + packer.flush()
    return gzip.compress(data) if encoding.endswith("gzip") else zlib.compress(data)


def unpacker(encoding: str) -> Decompressor:
    """Return what decompresses it."""
    made = decompressor("deflate" if encoding == "raw" else encoding)
    assert made is not None
    return made


ENCODINGS = ["gzip", "x-gzip", "deflate", "raw"]


@given(
    st.sampled_from(ENCODINGS),
    st.binary(max_size=300),
    st.integers(0, 3 * STEP),
    st.integers(1, 50),
    st.binary(max_size=20),
)
@example("raw", b"a", 0, 1, b"")
@example("gzip", b"", STEP, 1 << 20, b"")
@example("deflate", b"", 2 * STEP, 7, b"behind")
def test_body_comes_out_whole_in_bounded_steps(
    encoding: str, data: bytes, zeros: int, size: int, behind: bytes
) -> None:
    data += bytes(zeros)
    body, decompress = packed(encoding, data) + behind, unpacker(encoding)
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    steps = [step for piece in pieces for step in decompress.feed(piece)]
    assert b"".join(steps) == data
    assert all(0 < len(step) <= STEP for step in steps)


@given(st.sampled_from(ENCODINGS), st.binary(min_size=2, max_size=50), st.integers(1, 9))
def test_any_bytes_decompress_or_raise_one_error(encoding: str, body: bytes, size: int) -> None:
    decompress = unpacker(encoding)
    with contextlib.suppress(zlib.error):
        for at in range(0, len(body), size):
            assert all(len(step) <= STEP for step in decompress.feed(body[at : at + size]))


@pytest.mark.parametrize("encoding", ["", "identity", " Identity ,", ","])
def test_identity_needs_no_decompressor(encoding: str) -> None:
    assert decompressor(encoding) is None


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("br", "br"), ("zstd", "zstd"), ("GZIP, gzip", "gzip, gzip"),
     ("deflate, identity, gzip", "deflate, gzip")],
)  # fmt: skip
def test_other_encodings_are_refused(encoding: str, named: str) -> None:
    with pytest.raises(UnsupportedEncodingError) as caught:
        decompressor(encoding)
    assert str(caught.value) == named
