"""The headers of safetensors files: which files a model has, and whether they are complete."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


def indexed_files(folder: Path) -> list[str]:
    """Return the names in the index of a folder; raises `OSError`, or `ValueError` if it is damaged."""
    index = json.loads((folder / INDEX).read_text("utf-8"))
    try:
        return sorted(set(map(str, index["weight_map"].values())))
    except (TypeError, KeyError, AttributeError):
        raise ValueError("the index has no names") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the files that Transformers reads: one, or those of the index, else all of them."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    with contextlib.suppress(OSError, ValueError):
        return [file for name in indexed_files(folder) if (file := folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


def read_header(file: Path) -> dict[str, Any]:
    """Return dtype, shape and offsets of each tensor; nothing for a damaged header."""
    # Eight bytes, little-endian: the length of the JSON that follows.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return {}
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            return {name: info for name, info in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError):
            return {}


def is_complete(file: Path) -> bool:
    """Return whether a file is as long as its header states."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    ends: list[int] = [info["data_offsets"][1] for info in read_header(file).values()]
    return bool(ends) and 8 + length + max(ends) == file.stat().st_size
