"""Decompresses bodies in steps of a bounded size; pure, no I/O.

Requests ask for no compression, because it delays what is streamed. Some servers and proxies compress
all the same. What the standard library decodes in bounded steps is accepted: one layer of gzip or
deflate. Anything else is refused: a second layer turns 656 bytes into 300 MB, and the decoders of br
and zstd return everything at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

# The most that one step returns: the event loop can do other work between two of them.
STEP = 64 * 1024
_GZIP, _ZLIB, _RAW = 31, 15, -15


class UnsupportedEncodingError(ValueError):
    """The body is compressed in a way that is not decoded; the message names it."""


def decompressor(encoding: str) -> Decompressor | None:
    """Return what decodes a ``Content-Encoding``, None for one that changes nothing."""
    names = [name.strip().lower() for name in encoding.split(",")]
    layers = [name for name in names if name not in {"", "identity"}]
    if not layers:
        return None
    if layers in (["gzip"], ["x-gzip"]):
        return Decompressor(is_gzip=True)
    if layers == ["deflate"]:
        return Decompressor(is_gzip=False)
    raise UnsupportedEncodingError(", ".join(layers))


class Decompressor:
    """Decompresses one body that comes in pieces; what follows its end is ignored."""

    def __init__(self, *, is_gzip: bool) -> None:
        self._is_gzip = is_gzip
        # Made when the head of the body shows its format.
        self._stream: Any = None
        self._head = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` adds, at most `STEP` bytes at a time; raises `zlib.error`."""
        if self._stream is None:
            data = self._head = self._head + data
            if len(data) < 2:
                return
            self._stream = zlib.decompressobj(_GZIP if self._is_gzip else _deflate(data))
        step = b""
        # A full step may leave output behind that needs no more input.
        while (data or len(step) == STEP) and not self._stream.eof:
            step = self._stream.decompress(data, STEP)
            data = self._stream.unconsumed_tail
            if step:
                yield step


def _deflate(head: bytes) -> int:
    """Return the format of a "deflate" body: some servers omit the header of zlib (RFC 1950)."""
    has_header = head[0] & 0x0F == 8 and int.from_bytes(head[:2], "big") % 31 == 0
    return _ZLIB if has_header else _RAW
