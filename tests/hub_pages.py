"""The responses of the test hub about a repository, as pure functions of a folder.

The shapes are those that `huggingface_hub` 2.4 reads in `hf_api.py` (`ModelInfo`, `RepoFile`,
`RepoFolder`); ids are computed as git and Git LFS compute them, as on the real hub.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"

_LFS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True, slots=True)
class Repo:
    """A local folder that the hub shows as a model repository with one commit."""

    folder: Path
    commit: str = COMMIT
    tags: tuple[str, ...] = ("v1.0",)

    def has_revision(self, revision: str) -> bool:
        return revision in {"main", self.commit, *self.tags}

    def files(self) -> dict[str, Path]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in sorted(found)}


@dataclass(frozen=True, slots=True)
class Blob:
    """A file as git sees it; large kinds of files are Git LFS pointers with a sha256."""

    size: int
    oid: str
    sha256: str = ""
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def blob(path: Path) -> Blob:
    """The blob of a file; its hashes are kept while its size and time stay the same."""
    stat = path.stat()
    return _hashed(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hashed(path: Path, size: int, _time: int) -> Blob:
    content = path.read_bytes()
    if path.suffix not in _LFS:
        return Blob(size, _git_oid(content))
    digest = sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
    return Blob(size, _git_oid(pointer.encode()), digest, len(pointer))


def _git_oid(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def model_info(repo_id: str, repo: Repo, *, gated: bool, blobs: bool) -> dict[str, Any]:
    """The answer to `GET /api/models/{repo_id}`; `blobs` adds sizes and hashes of the files."""
    siblings = [
        {"rfilename": name} | (_sibling(blob(path)) if blobs else {})
        for name, path in repo.files().items()
    ]
    return {
        "id": repo_id,
        "modelId": repo_id,
        "sha": repo.commit,
        "private": False,
        "gated": "manual" if gated else False,
        "disabled": False,
        "tags": ["transformers", "text-generation"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "createdAt": "2025-01-01T00:00:00.000Z",
        "lastModified": "2025-01-01T00:00:00.000Z",
        "config": _config(repo.folder / "config.json"),
        "siblings": siblings,
    }


def _sibling(file: Blob) -> dict[str, Any]:
    known: dict[str, Any] = {"size": file.size, "blobId": file.oid}
    if file.sha256:
        known["lfs"] = {
            "sha256": file.sha256,
            "size": file.size,
            "pointerSize": file.pointer_size,
        }
    return known


def _config(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text()) if path.is_file() else {}
    return {key: config[key] for key in ("architectures", "model_type") if key in config}


def tree(repo: Repo, folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """The answer to `GET /api/models/{repo_id}/tree/{revision}/{folder}`; None if missing."""
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    inside = {name: path for name, path in repo.files().items() if name.startswith(prefix)}
    if folder and not inside:
        return None
    folders = {
        prefix + name[len(prefix) : end]
        for name in inside
        for end, letter in enumerate(name)
        if letter == "/" and end > len(prefix)
    }
    entries = [_folder_entry(name) for name in folders]
    entries += [_file_entry(name, blob(path)) for name, path in inside.items()]
    shown = [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]
    return sorted(shown, key=lambda entry: str(entry["path"]))


def _folder_entry(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": sha1(name.encode()).hexdigest(), "size": 0}


def _file_entry(name: str, file: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": file.oid, "size": file.size}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry


def file_headers(path: Path, commit: str) -> dict[str, str]:
    """The headers of `/{repo_id}/resolve/{revision}/{path}`, of which the client reads most."""
    known = blob(path)
    return {
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        "ETag": f'"{known.etag}"',
        "X-Linked-Etag": f'"{known.etag}"',
        "X-Linked-Size": str(known.size),
        "X-Repo-Commit": commit,
    }


def part(content: bytes, range_header: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, bytes and extra headers for a `Range` header, of which one `bytes=N-[M]` is known."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", range_header)
    if match is None:
        return 200, content, {}
    total = len(content)
    start, end = int(match[1]), min(int(match[2] or total), total - 1)
    if start > end:
        return 416, b"", {"Content-Range": f"bytes */{total}"}
    return 206, content[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{total}"}
