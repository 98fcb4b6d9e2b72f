"""The session of a kernel: what is loaded, how it generates, and every way to use it.

Magics, panel and Python code all use this object.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import math
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Unpack, cast

from llm_magic.backends.thread_bridge import CHECK_S
from llm_magic.config.commands import either
from llm_magic.errors import (
    GenerationStopped,
    Interrupted,
    ModelNotLoaded,
    NoAttribute,
    OptionError,
    did_you_mean,
)
from llm_magic.session import context_window
from llm_magic.session.cell_keys import Cells
from llm_magic.session.chats import Chats, check_name
from llm_magic.session.event_loop import LoopThread
from llm_magic.session.interruptible_wait import held_back
from llm_magic.session.jobs import (
    Job,
    Jobs,
    ProgressView,
    show_until_end,
    stopped_waiting,
    without_view,
)
from llm_magic.session.loading import LoadRequest, Loads, OnWait
from llm_magic.session.recording import Recorder
from llm_magic.session.requests import (
    AskOptions,
    DryRun,
    PreparedRequest,
    Prompt,
    Request,
    dry_run_without_model,
    prepare,
    request,
)
from llm_magic.session.response import ChunkIterator, Pending, Response
from llm_magic.session.usage import SessionUsage
from llm_magic.text import replace_surrogates, visible_line
from llm_magic.types import Chunk, Progress, Reply, Score, Unloaded

if TYPE_CHECKING:
    from llm_magic.backends.base import Backend
    from llm_magic.backends.manager import BackendManager, LoadedModel, LoadResult, Status
    from llm_magic.backends.registry import LoadOptions
    from llm_magic.config.api_keys import ApiKeys
    from llm_magic.config.settings import LoadConfig, Settings
    from llm_magic.session.generation_settings import GenerationSettings
    from llm_magic.session.map.mapped import Mapped
    from llm_magic.session.map.options import MapOptions
    from llm_magic.session.map.run import MapRun
    from llm_magic.session.map.saved import UnfinishedMaps
    from llm_magic.types import ModelInfo

T = TypeVar("T")

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
# What other libraries call the attributes of a session.
_OTHER_NAMES = {
    "chat": 'Use llm.generate(PROMPT, chat="NAME").',
    "complete": "Use llm.generate(PROMPT).",
    "config": "Use llm.generation.temperature = 0.2.",
    "invoke": "Use llm.generate(PROMPT).",
    "model": "Use llm.load(MODEL).",
}
_STOP_IN_NOTEBOOK = (
    "%llm_stop stops all answers, job.cancel() stops a job, and ■ what a cell waits for."
)
_STOP_IN_PROGRAM = (
    "Leave the loop over llm.stream(PROMPT), or cancel the task that awaits llm.agenerate(PROMPT)."
)
# The magics and the panel use the others.
_DOCUMENTED = {
    "agenerate", "amap", "astream", "chats", "close", "generate", "generation", "imap", "jobs", "last",
    "last_mapped", "load", "map", "models", "reset", "score", "settings", "status", "stream", "unload",
    "unload_all", "usage", "use",
}  # fmt: skip
# Threads and connections of a parent process: never closed in the child.
_inherited: list[object] = []


def _after_fork() -> None:
    for session in list(_sessions):
        session._reset_after_fork()


# Windows and some other places cannot fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Session:
    """Loads language models and sends prompts to them; magics, panel and Python code share one session.

    You can call every method from any cell, even while an event loop runs::

        llm.load("Qwen/Qwen2.5-7B-Instruct")      # as %llm_load; without a name, the default model
        reply = llm.generate("Name a color.")     # as %%llm; a str with .usage, .timing, .json()
        for chunk in llm.stream("…"): ...         # in async code: await llm.agenerate, llm.astream
        results = llm.map("… {text}", rows)       # one answer for each row
        llm.generation.temperature = 0.3          # as %llm_config
        llm.status(); llm.models(); llm.use(NAME); llm.unload(); llm.chats; llm.jobs; llm.last; llm.usage()
    """

    chats: Chats
    cells: Cells
    jobs: Jobs
    progress_view: Callable[[Job], ProgressView | None]
    is_configured: bool

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        create: Callable[[str], Backend] | None = None,
    ) -> None:
        """Create a session without a model.

        Args:
            settings: The settings to use instead of those of the environment and ``.env``.
            create: Returns the backend with a name, to use instead of the installed backends.
        """
        self._given_settings = settings
        self._create = create
        # The named conversations.
        self.chats = Chats()
        # The magics set `current`, where there is a frontend.
        self.cells = Cells()
        # Returns what shows an answer or a map that Python code waits for; the magics set it.
        self.progress_view = without_view
        # Whether `generation` has the values of IPython's configuration.
        self.is_configured = False
        self._listeners: list[Callable[[], None]] = []
        self._closing: list[Callable[[], None]] = []
        # A tuple: other threads read it.
        self._maps: tuple[weakref.ref[MapRun], ...] = ()
        self._last_mapped: Mapped | None = None
        self._start_process()
        _sessions.add(self)

    def _start_process(self, last: Reply | None = None) -> None:
        """Create what belongs to this process: threads, and what runs on them."""
        self._loop = LoopThread()
        # The responses that run in the background, and those that ended last.
        self.jobs = Jobs()
        self._recorder = Recorder(self.chats, self._notify, last)
        self._loads = Loads(self._loop, lambda: self._manager)

    def _reset_after_fork(self) -> None:
        """Start anew in a forked child, which has none of the threads: nothing is loaded there."""
        # Referenced for ever: connections and memory belong to the parent.
        _inherited.append((self._loop, self.__dict__.pop("_manager", None)))
        # The frontend is connected to the parent.
        self.progress_view = without_view
        self._start_process(self._recorder.last)

    def __setattr__(self, name: str, value: object) -> None:
        """Raise `AttributeError` for an attribute that does not exist, such as a generation setting."""
        is_known = hasattr(type(self), name) or name in Session.__annotations__
        if not is_known and not name.startswith("_"):
            raise self._no_attribute(name)
        super().__setattr__(name, value)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Raise `AttributeError`, which suggests the nearest attribute."""
            raise self._no_attribute(name)

    def __dir__(self) -> list[str]:
        """Return the documented attributes, which completion and suggestions offer."""
        return [name for name in super().__dir__() if name[0] == "_" or name in _DOCUMENTED]

    def _no_attribute(self, name: str) -> NoAttribute:
        """Return the error for an attribute that does not exist, with the one that was meant."""
        message = f"{type(self).__name__!r} object has no attribute {name!r}."
        if name.startswith("_"):
            return NoAttribute(message)
        from llm_magic.config.settings import SessionConfig

        settings = SessionConfig.model_fields
        if name == "stop":
            advice = f" {either(_STOP_IN_NOTEBOOK, _STOP_IN_PROGRAM)}"
        elif name in _OTHER_NAMES:
            advice = f" {_OTHER_NAMES[name]}"
        elif name in settings:
            advice = f" Use llm.generation.{name}."
        else:
            known = [one for one in dir(self) if not one.startswith("_")]
            advice = did_you_mean(name, known, count=1, prefix="llm.") or did_you_mean(
                name, settings, prefix="llm.generation."
            )
        return NoAttribute(message + advice)

    @functools.cached_property
    def keys(self) -> ApiKeys:
        """The keys of servers that this session was given."""
        from llm_magic.config.api_keys import ApiKeys

        return ApiKeys()

    @functools.cached_property
    def _manager(self) -> BackendManager:
        from llm_magic.backends import registry
        from llm_magic.backends.manager import BackendManager

        keys = self.keys

        def create(name: str) -> Backend:
            return registry.create(name, lambda: self.settings, keys)

        # Programs end without `close`, too. Registered last, so that it is called first.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        return BackendManager(
            self._create or create, self._notify, self._wait_for_answers, self._local_names
        )

    def _local_names(self) -> list[str]:
        from llm_magic.backends import registry

        return [info.name for info in registry.local_model_names(self.settings)]

    # -- settings -----------------------------------------------------------------------------

    @functools.cached_property
    def generation(self) -> GenerationSettings:
        """The generation settings of this session, as in ``llm.generation.temperature = 0.3``."""
        from llm_magic.session.generation_settings import GenerationSettings

        return GenerationSettings(self._given_settings, self._notify)

    @property
    def settings(self) -> Settings:
        """The settings of the environment and the ``.env`` file."""
        return self.generation.settings

    # -- models -------------------------------------------------------------------------------

    def load(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        **options: Unpack[LoadOptions],
    ) -> ModelInfo:
        """Load a model, make it the active one, and return its description when it is ready.

        >>> llm.load("Qwen/Qwen2.5-7B-Instruct", quantization="4bit")

        Args:
            model: A Hugging Face id, a folder or a ``.gguf`` file (also as a ``Path``), or the name of a
                model on a server. Default: the model of the settings, else the bundled one.
            name: The name to use for the model afterwards.
            keep: Keep the models that are already loaded.
            options: The options of ``%llm_load``: backend, base_url, key_env, pull, idle_timeout,
                concurrency, device, quantization, dtype, revision, trust_remote_code, attn, assistant,
                special_tokens, compile, context.

        Raises:
            OptionError: An option is unknown, or its value is invalid.
            ModelError: The model does not exist, does not fit into memory, or cannot be loaded.
            ServerError: The server cannot be reached, or returned an error.
        """
        return self.load_with_details(model, name=name, keep=keep, **options).info

    @held_back()
    def load_with_details(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        on_wait: OnWait | None = None,
        began: float | None = None,
        **options: Unpack[LoadOptions],
    ) -> LoadResult:
        """Load a model and return also which models were unloaded for it.

        `on_wait` is called about ten times a second meanwhile, to show `status().progress`. The time of
        the load counts from `began` (`time.perf_counter`), or from now.
        """
        if "bg" in options:
            meanwhile = either("%llm_load --bg", "await asyncio.to_thread(llm.load, MODEL)")
            raise OptionError(f"llm.load waits for the model. To load it meanwhile: {meanwhile}.")
        began = time.perf_counter() if began is None else began
        return self._loads.load(self._load_request(model, name, keep, began, options), on_wait)

    @held_back()
    def load_later(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        **options: Unpack[LoadOptions],
    ) -> concurrent.futures.Future[LoadResult]:
        """Start to load a model and return at once; the next call waits for it.

        The future has the result; cancelling it does not stop the load.
        """
        began = time.perf_counter()
        return self._loads.start(self._load_request(model, name, keep, began, options))

    def discard_finished_load(self) -> None:
        """Discard the load of `load_later` if it has ended: the next call does not raise its error."""
        self._loads.discard_finished()

    def discard_failed_load(self) -> str:
        """Discard the load of `load_later` if it has failed and another model can answer.

        Returns the name of the model that was not loaded, else an empty string.
        """
        failed = self._loads.failed
        if not failed or self.status().active_model is None:
            return ""
        self.discard_finished_load()
        return failed

    def stop_loading(self) -> None:
        """Stop the load that `load_later` started, or that a cell waits for."""
        if not self._loads.stop():
            self._loop.interrupt()

    def _load_request(
        self,
        model: str | os.PathLike[str] | None,
        name: str | None,
        keep: bool,
        began: float,
        options: LoadOptions,
    ) -> LoadRequest:
        """Check what is loaded."""
        from llm_magic.backends import registry

        model = os.fspath(model) if isinstance(model, os.PathLike) else model

        if name is not None:
            check_name(name, "model")
        registry.check_model(model, options.get("backend"), self.settings)
        if model is None:
            model = self.default_model(options.get("backend"))
        config = self._load_config(options, needs_model=model is None)
        return LoadRequest(model, config, name, keep, began)

    def default_model(self, backend: str | None) -> str | None:
        """Return the model of the settings, which is meant for the default backend only."""
        settings = self.settings
        return settings.model if (backend or settings.backend) == settings.backend else None

    def _load_config(self, options: LoadOptions, *, needs_model: bool = False) -> LoadConfig:
        """Check the options of a load, and get the key of its server."""
        from llm_magic.backends import registry
        from llm_magic.config.server_address import resolve_address
        from llm_magic.config.settings import ServerLoadConfig

        config = registry.load_config(self.settings, options)
        if isinstance(config, ServerLoadConfig):
            # Here, because only the caller's thread can ask.
            address = resolve_address(config, self.settings)
            self.keys.obtain(config, address, self.settings, needs_model=needs_model)
            if config.base_url is not None:
                # In one spelling, so that a load of the loaded model is recognized.
                config = config.replace(base_url=address.url)
        return config

    @held_back()
    def use(self, name: str) -> ModelInfo:
        """Make a loaded model the active one, which answers if a call names no model.

        >>> llm.load("Qwen/Qwen2.5-7B-Instruct", keep=True)
        >>> llm.use("SmolLM2-135M-Instruct")

        Raises `ModelNotLoaded` if no loaded model has that name.
        """
        self.discard_finished_load()
        self._loads.wait()
        return self._loop.run(self._manager.use(name))

    @held_back()
    def unload(self, name: str | None = None, on_wait: OnWait | None = None) -> Unloaded:
        """Unload a model, by default the active one, and return the memory before and after.

        It first waits for the answers of a local model, and calls `on_wait` about ten times a second
        while it waits. An interrupt ends the wait and unloads nothing.
        """
        self.discard_finished_load()
        self._loads.wait()
        self._wait_to_unload(self.answers_of(name), on_wait)
        return self._unload(self._manager.unload(name))

    @held_back()
    def unload_all(self, on_wait: OnWait | None = None) -> list[Unloaded]:
        """Unload every model as `unload` does, and return the memory before and after each."""
        self.discard_finished_load()
        self._loads.wait()
        self._wait_to_unload(self.answers_of(every=True), on_wait)
        return self._unload(self._manager.unload_all())

    def answers_of(self, name: str | None = None, *, every: bool = False) -> tuple[Job, ...]:
        """Return the answers and maps that an unload of a model waits for, by default the active model.

        They are background jobs and what Python code waits for. Answers of servers do not need the model
        here: they continue.
        """
        model = None if every else self._manager.find(name, to_use=False).name
        running: tuple[Job, ...] = (*self.answering, *self.mapping)
        return tuple(
            one
            for one in running
            if model in {None, one.model} and one.is_in_process and one.is_generating
        )

    @property
    def mapping(self) -> tuple[MapRun, ...]:
        """The maps that run now."""
        runs = (ref() for ref in self._maps)
        return tuple(run for run in runs if run is not None and run.is_generating)

    async def _wait_for_answers(self, report: Callable[[Progress], None]) -> None:
        """Wait until no answer needs a model that is unloaded for another one; on the loop thread."""
        while answers := self.answers_of(every=True):
            report(Progress(f"waiting for {answers[0].short_name}"))
            await asyncio.sleep(CHECK_S)

    def _wait_to_unload(self, answers: Iterable[Job], on_wait: OnWait | None) -> None:
        try:
            self.wait(answers, on_wait)
        except Interrupted as stopped:
            raise stopped.append("Nothing was unloaded.") from None

    def _unload(self, unload: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.run(unload)
        except KeyboardInterrupt:
            loaded = ", ".join(info.name for info in self.status().models)
            still = f"Still loaded: {loaded}." if loaded else "No model is loaded any more."
            raise Interrupted(f"Stopped while the memory was being freed. {still}") from None

    @held_back()
    def models(
        self,
        backend: str | None = None,
        *,
        base_url: str | None = None,
        key_env: str | None = None,
    ) -> list[ModelInfo]:
        """Return the models that a backend can load.

        Args:
            backend: The name of the backend. Default: the one in the settings.
            base_url: The address of a server. Default: the one in use, else the one in the settings.
            key_env: The name of the environment variable that contains the API key of the server.
        """
        about = {"backend": backend, "base_url": base_url, "key_env": key_env}
        given = {name: value for name, value in about.items() if value is not None}
        return self._loop.run(self._listed(cast("LoadOptions", given)))

    def models_later(
        self, **about: Unpack[LoadOptions]
    ) -> concurrent.futures.Future[list[ModelInfo]]:
        """Ask for what a backend could load, and return at once."""
        return self._loop.submit(self._listed(about))

    def _listed(self, about: LoadOptions) -> Coroutine[Any, Any, list[ModelInfo]]:
        from llm_magic.config.settings import ServerLoadConfig

        backend = about.setdefault("backend", self.settings.backend)
        used = self.used(backend)
        if isinstance(used, ServerLoadConfig) and "base_url" not in about:
            known = {name: getattr(used, name) for name in ServerLoadConfig.model_fields}
            about = cast("LoadOptions", {n: v for n, v in known.items() if v is not None} | about)
        return self._manager.models(self._load_config(about))

    def known_models(self, backend: str, base_url: str | None = None) -> list[ModelInfo]:
        """Return what a backend could load, without a request to a server.

        Fast enough for completion: names on this disk, or what servers listed in the last request,
        which every load and every `models()` sends.
        """
        from llm_magic.backends import registry

        here = registry.local_model_names(self.settings) if backend in {"local", "llamacpp"} else []
        if backend == "llamacpp":
            here = [info for info in here if info.where in {"bundled", "gguf"}]
        return [*here, *self._manager.known(backend, base_url)]

    def used(self, backend: str) -> LoadConfig | None:
        """Return what the latest model of a backend was loaded with."""
        return self._manager.used(backend)

    @property
    def is_loading_in_background(self) -> bool:
        """Whether a load runs that `load_later` started; a cell waits for any other."""
        load = self._loads.pending
        return load is not None and not load.done()

    @property
    def loading(self) -> str | None:
        """The name of the model that is being loaded."""
        pending = self._manager.pending
        return pending.name if pending is not None else None

    @property
    def progress(self) -> Progress | None:
        """How far the running load is."""
        return self._manager.progress

    def status(self) -> Status:
        """Return the loaded models, the state of the active one, and the memory of this process."""
        return self._manager.snapshot(self.generation.config, self.settings.backend)

    def loaded_model(self, name: str | None = None) -> LoadedModel:
        """Return a loaded model with its options and its backend; the active one if none is named."""
        return self._manager.find(name)

    # -- asking -------------------------------------------------------------------------------

    @held_back()
    def wait_for_load(self, on_wait: OnWait | None = None, deadline: float = math.inf) -> None:
        """Wait for a load that `load_later` started; an interrupt only ends the wait.

        So does the `deadline` (`time.monotonic`), without an error.

        `on_wait` is called about ten times a second meanwhile. Raises the error of the load.
        """
        self._loads.wait(on_wait, deadline)

    def __call__(self, *_prompt: object, **_options: object) -> NoReturn:
        """Raise `OptionError`, which names the method to use."""
        raise OptionError("llm cannot be called. Use llm.generate(…), or llm.stream(…) for chunks.")

    # With it, ``llm?`` shows no way to call it.
    __call__.__signature__ = inspect.Signature()  # type: ignore[attr-defined]

    def ask(self, request: Request, *, background: bool = False) -> Response:
        """Check a request, start to answer it, and return the response at once.

        Raises what is wrong with the request before anything is sent. A `background` response is one
        of the `jobs`. A load that runs is waited for first; a `background` response waits by itself.
        """
        if not isinstance(request, Request):
            raise OptionError("llm.ask takes a Request. For a prompt: llm.generate(PROMPT).")
        with held_back():
            response = self._respond_after_load(request) if background else None
            if response is None:
                self._loads.wait()
                response = self._respond(request)
        if background:
            self.jobs.add(response)
        return response.start()

    def earlier_turns(self, chat: str, key: str) -> tuple[Response, ...]:
        """Return what the turn `key` of a chat waits for: earlier turns that still run."""
        return tuple(self._recorder.earlier_turns(chat, key).values())

    def _respond(self, request: Request) -> Response:
        prepared, pending = self._prepare(request), None
        if prepared.context is not None:
            turns = self._recorder.earlier_turns(prepared.context.chat, prepared.context.key)
            again = dataclasses.replace(prepared.request, model=prepared.loaded_model.name)
            pending = self._pending(again, turns) if turns else None
        return Response(prepared, self._manager, self._loop, self._recorder, pending)

    def _pending(
        self,
        request: Request,
        turns: dict[str, Response],
        load: asyncio.Task[LoadResult] | None = None,
    ) -> Pending:
        """Return what a request waits for; it is prepared afterwards with the settings of now."""
        settings = self.generation.values

        def again() -> PreparedRequest:
            return prepare(request, self._manager.find(request.model), settings, self.chats)

        return Pending(again, load, turns)

    def _respond_after_load(self, request: Request) -> Response | None:
        """Return a response that waits for the load that `load_later` started; None if none runs.

        The request is checked now with what is known of the model, and prepared again then.
        """
        load, pending = self._loads.pending, self._manager.pending
        if load is None or load.done() or pending is None:
            return None
        request = self._with_key(request)
        chat, key = request.chat, request.key
        turns = self._recorder.earlier_turns(chat, key) if chat is not None and key else {}
        prepared = prepare(request, pending, self.generation.values, self.chats)
        waits = self._pending(request, turns, load)
        return Response(prepared, self._manager, self._loop, self._recorder, waits)

    @functools.cached_property
    def _unfinished(self) -> UnfinishedMaps:
        from llm_magic.session.map.saved import UnfinishedMaps

        return UnfinishedMaps()

    def _prepare(self, request: Request, *, peek: bool = False) -> PreparedRequest:
        """Check a request; `peek` starts no turn of its chat."""
        loaded_model = self._manager.find(request.model)
        loaded_model.backend.release_threads()
        if request.chat is not None:
            request = self._with_key(request, peek=peek)
        return prepare(request, loaded_model, self.generation.values, self.chats)

    def _with_key(self, request: Request, *, peek: bool = False) -> Request:
        """Return a request of a chat with the key of its cell."""
        if request.chat is None or request.key is not None:
            return request
        return dataclasses.replace(request, key=self.cells.key(request.chat, peek=peek))

    @held_back()
    def generate(self, prompt: Prompt = "", **about: Unpack[AskOptions]) -> Reply:
        """Send a prompt and return the complete answer.

        >>> llm.generate("What is 7 times 6?", temperature=0)

        After three seconds, a notebook shows in the cell how much of the answer there is.

        Args:
            prompt: A string, or a list of messages such as ``{"role": "user", "content": "…"}``.
            about: The options of ``%%llm`` for this call: model, system, chat, trim, max_new_tokens,
                temperature, top_p, top_k, repetition_penalty, seed, stop, logprobs, and extra (other
                parameters of the backend); and the type of the answer, whose value the reply has:
                schema, choice, regex or grammar, and schema_by.

        Raises:
            OptionError: An option is unknown, invalid, or not supported by the backend.
            ModelNotLoaded: No model is loaded, or no loaded model has the given name.
            GenerationError: The answer is missing or incomplete.
            ServerError: The server cannot be reached, or returned an error.
            Interrupted: The user stopped the answer; the exception has the partial reply.
        """
        with self.ask(request(prompt, about)) as response:
            if (view := self.progress_view(response)) is not None:
                show_until_end(response, view)
            return response.result()

    @held_back()
    def stream(self, prompt: Prompt = "", **about: Unpack[AskOptions]) -> Iterator[Chunk]:
        """Send a prompt and yield the chunks of the answer; leaving the loop early stops the model."""
        prepared = request(prompt, about)
        self._loads.wait()
        return ChunkIterator(self._respond(prepared))

    async def agenerate(self, prompt: Prompt = "", **about: Unpack[AskOptions]) -> Reply:
        """Send a prompt from async code and return the complete answer.

        Cancelling the task stops the model.
        """
        prepared = request(prompt, about)
        await self._loads.wait_async()
        return await self._respond(prepared)

    async def astream(
        self, prompt: Prompt = "", **about: Unpack[AskOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Send a prompt from async code and yield the chunks of the answer.

        Leaving the loop early stops the model.
        """
        prepared = request(prompt, about)
        await self._loads.wait_async()
        async with contextlib.aclosing(aiter(self._respond(prepared))) as chunks:
            async for chunk in chunks:
                if chunk.has_content:
                    yield chunk

    @held_back()
    def score(
        self,
        prompt: Prompt,
        continuations: Sequence[str],
        *,
        model: str | None = None,
        system: str | None = None,
        logprobs: int = 0,
    ) -> tuple[Score, ...]:
        """Return how probable each text is as the answer to a prompt, in the order of the texts.

        The probabilities are those of the model's own distribution, of the tokens of each text; the end
        of the answer is not counted. A local model reads the prompt once. Longer texts are less probable:
        compare texts of different lengths by the mean over their tokens.

        >>> best = max(llm.score("The capital of France is", ["Paris", "Rome"]), key=lambda s: s.logprob)

        Args:
            prompt: A string, or a list of messages, as for `generate`.
            continuations: The texts.
            model: The name of a loaded model. Default: the active one.
            system: The system prompt. Default: the one of the session.
            logprobs: How many of the likeliest tokens are reported at the place of each token.

        Raises:
            OptionError: The backend cannot score texts, or a text is empty.
            PromptTooLong: The prompt and a text exceed the context of the model.
        """
        texts = _texts(continuations)
        requested = request(prompt, {"model": model, "system": system})
        self._loads.wait()
        prepared = self._prepare(requested)
        config, loaded = prepared.config.replace(logprobs=logprobs), prepared.loaded_model
        answer = loaded.backend.score(loaded.name, prepared.sent, config, texts)
        return tuple(self._loop.run(answer))

    # -- a prompt for each row ----------------------------------------------------------------

    @held_back()
    def map(
        self, prompt: str | Callable[[Any], Any] = "", data: Any = None, **about: Unpack[MapOptions]
    ) -> Mapped:
        """Send a prompt for each row of `data` and return the answers in the order of the rows.

        After a second, a notebook shows the progress in the cell: rows, speed, time left, failures.
        The answers have no index. As a column of another table, use ``frame()["answer"]``, which has
        the index of `data`.

        >>> llm.map("Which language is this? {text}", df, temperature=0).frame()

        Args:
            prompt: A template with references to the columns of a row, to the row itself (``{item}``)
                and to its label (``{index}``); or a function that returns the prompt of a row, None
                for a row that is not sent.
            data: A list, a dict, an iterator, a Series, a DataFrame (pandas, polars and others), or a
                data set of Hugging Face.
            about: The options of a map, see `MapSettings`: save, retry_failed, workers, rate, on_error,
                sample, names, on; and those of a call, as for `generate`, without chat.

        Raises:
            PromptError: A name in the template does not exist; nothing was sent.
            OptionError: An option or the data is invalid.
            WorkersFailed: The workers of `on` died, or cannot load the model.
            Interrupted: You stopped it. The exception has the result so far as `mapped`, and the same
                call goes on from there.
        """
        with self.start_map(prompt, data, **about) as run:
            return run.result()

    @held_back()
    def start_map(
        self, prompt: str | Callable[[Any], Any] = "", data: Any = None, **about: Unpack[MapOptions]
    ) -> MapRun:
        """Check a map and return it before anything is sent; it has the arguments of `map`.

        >>> run = llm.start_map("Which language is this? {text}", df)
        >>> with run:
        ...     for _ in run.updates():
        ...         print(run.progress.done)
        """
        return self._map_run(prompt, data, about, is_lazy=False)

    def imap(
        self, prompt: str | Callable[[Any], Any] = "", data: Any = None, **about: Unpack[MapOptions]
    ) -> Iterator[Reply | None]:
        """Do what `map` does, and yield each answer when those before it are there.

        Rows are read only a little ahead of the loop, so `data` may be endless. Leaving the loop early
        stops the model. A row that failed yields None; ``on_error="stop"`` raises its error.
        """
        return self._map_run(prompt, data, about, is_lazy=True).replies()

    async def amap(
        self, prompt: str | Callable[[Any], Any] = "", data: Any = None, **about: Unpack[MapOptions]
    ) -> Mapped:
        """Do what `map` does, from async code. Cancelling the task stops the model."""
        await self._loads.wait_async()
        run = self._map_run(prompt, data, about, is_lazy=False)
        view = self.progress_view(run)
        with view or contextlib.nullcontext():
            async with contextlib.aclosing(run.aupdates()) as updates:
                async for _ in updates:
                    if view is not None:
                        view.draw()
        return run.result()

    def _map_run(self, prompt: object, data: Any, about: MapOptions, *, is_lazy: bool) -> MapRun:
        from llm_magic.session.map.plan import make_plan
        from llm_magic.session.map.run import MapRun

        self._loads.wait()
        plan = make_plan(prompt, data, about, self._prepare, self._unfinished, self.settings)
        run = MapRun(
            plan, self._manager, self._loop, self._recorder.usage, self._notify, is_lazy=is_lazy
        )
        self._maps = (*(ref for ref in self._maps if ref() is not None), weakref.ref(run))
        run.progress_view = self.progress_view
        if not is_lazy:
            self._last_mapped = run.mapped
        return run

    @held_back()
    def dry_run(self, prompt: Prompt | Request = "", **about: Unpack[AskOptions]) -> DryRun:
        """Return the exact messages and their token count; generates nothing.

        Without a model the tokens are not counted.
        """
        requested = prompt if isinstance(prompt, Request) else request(prompt, about)
        self._loads.wait()
        try:
            prepared = self._prepare(requested, peek=True)
        except ModelNotLoaded:
            if requested.model is not None:
                raise
            requested = self._with_key(requested, peek=True)
            backend = self.settings.backend
            return dry_run_without_model(requested, self.generation.values, self.chats, backend)
        return self._loop.run(context_window.dry_run(self._manager, prepared))

    @property
    def last(self) -> Reply | None:
        """The last answer, complete or incomplete; None before the first one."""
        return self._recorder.last

    @property
    def last_mapped(self) -> Mapped | None:
        """The answers of the last map, also of one that runs; None before the first one.

        They keep the data of the map in memory until the next map.
        """
        return self._last_mapped

    def usage(self, *, reset: bool = False) -> SessionUsage:
        """Return the answers so far, by model: their number, tokens, seconds and cost.

        Args:
            reset: Start again from 0 afterwards.
        """
        return self._recorder.usage.sums(reset=reset)

    @property
    def answering(self) -> tuple[Response, ...]:
        """The responses that are being generated now."""
        return self._recorder.running

    @held_back()
    def wait(
        self,
        responses: Iterable[Job],
        on_wait: OnWait | None = None,
        deadline: float = math.inf,
    ) -> None:
        """Wait until responses have ended, however; an interrupt only ends the waiting.

        So does the `deadline` (`time.monotonic`), without an error.
        """
        waited_for = tuple(responses)
        try:
            for response in waited_for:
                for _ in response.until_end(lambda: CHECK_S, deadline):
                    if on_wait is not None:
                        on_wait()
        except KeyboardInterrupt:
            raise stopped_waiting(waited_for) from None

    def interrupt(self) -> None:
        """Stop what cells are waiting for, as ■ does, and what panels asked; from any thread.

        Jobs that have a cell of their own go on: `jobs.stop` stops them.
        """
        self._loop.interrupt()
        for job in self.jobs.running:
            if job.view is None:
                job.cancel()

    def interrupt_threads(self, since: float) -> int:
        """Stop what other threads wait for since a time (`time.monotonic`), as ■ does.

        Until `resume_threads`, it also stops what they start: an executor starts what is queued. Returns
        how many answers and loads were running. Signal handlers may call it.
        """
        return self._loop.interrupt_threads(since)

    def resume_threads(self) -> None:
        """End the effect of `interrupt_threads`, when the next cell starts."""
        self._loop.resume_threads()

    # -- listeners ----------------------------------------------------------------------------

    def when_closed(self, closed: Callable[[], None]) -> Callable[[], None]:
        """Call `closed` once, when the session is closed; returns a function that undoes this."""
        return _registered(self._closing, closed)

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` after every change, from any thread; returns a function that ends that.

        It must return at once: it is called for every token.
        """
        return _registered(self._listeners, changed)

    def _notify(self) -> None:
        for changed in tuple(self._listeners):
            changed()

    # -- conversations and the end ------------------------------------------------------------

    @held_back()
    def chat_tokens(self, name: str) -> int | None:
        """Return what a conversation takes of the active model's context; None where unknown.

        It sends no request, and waits for no answer that is being generated.
        """
        chat = self.chats.get(name)
        status = self.status()
        if status.active_model is None:
            return None
        loaded_model = self._manager.find(status.active_model)
        idle = status.status == "Ready" and not self.answering
        messages = self.chats.messages(name, self.generation.system)
        if loaded_model.backend.capabilities.local_token_counts and idle and messages:
            return self._loop.run(context_window.count_tokens(loaded_model, messages))
        return context_window.reported_tokens(chat, loaded_model.name)

    def reset(self, chat: str | None = None, *, stale: bool = False) -> list[str]:
        """Delete a chat, or all chats, or only their stale turns, and return the names of the chats."""
        return self.chats.reset(chat, stale=stale)

    def close(self) -> None:
        """Unload all models and end the threads. You can use the session again afterwards."""
        closing = tuple(self._closing)
        self._closing.clear()
        for closed in closing:
            closed()
        if "_manager" in self.__dict__:
            self._loop.cancel_all()
            self.jobs.close()
            with contextlib.suppress(KeyboardInterrupt):
                self._loop.run(self._manager.aclose())
            del self.__dict__["_manager"]
        self.__dict__.pop("generation", None)
        self.is_configured = False
        self._loads.pending = None
        self._loop.close()

    def __repr__(self) -> str:
        status = self.status()
        return (
            f"<Session: {status.status}, {visible_line(status.active_model or 'nothing loaded')}>"
        )


def _texts(continuations: Sequence[str]) -> list[str]:
    """Return the texts to score; raises `OptionError` for what is no list of texts."""
    if isinstance(continuations, str):
        raise OptionError(
            'The continuations are a list of texts: llm.score(PROMPT, ["Yes", "No"]).'
        )
    texts = list(continuations)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise OptionError("llm.score needs a list of texts that are not empty.")
    return [replace_surrogates(text) for text in texts]


def _registered(
    callbacks: list[Callable[[], None]], callback: Callable[[], None]
) -> Callable[[], None]:
    """Add a callback; returns a function that removes it."""
    callbacks.append(callback)

    def remove() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return remove


def _close_all() -> None:
    """Close every session when the program ends; daemon threads do not report what that stops."""
    report = threading.excepthook
    stops = GenerationStopped | Interrupted | asyncio.CancelledError

    def report_others(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, stops):
            report(failed)

    threading.excepthook = report_others
    for session in list(_sessions):
        session.close()


@functools.cache
def kernel_session() -> Session:
    """Return the one session of this process, which the magics and ``llm`` share."""
    return Session()
