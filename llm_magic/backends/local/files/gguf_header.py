"""What a GGUF file says at its beginning: enough to tell a whole file from a broken one.

The `gguf` package reads the same, but takes seconds, as it makes an array of every token.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from llm_magic.errors import LoadFailed

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class Contents(NamedTuple):
    """How many numbers all tensors of a file hold, and how many bytes it has to have for them.

    A big model may come in several files; `parts` is how many.
    """

    numbers: int
    size: int
    parts: int


def read_contents(file: Path) -> Contents:
    """Read the header of `file`; `LoadFailed` tells what is wrong with a file that is no good."""
    try:
        size = file.stat().st_size
        with file.open("rb") as raw:
            if raw.read(len(_MAGIC)) != _MAGIC:
                raise LoadFailed(f"{file.name} is not a GGUF file: it does not begin with GGUF.")
            with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as view:
                contents = _Header(view).contents()
    except OSError as error:
        raise LoadFailed(f"{file} cannot be read: {error.strerror}.") from None
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise LoadFailed(
            f"{file.name} is damaged or not complete: its header cannot be read; get it again.",
            details=repr(error),
        ) from None
    if contents.parts > 1:
        raise LoadFailed(
            f"{file.name} is one of {contents.parts} parts; join them first:"
            f" llama-gguf-split --merge {file.name} whole.gguf"
        )
    if size < contents.size:
        raise LoadFailed(
            f"{file.name} is not complete: {size / 1e6:.1f} MB of at least"
            f" {contents.size / 1e6:.1f} MB are there; get it again."
        )
    return contents


class _Header:
    """Reads from front to back; beyond the end of the file is a `struct.error`."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._at = len(_MAGIC)

    def contents(self) -> Contents:
        from gguf import GGML_QUANT_SIZES  # bytes per block of numbers, for every type

        version, tensors, entries = self._take("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}")
        values = {self._text(): self._value(*self._take("I")) for _ in range(entries)}
        numbers = end = 0
        for _ in range(tensors):
            self._text()
            count = math.prod(self._take(f"{self._take('I')[0]}Q"))
            kind, offset = self._take("IQ")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            numbers += count
            end = max(end, offset + count // block * block_bytes)
        step = values.get("general.alignment") or 32
        size = math.ceil(self._at / step) * step + end
        return Contents(numbers, size, values.get("split.count") or 1)

    def _take(self, layout: str) -> tuple[Any, ...]:
        taken = struct.Struct(f"<{layout}")
        values = taken.unpack_from(self._view, self._at)
        self._at += taken.size
        return values

    def _text(self) -> str:
        (length,) = self._take("Q")
        self._at += length
        return self._view[self._at - length : self._at].decode()

    def _value(self, kind: int) -> int | None:
        """Step over one value, and return it if it is a number."""
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]  # type: ignore[no-any-return]
        if kind == _TEXT:
            self._skip_texts(1)
        elif kind == _ARRAY:
            self._skip_array(*self._take("IQ"))
        else:
            raise ValueError(f"kind {kind}")
        return None

    def _skip_array(self, kind: int, count: int) -> None:
        if kind in _SCALARS:
            self._at += count * struct.calcsize(f"<{_SCALARS[kind]}")
        elif kind == _TEXT:
            self._skip_texts(count)
        else:
            for _ in range(count):
                self._value(kind)

    def _skip_texts(self, count: int) -> None:
        # A vocabulary and its merges are some 100,000 of these: no call per text.
        view, at, length = self._view, self._at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length(view, at)[0]
        self._at = at
