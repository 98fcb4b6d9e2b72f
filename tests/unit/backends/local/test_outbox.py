"""From the inference thread to the loop: in order, nothing lost, and few wakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple

from llm_magic.backends.local.worker import Outbox

Ts = TypeVarTuple("Ts")


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread wakes it."""

    woken = 0

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Count."""
        self.woken += 1
        return super().call_soon_threadsafe(callback, *args, context=context)


def test_many_items_wake_the_loop_once() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        outbox: Outbox[int] = Outbox(loop)
        for number in range(100):
            outbox.put(number)
        assert loop.woken == 1
        items = outbox.items()
        taken = [await anext(items) for _ in range(100)]
        outbox.put(100)
        assert loop.woken == 2
        outbox.close()
        return [*taken, *[number async for number in items]]

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        assert runner.run(main()) == list(range(101))


def test_an_outbox_loses_nothing_under_two_threads() -> None:
    async def main() -> list[int]:
        outbox: Outbox[int] = Outbox(asyncio.get_running_loop())

        def produce() -> None:
            for number in range(20_000):
                outbox.put(number)

        done = asyncio.ensure_future(asyncio.to_thread(produce))
        done.add_done_callback(lambda _done: outbox.close())
        return [number async for number in outbox.items()]

    assert asyncio.run(main()) == list(range(20_000))
