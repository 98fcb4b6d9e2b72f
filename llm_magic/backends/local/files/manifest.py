"""The list of files in the folder of a converted model, and the comparison with the files on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llm_magic.backends.local.files import safetensors

MARKER = "llm_magic.json"
# Larger files are weights. Their sizes and headers are compared: a digest would take seconds.
_LARGEST_DIGESTED = 32 << 20


def write(folder: Path, origin: dict[str, Any]) -> None:
    """Write what a folder was converted from, and the list of its files."""
    text = json.dumps({**origin, "files": _files(folder)}, indent=2)
    (folder / MARKER).write_text(text, encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a manifest, and its files are those in it."""
    try:
        listed = json.loads((folder / MARKER).read_text("utf-8"))["files"]
        found = _files(folder)
        is_same = all(found.get(name) == entry for name, entry in listed.items())
        return is_same and all(map(safetensors.is_complete, folder.glob("*.safetensors")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _files(folder: Path) -> dict[str, list[Any]]:
    """Return the size of each file in a folder, and the digest of small files."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MARKER]
    return {str(file.relative_to(folder).as_posix()): _entry(file) for file in sorted(files)}


def _entry(file: Path) -> list[Any]:
    size = file.stat().st_size
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if size <= _LARGEST_DIGESTED else None
    return [size, digest]
