"""Hugging Face Transformers models in the memory of this process."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from llm_magic.backends.base import Backend, Capabilities, LoadPlan, Report, TokenCount
from llm_magic.backends.local import load_plan, log_filters, memory, openmp
from llm_magic.backends.local.cpus import cpus
from llm_magic.backends.local.errors import explain_generation, explain_load
from llm_magic.backends.local.files import sources
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.local.worker import Worker
from llm_magic.config.settings import GenerationConfig, LoadConfig, ReadSettings
from llm_magic.errors import LoadFailed, MissingDependency, ModelNotLoaded
from llm_magic.text.formatting import human_bytes
from llm_magic.types import Chunk, MemoryUse, Message, ModelInfo, Progress, Unloaded

if TYPE_CHECKING:
    from llm_magic.backends.local.batch.sequence import Item
    from llm_magic.backends.local.loaded_model import Loaded
    from llm_magic.config.api_keys import ApiKeys

# What `generate` calls an option; `seed` sets the generators, `stop` ends the stream.
_OPTION_NAMES = MappingProxyType({
    "max_new_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "repetition_penalty": "repetition_penalty", "seed": "seed", "stop": "stop",
    "extra": "keyword arguments",
})  # fmt: skip
# For the end of a cell whose load was stopped, before its memory is collected.
_HEAD_START_S = 0.05


class LocalTransformersBackend(Backend):
    """Keeps Transformers models resident; all torch work happens on one inference thread."""

    name = "local"
    capabilities = Capabilities(in_process=True, local_token_counts=True)
    option_names = _OPTION_NAMES
    load_config = LocalLoadConfig

    def __init__(self, settings: ReadSettings, _keys: ApiKeys) -> None:
        log_filters.keep_quiet()
        self._settings = settings
        self._inference = Worker("llm_magic-inference", rest=self._tidy)
        self._left_over = False
        # Downloads and conversions: they may wait long, and need no torch kernel.
        self._files = Worker("llm_magic-files")
        self._loaded: dict[str, Loaded] = {}
        self._imported = False

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the embedded model, those of the local folder, and those in the hub's cache."""
        _require_packages()
        return await self._files.run(
            lambda _cancel: sources.available(self._settings()), partial(explain_load, "The list")
        )

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """Find, fetch and convert the files, and see that they fit; changes nothing resident."""
        assert isinstance(config, LocalLoadConfig)
        _require_packages()
        if not self._imported:
            _require_usable_process()
            # Seconds, the first time; on one thread only, because two that import the same large
            # packages at once can see them half initialised.
            report(Progress("importing torch"))
            await self._inference.run(_import_torch, partial(explain_load, "torch"))
            self._imported = True
        freed = Counter[str]()
        for name, loaded in self._loaded.items():
            # What is kept of earlier prompts goes where a model needs the room.
            freed += loaded.prefixes.held()
            freed += loaded.held() if name in leaving else Counter()
        settings = self._settings()
        return await self._files.run(
            lambda cancel: load_plan.Planner(settings, config, report, cancel).plan(model, freed),
            partial(explain_load, model or "The default model"),
        )

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Load on the inference thread; cancelling it stops at the next tensor."""
        ready = plan.source
        assert isinstance(ready, load_plan.Ready)
        loaded = await self._inference.run(
            lambda cancel: self._bring_in(plan, ready, report, cancel),
            partial(explain_load, plan.name),
        )
        loaded.info = dataclasses.replace(loaded.info, name=name)
        self._loaded[name] = loaded
        return loaded.info

    def _bring_in(
        self, plan: LoadPlan, ready: load_plan.Ready, report: Report, cancel: threading.Event
    ) -> Loaded:
        from llm_magic.backends.local import loaded_model

        if memory.free_bytes(ready.device) < ready.needed:
            self._give_room()
        keep = self._settings().prefix_cache == "on"
        try:
            return loaded_model.bring_in(plan, ready, report, cancel, keep=keep)
        except BaseException:
            # Its frames hold tensors as long as it is on its way.
            self._left_over = True
            raise

    def _tidy(self) -> None:
        """After each job: give back what a load left that did not come to its end, and the team."""
        if self._left_over:
            self._left_over = False
            # The collection holds the GIL for some tenths of a second: the cell ends first.
            time.sleep(_HEAD_START_S)
            memory.give_back()
        openmp.release()

    def _give_room(self) -> None:
        for loaded in self._loaded.values():
            loaded.give_room()

    async def unload(self, name: str) -> Unloaded:
        """Free a model on its own thread and measure the process before and after."""
        from llm_magic.backends.local import loaded_model

        loaded = [self._find(name)]
        del self._loaded[name]
        return await self._inference.run(
            lambda _cancel: loaded_model.let_go(loaded), partial(explain_load, name)
        )

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer on the inference thread; closing the generator stops it at the next token."""
        from llm_magic.backends.local.generation import generate

        def work(cancel: threading.Event, emit: Callable[[Chunk], None]) -> None:
            try:
                generate.stream(self._find(name), messages, config, cancel, emit)
            except Exception as error:
                if memory.ran_out(error):
                    self._give_room()
                raise

        explain = partial(explain_generation, name, self._find(name).info.device)
        async with contextlib.aclosing(self._inference.stream(work, explain)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stream_many(
        self, name: str, conversations: Sequence[Sequence[Message]], config: GenerationConfig
    ) -> AsyncGenerator[tuple[int, Item], None]:
        """Answer many conversations together; yields what comes with its conversation's index.

        The chunks of each come in order, as `stream` yields them. One that cannot be answered ends
        with its error instead, and the others go on. Closing the generator stops the work.
        """
        from llm_magic.backends.local.batch import batch, sequence

        explain = partial(explain_generation, name, self._find(name).info.device)

        def work(cancel: threading.Event, emit: Callable[[tuple[int, Item]], None]) -> None:
            job = sequence.Job(conversations, config, cancel, emit, explain)
            batch.stream_many(self._find(name), job)

        async with contextlib.aclosing(self._inference.stream(work, explain)) as items:
            async for item in items:
                yield item

    def release_threads(self) -> None:
        """End the OpenMP team of a thread that has run torch itself."""
        openmp.release()

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count with the model's own template and tokenizer."""
        from llm_magic.backends.local.generation.chat_template import encode

        loaded = self._find(name)
        tokens = await self._inference.run(
            lambda _cancel: int(encode(loaded, messages).shape[1]),
            partial(explain_generation, name, loaded.info.device),
        )
        return TokenCount(tokens, loaded.info.context_length)

    def check_extra(self, config: GenerationConfig) -> None:
        """Check ``-p`` names against Transformers."""
        if config.extra:
            from llm_magic.backends.local.generation.parameters import check_extra

            check_extra(config)

    def details(self, name: str) -> dict[str, str]:
        """Return how it decodes, and what is kept of earlier prompts."""
        loaded = self._loaded.get(name)
        if loaded is None:
            return {}
        kept = loaded.prefixes
        return {
            "decoding": loaded.decoding,
            "kept prompts": f"{human_bytes(kept.nbytes)} of at most {human_bytes(kept.budget)}",
        }

    def memory(self) -> MemoryUse:
        """Return what this process holds now."""
        # Before anything is loaded torch may be half imported on the other thread.
        return memory.memory_use(gpus=bool(self._loaded))

    async def aclose(self) -> None:
        """Free every model and end the threads."""
        for name in list(self._loaded):
            await self.unload(name)
        if self._imported:
            self._imported = False
            await self._inference.run(
                lambda _cancel: openmp.restore_threads(), partial(explain_load, "torch")
            )
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


def _require_usable_process() -> None:
    """Raise where the import of torch or Transformers fails, or ends the process."""
    if sys.flags.optimize >= 2:
        raise LoadFailed(
            "Local models cannot be loaded under python -OO (PYTHONOPTIMIZE=2): Transformers needs"
            " docstrings. Restart the kernel without it."
        )
    try:
        Path.cwd()
    except OSError:
        # oneMKL ends the process where it cannot find its libraries.
        raise LoadFailed(
            "The working folder is gone. Change to another one"
            " (import os; os.chdir(os.path.expanduser('~'))) and load again."
        ) from None


def _import_torch(_cancel: threading.Event) -> None:
    with openmp.bounded_spin():
        from llm_magic.backends.local import loaded_model  # noqa: F401 - imported for its weight
    openmp.limit_threads(cpus())
