"""The loads of a session: one at a time, in the foreground or in the background."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llm_magic.errors import Interrupted, OptionError, release_frames
from llm_magic.session.event_loop import LoopThread
from llm_magic.text.surrogates import is_plain_name

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager, LoadResult
    from llm_magic.config.settings import LoadConfig

OnWait = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Naming:
    """What a model is called once it is loaded, and whether the others stay.

    `began` is when the user asked for it (`time.perf_counter`): the time of the load counts from then.
    """

    name: str | None = None
    keep: bool = False
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.name is not None and not is_plain_name(self.name):
            raise OptionError(
                f"{self.name!r} cannot name a model: it has a control character or half a character."
                " Choose another --name."
            )

    def load(
        self, manager: BackendManager, model: str | None, config: LoadConfig
    ) -> Coroutine[Any, Any, LoadResult]:
        """Return the load of `model` under this name."""
        return manager.load(model, config, name=self.name, keep=self.keep, began=self.began)


class Loads:
    """Loads models on the loop thread, one at a time, and waits for a load that runs."""

    def __init__(self, loop: LoopThread, manager: Callable[[], BackendManager]) -> None:
        self._loop = loop
        self._manager = manager
        self._pending: asyncio.Task[LoadResult] | None = None

    def load(
        self, model: str | None, config: LoadConfig, naming: Naming, on_wait: OnWait | None
    ) -> LoadResult:
        """Load a model and wait for it; an interrupt stops the load."""
        self._discard_finished()
        load = naming.load(self._manager(), model, config)
        try:
            return self._loop.run(load, on_wait)
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped loading {model or 'the default model'}.") from None

    def start(
        self, model: str | None, config: LoadConfig, naming: Naming
    ) -> concurrent.futures.Future[LoadResult]:
        """Start to load a model and return at once; cancelling the future does not stop the load."""
        manager = self._manager()

        async def start() -> asyncio.Task[LoadResult]:
            manager.check_not_loading()
            load = naming.load(manager, model, config)
            task = asyncio.ensure_future(load)
            task.add_done_callback(_release)
            # One step, so that the next load finds this one under way.
            await asyncio.sleep(0)
            return task

        pending = self._pending = self._loop.run(start())
        return self._loop.submit(_outcome(pending))

    @property
    def is_running(self) -> bool:
        """Whether a load runs that was started with `start`."""
        return self._pending is not None and not self._pending.done()

    def stop(self) -> bool:
        """Stop a load that was started with `start`; returns whether one ran."""
        pending = self._pending
        if pending is None or not self.is_running:
            return False
        # Only once: a second cancellation would interrupt its clean-up.
        self._loop.loop.call_soon_threadsafe(lambda: pending.cancelling() or pending.cancel())
        return True

    def wait(self, on_wait: OnWait | None = None) -> None:
        """Wait for a load that was started with `start`; an interrupt only ends the wait.

        A load that was stopped raises nothing: the model that was loaded before answers.
        """
        if self._pending is None:
            return
        try:
            self._loop.run(_wait_for_end(self._pending), on_wait)
        except KeyboardInterrupt:
            raise Interrupted("Stopped while waiting for the model; it goes on loading.") from None
        finally:
            self._discard_finished()

    async def wait_async(self) -> None:
        """Wait for a load that was started with `start`, in a coroutine of another loop."""
        if self._pending is not None:
            try:
                await self._loop.arun(_wait_for_end(self._pending))
            finally:
                self._discard_finished()

    def discard(self) -> None:
        """Wait for no load any more: the loop is being closed."""
        self._pending = None

    def _discard_finished(self) -> None:
        if self._pending is not None and self._pending.done():
            self._pending = None


def _release(load: asyncio.Task[LoadResult]) -> None:
    """Retrieve the error of a load: asyncio logs one that nothing retrieves before the next load."""
    if not load.cancelled() and (error := load.exception()) is not None:
        release_frames(error)


async def _wait_for_end(load: asyncio.Task[LoadResult]) -> None:
    """Wait for the end of a load without stopping it when the waiting is stopped; raises its error."""
    await asyncio.wait({load})
    if not load.cancelled():
        load.result()


async def _outcome(load: asyncio.Task[LoadResult]) -> LoadResult:
    """Wait for a load without stopping it when the waiting is stopped."""
    return await asyncio.shield(load)
