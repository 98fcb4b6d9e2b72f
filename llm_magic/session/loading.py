"""The loads of a session: one at a time, in the foreground or in the background."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from llm_magic.errors import Interrupted, LoadInProgress, release_frames
from llm_magic.session.event_loop import LoopThread

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager, LoadedModel, LoadResult
    from llm_magic.config.settings import LoadConfig

OnWait = Callable[[], None]


class LoadRequest(NamedTuple):
    """A model to load: its options, what it is called then, and whether the others stay.

    The time of the load counts from `began` (`time.perf_counter`).
    """

    model: str | None
    config: LoadConfig
    name: str | None
    keep: bool
    began: float

    async def load(self, manager: BackendManager) -> LoadResult:
        """Load the model."""
        return await manager.load(
            self.model, self.config, name=self.name, keep=self.keep, began=self.began
        )


class Loads:
    """Loads models on the loop thread, one at a time, and waits for a load that runs.

    `pending` is the load that was started last with `start`, until something has waited for it or
    its result was shown. `name` is what was requested then.
    """

    def __init__(self, loop: LoopThread, manager: Callable[[], BackendManager]) -> None:
        self._loop = loop
        self._manager = manager
        self.pending: asyncio.Task[LoadResult] | None = None
        self.name = ""

    def load(self, request: LoadRequest, on_wait: OnWait | None) -> LoadResult:
        """Load a model and wait for it; an interrupt stops the load."""
        self.discard_finished()
        results: list[LoadResult] = []
        before = self._manager().loaded_models

        async def load() -> LoadResult:
            results.append(await request.load(self._manager()))
            return results[0]

        try:
            return self._loop.run(load(), on_wait)
        except KeyboardInterrupt:
            name = request.model or "the default model"
            if results:
                raise Interrupted(f"Stopped just after {name} was loaded.") from None
            raise Interrupted(f"Stopped loading {name}.{self._lost(before)}") from None

    def _lost(self, before: tuple[LoadedModel, ...]) -> str:
        """Return the sentences about the models that a stopped load has unloaded, or an empty string."""
        from llm_magic.backends.manager import load_again, unloaded_for_it

        left = self._manager().loaded_models
        if not (lost := [one for one in before if one not in left]):
            return ""
        none_left = "" if left else " No model is loaded now."
        return f" {unloaded_for_it(lost)}{none_left} {load_again(lost[-1])}"

    def start(self, request: LoadRequest) -> concurrent.futures.Future[LoadResult]:
        """Start to load a model and return at once; cancelling the future does not stop the load."""
        manager = self._manager()

        async def start() -> asyncio.Task[LoadResult]:
            manager.check_not_loading()
            if self.pending is not None and not (self.pending.done() or self.pending.cancelling()):
                raise LoadInProgress(
                    "Another load is waiting for the end of a stopped one. Wait for it, then try again."
                )
            task = asyncio.ensure_future(request.load(manager))
            task.add_done_callback(_release)
            # One step, so that the next load finds this one under way.
            await asyncio.sleep(0)
            return task

        pending = self.pending = self._loop.run(start())
        self.name = request.model or "the default model"
        return self._loop.submit(_outcome(pending))

    def stop(self) -> bool:
        """Stop a load that was started with `start`; returns whether one ran."""
        pending = self.pending
        if pending is None or pending.done():
            return False
        # Only once: a second cancellation would interrupt its clean-up.
        self._loop.loop.call_soon_threadsafe(lambda: pending.cancelling() or pending.cancel())
        return True

    def wait(self, on_wait: OnWait | None = None, deadline: float = math.inf) -> None:
        """Wait for a load that was started with `start`; an interrupt or the `deadline` only ends the wait.

        A load that was stopped raises nothing: the model that was loaded before answers.
        """
        pending = self.pending
        if pending is None:
            return
        try:
            self._loop.run(wait_for_end(pending, deadline), on_wait)
        except KeyboardInterrupt:
            message = "Stopped waiting; the model is still loading."
            if pending.done():
                message = "Stopped just after the model was loaded."
            raise Interrupted(message) from None
        finally:
            self.discard_finished()

    async def wait_async(self) -> None:
        """Wait for a load that was started with `start`, in a coroutine of another loop."""
        if self.pending is not None:
            try:
                await self._loop.arun(wait_for_end(self.pending))
            finally:
                self.discard_finished()

    @property
    def failed(self) -> str:
        """The model whose load failed, which nothing has waited for since; else an empty string."""
        pending = self.pending
        if pending is None or not pending.done() or pending.cancelled():
            return ""
        return self.name if pending.exception() is not None else ""

    def discard_finished(self) -> None:
        """Discard the load that was started with `start`, if it has ended: nothing raises its error again."""
        if self.pending is not None and self.pending.done():
            self.pending = None


def _release(load: asyncio.Task[LoadResult]) -> None:
    """Retrieve the error of a load: asyncio logs one that nothing retrieves before the next load."""
    if not load.cancelled() and (error := load.exception()) is not None:
        release_frames(error)


async def wait_for_end(load: asyncio.Task[LoadResult], deadline: float = math.inf) -> None:
    """Wait for the end of a load without stopping it when the waiting is stopped; raises its error.

    Returns at the `deadline` (`time.monotonic`).
    """
    left = max(0.0, deadline - time.monotonic())
    await asyncio.wait({load}, timeout=left if math.isfinite(left) else None)
    if load.done() and not load.cancelled():
        load.result()


async def _outcome(load: asyncio.Task[LoadResult]) -> LoadResult:
    """Wait for a load without stopping it when the waiting is stopped."""
    return await asyncio.shield(load)
