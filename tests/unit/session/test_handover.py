"""Calls from one thread to the loop of another: all of them, in turn, for one wake."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple

import pytest

from llm_magic.session.handover import Handover, handover

Ts = TypeVarTuple("Ts")


class _Counting(asyncio.SelectorEventLoop):
    """A loop that counts how often it is woken."""

    wakes = 0

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.wakes += 1
        return super().call_soon_threadsafe(callback, *args, context=context)


def test_many_calls_wake_the_loop_once_and_come_in_turn() -> None:
    came: list[int] = []
    with asyncio.Runner(loop_factory=_Counting) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, _Counting)
        there = handover(loop, 1.0)
        for number in range(100):
            there.call(lambda number=number: came.append(number))  # type: ignore[misc]
        assert (came, loop.wakes) == ([], 1)
        runner.run(asyncio.sleep(0))
        assert came == list(range(100))
        there.call(lambda: came.append(100))
        assert loop.wakes == 2
        runner.run(asyncio.sleep(0))
    assert came[-1] == 100


def test_no_call_is_lost_between_threads() -> None:
    came: list[int] = []
    threads, each = 8, 500

    def work(there: Handover) -> None:
        for number in range(each):
            there.call(lambda number=number: came.append(number))  # type: ignore[misc]

    async def main() -> None:
        there = handover(asyncio.get_running_loop(), 1.0)
        await asyncio.gather(*(asyncio.to_thread(work, there) for _ in range(threads)))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert sorted(came) == sorted(list(range(each)) * threads)


def test_a_closed_loop_is_told() -> None:
    loop = asyncio.new_event_loop()
    there = handover(loop, 1.0)
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            there.call(lambda: None)


def test_a_loop_has_one_and_takes_it_along() -> None:
    loop = asyncio.new_event_loop()
    there = handover(loop, 1.0)
    assert handover(loop, 1.0) is there
    gone = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError):
        there.call(lambda: None)


def test_a_loop_that_something_waits_on_wakes_by_itself() -> None:
    """As ipykernel cancels: from a signal handler, which wakes nobody."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        there, task = handover(loop, 0.05), asyncio.current_task()
        assert task is not None
        # `task.cancel` from another thread leaves the loop asleep.
        timer = threading.Timer(0.1, task.cancel)
        timer.start()
        began = time.monotonic()
        try:
            with there.awake(), there.awake():
                await asyncio.sleep(30)
        except asyncio.CancelledError:
            task.uncancel()
        timer.join()
        return time.monotonic() - began

    assert asyncio.run(main()) < 10
