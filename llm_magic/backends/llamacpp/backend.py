"""The backend for .gguf files that llama.cpp runs in this process."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from llm_magic.backends.base import Backend, Capabilities, LoadPlan, Report, TokenCount, find_loaded
from llm_magic.backends.llamacpp.engine_config import EngineConfig
from llm_magic.backends.local import memory, openmp
from llm_magic.backends.local.cpus import cpus
from llm_magic.backends.local.files import gguf, sources
from llm_magic.backends.local.generation import grammar
from llm_magic.backends.local.worker import Cancelled, Job, Worker, process_lock
from llm_magic.backends.remote.base import SPELLINGS, check_fields, message_objects, option_fields
from llm_magic.backends.remote.chat_completions import EMPTY, ReplyReader
from llm_magic.backends.remote.openai_compatible import OPTION_NAMES, OpenAICompatibleBackend
from llm_magic.backends.remote.server_errors import parse_error
from llm_magic.backends.remote.token_logprobs import requested
from llm_magic.config.commands import command, option
from llm_magic.config.option_spec import OptionSpec
from llm_magic.config.settings import GenerationConfig, LoadConfig, ReadSettings
from llm_magic.errors import (
    GenerationFailed,
    LLMMagicError,
    LoadFailed,
    MissingDependency,
    OutOfMemory,
    PromptTooLong,
)
from llm_magic.text import counted, human_bytes
from llm_magic.types import (
    Chunk,
    MemoryUse,
    Message,
    ModelInfo,
    Progress,
    Structure,
    StructureKind,
    Unloaded,
)

if TYPE_CHECKING:
    from llm_magic.backends.llamacpp.engine import Engine
    from llm_magic.backends.local.files.sources import Source
    from llm_magic.config.api_keys import ApiKeys

T = TypeVar("T")
_PACKAGES = ("xllamacpp", "gguf")
_INSTALL = 'pip install "llm_magic[gguf]"'
_NOTE = "llama.cpp answers, not Transformers: the same seed gives another text than -b local."
# What gives the options of a request the meaning that they have in Transformers: temperature before
# the limits on probabilities, no further limit, and a penalty for all tokens of prompt and answer.
_AS_TRANSFORMERS: dict[str, Any] = {
    "min_p": 0,
    "samplers": [
        "penalties", "dry", "top_n_sigma", "temperature", "top_k", "typ_p", "top_p", "min_p", "xtc",
    ],
}  # fmt: skip
_READ_BYTES = 8 << 20
# Put into a special token in a message, which makes it text.
_SEPARATOR = "\u200b"


class LlamaCppLoadConfig(LoadConfig):
    """How llama.cpp loads a model."""

    context: Annotated[
        int | None,
        OptionSpec(
            "Tokens of prompt and answer to reserve memory for.", ("--context",), "N", minimum=1
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """A file that was checked, and how it is loaded."""

    source: Source
    header: gguf.Header
    config: EngineConfig


@dataclass(slots=True)
class _LoadedModel:
    """A model in memory; `control_token` matches the special tokens of its vocabulary."""

    engine: Engine
    info: ModelInfo
    source: Source
    control_token: re.Pattern[str] | None


class LlamaCppBackend(Backend):
    """Keeps .gguf models in memory. One thread, `inference`, calls llama.cpp."""

    name = "llamacpp"
    capabilities = Capabilities(
        in_process=True,
        local_token_counts=True,
        structures=frozenset(get_args(StructureKind)),
    )
    option_names = MappingProxyType(
        OPTION_NAMES | {"top_k": "top_k", "repetition_penalty": "repeat_penalty"}
    )
    load_config = LlamaCppLoadConfig

    def __init__(self, settings: ReadSettings, _keys: ApiKeys) -> None:
        self._settings = settings
        self._inference = Worker("llm_magic-llamacpp")
        self._models: dict[str, _LoadedModel] = {}

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the bundled model, and the files in the local folder."""
        _require_packages()
        found = await self._run(lambda _cancel: sources.available(self._settings()), "The list")
        return [
            dataclasses.replace(info, backend=self.name)
            for info in found
            if info.where in {"bundled", "gguf"}
        ]

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """Find the file, read its header, and check that the model fits."""
        assert isinstance(config, LlamaCppLoadConfig)
        _require_packages()
        report(Progress("looking for the model"))
        freed = sum(
            self._models[n].engine.config.context_bytes for n in leaving if n in self._models
        )
        plan = await self._run(lambda _cancel: self._plan(model, config, freed), model or "")
        name = plan.source.name
        return LoadPlan(model or name, name, config, plan, (_NOTE,))

    def _plan(self, model: str | None, config: LlamaCppLoadConfig, freed: int) -> _Plan:
        settings = self._settings()
        source = sources.find_gguf(model, settings)
        assert source.path is not None
        header = gguf.read_header(source.path)
        free = memory.free_bytes("cpu") + freed
        engine = EngineConfig.for_model(
            header, threads(), free - header.size, config.context,
            keep_prefixes=settings.prefix_cache == "on",
        )  # fmt: skip
        required = memory.required_bytes(header.size, engine.context_bytes)
        if required > free:
            raise OutOfMemory(
                f"{source.name} needs about {human_bytes(required)}, but only {human_bytes(free)} is"
                " free."
            ).advise(
                f"Try a smaller file or {option('context')}, or free memory with {command('unload')}."
            )
        return _Plan(source, header, engine)

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Load on the inference thread. Cancelling stops while the file is read."""
        loaded = await self._run(lambda cancel: _load(plan, report, cancel), plan.name)
        loaded.info = dataclasses.replace(loaded.info, name=name)
        self._models[name] = loaded
        return loaded.info

    async def unload(self, name: str) -> Unloaded:
        """Free a model on the inference thread, and measure the process before and after."""
        loaded = self._find_loaded(name)
        del self._models[name]

        def work(_cancel: threading.Event) -> Unloaded:
            before = self.memory()
            loaded.engine.close()
            memory.release_memory(collect=False)
            return Unloaded(name, loaded.info.size or 0, before, self.memory())

        return await self._run(work, name)

    def is_current(self, name: str, model: str | None, _config: LoadConfig) -> bool:
        """Return whether the file of a model is the one that was loaded."""
        return sources.is_current(self._find_loaded(name).source, model, self._settings())

    def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer on the inference thread. Closing the generator stops at the next token."""
        loaded = self._find_loaded(name)

        def work(job: Job[None]) -> None:
            body = self._body(loaded, messages, config)
            _stream(loaded, body, config.logprobs, job.cancel, job.emit)

        return self._inference.stream(work, partial(_explain, name), Chunk(queued=True))

    def _body(
        self, loaded: _LoadedModel, messages: Sequence[Message], config: GenerationConfig
    ) -> dict[str, Any]:
        """Return the body of a request."""
        names = {name: field for name, field in self.option_names.items() if name != "extra"}
        fields = option_fields(names, config)
        return {
            "messages": message_objects([_as_text(loaded.control_token, m) for m in messages]),
            "stream_options": {"include_usage": True},
            "return_progress": True,
            "cache_prompt": self._settings().prefix_cache == "on",
            "repeat_last_n": loaded.engine.config.context,
            **_AS_TRANSFORMERS,
            **fields,
            **requested(fields),
            **_structure_fields(config.structure),
            **config.extra,
        }

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Return what llama.cpp reports before it reads the prompt."""
        loaded = self._find_loaded(name)
        body = self._body(loaded, messages, GenerationConfig(max_new_tokens=1))
        count = await self._run(lambda cancel: _count(loaded, body, cancel), name)
        return TokenCount(count, loaded.info.context_length)

    def check_structure(self, structure: Structure) -> None:
        """Raise `OptionError` for a structure that cannot be expressed; llama.cpp would ignore it."""
        super().check_structure(structure)
        grammar.checked(structure)

    def check_extra(self, config: GenerationConfig) -> None:
        """Raise `OptionError` for a field that an option sets, or that the backend sets."""
        check_fields(config, self.option_names, SPELLINGS, OpenAICompatibleBackend.reserved)

    def details(self, name: str) -> dict[str, str]:
        """Return the version of llama.cpp, and how many threads compute."""
        from llm_magic.backends.llamacpp import engine

        loaded = self._models.get(name)
        if loaded is None:
            return {}
        config = loaded.engine.config
        return {
            "engine": f"llama.cpp (xllamacpp {engine.version()}), {config.threads} threads",
            "context": f"{human_bytes(config.context_bytes)} reserved",
        }

    def memory(self) -> MemoryUse:
        """Return the memory that this process uses now."""
        return memory.memory_use(gpus=False)

    async def aclose(self) -> None:
        """Free all models and end the thread."""
        for name in list(self._models):
            await self.unload(name)
        self._inference.close()

    async def _run(self, work: Callable[[threading.Event], T], name: str) -> T:
        return await self._inference.run(work, partial(_explain, name))

    def _find_loaded(self, name: str) -> _LoadedModel:
        return find_loaded(self._models, name)


def _structure_fields(structure: Structure | None) -> dict[str, Any]:
    """Return the fields that hold an answer to its structure."""
    if structure is None:
        return {}
    return {"grammar": f"%llguidance {{}}\n{grammar.lark(structure)}"}


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"{option('backend', 'llamacpp')} needs {' and '.join(missing)}. To install, run: {_INSTALL}"
        )


def threads() -> int:
    """Return how many threads compute: one for each usable CPU, or fewer if the user has set that."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    usable = cpus().usable
    return min(usable, int(chosen)) if chosen.isdecimal() and int(chosen) else usable


