"""Names of the models on this disk, found quickly enough for a key press.

`sources.available` tells more about them, and reads every file of the hub's cache for that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from llm_magic.backends.local.files import gguf
from llm_magic.types import ModelInfo

# Of a folder with more entries only so many are looked at.
_MOST = 500


def models(folder: Path | None) -> list[ModelInfo]:
    """Return the embedded model, those of a folder, and those in the hub's cache, by name only."""
    found = list(_in_folder(folder.expanduser())) if folder is not None else []
    found += _in_hub_cache()
    if gguf.embedded_file() is not None:
        found.insert(0, _named(gguf.EMBEDDED_NAME, "embedded"))
    return found


def paths(typed: str) -> list[str]:
    """Return the folders (with a slash at the end, unless they hold a model) and .gguf files there.

    `typed` is the beginning of a path as somebody writes it: ``./mod``, ``~/models/``.
    """
    head, start = os.path.split(typed)
    found = []
    # Of `os`, which leaves the ~name of no user as it is.
    for entry in _entries(Path(os.path.expanduser(head or "."))):  # noqa: PTH111
        hidden = entry.name.startswith(".") and not start.startswith(".")
        if hidden or not entry.name.startswith(start):
            continue
        written = typed.removesuffix(start) + entry.name
        if entry.is_dir():
            found.append(written if _is_model(entry.path) else written + os.sep)
        elif entry.name.endswith(".gguf"):
            found.append(written)
    return sorted(found)


def _in_folder(folder: Path) -> Iterator[ModelInfo]:
    for entry in _entries(folder):
        if entry.name.endswith(".gguf"):
            yield _named(entry.name, "gguf")
        elif _is_model(entry.path):
            yield _named(entry.name, "folder")


def _in_hub_cache() -> Iterator[ModelInfo]:
    if find_spec("huggingface_hub") is None:
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    for repo in _entries(Path(HF_HUB_CACHE)):
        kind, _, name = repo.name.partition("--")
        if kind == "models" and _has_weights(Path(repo.path, "snapshots")):
            yield _named(name.replace("--", "/"), "cache")


# Where weights were seen, and when that folder was changed last.
_SEEN: dict[Path, int] = {}


def _has_weights(snapshots: Path) -> bool:
    """Return whether a revision has weights; what was seen is looked for again after a change."""
    try:
        changed = snapshots.stat().st_mtime_ns
    except OSError:
        return False
    # Never that there are none: a download may be at its beginning.
    if _SEEN.get(snapshots) != changed:
        files = (file for revision in _entries(snapshots) for file in _entries(Path(revision)))
        if not any(file.name.endswith(".safetensors") for file in files):
            return False
        _SEEN[snapshots] = changed
    return True


def _is_model(folder: str) -> bool:
    # Of `os`, which says no where it must not look.
    return os.path.isfile(Path(folder, "config.json"))  # noqa: PTH113


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, _MOST))
    except OSError:
        return []


def _named(name: str, where: str) -> ModelInfo:
    return ModelInfo(name, "local", where)
