"""The files of a converted model: listed when they are written, compared before they are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llm_magic.backends.local import memory

MARKER = "llm_magic.json"  # in every folder that is ready; says what it was made of
# Larger ones are weights, of which sizes and headers are compared: a digest would take seconds.
_MOST_DIGESTED = 32 << 20


def write(folder: Path, made_of: dict[str, Any]) -> None:
    """Write the marker of a folder: what it was made of, and its files."""
    text = json.dumps({**made_of, "files": _files(folder)}, indent=2)
    (folder / MARKER).write_text(text, encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Return whether a folder has its marker, and its files are those that were written."""
    try:
        listed = json.loads((folder / MARKER).read_text("utf-8"))
        if "files" not in listed:
            # Written before files were listed.
            return _looks_whole(folder)
        found = _files(folder)
        same = all(found.get(name) == entry for name, entry in listed["files"].items())
        return same and all(map(memory.is_whole, folder.glob("*.safetensors")))
    except (OSError, ValueError, TypeError, AttributeError):
        # No marker, a damaged one, or a folder that is closed to us.
        return False


def _files(folder: Path) -> dict[str, list[Any]]:
    """Return the size of each file in a folder, and the digest of the smaller ones."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MARKER]
    return {str(file.relative_to(folder).as_posix()): _entry(file) for file in sorted(files)}


def _entry(file: Path) -> list[Any]:
    size = file.stat().st_size
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if size <= _MOST_DIGESTED else None
    return [size, digest]


def _looks_whole(folder: Path) -> bool:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        json.loads((folder / name).read_bytes())
    weights = memory.weight_files(folder)
    return bool(weights) and all(map(memory.is_whole, weights))
