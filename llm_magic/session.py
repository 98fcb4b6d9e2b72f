"""The session of a kernel: what is loaded, how it generates, and the doors to use it.

Magics, panel and Python code all come through here. Sync and async are two doors to one core, an
async generator of chunks on the loop thread; there is no second code path.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Unpack

from llm_magic.answers import Answers, chunks, filled
from llm_magic.calls import (
    AskOptions,
    Call,
    Draft,
    DryRun,
    Prompt,
    Request,
    definite,
    request,
)
from llm_magic.chats import Chats
from llm_magic.jobs import Job
from llm_magic.keys import Keys
from llm_magic.loads import Loads, Naming, Tick
from llm_magic.loop import LoopThread
from llm_magic.places import place
from llm_magic.types import Chunk, Progress, Reply, Unloaded
from llm_magic.watch import Watchers

if TYPE_CHECKING:
    from llm_magic.backends.base import Backend
    from llm_magic.config import (
        GenerationConfig,
        LoadConfig,
        LoadOptions,
        Settings,
    )
    from llm_magic.manager import BackendManager, LoadResult, Status
    from llm_magic.options import Config, Options
    from llm_magic.types import ModelInfo


class Session:
    """One notebook's relation to its language models; every method may be called from any cell."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        create: Callable[[str], Backend] | None = None,
    ) -> None:
        """`create` makes the backend of a name; the ones of this package if left away."""
        self._given_settings = settings
        self._create = create
        self._loop = LoopThread()
        self._chats = Chats()
        self._keys = Keys()
        self._watchers = Watchers()
        self._jobs = itertools.count(1)
        self._running: list[Job] = []
        self._answers = Answers(self._chats, self._watchers.tell)
        self._closing: list[Callable[[], None]] = []
        self._loads = Loads(self._loop, lambda: self._manager)
        self._seen: list[ModelInfo] = []

    # -- settings -----------------------------------------------------------------------------

    @functools.cached_property
    def options(self) -> Options:
        """The settings, read at first use, and what was changed since."""
        from llm_magic.options import Options

        return Options(self._given_settings, self._watchers.tell)

    @property
    def settings(self) -> Settings:
        """The settings of the environment and ``.env``."""
        return self.options.settings

    @property
    def config(self) -> Config:
        """The generation settings as attributes: ``llm.config.temperature = 0.2``."""
        from llm_magic.options import Config

        return Config(self.options)

    def configure(self, **changes: Any) -> GenerationConfig:
        """Change generation settings for later calls; all of them, or none if one is wrong."""
        return self.options.change(**changes)

    @functools.cached_property
    def _manager(self) -> BackendManager:
        from llm_magic import backends
        from llm_magic.manager import BackendManager

        def create(name: str) -> Backend:
            return backends.create(name, self.settings, self._keys)

        return BackendManager(self._create or create, self._watchers.tell)

    # -- models -------------------------------------------------------------------------------

    def load(
        self,
        model: str | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        **options: Unpack[LoadOptions],
    ) -> ModelInfo:
        """Load a model and make it the active one; returns when it is ready."""
        return self.load_and_tell(model, name=name, keep=keep, **options).info

    def load_and_tell(
        self,
        model: str | None = None,
        *,
        name: str | None = None,
        keep: bool = False,
        tick: Tick | None = None,
        **options: Unpack[LoadOptions],
    ) -> LoadResult:
        """Load a model and return also what had to go for it.

        `tick` is called about ten times a second meanwhile, to show `status().progress`.
        """
        config, wanted = self._prepared(model, options)
        return self._loads.load(wanted, config, Naming(name, keep), tick)

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
        config, wanted = self._prepared(model, options)
        return self._loads.begin(wanted, config, Naming(name, keep))

    def stop_loading(self) -> None:
        """Stop a load: one that was begun with `load_later`, or that a cell is waiting for."""
        if not self._loads.stop():
            self._loop.interrupt()

    def _prepared(self, model: str | None, options: LoadOptions) -> tuple[LoadConfig, str | None]:
        """Return the options and the model of a load, and see that its key is there."""
        from llm_magic.specs import refuse_foreign

        settings = self.settings
        config = settings.loading().replace(**options)
        refuse_foreign(config, config.backend)
        where = place(config, settings)
        if where is not None:
            # Here, because only the caller's thread can ask.
            self._keys.obtain(config, where, settings)
        # The default model is meant for the default backend.
        default = settings.model if config.backend == settings.backend else None
        return config, model or default

    def unload(self, name: str | None = None) -> Unloaded:
        """Free a model, the active one if none is named, and measure what came back."""
        self._loads.settle()
        return self._loop.run(self._manager.unload(name))

    def unload_all(self) -> list[Unloaded]:
        """Free every model."""
        self._loads.settle()
        return self._loop.run(self._manager.unload_all())

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
        self._seen = self._loop.run(self._listed(about))
        return list(self._seen)

    def models_later(
        self, **about: Unpack[LoadOptions]
    ) -> concurrent.futures.Future[list[ModelInfo]]:
        """Ask for what a backend could load, and return at once."""
        return self._loop.submit(self._listed(about))

    def _listed(self, about: LoadOptions) -> Coroutine[Any, Any, list[ModelInfo]]:
        config, _ = self._prepared(None, about)
        return self._manager.models(config)

    def ready(self, request: Request) -> ModelInfo:
        """Return the model that will answer, after a load that was begun has ended."""
        self._loads.settle()
        return self._manager.find(request.model).info

    def known_models(self) -> list[ModelInfo]:
        """Return what the last `models()` found and what is loaded; asks nobody."""
        return [*self._seen, *self.status().models]

    @property
    def progress(self) -> Progress | None:
        """How far the running load is."""
        return self._manager.progress

    def status(self) -> Status:
        """Return the state of everything at this moment."""
        return self._manager.snapshot(self.options.current, self.settings.backend)

    # -- generation ---------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **about: Unpack[AskOptions]) -> Reply:
        """Answer a prompt; blocks until the answer is whole, and can be interrupted."""
        return self.answer(request(prompt, about))

    def answer(
        self,
        request: Request,
        take: Callable[[Chunk], None] | None = None,
        tick: Tick | None = None,
    ) -> Reply:
        """Answer a request, handing every chunk to `take` on this thread.

        Whatever ends it early, the text so far stays in `last`; an interrupt raises
        `Interrupted`, which carries it too.
        """
        self._loads.settle(tick)
        call = self._call(request)
        draft = self._answers.draft(call)

        with self._answers.kept(draft):
            if take is None:
                self._loop.drain(filled(draft, self._chunks(draft)), lambda _chunk: None, tick)
            else:
                # Kept as it is shown: what an interrupt leaves is what was seen.
                self._loop.drain(self._chunks(draft), _both(draft.add, take), tick)
        return self._answers.keep(draft)

    def stream(self, prompt: Prompt, **about: Unpack[AskOptions]) -> Iterator[Chunk]:
        """Yield the answer as it is produced; leaving the loop early stops the model."""
        self._loads.settle()
        call = self._call(request(prompt, about))
        return self._stream(call)

    def _stream(self, call: Call) -> Iterator[Chunk]:
        draft = self._answers.draft(call)
        with self._answers.kept(draft):
            for chunk in self._loop.iterate(self._chunks(draft)):
                draft.add(chunk)
                yield chunk
        self._answers.keep(draft)

    async def agenerate(self, prompt: Prompt, **about: Unpack[AskOptions]) -> Reply:
        """Answer a prompt in an async cell or program; cancelling the task stops the model."""
        await self._loads.asettle()
        call = self._call(request(prompt, about))
        draft = self._answers.draft(call)
        with self._answers.kept(draft):
            filling = self._loop.relay(filled(draft, self._chunks(draft)))
            async with contextlib.aclosing(filling) as nothing:
                async for _chunk in nothing:
                    pass
        return self._answers.keep(draft)

    async def astream(
        self, prompt: Prompt, **about: Unpack[AskOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer in an async cell or program; leaving the loop early stops the model."""
        await self._loads.asettle()
        call = self._call(request(prompt, about))
        draft = self._answers.draft(call)
        with self._answers.kept(draft):
            async with contextlib.aclosing(self._loop.relay(self._chunks(draft))) as stream:
                async for chunk in stream:
                    draft.add(chunk)
                    yield chunk
        self._answers.keep(draft)

    def begin(self, request: Request) -> Job:
        """Begin to answer a request and return at once; raises what is wrong with it."""
        call = self._call(request)
        job = Job(next(self._jobs), self._answers.draft(call))
        job.future = self._loop.submit(self._work(job))
        self._running.append(job)
        job.future.add_done_callback(lambda _future: self._ended(job))
        return job

    def _ended(self, job: Job) -> None:
        self._running.remove(job)
        self._watchers.tell()

    async def _work(self, job: Job) -> Reply:
        try:
            job.starts()
            with self._answers.kept(job.draft):
                async for chunk in filled(job.draft, self._chunks(job.draft), all_of_it=True):
                    job.notice = chunk.notice
            job.reply = self._answers.keep(job.draft)
        except asyncio.CancelledError:
            job.reply = job.draft.reply("cancelled")
            raise
        except Exception as error:
            job.reply, job.error = job.draft.reply("truncated"), error
            raise
        return job.reply

    @property
    def last(self) -> Reply | None:
        """The last answer, whole or not."""
        return self._answers.last

    @property
    def running(self) -> tuple[Job, ...]:
        """What was begun and has not ended."""
        return tuple(self._running)

    @property
    def answering(self) -> tuple[Draft, ...]:
        """The answers that are being produced now, in whatever way they were asked for."""
        return self._answers.drafts

    def interrupt(self) -> None:
        """Stop what cells are waiting for, as ■ does, and what was begun; from any thread."""
        self._loop.interrupt()
        for job in tuple(self._running):
            job.stop()

    def when_closed(self, closed: Callable[[], None]) -> Callable[[], None]:
        """Call `closed` once, when the session is closed; returns what takes that back."""
        self._closing.append(closed)

        def remove() -> None:
            if closed in self._closing:
                self._closing.remove(closed)

        return remove

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` after every change, from any thread; returns what ends that.

        It must return at once: it is told of every token.
        """
        return self._watchers.add(changed)

    def dry_run(self, request: Request) -> DryRun:
        """Return the exact messages and their token count; calls nothing."""
        self._loads.settle()
        call = self._call(request)
        name = call.resident.name
        count = self._loop.run(self._manager.count(name, call.messages))
        backend = call.resident.config.backend
        return DryRun(name, backend, call.messages, call.config, count)

    def _call(self, request: Request) -> Call:
        """Check a request; raises before anything is sent."""
        return definite(
            request, self._manager.find(request.model), self.options.current, self._chats
        )

    def _chunks(self, draft: Draft) -> AsyncGenerator[Chunk, None]:
        return chunks(self._manager, draft)

    # -- conversations and the end ------------------------------------------------------------

    @property
    def chats(self) -> Chats:
        """The named conversations."""
        return self._chats

    def reset(self, chat: str | None = None) -> list[str]:
        """Forget a conversation, or all of them; returns their names."""
        return self._chats.reset(chat)

    def close(self) -> None:
        """Free the models and end the threads; the session can be used again afterwards."""
        closing, self._closing = self._closing, []
        for closed in closing:
            closed()
        if "_manager" in self.__dict__:
            self._loop.cancel_all()
            with contextlib.suppress(KeyboardInterrupt):
                self._loop.run(self._manager.aclose())
            del self.__dict__["_manager"]
        self.__dict__.pop("options", None)
        self._loads.forget()
        self._loop.close()

    def __repr__(self) -> str:
        status = self.status()
        return f"<Session: {status.status}, {status.active_model or 'nothing loaded'}>"


def _both(
    first: Callable[[Chunk], None], second: Callable[[Chunk], None]
) -> Callable[[Chunk], None]:
    def take(chunk: Chunk) -> None:
        first(chunk)
        second(chunk)

    return take


@functools.cache
def kernel_session() -> Session:
    """Return the one session of this process, which the magics and ``llm`` share."""
    return Session()