def _load(plan: LoadPlan, report: Report, cancel: threading.Event) -> _LoadedModel:
    """Load a checked file; raises `Cancelled` if `cancel` is set while the file is read."""
    checked = plan.source
    assert isinstance(checked, _Plan)
    file, header = checked.source.path, checked.header
    assert file is not None
    report(Progress("importing llama.cpp"))
    from llm_magic.backends.llamacpp.engine import Engine, devices

    buffer, read = bytearray(_READ_BYTES), 0
    with file.open("rb", buffering=0) as raw:
        # Nothing can be interrupted while llama.cpp reads it: the second time, it is in memory.
        while count := raw.readinto(buffer):
            if cancel.is_set():
                raise Cancelled
            read += count
            report(Progress("reading the weights", min(read / header.size, 1.0)))
    report(Progress("starting llama.cpp"))
    with process_lock(cancel):
        try:
            engine = Engine(file, checked.config)
        except RuntimeError as error:
            raise LoadFailed(
                f"llama.cpp cannot load {file.name}. It may be damaged, or of a kind that llama.cpp"
                " does not support."
            ).advise(f"Load it without -b llamacpp, or upgrade: {_INSTALL} -U") from error
    info = ModelInfo(
        plan.name,
        "llamacpp",
        where=checked.source.where,
        source=str(file),
        folder=str(file.parent),
        device="+".join(devices()),
        dtype=header.dtype,
        size=header.size,
        context_length=checked.config.context,
    )
    tokens = sorted(header.control_tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
    return _LoadedModel(engine, info, checked.source, pattern)


def _as_text(control_token: re.Pattern[str] | None, message: Message) -> Message:
    """Return a message in which special tokens are text, as llama.cpp reads them everywhere."""
    if control_token is None or not control_token.search(message.content):
        return message
    text = control_token.sub(
        lambda found: found[0][:1] + _SEPARATOR + found[0][1:], message.content
    )
    return dataclasses.replace(message, content=text)


def _stream(
    loaded: _LoadedModel,
    body: dict[str, Any],
    logprobs: int | None,
    cancel: threading.Event,
    emit: Callable[[Chunk], None],
) -> None:
    """Answer a request; raises `Cancelled` soon after `cancel` is set."""
    reader = ReplyReader(partial(_error, loaded.info), logprobs)

    def read(value: dict[str, Any]) -> None:
        if progress := _progress(value.get("prompt_progress")):
            emit(Chunk(progress=progress))
        elif (chunk := reader.read(value)) is not EMPTY:
            emit(chunk)

    with process_lock(cancel), openmp.throttle_beside_others(by_python=False):
        loaded.engine.chat(body, read, cancel)
    emit(reader.last_chunk())


def _progress(state: dict[str, int] | None) -> Progress | None:
    """Return how much of a prompt that takes several batches has been read."""
    if state is None:
        return None
    read, unread = state["processed"] - state["cache"], state["total"] - state["cache"]
    return Progress("reading the prompt", read / max(unread, 1), f"{read:,} of {counted(unread)}")


def _count(loaded: _LoadedModel, body: dict[str, Any], cancel: threading.Event) -> int | None:
    """Return the tokens of a prompt without reading it."""
    counts: list[int] = []
    stop = threading.Event()

    def read(value: dict[str, Any]) -> None:
        ReplyReader(partial(_error, loaded.info)).read(value)
        counts.append(value["prompt_progress"]["total"])
        raise Cancelled

    try:
        with process_lock(cancel):
            loaded.engine.chat(body, read, stop)
    except Cancelled:
        if not counts:
            raise
    except PromptTooLong as error:
        return error.tokens
    return counts[0] if counts else None


def _error(info: ModelInfo, value: dict[str, Any]) -> LLMMagicError:
    """Return the error for an error object in a reply."""
    response = parse_error(value)
    if response.lengths:
        hint = "Shorten the prompt, or load the model with a larger --context."
        return PromptTooLong.measured(info.name, *response.lengths, hint)
    return GenerationFailed(f"llama.cpp failed while {info.name} was answering: {response.text}.")


def _explain(name: str, error: BaseException) -> LLMMagicError:
    """Return the error for what ended a job."""
    if isinstance(error, LLMMagicError):
        return error
    details = "".join(traceback.format_exception(error))
    if isinstance(error, MemoryError):
        return OutOfMemory(f"Memory ran out in llama.cpp for {name}.", details=details)
    line = " ".join(str(error).split())
    return GenerationFailed(f"llama.cpp: {name}: {line}", details=details)
