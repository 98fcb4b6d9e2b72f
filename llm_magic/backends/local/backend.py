"""Hugging Face Transformers models in the memory of this process."""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llm_magic.backends.base import Backend, Plan, Report, TokenCount
from llm_magic.backends.local import checks, gguf, hub, memory, quiet, sources
from llm_magic.backends.local.sources import Source
from llm_magic.backends.local.worker import Cancelled, Worker
from llm_magic.config import GenerationConfig, LoadConfig, Settings
from llm_magic.errors import (
    DoesNotFit,
    GenerationFailed,
    LLMMagicError,
    LoadFailed,
    MissingDependency,
    ModelNotLoaded,
)
from llm_magic.types import Chunk, MemoryUse, Message, ModelInfo, Progress, Unloaded
from llm_magic.units import human_bytes

if TYPE_CHECKING:
    from llm_magic.backends.local.loading import Loaded
    from llm_magic.keys import Keys


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a checked load needs: files on this disk and a device that has room."""

    source: Source
    folder: Path
    device: str
    needed: int


def local(settings: Settings, _keys: Keys) -> LocalTransformersBackend:
    """Return the backend for models in this process, which needs no key."""
    return LocalTransformersBackend(settings)


class LocalTransformersBackend(Backend):
    """Keeps Transformers models resident; all torch work happens on one inference thread."""

    name = "local"

    def __init__(self, settings: Settings) -> None:
        quiet.keep_quiet()
        self._settings = settings
        self._inference = Worker("llm_magic-inference")
        # Downloads and conversions: they may wait long, and need no torch kernel.
        self._files = Worker("llm_magic-files")
        self._loaded: dict[str, Loaded] = {}
        self._imported = False

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the embedded model, those of the local folder, and those in the hub's cache."""
        return await self._files.run(
            lambda _cancel: sources.available(self._settings), partial(_explain_load, "The list")
        )

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> Plan:
        """Find, fetch and convert the files, and see that they fit; changes nothing resident."""
        _require_packages()
        if not self._imported:
            # Seconds, the first time; on one thread only, because two that import the same large
            # packages at once can see them half initialised.
            report(Progress("importing torch"))
            await self._inference.run(_import_torch, partial(_explain_load, "torch"))
            self._imported = True
        freed = sum(self._loaded[name].info.size or 0 for name in leaving if name in self._loaded)
        return await self._files.run(
            lambda cancel: self._check(model, config, report, freed, cancel),
            partial(_explain_load, model or "The default model"),
        )

    def _check(
        self,
        model: str | None,
        config: LoadConfig,
        report: Report,
        freed: int,
        cancel: threading.Event,
    ) -> Plan:
        from llm_magic.backends.local import loading

        report(Progress("looking for the model"))
        source = sources.find(model, config.revision, self._settings, code=config.trust_remote_code)
        device = loading.resolve_device(config.device)
        loading.check_quantization(config, device)
        fit = partial(
            memory.check_fit, source.name, device=device, quantization=config.quantization
        )
        free = _free(config, device) + freed
        if source.hub is not None:
            fit(memory.scaled(source.hub.size, config.quantization), free)
        converted = _is_new(source)
        folder = _files_of(source, config, report, cancel)
        about = sources.model_config(folder)
        checks.check_folder(source.name, folder, config, about)
        needed = memory.needed_bytes(
            memory.weight_bytes(folder, config.dtype, config.quantization),
            memory.kv_bytes(about, config.dtype),
        )
        fit(needed, free)
        ready = _Ready(source, folder, device, needed)
        notes = (f"Converted once to {folder}",) if converted else ()
        return Plan(model or source.name, source.name, config, ready, notes)

    async def load(self, plan: Plan, name: str, report: Report) -> ModelInfo:
        """Load on the inference thread; cancelling it stops at the next tensor."""
        ready = plan.source
        assert isinstance(ready, _Ready)
        loaded = await self._inference.run(
            lambda cancel: _load(plan, ready, report, cancel),
            partial(_explain_load, plan.name),
        )
        loaded.info = dataclasses.replace(loaded.info, name=name)
        self._loaded[name] = loaded
        return loaded.info

    async def unload(self, name: str) -> Unloaded:
        """Free a model on its own thread and measure the process before and after."""
        loaded = [self._find(name)]
        del self._loaded[name]
        return await self._inference.run(
            lambda _cancel: _free_model(loaded), partial(_explain_load, name)
        )

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer on the inference thread; closing the generator stops it at the next token."""
        from llm_magic.backends.local import decoding

        def work(cancel: threading.Event, emit: Callable[[Chunk], None]) -> None:
            decoding.stream(self._find(name), messages, config, cancel, emit)

        explain = partial(_explain_generation, name, self._find(name).info.device)
        chunks = self._inference.stream(work, explain)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count with the model's own template and tokenizer."""
        from llm_magic.backends.local import decoding

        loaded = self._find(name)
        tokens = await self._inference.run(
            lambda _cancel: int(decoding.encode(loaded, messages).shape[1]),
            partial(_explain_generation, name, loaded.info.device),
        )
        return TokenCount(tokens, loaded.info.context_length)

    def check_extra(self, config: GenerationConfig) -> None:
        """Check ``-p`` names against Transformers."""
        if config.extra:
            from llm_magic.backends.local import decoding

            decoding.check_extra(config)

    def memory(self) -> MemoryUse:
        """Return what this process holds now."""
        # Before anything is loaded torch may be half imported on the other thread.
        return memory.memory_use(gpus=bool(self._loaded))

    async def aclose(self) -> None:
        """Free every model and end the threads."""
        for name in list(self._loaded):
            await self.unload(name)
        self._inference.close()
        self._files.close()

    def _find(self, name: str) -> Loaded:
        try:
            return self._loaded[name]
        except KeyError:
            raise ModelNotLoaded(f"{name} is not loaded any more. Type %llm_load.") from None


