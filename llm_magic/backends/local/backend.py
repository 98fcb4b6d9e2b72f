"""The backend for Hugging Face Transformers models in the memory of this process."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, get_args

from llm_magic.backends.base import Backend, Capabilities, LoadPlan, Report, TokenCount, find_loaded
from llm_magic.backends.local import compile_cache, log_filters, memory, openmp
from llm_magic.backends.local.cpus import cpus
from llm_magic.backends.local.errors import explain_generation, explain_load
from llm_magic.backends.local.files import sources
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.local.load_plan import LocalPlan, Planner
from llm_magic.backends.local.worker import Worker
from llm_magic.config.settings import GenerationConfig, LoadConfig, ReadSettings
from llm_magic.errors import LLMMagicError, LoadFailed, MissingDependency
from llm_magic.text import human_bytes
from llm_magic.types import (
    Chunk,
    MemoryUse,
    Message,
    ModelInfo,
    Progress,
    Score,
    Structure,
    StructureKind,
    Unloaded,
)

if TYPE_CHECKING:
    from llm_magic.backends.local.local_model import LocalModel
    from llm_magic.config.api_keys import ApiKeys

# What `generate` calls an option; `seed` sets the generators, `stop` ends the stream, and `logprobs`
# reads the logits.
_OPTION_NAMES = MappingProxyType({
    "max_new_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "repetition_penalty": "repetition_penalty", "seed": "seed", "stop": "stop",
    "logprobs": "logprobs", "extra": "keyword arguments",
})  # fmt: skip
# The garbage collector holds the GIL for some tenths of a second: a cell whose load was stopped
# ends first.
_COLLECT_DELAY_S = 0.05


class LocalTransformersBackend(Backend):
    """Keeps Transformers models in memory. One thread, `inference`, does all torch work."""

    name = "local"
    capabilities = Capabilities(
        in_process=True,
        local_token_counts=True,
        stop_strings=True,
        structures=frozenset(get_args(StructureKind)),
        scores=True,
    )
    option_names = _OPTION_NAMES
    load_config = LocalLoadConfig
    # Of a thread that has run torch itself.
    release_threads = staticmethod(openmp.release_threads)

    def __init__(self, settings: ReadSettings, _keys: ApiKeys) -> None:
        log_filters.install()
        self._settings = settings
        self.inference = Worker("llm_magic-inference", after_job=self._after_job)
        # A second thread for downloads and conversions, which take long. Whether weights can be packed
        # is found out there too, with OpenMP threads of its own.
        self._files = Worker("llm_magic-files", after_job=openmp.release_threads)
        self._models: dict[str, LocalModel] = {}
        self._imported_torch = False
        self._load_failed = False
        self._named_llamacpp = threading.Event()

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the bundled model, and those in the local folder and in the cache of the hub."""
        _require_packages()
        return await self._files.run(
            lambda _cancel: sources.available(self._settings()), partial(explain_load, "The list")
        )

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """Find, download and convert the files, and check that the model fits."""
        assert isinstance(config, LocalLoadConfig)
        settings = self._settings()
        sources.check_name(model, settings)
        _require_packages()
        if not self._imported_torch:
            _require_usable_process()
            # Takes seconds. On one thread only: two threads that import the same packages at once
            # can see them half initialized.
            report(Progress("importing torch"))
            await self.inference.run(_import_torch, partial(explain_load, "torch"))
            self._imported_torch = True
        freed = Counter[str]()
        for name, loaded in self._models.items():
            # A load that needs the memory frees the caches.
            freed += loaded.prefix_cache.bytes_by_device()
            freed += loaded.weight_bytes() if name in leaving else Counter()
        return await self._files.run(
            lambda cancel: Planner(settings, config, report, cancel, self._named_llamacpp).plan(
                model, freed
            ),
            partial(explain_load, model or "The default model"),
        )

    async def verify(self, plan: LoadPlan, report: Report) -> LoadPlan:
        """Read the tokenizer, and build the model without its weights."""
        return await self.inference.run(
            lambda cancel: self._verify(plan, report, cancel), partial(explain_load, plan.name)
        )

    def _verify(self, plan: LoadPlan, report: Report, cancel: threading.Event) -> LoadPlan:
        from llm_magic.backends.local import loader

        assert isinstance(plan.source, LocalPlan)
        return dataclasses.replace(plan, source=loader.verify(plan, plan.source, report, cancel))

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Load on the inference thread. Cancelling stops at the next tensor."""
        loaded = await self.inference.run(
            lambda cancel: self._load(plan, report, cancel), partial(explain_load, plan.name)
        )
        loaded.info = dataclasses.replace(loaded.info, name=name)
        self._models[name] = loaded
        return loaded.info

    def _load(self, plan: LoadPlan, report: Report, cancel: threading.Event) -> LocalModel:
        from llm_magic.backends.local import loader

        local = plan.source
        assert isinstance(local, LocalPlan)
        if memory.free_bytes(local.device) < local.required_bytes:
            self._free_caches()
        keep_prefixes = self._settings().prefix_cache == "on"
        try:
            return loader.load(plan, local, report, cancel, keep_prefixes=keep_prefixes)
        except BaseException:
            # The frames of the error hold tensors until it is handled.
            self._load_failed = True
            raise

    def _after_job(self) -> None:
        """Free what a failed load left in memory, and end the OpenMP threads of this thread."""
        if self._load_failed:
            self._load_failed = False
            time.sleep(_COLLECT_DELAY_S)
            memory.release_memory()
        openmp.release_threads()

    def _free_caches(self) -> None:
        for loaded in self._models.values():
            loaded.free_caches()

    async def unload(self, name: str) -> Unloaded:
        """Free a model on the inference thread, and measure the process before and after."""
        from llm_magic.backends.local import loader

        box = [self.local_model(name)]
        del self._models[name]
        return await self.inference.run(
            lambda _cancel: loader.unload(box), partial(explain_load, name)
        )

    def is_current(self, name: str, model: str | None, _config: LoadConfig) -> bool:
        """Return whether the files of a model are those that were loaded."""
        return sources.is_current(self.local_model(name).source, model, self._settings())

    def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer on the inference thread, together with other requests for the same model.

        Closing the generator stops at the next token.
        """
        from llm_magic.backends.local.batch import batch
        from llm_magic.backends.local.generation.sequence import Request

        loaded = self.local_model(name)
        return self.inference.stream(
            lambda job: batch.answer(self.local_model(name), job),
            partial(self._explain, name, loaded.info.device),
            queued=Chunk(queued=True),
            group=name if loaded.traits.can_batch else None,
            request=Request(messages, config),
        )

    async def score(
        self,
        name: str,
        messages: Sequence[Message],
        config: GenerationConfig,
        texts: Sequence[str],
    ) -> list[Score]:
        """Score on the inference thread: what is cached of the prompt is not read again."""
        from llm_magic.backends.local.batch import batch
        from llm_magic.backends.local.generation.sequence import Request

        items = self.inference.stream(
            lambda job: batch.score(self.local_model(name), job, texts),
            partial(self._explain, name, self.local_model(name).info.device),
            request=Request(messages, config),
        )
        async with contextlib.aclosing(items):
            return [item async for item in items if isinstance(item, Score)]

    def _explain(self, name: str, device: str, error: BaseException) -> LLMMagicError:
        """Return the error for what ended an answer; frees the caches if memory ran out."""
        if memory.is_out_of_memory(error):
            self._free_caches()
        return explain_generation(name, device, error)

    def concurrency_of(self, name: str) -> int:
        """Return how many answers are generated or queued at once."""
        from llm_magic.backends.local.batch.scheduler import max_sequences

        return max_sequences(self.local_model(name).model.device.type)

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count with the model's own template and tokenizer."""
        loaded = self.local_model(name)
        encoder, context = loaded.prompt_encoder, loaded.info.context_length
        return await self.inference.run(
            lambda _cancel: TokenCount(
                len(encoder.encode(messages)), context, encoder.added_system(messages)
            ),
            partial(explain_generation, name, loaded.info.device),
        )

    def check_structure(self, structure: Structure) -> None:
        """Raise `OptionError` for a structure that llguidance cannot express."""
        from llm_magic.backends.local.generation.grammar import checked

        super().check_structure(structure)
        checked(structure)

    def check_extra(self, config: GenerationConfig) -> None:
        """Check ``-p`` names against Transformers."""
        from llm_magic.backends.local.generation.parameters import check_extra

        check_extra(config)

    def details(self, name: str) -> dict[str, str]:
        """Return how the model decodes, and the size of its prefix cache."""
        loaded = self._models.get(name)
        if loaded is None:
            return {}
        size, budget = loaded.prefix_cache.nbytes, loaded.prefix_cache.budget
        return {
            "decoding": loaded.decoding,
            "prompt cache": f"{human_bytes(size)} of at most {human_bytes(budget)}"
            if budget
            else "off",
        }

    def memory(self) -> MemoryUse:
        """Return the memory that this process uses now."""
        # Before the first load, the inference thread may be importing torch.
        return memory.memory_use(gpus=bool(self._models))

    async def aclose(self) -> None:
        """Free all models, end the threads, and undo the changes to the process."""
        for name in list(self._models):
            await self.unload(name)
        if self._imported_torch:
            self._imported_torch = False
            await self.inference.run(
                lambda _cancel: openmp.restore_threads(), partial(explain_load, "torch")
            )
        self.inference.close()
        self._files.close()
        compile_cache.restore()
        log_filters.remove()

    def local_model(self, name: str) -> LocalModel:
        """Return a loaded model, with its PyTorch module and its tokenizer; do not store it.

        Use it on the inference thread only, or while nothing is generated.
        """
        return find_loaded(self._models, name)


def _require_packages() -> None:
    missing = [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f'Local models need {", ".join(missing)}. To install, run: pip install "llm_magic[local]"'
        )


def _require_usable_process() -> None:
    """Raise `LoadFailed` where the import of torch or Transformers would fail or end the process."""
    if sys.flags.optimize >= 2:
        raise LoadFailed(
            "Local models cannot be loaded under python -OO (PYTHONOPTIMIZE=2): Transformers needs"
            " docstrings. Restart the kernel without it."
        )
    try:
        Path.cwd()
    except OSError:
        # oneMKL ends the process if the working folder does not exist.
        raise LoadFailed(
            "The working folder no longer exists. Change to another one"
            " (import os; os.chdir(os.path.expanduser('~'))) and load again."
        ) from None


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Collect no garbage during an import: that takes a sixth of the time of importing torch."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _import_torch(_cancel: threading.Event) -> None:
    with openmp.bounded_spin(), _garbage_collection_paused():
        from llm_magic.backends.local import loader  # noqa: F401 - imports torch and Transformers
    openmp.limit_threads(cpus())
