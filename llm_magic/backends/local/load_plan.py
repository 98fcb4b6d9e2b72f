"""Prepares a load: finds the model, downloads and converts its files, and checks that it fits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llm_magic.backends.base import LoadPlan, Report
from llm_magic.backends.local import memory
from llm_magic.backends.local.files import gguf, hub, sources, validate
from llm_magic.backends.local.files.sources import Source
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.config.commands import option
from llm_magic.config.settings import Settings
from llm_magic.errors import DeviceUnavailable, MissingDependency, OptionError, OutOfMemory
from llm_magic.text import counted, human_bytes
from llm_magic.types import Progress

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model on this disk, and the memory that the loaded model takes.

    `tokenizer` is that of the files, if it was read before the load.
    """

    source: Source
    folder: Path
    required_bytes: int
    was_converted: bool
    tokenizer: PreTrainedTokenizerBase | None = None


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
        self,
        settings: Settings,
        config: LocalLoadConfig,
        report: Report,
        cancel: threading.Event,
        named: threading.Event,
    ) -> None:
        """`named` is set once the notes of a load have named ``-b llamacpp``."""
        self._settings, self._config = settings, config
        self._report, self._cancel, self._named = report, cancel, named

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
        notes: tuple[str, ...] = (f"Converted once to {main.folder}",) if main.was_converted else ()
        if (source.where, device, config.quantization) == ("gguf", "cpu", "none"):
            notes += self._faster_engine()
        local = LocalPlan(config, main, device, assistant)
        return LoadPlan(model or source.name, source.name, config, local, notes)

    def _find(self, model: str | None, revision: str | None) -> Source:
        code = self._config.trust_remote_code
        return sources.find(model, revision, self._settings, code=code)

    def _faster_engine(self) -> tuple[str, ...]:
        """Return what to know about ``-b llamacpp``, unless an earlier load returned it."""
        if self._named.is_set():
            return ()
        self._named.set()
        install = "" if find_spec("xllamacpp") else ' To install it: pip install "llm_magic[gguf]"'
        return (
            "On a CPU, -b llamacpp generates two to four times as many tokens per second from a .gguf"
            f" file, but reads long prompts more slowly.{install}",
        )

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
        weights = _weight_bytes(folder, config, device)
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
            raise error.advise(f"Use {option('device', 'cpu')}.", "device")
        index, count = torch.device(device).index, torch.cuda.device_count()
        if index is None:
            return f"cuda:{torch.cuda.current_device()}"
        if index >= count:
            raise DeviceUnavailable(
                f"{device} is not available: this machine has {counted(count, 'GPU')}."
            ).advise("Use one of them, or -d cpu.", "device")
    if device == "mps" and not torch.backends.mps.is_available():
        error = DeviceUnavailable("No Apple GPU (mps) is available.")
        raise error.advise(f"Use {option('device', 'cpu')}.", "device")
    return device


def used_quantization(config: LocalLoadConfig, device: str) -> str:
    """Return ``none``, ``8bit`` or ``4bit``, or, where bitsandbytes is used, ``bnb-8bit`` or ``bnb-4bit``.

    On a CPU, ``8bit`` and ``4bit`` are the kernels of torch, where it has them.
    """
    from llm_magic.backends.local import cpu_quantized

    requested = config.quantization
    if requested == "none" or requested.startswith("bnb-"):
        return requested
    has_kernel = device == "cpu" and cpu_quantized.quantized_class(requested) is not None
    return requested if has_kernel else f"bnb-{requested}"


def used_dtype(config: LocalLoadConfig, quantization: str) -> str:
    """Return the number format of what is not quantized; `quantization` is that of `used_quantization`."""
    if config.dtype != "auto" or quantization == "none":
        return config.dtype
    # LLM.int8 computes in float16 and logs a warning for each matrix of another type. The kernels
    # of torch are fastest with bfloat16.
    return "float16" if quantization == "bnb-8bit" else "bfloat16"


def _weight_bytes(folder: Path, config: LocalLoadConfig, device: str) -> int:
    quantization = used_quantization(config, device)
    dtype = used_dtype(config, quantization)
    size = memory.weight_bytes(folder, dtype, quantization)
    if quantization in memory.QUANTIZED_HEADS:
        size += memory.head_copy_bytes(folder, dtype)
    return size


def check_quantization(config: LocalLoadConfig, device: str) -> None:
    """Raise an error where the requested quantization is not available."""
    if not used_quantization(config, device).startswith("bnb-"):
        return
    if device == "mps":
        error = OptionError("bitsandbytes does not support mps.")
        raise error.advise(
            f"Use {option('device', 'cpu')}, or {option('quantization', 'none')}.", "device"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingDependency(
            f"{option('quantization', config.quantization)} needs bitsandbytes. Run: pip install bitsandbytes"
        )


def packs_weights(config: LocalLoadConfig, device: str) -> bool:
    """Return whether a load packs the weights of the linear layers of a model.

    A compiler packs them itself. Where torch's kernels quantize, some layers may be left.
    """
    from llm_magic.backends.local import cpu_linear

    if device != "cpu" or config.compile or used_quantization(config, device).startswith("bnb-"):
        return False
    return cpu_linear.can_pack()


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
