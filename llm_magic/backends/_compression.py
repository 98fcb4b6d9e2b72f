"""Decompresses bodies in steps of a bounded size; pure, no I/O.

Requests ask for no compression, because it delays what is streamed. Some servers and proxies compress
all the same. What the standard library decodes in bounded steps is accepted: one layer of gzip or
deflate. Anything else is refused: a second layer turns 656 bytes into 300 MB, and the decoders of br
and zstd return everything at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

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
        return Decompressor(_GZIP)
    if layers == ["deflate"]:
        return Decompressor(_ZLIB)
    raise UnsupportedEncodingError(", ".join(layers))


class Decompressor:
    """Decompresses one body that comes in pieces; what follows its end is ignored."""

    def __init__(self, bits: int) -> None:
        self._bits, self._is_new = bits, True
        self._stream = zlib.decompressobj(bits)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` adds, at most `STEP` bytes at a time; raises `zlib.error`."""
        step = b""
        # A full step may leave output behind that needs no more input.
        while (data or len(step) == STEP) and not self._stream.eof:
            step = self._step(data)
            data = self._stream.unconsumed_tail
            if step:
                yield step

    def _step(self, data: bytes) -> bytes:
        is_new, self._is_new = self._is_new, False
        try:
            return self._stream.decompress(data, STEP)
        except zlib.error:
            if not is_new or self._bits != _ZLIB:
                raise
        # Some servers take "deflate" for the format without a header.
        self._stream = zlib.decompressobj(_RAW)
        return self._stream.decompress(data, STEP)
