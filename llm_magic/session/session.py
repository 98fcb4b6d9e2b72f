"""The session of a kernel: what is loaded, how it generates, and the doors to use it.

Magics, panel and Python code all come through here; how they ask is in `doors`.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Unpack, cast

from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.server_address import resolve_address
from llm_magic.session import context_window
from llm_magic.session.chats import Chats
from llm_magic.session.doors import Doors
from llm_magic.session.interrupts import held_back
from llm_magic.session.loading import Naming, Tick
from llm_magic.text.terminal import visible_line
from llm_magic.types import Progress, Unloaded

if TYPE_CHECKING:
    from llm_magic.backends.manager import LoadResult, Status
    from llm_magic.backends.registry import LoadOptions
    from llm_magic.config.settings import GenerationConfig, LoadConfig
    from llm_magic.types import ModelInfo


class Session(Doors):
    """One notebook's relation to its language models: which are loaded, and how they answer."""

    # -- settings -----------------------------------------------------------------------------

    @property
    def keys(self) -> ApiKeys:
        """The keys of servers that this session was given."""
        return self._keys

    def configure(self, **changes: Any) -> GenerationConfig:
        """Change generation settings for later calls; all of them, or none if one is wrong."""
        return self.generation.update(**changes)

    # -- models -------------------------------------------------------------------------------

    def load(
        self,
        model: str | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        **options: Unpack[LoadOptions],
    ) -> ModelInfo:
        """Load a model and make it the active one; returns when it is ready.

        `model` is a Hugging Face id, a folder or a .gguf file, or what a server calls it; `name` is
        what it is called afterwards; `keep` leaves the others loaded. The options are those of
        ``%llm_load?``: backend, base_url, key_env, pull, idle_timeout, concurrency, device,
        quantization, dtype, revision, trust_remote_code, attn, assistant,
        special_tokens, compile.

        >>> llm.load("Qwen/Qwen2.5-7B-Instruct", quantization="4bit")
        """
        return self.load_and_tell(model, name=name, keep=keep, **options).info

    @held_back()
    def load_and_tell(
        self,
        model: str | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        tick: Tick | None = None,
        began: float | None = None,
        **options: Unpack[LoadOptions],
    ) -> LoadResult:
        """Load a model and return also what had to go for it.

        `tick` is called about ten times a second meanwhile, to show `status().progress`. The time of
        the load counts from `began` (`time.perf_counter`), or from now.
        """
        naming = Naming(name, keep, time.perf_counter() if began is None else began)
        config, wanted = self._prepared(model, options)
        return self._loads.load(wanted, config, naming, tick)

    @held_back()
    def load_later(
        self,
        model: str | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        **options: Unpack[LoadOptions],
    ) -> concurrent.futures.Future[LoadResult]:
        """Begin to load a model and return at once; the next call waits for it.

        The future tells what came of it; cancelling that only ends the looking on.
        """
        naming = Naming(name, keep)
        config, wanted = self._prepared(model, options)
        return self._loads.begin(wanted, config, naming)

    def stop_loading(self) -> None:
        """Stop a load: one that was begun with `load_later`, or that a cell is waiting for."""
        if not self._loads.stop():
            self._loop.interrupt()

    def _prepared(self, model: str | None, options: LoadOptions) -> tuple[LoadConfig, str | None]:
        """Return the options and the model of a load, and see that its key is there."""
        from llm_magic.backends import registry
        from llm_magic.config.settings import ServerLoadConfig

        settings = self.settings
        config = registry.load_config(settings, options)
        if isinstance(config, ServerLoadConfig):
            # Here, because only the caller's thread can ask.
            self._keys.obtain(config, resolve_address(config, settings), settings)
        # The default model is meant for the default backend.
        default = settings.model if config.backend == settings.backend else None
        return config, model or default

    @held_back()
    def unload(self, name: str | None = None) -> Unloaded:
        """Free a model, the active one if none is named, and measure what came back."""
        self._loads.settle()
        return self._loop.run(self._manager.unload(name))

    @held_back()
    def unload_all(self) -> list[Unloaded]:
        """Free every model."""
        self._loads.settle()
        return self._loop.run(self._manager.unload_all())

    @held_back()
    def models(
        self,
        backend: str | None = None,
        *,
        base_url: str | None = None,
        key_env: str | None = None,
    ) -> list[ModelInfo]:
        """Return what a backend could load; the default backend if none is named.

        `base_url` and `key_env` name a server; else it is the one in use, or that of the settings.
        """
        about: LoadOptions = {"backend": backend or self.settings.backend}
        if base_url is not None:
            about["base_url"] = base_url
        if key_env is not None:
            about["key_env"] = key_env
        return self._loop.run(self._listed(about))

    def models_later(
        self, **about: Unpack[LoadOptions]
    ) -> concurrent.futures.Future[list[ModelInfo]]:
        """Ask for what a backend could load, and return at once."""
        return self._loop.submit(self._listed(about))

    def _listed(self, about: LoadOptions) -> Coroutine[Any, Any, list[ModelInfo]]:
        from llm_magic.config.settings import ServerLoadConfig

        used = self.used(about.get("backend", self.settings.backend))
        if isinstance(used, ServerLoadConfig) and "base_url" not in about:
            known = {name: getattr(used, name) for name in ServerLoadConfig.model_fields}
            about = cast("LoadOptions", {n: v for n, v in known.items() if v is not None} | about)
        config, _ = self._prepared(None, about)
        return self._manager.models(config)

    def known_models(self, backend: str, base_url: str | None = None) -> list[ModelInfo]:
        """Return what a backend could load, as far as this process knows; asks no server.

        Quick enough for a key press: names on this disk, or what servers listed when they were last
        asked, which every load and every `models()` does.
        """
        from llm_magic.backends import registry

        here = registry.local_model_names(self.settings) if backend == "local" else []
        return [*here, *self._manager.known(backend, base_url)]

    def used(self, backend: str) -> LoadConfig | None:
        """Return what the latest model of a backend was loaded with."""
        return self._manager.used(backend)

    @property
    def loads_later(self) -> bool:
        """Whether a load goes on that was begun with `load_later`; a cell waits for any other."""
        return self._loads.is_begun

    @property
    def loading(self) -> str | None:
        """The name of the model that is being loaded."""
        return self._manager.loading

    @property
    def progress(self) -> Progress | None:
        """How far the running load is."""
        return self._manager.progress

    def status(self) -> Status:
        """Return the state of everything at this moment."""
        return self._manager.snapshot(self.generation.config, self.settings.backend)

    # -- conversations and the end ------------------------------------------------------------

    @property
    def chats(self) -> Chats:
        """The named conversations."""
        return self._chats

    @held_back()
    def chat_tokens(self, name: str) -> int | None:
        """Return what a conversation takes of the active model's context; None where unknown.

        It asks no server, and waits for no answer that is being written.
        """
        chat = self._chats.get(name)
        status = self.status()
        if status.active_model is None:
            return None
        loaded_model = self._manager.find(status.active_model)
        idle = status.status == "Ready" and not self.answering
        messages = self._chats.messages(name)
        if loaded_model.backend.capabilities.local_token_counts and idle and messages:
            return self._loop.run(context_window.counted(loaded_model, messages))
        return context_window.told(chat, loaded_model.name)

    def reset(self, chat: str | None = None, *, stale: bool = False) -> list[str]:
        """Forget a conversation, or all of them, or only stale turns; returns their names."""
        return self._chats.reset(chat, stale=stale)

    def close(self) -> None:
        """Free the models and end the threads; the session can be used again afterwards."""
        closing, self._closing = self._closing, []
        for closed in closing:
            closed()
        if "_manager" in self.__dict__:
            self._loop.cancel_all()
            self._jobs.close()
            with contextlib.suppress(KeyboardInterrupt):
                self._loop.run(self._manager.aclose())
            del self.__dict__["_manager"]
        self.__dict__.pop("generation", None)
        self._loads.forget()
        self._loop.close()

    def __repr__(self) -> str:
        status = self.status()
        return (
            f"<Session: {status.status}, {visible_line(status.active_model or 'nothing loaded')}>"
        )


@functools.cache
def kernel_session() -> Session:
    """Return the one session of this process, which the magics and ``llm`` share."""
    session = Session()
    # Plain programs have no extension that could be unloaded.
    atexit.register(session.close)
    return session
