"""Prepares a load: finds the model, downloads and converts its files, and checks that it fits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from llm_magic.backends.base import LoadPlan, Report
from llm_magic.backends.local import memory
from llm_magic.backends.local.files import gguf, hub, sources, validate
from llm_magic.backends.local.files.sources import Source
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.config.settings import Settings
from llm_magic.errors import DeviceUnavailable, MissingDependency, OptionError, OutOfMemory
from llm_magic.text import counted, human_bytes
from llm_magic.types import Progress


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model on this disk, and the memory that the loaded model takes."""

    source: Source
    folder: Path
    required_bytes: int
    was_converted: bool


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """The checked files of a model and of its assistant, and the device they go to."""

    config: LocalLoadConfig
    main: ModelFiles
    device: str
    assistant: ModelFiles | None = None

    @property
    def required_bytes(self) -> int:
        """The memory that both take together."""
        return self.main.required_bytes + (self.assistant.required_bytes if self.assistant else 0)


class Planner:
    """Finds and checks the models of one load. Leaves all loaded models as they are."""

    def __init__(
        self, settings: Settings, config: LocalLoadConfig, report: Report, cancel: threading.Event
    ) -> None:
        self._settings, self._config = settings, config
        self._report, self._cancel = report, cancel

    def plan(self, model: str | None, freed: Mapping[str, int]) -> LoadPlan:
        """Return what to load. `freed` are the bytes by device that will be freed before the load."""
        config = self._config
        self._report(Progress("looking for the model"))
        source = self._find(model, config.revision)
        device = resolve_device(config.device)
        check_quantization(config, device)
        free = available_bytes(config, device, freed)
        main = self._prepare_files(source, device, free)
        assistant = None
        if config.assistant is not None:
            self._report(Progress("looking for the assistant"))
            assistant_source = self._find(config.assistant, None)
            assistant = self._prepare_files(assistant_source, device, free - main.required_bytes)
        notes = (f"Converted once to {main.folder}",) if main.was_converted else ()
        local = LocalPlan(config, main, device, assistant)
        return LoadPlan(model or source.name, source.name, config, local, notes)

    def _find(self, model: str | None, revision: str | None) -> Source:
        code = self._config.trust_remote_code
        return sources.find(model, revision, self._settings, code=code)

    def _prepare_files(self, source: Source, device: str, free: int) -> ModelFiles:
        config = self._config
        check_fit = partial(
            memory.check_fit, source.name, device=device, quantization=config.quantization
        )
        if source.hub is not None:
            check_fit(memory.scaled(source.hub.size, config.quantization), free)
        file, converts = source.gguf_file, False
        if file is not None and not gguf.is_converted(file):
            converts = True
            self._check_conversion(file, check_fit, free)
        folder = self._fetch(source)
        model_config = sources.model_config(folder)
        validate.check_folder(source.name, folder, config, model_config)
        weights = memory.weight_bytes(folder, config.dtype, config.quantization)
        if packs_weights(config, device):
            weights += memory.head_copy_bytes(folder, config.dtype)
        required = memory.required_bytes(weights, memory.kv_bytes(model_config, config.dtype))
        check_fit(required, free)
        return ModelFiles(source, folder, required, converts)

    def _check_conversion(
        self, file: Path, check_fit: Callable[[float, int], None], free: int
    ) -> None:
        """Check that the converted model fits, and that there is memory for the conversion."""
        size = gguf.converted_size(file)
        check_fit(memory.scaled(size, self._config.quantization), free)
        available = memory.free_bytes("cpu")
        if size > available:
            raise OutOfMemory(
                f"Converting {file.stem} needs about {human_bytes(size)} of memory, but only"
                f" {human_bytes(available)} is free. Free memory, or load the model from .safetensors"
                " files."
            )

    def _fetch(self, source: Source) -> Path:
        """Return a folder of safetensors on this disk; downloads or converts the model if needed."""
        if source.hub is not None:
            code = self._config.trust_remote_code
            return hub.download(source.hub, self._report, self._cancel.is_set, code=code)
        if source.gguf_file is None:
            assert source.path is not None
            return source.path
        return gguf.convert(source.gguf_file, report=self._report, cancelled=self._cancel.is_set)


def resolve_device(device: str) -> str:
    """Return the device of a model; raises `DeviceUnavailable`.

    ``cuda`` without an index is returned for ``auto`` only, and stands for all GPUs together.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            is_cpu_build = torch.version.cuda is None
            reason = "this torch is built for the CPU only" if is_cpu_build else "no GPU was found"
            error = DeviceUnavailable(f"CUDA is not available: {reason}.")
            raise error.advise("Use -d cpu.", "device")
        index, count = torch.device(device).index, torch.cuda.device_count()
        if index is None:
            return f"cuda:{torch.cuda.current_device()}"
        if index >= count:
            raise DeviceUnavailable(
                f"{device} is not available: this machine has {counted(count, 'GPU')}."
            ).advise("Use one of them, or -d cpu.", "device")
    if device == "mps" and not torch.backends.mps.is_available():
        error = DeviceUnavailable("No Apple GPU (mps) is available.")
        raise error.advise("Use -d cpu.", "device")
    return device


def check_quantization(config: LocalLoadConfig, device: str) -> None:
    """Raise an error where the requested quantization is not available."""
    if config.quantization == "none":
        return
    if device == "mps":
        error = OptionError("bitsandbytes does not support mps.")
        raise error.advise("Use -d cpu, or -q none.", "device")
    if find_spec("bitsandbytes") is None:
        raise MissingDependency(
            f"-q {config.quantization} needs bitsandbytes. Run: pip install bitsandbytes"
        )


def packs_weights(config: LocalLoadConfig, device: str) -> bool:
    """Return whether a load packs the weights of the linear layers of a model.

    A compiler packs them itself, and a quantized model is to be small.
    """
    from llm_magic.backends.local import cpu_linear

    is_usual = config.quantization == "none" and not config.compile
    return device == "cpu" and is_usual and cpu_linear.can_pack()


def available_bytes(config: LocalLoadConfig, device: str, freed: Mapping[str, int]) -> int:
    """Return the bytes for a model on `device`, with what will be freed there before the load."""
    targets = [device]
    if config.device == "auto" and device == "cuda" and config.quantization == "none":
        # accelerate puts on the CPU what does not fit on the GPUs.
        targets.append("cpu")
    free = sum(map(memory.free_bytes, targets))
    return free + sum(
        size for name, size in freed.items() if any(_shares_memory(name, t) for t in targets)
    )


def _shares_memory(device: str, target: str) -> bool:
    """Return whether memory freed on `device` is free on `target`; ``cuda`` means all GPUs."""
    # An Apple GPU uses the memory of the CPU.
    device, target = (
        name.replace("mps", "cpu").replace("cpu:0", "cpu") for name in (device, target)
    )
    return device == target or (target == "cuda" and device.startswith("cuda:"))
