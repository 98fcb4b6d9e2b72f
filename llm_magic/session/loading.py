"""The loads of a session: one at a time, waited for now or later."""

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

Tick = Callable[[], None]


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
    """Brings models into memory through the loop thread, and knows the load that was begun."""

    def __init__(self, loop: LoopThread, manager: Callable[[], BackendManager]) -> None:
        self._loop = loop
        self._manager = manager
        self._pending: asyncio.Task[LoadResult] | None = None

    def load(
        self, model: str | None, config: LoadConfig, naming: Naming, tick: Tick | None
    ) -> LoadResult:
        """Load a model and wait for it; an interrupt stops the load."""
        self._forget_ended()
        load = naming.load(self._manager(), model, config)
        try:
            return self._loop.run(load, tick)
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped loading {model or 'the default model'}.") from None

    def begin(
        self, model: str | None, config: LoadConfig, naming: Naming
    ) -> concurrent.futures.Future[LoadResult]:
        """Begin to load a model and return at once; the future is only there to be looked at."""
        manager = self._manager()

        async def begin() -> asyncio.Task[LoadResult]:
            manager.check_not_loading()
            load = naming.load(manager, model, config)
            task = asyncio.ensure_future(load)
            task.add_done_callback(_release)
            # One step, so that the next load finds this one under way.
            await asyncio.sleep(0)
            return task

        pending = self._pending = self._loop.run(begin())
        return self._loop.submit(_outcome(pending))

    @property
    def is_begun(self) -> bool:
        """Whether a load that was begun goes on."""
        return self._pending is not None and not self._pending.done()

    def stop(self) -> bool:
        """Stop a load that was begun; returns whether there is one."""
        pending = self._pending
        if pending is None or not self.is_begun:
            return False
        # Only once: a second time would break off the waiting for it to let go.
        self._loop.loop.call_soon_threadsafe(lambda: pending.cancelling() or pending.cancel())
        return True

    def wait(self, tick: Tick | None = None) -> None:
        """Wait for a load that was begun; an interrupt only ends the waiting.

        One that was stopped is none: what was loaded before answers.
        """
        if self._pending is None:
            return
        try:
            self._loop.run(_ended(self._pending), tick)
        except KeyboardInterrupt:
            raise Interrupted("Stopped while waiting for the model; it goes on loading.") from None
        finally:
            self._forget_ended()

    async def wait_async(self) -> None:
        """Wait for a load that was begun, in a coroutine of another loop."""
        if self._pending is not None:
            try:
                await self._loop.arun(_ended(self._pending))
            finally:
                self._forget_ended()

    def forget(self) -> None:
        """Wait for nothing any more: the loop is being closed."""
        self._pending = None

    def _forget_ended(self) -> None:
        if self._pending is not None and self._pending.done():
            self._pending = None


def _release(load: asyncio.Task[LoadResult]) -> None:
    """Retrieve the error of a load: asyncio logs one that nothing retrieves before the next load."""
    if not load.cancelled() and (error := load.exception()) is not None:
        release_frames(error)


async def _ended(load: asyncio.Task[LoadResult]) -> None:
    """Wait for the end of a load without stopping it when the waiting is stopped; raises its error."""
    await asyncio.wait({load})
    if not load.cancelled():
        load.result()


async def _outcome(load: asyncio.Task[LoadResult]) -> LoadResult:
    """Wait for a load without stopping it when the waiting is stopped."""
    return await asyncio.shield(load)
