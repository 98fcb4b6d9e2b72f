"""One event loop on one daemon thread, and the doors through which other threads use it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from llm_magic.errors import Interrupted
from llm_magic.session.interrupts import Inbox, interrupts_to, translated
from llm_magic.session.thread_bridge import Pump

T = TypeVar("T")


class LoopThread:
    """Owns the loop that all backends live on; started on first use, closed explicitly."""

    def __init__(self, name: str = "llm_magic-loop") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pumps: list[Pump] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, started now if it was not."""
        with self._lock:
            if self._loop is None:
                # Built by hand: a new loop of our own is not touched by nest-asyncio's patches.
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name=self._name, daemon=True
                )
                self._thread.start()
            return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T], tick: Callable[[], None] | None = None) -> T:
        """Run a coroutine and wait; an interrupt cancels it and raises `KeyboardInterrupt`.

        `tick` is called on this thread about ten times a second while waiting.
        """
        result: list[T] = []

        async def once() -> AsyncGenerator[T, None]:
            yield await coroutine

        try:
            # What has ended is not undone by an interrupt that comes too late.
            self._drained(once(), result.append, tick)
        finally:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()
        return result[0]

    def drain(
        self,
        source: AsyncGenerator[T, None],
        take: Callable[[T], None],
        tick: Callable[[], None] | None = None,
        rest: Callable[[], float] | None = None,
    ) -> None:
        """Iterate `source` on the loop and hand every item to `take` on this thread.

        `tick` is called after what was there was taken, and about ten times a second where nothing
        comes. Then this thread does not wake up for `rest()` seconds: each time that it does for an
        item, it takes the GIL from whoever produces them.

        While it runs, SIGINT arrives as a message in the inbox, never as an exception in the
        middle of a line: nothing that was produced is lost, and no display is torn. One that comes
        when everything has been taken still counts: what is in a loop of calls is stopped by it.
        """
        if self._drained(source, take, tick, rest).is_interrupted():
            raise KeyboardInterrupt

    def _drained(
        self,
        source: AsyncGenerator[T, None],
        take: Callable[[T], None],
        tick: Callable[[], None] | None = None,
        rest: Callable[[], float] | None = None,
    ) -> Pump:
        inbox: Inbox = queue.SimpleQueue()
        with interrupts_to(inbox):
            pump = Pump(self.loop, source, inbox)
            with self._listed(pump):
                try:
                    for item in pump.items(tick, rest):
                        take(item)
                finally:
                    pump.stop()
        return pump

    @contextlib.contextmanager
    def _listed(self, pump: Pump) -> Iterator[None]:
        self._pumps.append(pump)
        try:
            yield
        finally:
            self._pumps.remove(pump)

    def interrupt(self) -> None:
        """Do what SIGINT does to all that is waited for, from any thread."""
        for pump in tuple(self._pumps):
            pump.interrupt()

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """Iterate `source` on the loop; leaving early cancels it and waits for its clean-up."""
        inbox: Inbox = queue.SimpleQueue()
        with interrupts_to(inbox):
            pump = Pump(self.loop, source, inbox)
        with self._listed(pump):
            try:
                yield from self._turns(pump, inbox)
            finally:
                pump.stop()
        if pump.is_interrupted():
            raise KeyboardInterrupt

    def _turns(self, pump: Pump, inbox: Inbox) -> Iterator[Any]:
        items = pump.items()
        while True:
            # Only while this thread waits here: between items, SIGINT belongs to the user.
            with interrupts_to(inbox):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    async def relay(
        self, source: AsyncGenerator[T, None], stopping: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[T, None]:
        """Iterate `source` on the loop thread for a coroutine of another loop.

        Where SIGINT cancels that, it raises `Interrupted`, which is also a `CancelledError`.
        `stopping` is called first where SIGINT ended the cell, but not the wait for this.
        """
        pump = Pump(self.loop, source, queue.SimpleQueue())
        with translated(stopping), self._listed(pump):
            try:
                while True:
                    for item in pump.ready():
                        yield item
                    if pump.ended():
                        return
                    if pump.is_interrupted():
                        raise Interrupted("Stopped.")
                    await pump.wait_elsewhere()
            finally:
                await pump.stop_elsewhere()

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine that runs on the loop thread, from a coroutine of another loop."""

        async def once() -> AsyncGenerator[T, None]:
            yield await coroutine

        async with contextlib.aclosing(self.relay(once())) as results:
            return await anext(results)

    def cancel_all(self) -> None:
        """Cancel everything that runs on the loop, and wait a little until it has ended."""
        if self._loop is not None:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                self.submit(_cancel_all()).result(timeout=2)

    def close(self) -> None:
        """Stop the loop and wait for the thread; the next use starts a new one."""
        self.cancel_all()
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
