"""Before a load: find the model, fetch and convert its files, and see that it fits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm_magic.backends.base import LoadPlan, Report
from llm_magic.backends.local import memory
from llm_magic.backends.local.files import gguf, hub, sources, validate
from llm_magic.backends.local.files.sources import Source
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.local.worker import Cancelled
from llm_magic.config.settings import Settings
from llm_magic.errors import OutOfMemory
from llm_magic.text.formatting import human_bytes
from llm_magic.types import Progress


@dataclass(frozen=True, slots=True)
class Ready:
    """What a checked load needs: files on this disk and a device that has room.

    `assistant` is the folder of the small model that guesses ahead.
    """

    config: LocalLoadConfig
    source: Source
    folder: Path
    device: str
    needed: int
    assistant: Path | None = None


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one model on this disk, and what they will take in memory."""

    source: Source
    folder: Path
    needed: int
    converted: bool


class Planner:
    """Finds and checks the models of one load; changes nothing that is resident."""

    def __init__(
        self, settings: Settings, config: LocalLoadConfig, report: Report, cancel: threading.Event
    ) -> None:
        self._settings, self._config = settings, config
        self._report, self._cancel = report, cancel

    def plan(self, model: str | None, freed: Mapping[str, int]) -> LoadPlan:
        """Return what to load; `freed` are the bytes, by device, that will be free besides."""
        from llm_magic.backends.local import loader

        config = self._config
        self._report(Progress("looking for the model"))
        source = self._find(model, config.revision)
        device = loader.resolve_device(config.device)
        loader.check_quantization(config, device)
        free = _free(config, device, freed)
        found = self._files(source, device, free)
        needed = found.needed
        assistant = None
        if config.assistant is not None:
            self._report(Progress("looking for the assistant"))
            helper = self._files(self._find(config.assistant, None), device, free - needed)
            needed += helper.needed
            assistant = helper.folder
        ready = Ready(config, source, found.folder, device, needed, assistant)
        notes = (f"Converted once to {found.folder}",) if found.converted else ()
        return LoadPlan(model or source.name, source.name, config, ready, notes)

    def _find(self, model: str | None, revision: str | None) -> Source:
        code = self._config.trust_remote_code
        return sources.find(model, revision, self._settings, code=code)

    def _files(self, source: Source, device: str, free: int) -> _Files:
        config = self._config
        fit = partial(
            memory.check_fit, source.name, device=device, quantization=config.quantization
        )
        if source.hub is not None:
            fit(memory.scaled(source.hub.size, config.quantization), free)
        converted = _is_new(source)
        if converted:
            self._check_conversion(source, fit, free)
        folder = _files_of(source, config, self._report, self._cancel)
        about = sources.model_config(folder)
        validate.check_folder(source.name, folder, config, about)
        needed = memory.needed_bytes(
            memory.weight_bytes(folder, config.dtype, config.quantization),
            memory.kv_bytes(about, config.dtype),
        )
        fit(needed, free)
        return _Files(source, folder, needed, converted)

    def _check_conversion(
        self, source: Source, fit: Callable[[float, int], None], free: int
    ) -> None:
        """See that what comes of a .gguf file will fit, and that there is room to make it."""
        assert source.path is not None
        size = gguf.converted_size(source.path)
        fit(memory.scaled(size, self._config.quantization), free)
        room = memory.free_bytes("cpu")
        if size > room:
            raise OutOfMemory(
                f"Converting {source.name} takes about {human_bytes(size)} of memory,"
                f" {human_bytes(room)} are free. Free some, or get the model as safetensors."
            )


def _free(config: LocalLoadConfig, device: str, freed: Mapping[str, int]) -> int:
    """Return the bytes that there will be for a model; what goes from elsewhere is of no use."""
    places = [device]
    if config.device == "auto" and device == "cuda" and config.quantization == "none":
        # accelerate puts on the CPU what the GPUs have no room for.
        places.append("cpu")
    free = sum(map(memory.free_bytes, places))
    return free + sum(size for at, size in freed.items() if any(_is_in(at, p) for p in places))


def _is_in(device: str, place: str) -> bool:
    """Return whether a device's memory is that of a place, of which ``cuda`` is all GPUs."""
    # An Apple GPU has the CPU's.
    device, place = (name.replace("mps", "cpu").replace("cpu:0", "cpu") for name in (device, place))
    return device == place or (place == "cuda" and device.startswith("cuda:"))


def _is_new(source: Source) -> bool:
    """Return whether the files will be converted now."""
    if source.path is None or source.where not in {"embedded", "gguf"}:
        return False
    return not gguf.is_converted(source.path)


def _files_of(
    source: Source, config: LocalLoadConfig, report: Report, cancel: threading.Event
) -> Path:
    """Return a folder of safetensors on this disk: downloaded or converted now if need be."""
    if source.hub is not None:
        return hub.download(source.hub, report, cancel.is_set, code=config.trust_remote_code)
    assert source.path is not None
    if source.where not in {"embedded", "gguf"}:
        return source.path
    try:
        return gguf.convert(source.path, report=report, cancelled=cancel.is_set)
    except gguf.ConversionCancelled:
        raise Cancelled from None
