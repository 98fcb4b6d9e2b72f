"""Models on the Hugging Face hub and in its cache on this machine."""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLError
from typing import Any

from llm_magic.backends.local.files import validate
from llm_magic.backends.local.worker import Cancelled
from llm_magic.config.certificates import certificate_problem
from llm_magic.config.commands import option
from llm_magic.errors import LLMMagicError, LoadFailed, ModelNotFound
from llm_magic.text import human_bytes
from llm_magic.types import Progress

# Weights as safetensors only: reading a pickle can run code.
_ERRNO = re.compile(r"\[Errno -?\d+\] ")
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_IGNORED_PATTERNS = ("consolidated*", "original/*", "onnx/*", "*/*.safetensors")
# The client checks for a cancellation after each chunk. Its default is 10 MiB.
_CHUNK = 256 << 10
# Errors of a disk that cannot be written to.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub: its size and the part that is not in the cache yet, in bytes."""

    id: str
    revision: str | None
    size: int
    missing: int
    files: tuple[str, ...]


def cached(model: str, revision: str | None, *, code: bool = False) -> Path | None:
    """Return the folder of a model that is complete in the cache; uses no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(
                model, revision=revision, local_files_only=True, **_patterns(code)
            )
        )  # fmt: skip
    except IncompleteSnapshotError as error:
        if code:
            return None
        # A model does not need all files of its repository, such as the license.
        folder = Path(error.snapshot_path)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    # The folder may hold a part of the model only, such as its tokenizer.
    return folder if validate.is_complete(folder) else None


def look_up(
    model: str, revision: str | None, *, code: bool = False, suggestion: Callable[[], str] = str
) -> HubModel:
    """Return what the hub has of a model; raises `ModelNotFound` or `LoadFailed`.

    `suggestion` returns a sentence about similar names for the message of an unknown name.
    """
    from huggingface_hub import snapshot_download

    # Otherwise the client displays a progress bar in the cell.
    bar = _progress_bar(0, lambda _progress: None, lambda: False)
    problem = ""
    try:
        files = snapshot_download(
            model, revision=revision, dry_run=True, tqdm_class=bar, **_patterns(code)
        )
        names = {file.filename for file in files}
        if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
            problem = _unusable_files(model, revision)
    except Exception as error:  # noqa: BLE001 - translated; the client raises many classes
        raise _translated(error, model, revision, suggestion) from None
    if problem:
        raise LoadFailed(problem)
    return HubModel(
        id=model,
        revision=revision,
        size=sum(f.file_size for f in files),
        missing=sum(f.file_size for f in files if f.will_download),
        files=tuple(f.filename for f in files),
    )


def _unusable_files(model: str, revision: str | None) -> str:
    """Return the message for a repository that has no model for Transformers."""
    from huggingface_hub import list_repo_files

    names = list_repo_files(model, revision=revision)
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return (
            f"{model} has only GGUF files. Download one of them (`hf download {model} {gguf[0]}`"
            " in a terminal) and load the path that this prints."
        )
    if any(name.endswith(".safetensors") for name in names):
        return (
            f"{model} has no config.json: it is an adapter, or not a Transformers model."
            " Choose another model."
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"{model} has only pickle files, and reading them can run code."
            " Choose a model with .safetensors files."
        )
    return f"{model} has no weights. Choose a model with .safetensors files."


def download(
    found: HubModel,
    report: Callable[[Progress], None],
    cancelled: Callable[[], bool],
    *,
    code: bool = False,
) -> Path:
    """Download a model into the hub's cache; raises `Cancelled` soon after `cancelled` returns True."""
    from huggingface_hub import snapshot_download

    report(Progress("downloading", 0.0, f"0 of {human_bytes(found.missing)}"))
    bar = _progress_bar(found.missing, report, cancelled)
    try:
        with _small_chunks():
            return Path(
                snapshot_download(
                    found.id, revision=found.revision, tqdm_class=bar, **_patterns(code)
                )
            )
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001 - translated; the client raises many classes
        if cancelled():
            raise Cancelled from None
        raise _translated(error, found.id, found.revision) from None


_CHUNK_LOCK = threading.Lock()
_downloads = _default_chunk = 0