def _require_packages() -> None:
    missing = [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f'Local models need {", ".join(missing)}. Type: pip install "llm_magic[local]"'
        )


def _import_torch(_cancel: threading.Event) -> None:
    from llm_magic.backends.local import loading  # noqa: F401 - imported for its weight


def _free(config: LoadConfig, device: str) -> int:
    free = memory.free_bytes(device)
    if config.device == "auto" and device == "cuda" and config.quantization == "none":
        # accelerate puts on the CPU what the GPUs have no room for.
        free += memory.free_bytes("cpu")
    return free


def _is_new(source: Source) -> bool:
    """Return whether the files will be converted now."""
    if source.path is None or source.where not in {"embedded", "gguf"}:
        return False
    return not gguf.converted_folder(source.path).exists()


def _files_of(source: Source, config: LoadConfig, report: Report, cancel: threading.Event) -> Path:
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


def _load(plan: Plan, ready: _Ready, report: Report, cancel: threading.Event) -> Loaded:
    from llm_magic.backends.local import loading

    began = time.perf_counter()
    model, tokenizer = loading.load(ready.folder, plan.config, ready.device, report, cancel)
    base = ModelInfo(
        plan.name,
        "local",
        where=ready.source.where,
        source=str(ready.source.path or ready.folder),
        folder=str(ready.folder),
        revision=plan.config.revision,
        load_s=time.perf_counter() - began,
    )
    return loading.Loaded(model, tokenizer, loading.describe(model, base, plan.config))


def _free_model(box: list[Loaded]) -> Unloaded:
    """Drop a model; it comes in a list so that no caller's frame holds it too."""
    loaded = box.pop()
    before = memory.memory_use()
    info = loaded.info
    alive = weakref.ref(loaded.model)
    # Accelerate's hooks wrap `forward` and refer back to the model.
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(loaded.model, recurse=True)
    del loaded
    memory.give_back()
    model = alive()
    holders = memory.holders(model) if model is not None else ()
    return Unloaded(info.name, info.size or 0, before, memory.memory_use(), holders)


def _details(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _out_of_memory(error: BaseException) -> bool:
    kind, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or (
        kind == "RuntimeError" and ("can't allocate memory" in text or "out of memory" in text)
    )  # fmt: skip


def _explain_load(name: str, error: BaseException) -> LLMMagicError:
    if isinstance(error, LLMMagicError):
        return error
    if _out_of_memory(error):
        return DoesNotFit(
            f"Memory ran out while {name} was loaded."
            " Try -q 4bit, a smaller model, or %llm_unload first.",
            details=_details(error),
        )
    if isinstance(error, ImportError):
        why = " ".join(str(error).split()).rstrip(".")
        return MissingDependency(f"{name} could not be loaded: {why}.", details=_details(error))
    try:
        from llm_magic.backends.local import loading
    except ImportError:
        return LoadFailed(f"{name} could not be loaded: {error}", details=_details(error))
    return loading.explain(error, name, _details(error))


def _explain_generation(name: str, device: str, error: BaseException) -> LLMMagicError:
    if isinstance(error, LLMMagicError):
        return error
    if _out_of_memory(error):
        # What the failed step had taken is cached by torch and counts as free.
        memory.give_back()
        place = device.partition("+")[0]
        return DoesNotFit(
            f"Memory ran out on {place} while {name} answered;"
            f" {human_bytes(memory.free_bytes(place))} are free now. {name} is still loaded."
            " Try a shorter prompt, a lower --max-new-tokens, or load it with -q 4bit.",
            details=_details(error),
        )
    first = str(error).strip().partition("\n")[0]
    return GenerationFailed(
        f"{name} broke while it answered: {type(error).__name__}: {first}",
        details=_details(error),
    )
