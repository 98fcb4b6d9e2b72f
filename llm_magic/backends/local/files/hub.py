"""The Hugging Face hub and its cache on this machine."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLError
from typing import Any

from llm_magic.backends.local.files import validate
from llm_magic.backends.local.worker import Cancelled
from llm_magic.config.certificates import certificate_problem
from llm_magic.errors import LLMMagicError, LoadFailed, ModelNotFound
from llm_magic.text.formatting import human_bytes
from llm_magic.types import Progress

# Weights as safetensors only: a pickle runs code when it is read.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# The client looks up after each so many bytes only, whether it shall stop; its own is 10 MiB.
_CHUNK = 256 << 10
# What a disk says that takes no more.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_NOT = ("consolidated*", "original/*", "onnx/*", "*/*.safetensors")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub: its size in bytes, and what of it is still to be fetched."""

    id: str
    revision: str | None
    size: int
    missing: int
    files: tuple[str, ...]


def cached(model: str, revision: str | None, *, code: bool = False) -> Path | None:
    """Return the folder of a completely cached model, without asking the network."""
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
        # Of the repository, of which a model needs less: not its licence.
        folder = Path(error.snapshot_path)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    # Who asks for the tokenizer alone leaves a folder with no more than that.
    return folder if validate.is_complete(folder) else None


def look_up(
    model: str, revision: str | None, *, code: bool = False, near: Callable[[], str] = str
) -> HubModel:
    """Ask the hub for a model; raises `ModelNotFound` or `LoadFailed` in one line.

    `near` returns what to say about other names, where this one leads nowhere.
    """
    from huggingface_hub import snapshot_download

    try:
        # Without a bar of ours, the client shows its own in the cell.
        bar = _progress_bar(0, lambda _progress: None, lambda: False)
        files = snapshot_download(
            model, revision=revision, dry_run=True, tqdm_class=bar, **_patterns(code)
        )
        names = {file.filename for file in files}
        if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
            raise LoadFailed(_why_unusable(model, revision))
    except LoadFailed:
        raise
    except Exception as error:  # noqa: BLE001 - translated: the hub's client raises many kinds
        raise _explain(error, model, revision, near) from None
    return HubModel(
        id=model,
        revision=revision,
        size=sum(f.file_size for f in files),
        missing=sum(f.file_size for f in files if f.will_download),
        files=tuple(f.filename for f in files),
    )


def _why_unusable(model: str, revision: str | None) -> str:
    from huggingface_hub import list_repo_files

    names = list_repo_files(model, revision=revision)
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return (
            f"{model} has only GGUF files. Download the one you want (`hf download {model} {gguf[0]}`"
            " in a terminal) and load it by the path that this prints."
        )
    if any(name.endswith(".safetensors") for name in names):
        return f"{model} has no config.json: it is an adapter, or no model for Transformers."
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"{model} has only pickle files, which can run code when they are read."
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
    """Fetch a model into the hub's cache; raises `Cancelled` soon after `cancelled()` is true."""
    from huggingface_hub import constants, snapshot_download

    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, _CHUNK)
    report(Progress("downloading", 0.0, f"0 of {human_bytes(found.missing)}"))
    bar = _progress_bar(found.missing, report, cancelled)
    try:
        return Path(
            snapshot_download(found.id, revision=found.revision, tqdm_class=bar, **_patterns(code))
        )
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001 - translated: the hub's client raises many kinds
        if cancelled():
            raise Cancelled from None
        raise _explain(error, found.id, found.revision) from None


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
    """Return the revision of a model that a load takes: of those with weights main, else the newest."""
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
        "allow_patterns": [*_FILES, *(("*.py",) if code else ())],
        "ignore_patterns": list(_NOT),
    }


def _progress_bar(
    missing: int, report: Callable[[Progress], None], cancelled: Callable[[], bool]
) -> type:
    from tqdm.std import tqdm

    # Of several that count the same bytes (fetched, and put together) the one that is ahead.
    told = [0]

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
        """Passes the bytes of the hub's own bar on, and stops the download when asked to."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.n = 0

        def update(self, n: float | None = 1) -> bool | None:
            if cancelled():
                # It fetches on threads of its own, which mind no exception from here.
                _abort()
                raise Cancelled
            self.n += int(n or 0)
            if self.counts_bytes and missing and self.n > told[0]:
                told[0] = int(self.n)
                share = min(self.n / missing, 1.0)
                detail = f"{human_bytes(self.n)} of {human_bytes(missing)}"
                report(Progress("downloading", share, detail))
            return None

    return Bar


def _abort() -> None:
    from huggingface_hub.utils import _xet

    abort = getattr(_xet, "abort_xet_session", None)
    if abort is not None:
        abort()


def _explain(
    error: Exception, model: str, revision: str | None, near: Callable[[], str] = str
) -> LLMMagicError:
    from huggingface_hub import errors

    if isinstance(error, errors.DryRunError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(
            f"{model} is gated: accept its terms on huggingface.co, then type `hf auth login`"
            " in a terminal."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"{model} has no revision {revision!r} on the hub.")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ModelNotFound(f"There is no model {model!r}, neither here nor on the hub.{near()}")
    # What is raised where the client reads its certificates does not name them.
    is_plain = type(error) in {FileNotFoundError, IsADirectoryError, PermissionError, SSLError}
    if is_plain and (problem := certificate_problem()):
        return LoadFailed(f"{model} cannot be fetched from the hub. {problem}")
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f" ({error.filename})" if error.filename else ""
        return LoadFailed(
            f"{model} cannot be written to the hub's cache{where}: {error.strerror}."
            " Make room or rights there, or set HF_HUB_CACHE to another folder."
        )
    reason = str(error.__cause__ or error).strip().partition("\n")[0]
    if isinstance(error, errors.HfHubHTTPError):
        return LoadFailed(f"The hub refused {model}: {reason}")
    wanted = f"{model} at revision {revision}" if revision else model
    return LoadFailed(
        f"{wanted} is not on this machine and the hub cannot be reached ({reason})."
        f" Load a local folder or a .gguf file instead, or try again with a network.{near()}"
    )
