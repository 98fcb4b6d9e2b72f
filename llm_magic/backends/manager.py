"""The loaded models, the active one, and the states of a load.

::

    Inactive -> Loading (local) | Configuring (remote) -> Ready -> Unloading -> Inactive
                        `-> Failed (keeps last_error), or Ready if a model is still loaded
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from llm_magic.backends.base import Backend, Report
from llm_magic.backends.thread_bridge import CHECK_S
from llm_magic.config import providers
from llm_magic.config.commands import command, either, option
from llm_magic.config.server_address import load_options
from llm_magic.config.settings import GenerationConfig, LoadConfig, ServerLoadConfig
from llm_magic.errors import (
    LLMMagicError,
    LoadInProgress,
    ModelNotLoaded,
    OptionError,
    ServerUnreachable,
    did_you_mean,
)
from llm_magic.text import visible_line
from llm_magic.types import MemoryUse, ModelInfo, Progress, State, Unloaded


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded model and the options of its load; `requested` is the model as the user named it.

    `ready_at` is when it was loaded (`time.perf_counter`).
    """

    name: str
    requested: str | None
    config: LoadConfig
    backend: Backend
    info: ModelInfo
    ready_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a session at one moment.

    Attributes:
        backend_type: The backend of the active model, else the default one.
        active_model: The name of the active model.
        status: ``Inactive``, ``Loading``, ``Configuring``, ``Ready``, ``Unloading`` or ``Failed``.
        generation_config: The generation settings.
        last_error: The error of the last load, if it failed.
        failed_model: The model of the last load, if it failed.
        backend_details: What the backend reports about the active model.
        models: The loaded models.
        progress: The progress of the running load.
        memory: The memory of this process.
    """

    backend_type: str
    active_model: str | None
    status: State
    generation_config: GenerationConfig
    last_error: str | None
    backend_details: dict[str, str]
    models: tuple[ModelInfo, ...]
    progress: Progress | None
    memory: MemoryUse | None
    failed_model: str | None = None

    def __repr__(self) -> str:
        names = ", ".join(visible_line(info.name) for info in self.models) or "no model"
        error = f", last error: {visible_line(self.last_error)}" if self.last_error else ""
        table = either("; %llm_status shows it as a table", "")
        return f"<Status: {self.status}, {names}{error}{table}>"

    @property
    def active(self) -> ModelInfo | None:
        """The active model."""
        return next((info for info in self.models if info.name == self.active_model), None)


@dataclass(slots=True)
class LoadResult:
    """The loaded model, whether it was loaded before, and the models that were unloaded for it."""

    info: ModelInfo
    was_loaded: bool = False
    unloaded: list[Unloaded] = field(default_factory=list)
    notes: tuple[str, ...] = ()


class BackendManager:
    """Owns the backends and the loaded models; runs on the event-loop thread unless stated."""

    def __init__(
        self,
        create: Callable[[str], Backend],
        changed: Callable[[], None] = lambda: None,
        wait_for_jobs: Callable[[Report], Awaitable[None]] | None = None,
        local_names: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """`changed` is called after every change, on the event-loop thread or one of a backend.

        `wait_for_jobs` is awaited before models are unloaded for another one. `local_names` returns the
        names of the models on this disk.
        """
        self._create, self._changed = create, changed
        self._wait_for_jobs, self._local_names = wait_for_jobs, local_names
        self._backends: dict[str, Backend] = {}
        self._loaded: dict[str, LoadedModel] = {}
        self._active: str | None = None
        self._stopping = False
        self._last_error: LLMMagicError | None = None
        self._failed: str | None = None
        # The state, the model that is being loaded, and the progress of its load. Any thread can read
        # them.
        self.state: State = "Inactive"
        self.pending: LoadedModel | None = None
        self.progress: Progress | None = None

    async def load(
        self,
        model: str | None,
        config: LoadConfig,
        *,
        name: str | None = None,
        keep: bool = False,
        began: float | None = None,
    ) -> LoadResult:
        """Load a model, make it active, and unload the others unless `keep`.

        They are unloaded only after the new one was found, checked and verified. A load that was stopped
        and is still ending is waited for. The time of the load counts from `began`
        (`time.perf_counter`), or from now.
        """
        began = time.perf_counter() if began is None else began
        await self._wait_for_stopped_load()
        same = self._same(model, config, name)
        if same is not None:
            self._active, self._last_error = same.name, None
            self._changed()
            unloaded = [] if keep else await self._unload_others(same.name)
            return LoadResult(same.info, was_loaded=True, unloaded=unloaded)
        backend = self._backend(config.backend)
        self.state, self._last_error = _loading_state(backend), None
        label = model or "the default model"
        info = ModelInfo(label, config.backend)
        self.pending = LoadedModel(label, model, config, backend, info)
        self._changed()
        work = asyncio.ensure_future(self._load(backend, model, config, name, keep, began))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping = True
            # The cell may end before the work: an import of a large package cannot be stopped.
            self._show_stopped()
            work.cancel()
            await asyncio.wait({work})
            if work.cancelled() or work.exception() is not None:
                raise
            # It was loaded before it noticed.
            return work.result()
        except LLMMagicError as error:
            self._advise_address(config, error)
            self._finish("Failed", error)
            raise
        except Exception as error:
            self._finish("Failed", LLMMagicError(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self.pending = self.progress = None
            self._stopping = False
            if self.state in {"Loading", "Configuring", "Unloading"}:
                self._finish("Inactive")
            self._changed()

    def check_not_loading(self) -> None:
        """Raise `LoadInProgress` while a load runs that was not stopped."""
        if self.pending is not None and not self._stopping:
            raise LoadInProgress(f"{self.pending.name} is being loaded.").advise(
                f"Wait for it ({command('status')} shows the progress), then try again."
            )

    async def _wait_for_stopped_load(self) -> None:
        """Wait for the end of a load that was stopped: an import of a large package cannot be stopped.

        Raises `LoadInProgress` while another load runs.
        """
        try:
            while self._stopping:
                self.state = "Loading"
                self.progress = Progress("waiting for the end of the stopped load")
                self._changed()
                await asyncio.sleep(CHECK_S)
        except asyncio.CancelledError:
            self._show_stopped()
            raise
        self.check_not_loading()

    async def _load(
        self,
        backend: Backend,
        model: str | None,
        config: LoadConfig,
        name: str | None,
        keep: bool,
        began: float,
    ) -> LoadResult:
        leaving = () if keep else tuple(self._loaded)
        plan = await backend.check(model, config, self._report, leaving)
        chosen = name or plan.name
        if self.pending is not None:
            self.pending = dataclasses.replace(self.pending, name=chosen)
        if keep and chosen in self._loaded:
            raise OptionError(
                f"The name {chosen} is already used by a loaded model. Choose another with {option('name')}."
            )
        before = self.loaded_models
        if leaving:
            await self._wait_for_answers(None)
            plan = await backend.verify(plan, self._report)
        unloaded = [] if keep else await self._unload_others(None)
        self.state = _loading_state(backend)
        try:
            info = await backend.load(plan, chosen, self._report)
        except LLMMagicError as error:
            if not unloaded:
                raise
            # The same object: some error classes have attributes that a copy would lose.
            raise error.append(unloaded_for_it(before)).advise(load_again(before[-1])) from None
        # The user waited for checks, imports, downloads, conversions and unloads too.
        ready_at = time.perf_counter()
        info = dataclasses.replace(info, load_s=ready_at - began)
        self._loaded[chosen] = LoadedModel(chosen, model, config, backend, info, ready_at)
        self._active = chosen
        self._finish("Ready")
        self._last_error = None
        return LoadResult(info, unloaded=unloaded, notes=plan.notes)

    def _advise_address(self, config: LoadConfig, error: LLMMagicError) -> None:
        """Add the address in use to the error of a load that named none."""
        used, names_none = self.used(config.backend), getattr(config, "base_url", "") is None
        url = used.base_url if isinstance(used, ServerLoadConfig) else None
        if isinstance(error, ServerUnreachable) and names_none and url:
            error.advise(f"The loaded model is at {url}: to use that server, add --base-url {url}")

    def _report(self, progress: Progress) -> None:
        # Called on threads of the backend; one assignment is atomic.
        if not self._stopping:
            self.progress = progress
            self._changed()

    def _show_stopped(self) -> None:
        self.progress = None
        self._finish("Inactive")

    def _finish(self, state: State, error: LLMMagicError | None = None) -> None:
        if error is not None:
            # A copy: the frames of the error hold what was loaded of the model.
            self._last_error = LLMMagicError.like(error)
            self._failed = self.pending.name if self.pending is not None else None
        self.state = "Ready" if self._loaded else state
        self._changed()

    def _same(self, model: str | None, config: LoadConfig, name: str | None) -> LoadedModel | None:
        for loaded in self._loaded.values():
            known = {loaded.requested, loaded.name, loaded.info.source}
            is_requested = model in known or self._is_alike(model, loaded)
            is_same = is_requested and loaded.config == config and name in {None, loaded.name}
            if is_same and loaded.backend.is_current(loaded.name, model, config):
                return loaded
        return None

    def _is_alike(self, model: str | None, loaded: LoadedModel) -> bool:
        """Return whether a name differs only in case from that of a local model, and is no other model's."""
        if model is None or not loaded.backend.capabilities.in_process:
            return False
        is_alike = model.casefold() == loaded.name.casefold()
        return is_alike and model not in self._local_names()

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = self._create(name)
        return self._backends[name]

    async def use(self, name: str) -> ModelInfo:
        """Make a loaded model the active one."""
        chosen = self.find(name)
        self._active = chosen.name
        self._changed()
        return chosen.info

    async def unload(self, name: str | None = None) -> Unloaded:
        """Unload one model, the active one if none is named."""
        await self._wait_for_stopped_load()
        return await self._unload(self.find(name, to_use=False))

    async def unload_all(self) -> list[Unloaded]:
        """Unload every model."""
        await self._wait_for_stopped_load()
        return await self._unload_others(None)

    async def _wait_for_answers(self, keep: str | None) -> None:
        """Wait until no answer needs a model that is unloaded; all but `keep` are."""
        if self._wait_for_jobs is not None and self._loaded.keys() - {keep}:
            await self._wait_for_jobs(self._report)

    async def _unload_others(self, keep: str | None) -> list[Unloaded]:
        await self._wait_for_answers(keep)
        others = [loaded for loaded in self._loaded.values() if loaded.name != keep]
        return [await self._unload(loaded) for loaded in others]

    async def _unload(self, loaded_model: LoadedModel) -> Unloaded:
        self.state = "Unloading"
        if self.pending is not None:
            self._report(Progress(f"unloading {loaded_model.name}"))
        # Not found from here on, so that no request uses it and no second unload starts.
        self._loaded.pop(loaded_model.name, None)
        if self._active == loaded_model.name:
            self._active = next(reversed(self._loaded), None)
        try:
            return await loaded_model.backend.unload(loaded_model.name)
        finally:
            self._finish("Inactive")

    def find(self, name: str | None = None, *, to_use: bool = True) -> LoadedModel:
        """Return a loaded model, the active one if none is named; raises `ModelNotLoaded`.

        Of several names that differ only in case, the exact one is meant.

        The error suggests to load it, unless it is searched for another purpose than `to_use` it.
        """
        if name is not None and (not isinstance(name, str) or not name):
            loaded = ", ".join(self._loaded) or "none"
            raise OptionError(f"{name!r} cannot be the name of a model. Loaded models: {loaded}.")
        name = self._active if name is None else name
        if name in self._loaded:
            return self._loaded[name]
        fold = name.casefold() if name is not None else None
        alike = [loaded for one, loaded in self._loaded.items() if one.casefold() == fold]
        if len(alike) == 1:
            return alike[0]
        if name is None and self._last_error is not None and self.state == "Failed":
            failed = "No model is loaded, because the last load failed."
            raise ModelNotLoaded.like(self._last_error, failed)
        if name is None:
            error = ModelNotLoaded("No model is loaded.")
            raise error.advise(f"Run {command('load')} (or {command('load', 'MODEL')}).")
        near = did_you_mean(name, self._loaded)
        names = near or f" Loaded models: {', '.join(self._loaded) or 'none'}."
        load = self._load_advice(name) if to_use and not near else ""
        raise ModelNotLoaded(f"{name} is not loaded.{names}").advise(load)

    def _load_advice(self, name: str) -> str:
        """Return how to load a model that is not loaded: from this disk, else from the server in use."""
        active = self._loaded.get(self._active or "")
        config = active.config if active is not None else None
        names, known = set(self._local_names()), set[str]()
        options: dict[str, str | bool | None] = {}
        if active is not None and isinstance(config, ServerLoadConfig):
            known = {info.name for info in active.backend.known(config.base_url)}
            options = {**load_options(config, config.base_url), "keep": True}
        if name in known:
            return f"Run {command('load', name, **options)}."
        hosted, local = providers.of_model(name), dict[str, str | bool | None]()
        if options:
            local = {"backend": "local", "keep": True}
        if name in names:
            return f"Run {command('load', name, **local)}."
        if hosted is not None and (config is None or config.backend != hosted.name):
            return f"Run {command('load', hosted.api_name(name), backend=hosted.name)}."
        for some, line in ((known, options), (names, local)):
            if near := did_you_mean(name, some).strip():
                return f"{near} Load it with {command('load', **line)}."
        if not options and (in_ollama := providers.ollama_name(name)):
            name, options = in_ollama, {"backend": "ollama"}
        return f"Run {command('load', name, **options)}."

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the models that a backend can load."""
        return await self._backend(config.backend).models(config)

    def used(self, backend: str) -> LoadConfig | None:
        """Return the options of the latest load of a backend. Safe to call from any thread."""
        configs = [r.config for r in tuple(self._loaded.values())]
        return next((c for c in reversed(configs) if c.backend == backend), None)

    @property
    def loaded_models(self) -> tuple[LoadedModel, ...]:
        """The loaded models, the active one last. Safe to read from any thread."""
        models = tuple(self._loaded.values())
        return tuple(sorted(models, key=lambda one: one.name == self._active))

    def known(self, backend: str, base_url: str | None = None) -> list[ModelInfo]:
        """Return the models that the servers of a backend listed last. Safe to call from any thread."""
        built = self._backends.get(backend)
        return built.known(base_url) if built is not None else []

    def snapshot(self, config: GenerationConfig, backend: str) -> Status:
        """Return the state now. Safe to call from any thread."""
        loaded_models = tuple(self._loaded.values())
        active = next((r for r in loaded_models if r.name == self._active), None)
        held = [built.memory() for built in tuple(self._backends.values())]
        return Status(
            backend_type=active.config.backend if active else backend,
            active_model=active.name if active else None,
            status=self.state,
            generation_config=config,
            last_error=None if self._last_error is None else str(self._last_error),
            backend_details=_details(active),
            models=tuple(r.info for r in loaded_models),
            progress=self.progress,
            failed_model=None if self._last_error is None else self._failed,
            # Only the local backend reports GPUs.
            memory=max(held, key=lambda memory: len(memory.devices), default=None),
        )

    async def aclose(self) -> None:
        """Unload the models and close the backends."""
        for backend in list(self._backends.values()):
            await backend.aclose()
        self._loaded.clear()
        self._backends.clear()
        self._active, self.state = None, "Inactive"


def unloaded_for_it(models: Sequence[LoadedModel]) -> str:
    """Return the sentence about the models that were unloaded for a load that did not succeed."""
    names = ", ".join(one.name for one in models)
    return f"{names} {'was' if len(models) == 1 else 'were'} unloaded for it."


def load_again(model: LoadedModel) -> str:
    """Return how to load a model that was unloaded, with its options."""
    config, changed = model.config, dict[str, str | bool | None]()
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if value != info.default:
            changed[name] = value if isinstance(value, bool) else str(value)
    return f"To load {model.name} again: {command('load', model.requested, **changed)}"


def _loading_state(backend: Backend) -> State:
    return "Loading" if backend.capabilities.in_process else "Configuring"


def _details(active: LoadedModel | None) -> dict[str, str]:
    if active is None:
        return {}
    info = active.info
    details = {
        "server": info.server,
        "source": info.source,
        "weights": info.folder if info.folder != info.source else "",
        "device": info.device,
        "dtype": info.dtype,
        "quantization": "" if info.server else info.quantization,
        "revision": info.revision or "",
    } | active.backend.details(active.name)
    return {name: value for name, value in details.items() if value}