@contextlib.contextmanager
def _small_chunks() -> Iterator[None]:
    """Set the chunk size of the client, which is a constant of its module, while downloads run."""
    global _downloads, _default_chunk
    from huggingface_hub import constants

    with _CHUNK_LOCK:
        _downloads += 1
        if _downloads == 1:
            _default_chunk = constants.DOWNLOAD_CHUNK_SIZE
            constants.DOWNLOAD_CHUNK_SIZE = min(_CHUNK, _default_chunk)
    try:
        yield
    finally:
        with _CHUNK_LOCK:
            _downloads -= 1
            if _downloads == 0:
                constants.DOWNLOAD_CHUNK_SIZE = _default_chunk


def cached_models() -> list[tuple[str, Path, int]]:
    """Return (id, folder, bytes) of the models in the hub's cache that have safetensors weights."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = (_latest(repo) for repo in repos if repo.repo_type == "model")
    return sorted(
        (repo_id, revision.snapshot_path, revision.size_on_disk)
        for repo_id, revision in filter(None, models)
    )


def _latest(repo: Any) -> tuple[str, Any] | None:
    """Return the revision that a load uses: of those with weights ``main``, else the newest."""
    usable = [
        revision
        for revision in repo.revisions
        if any(file.file_name.endswith(".safetensors") for file in revision.files)
    ]
    if not usable:
        return None
    return repo.repo_id, max(usable, key=lambda one: ("main" in one.refs, one.last_modified))


def _patterns(code: bool) -> dict[str, Any]:
    return {
        "allow_patterns": [*_PATTERNS, *(("*.py",) if code else ())],
        "ignore_patterns": list(_IGNORED_PATTERNS),
    }


def _progress_bar(
    missing: int, report: Callable[[Progress], None], cancelled: Callable[[], bool]
) -> type:
    from llm_magic.backends.local.files.download_progress import CountingBar

    # Several bars count the same bytes (downloaded, and written): the largest number is reported.
    most_reported = 0.0

    class DownloadBar(CountingBar):
        def on_update(self) -> None:
            nonlocal most_reported
            if cancelled():
                # The threads of the client ignore an exception that is raised here.
                _abort()
                raise Cancelled
            # Other bars count files.
            if self.counts_bytes and missing and self.n > most_reported:
                most_reported = self.n
                share = min(self.n / missing, 1.0)
                detail = f"{human_bytes(self.n)} of {human_bytes(missing)}"
                report(Progress("downloading", share, detail))

    return DownloadBar


def _abort() -> None:
    """Stop the transfers of the client. It has no public function for this."""
    from huggingface_hub.utils import _xet

    abort = getattr(_xet, "abort_xet_session", None)
    if abort is not None:
        abort()


def _translated(
    error: Exception, model: str, revision: str | None, suggestion: Callable[[], str] = str
) -> LLMMagicError:
    """Return the error for one that the client raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.DryRunError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(
            f"{model} is gated. Accept its terms on huggingface.co, then run `hf auth login`"
            " in a terminal."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(
            f"{model} has no revision {revision!r} on the hub. Change {option('revision')}, or omit it."
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ModelNotFound(
            f"Model {model!r} not found on this machine or on the hub.{suggestion()}"
        )
    # Errors about the certificate files of the client do not name these files.
    is_plain = type(error) in {FileNotFoundError, IsADirectoryError, PermissionError, SSLError}
    if is_plain and (problem := certificate_problem()):
        return LoadFailed(f"{model} cannot be downloaded from the hub. {problem}")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return LoadFailed(
            f"{model} cannot be written to the hub's cache{where}: {error.strerror}."
            " Free disk space or change its permissions, or set HF_HUB_CACHE to another folder."
        )
    reason = _ERRNO.sub("", str(error.__cause__ or error).strip().partition("\n")[0])
    if isinstance(error, errors.HfHubHTTPError):
        return LoadFailed(f"The hub returned an error for {model}: {reason}")
    version = f"{model} at revision {revision}" if revision else model
    if "/" not in model and (near := suggestion()):
        # Not the id of a user's model on the hub: most likely a typing error.
        return LoadFailed(f"{version} is not on this machine.{near}")
    return LoadFailed(
        f"{version} is not on this machine.{suggestion()} The hub cannot be reached ({reason}): load a local"
        " folder or a .gguf file, or connect to the network and load again."
    )
