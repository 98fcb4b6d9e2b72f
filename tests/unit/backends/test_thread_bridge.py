"""Items and calls from one thread to another: all of them, in order, with few wake-ups."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from contextvars import Context
from types import FrameType
from typing import Any, TypeVarTuple

import pytest

from llm_magic.backends.thread_bridge import LoopCalls, ThreadBridge, loop_calls
from llm_magic.types import Chunk
from tests.kernels import within_a_second

Ts = TypeVarTuple("Ts")


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread wakes it."""

    wakes = 0

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Count."""
        self.wakes += 1
        return super().call_soon_threadsafe(callback, *args, context=context)


async def items_of(bridge: ThreadBridge[int]) -> AsyncGenerator[int, None]:
    """Yield the items until the end; raise what ended the work."""
    while not bridge.is_finished:
        for item in bridge.take():
            yield item
        await bridge.wait_async()
    if bridge.error is not None:
        raise bridge.error


# -- items ----------------------------------------------------------------------------------------


def test_many_items_wake_a_loop_once() -> None:
    async def main() -> list[int]:
        loop, bridge = asyncio.get_running_loop(), ThreadBridge[int]()
        assert isinstance(loop, CountingLoop)
        items = items_of(bridge)
        first = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        for number in range(100):
            bridge.put(number)
        assert loop.wakes == 1
        taken = [await first, *[await anext(items) for _ in range(99)]]
        bridge.put(100)
        bridge.close()
        return [*taken, *[number async for number in items]]

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        assert runner.run(main()) == list(range(101))


def test_items_collect_during_a_pause_and_the_end_does_not_wait_for_it() -> None:
    async def main() -> list[list[int]]:
        bridge, taken = ThreadBridge[int](), []
        for pause, count in ((0.05, 2), (3600.0, 1)):
            waiting, began = asyncio.ensure_future(bridge.wait_async(pause)), time.monotonic()
            for number in range(count):
                await asyncio.sleep(0)
                bridge.put(number)
            await asyncio.sleep(0)
            assert not waiting.done() or time.monotonic() - began >= pause
            if pause > 1:
                bridge.close()
            await waiting
            taken.append(bridge.take())
        assert bridge.is_finished
        return taken

    assert asyncio.run(main()) == [[0, 1], [0]]


def test_an_item_after_a_pause_wakes_the_reader() -> None:
    async def main() -> list[int]:
        bridge = ThreadBridge[int]()
        waiting = asyncio.ensure_future(bridge.wait_async(0.001))
        await asyncio.sleep(0.05)
        bridge.put(1)
        await waiting
        return bridge.take()

    assert asyncio.run(main()) == [1]


def test_no_item_is_lost_between_thread_and_loop() -> None:
    async def main() -> list[int]:
        bridge: ThreadBridge[int] = ThreadBridge()

        def produce() -> None:
            for number in range(20_000):
                bridge.put(number)
            bridge.close()

        producing = asyncio.ensure_future(asyncio.to_thread(produce))
        numbers = [number async for number in items_of(bridge)]
        await producing
        return numbers

    assert asyncio.run(main()) == list(range(20_000))


def test_no_item_is_lost_between_threads() -> None:
    bridge: ThreadBridge[int] = ThreadBridge()

    def produce() -> None:
        for number in range(20_000):
            bridge.put(number)
        bridge.close(ValueError("broken"))

    thread = threading.Thread(target=produce)
    thread.start()
    taken: list[int] = []
    while not bridge.is_finished:
        assert not bridge.wait(10)
        taken += bridge.take()
    thread.join()
    assert taken == list(range(20_000))
    assert str(bridge.error) == "broken"


def test_async_reader_raises_the_error_after_the_items() -> None:
    async def main() -> None:
        bridge: ThreadBridge[int] = ThreadBridge()
        bridge.put(1)
        bridge.close(ValueError("broken"))
        items = items_of(bridge)
        assert await anext(items) == 1
        with pytest.raises(ValueError, match="broken"):
            await anext(items)

    asyncio.run(main())


def test_interrupt_ends_a_wait_for_items_and_a_pause() -> None:
    bridge: ThreadBridge[int] = ThreadBridge()
    for pause in (0.0, 60.0):
        threading.Timer(0.02, bridge.interrupt).start()
        began = time.monotonic()
        assert bridge.wait(60, pause)
        assert time.monotonic() - began < within_a_second()
    bridge.interrupt()
    bridge.put(1)
    assert bridge.take() == [1]
    assert bridge.take_interrupt()
    assert not bridge.take_interrupt()


def test_end_ends_a_pause_and_items_do_not() -> None:
    bridge: ThreadBridge[int] = ThreadBridge()
    bridge.put(1)
    began = time.monotonic()
    assert not bridge.wait(5, 0.1)
    assert 0.09 < time.monotonic() - began < within_a_second()
    threading.Timer(0.02, bridge.close).start()
    began = time.monotonic()
    assert not bridge.wait(60, 60)
    assert time.monotonic() - began < within_a_second()


@pytest.mark.parametrize("keep", [None, 1])
def test_writer_waits_for_a_reader_that_is_far_behind(keep: int | None) -> None:
    async def main() -> None:
        bridge: ThreadBridge[Chunk] = ThreadBridge(keep)
        for _ in range(6):
            assert not bridge.is_full
            bridge.put(Chunk(text="x" * 100_000))
        assert bridge.is_full
        waiting = asyncio.ensure_future(bridge.wait_for_space())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert len(await asyncio.to_thread(bridge.take)) == (keep or 6)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(main())


def test_writer_waits_for_no_reader_that_has_left() -> None:
    async def main() -> None:
        bridge: ThreadBridge[Chunk] = ThreadBridge()
        bridge.put(Chunk(text="x" * 1_000_000))
        waiting = asyncio.ensure_future(bridge.wait_for_space())
        await asyncio.sleep(0.01)
        await asyncio.to_thread(bridge.leave)
        await asyncio.wait_for(waiting, 5)
        assert not bridge.is_full

    asyncio.run(main())


# -- calls ----------------------------------------------------------------------------------------


def test_many_calls_wake_the_loop_once_and_come_in_order() -> None:
    came: list[int] = []
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, CountingLoop)
        calls = loop_calls(loop)
        for number in range(100):
            calls.call(lambda number=number: came.append(number))  # type: ignore[misc]
        assert (came, loop.wakes) == ([], 1)
        runner.run(asyncio.sleep(0))
        assert came == list(range(100))
        calls.call(lambda: came.append(100))
        assert loop.wakes == 2
        runner.run(asyncio.sleep(0))
    assert came[-1] == 100


def test_no_call_is_lost_between_threads() -> None:
    came: list[int] = []
    threads, each = 8, 500

    def work(calls: LoopCalls) -> None:
        for number in range(each):
            calls.call(lambda number=number: came.append(number))  # type: ignore[misc]

    async def main() -> None:
        calls = loop_calls(asyncio.get_running_loop())
        await asyncio.gather(*(asyncio.to_thread(work, calls) for _ in range(threads)))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert sorted(came) == sorted(list(range(each)) * threads)


def test_call_to_a_closed_loop_raises() -> None:
    loop = asyncio.new_event_loop()
    calls = loop_calls(loop)
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            calls.call(lambda: None)


def test_loop_has_one_loop_calls_that_goes_with_it() -> None:
    loop = asyncio.new_event_loop()
    calls = loop_calls(loop)
    assert loop_calls(loop) is calls
    gone = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError):
        calls.call(lambda: None)


def test_loop_that_is_woken_regularly_notices_a_cancellation() -> None:
    """As ipykernel cancels: from a signal handler, which wakes no loop."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        calls, task = loop_calls(loop), asyncio.current_task()
        assert task is not None
        # `task.cancel` from another thread leaves the loop asleep.
        timer = threading.Timer(0.1, task.cancel)
        timer.start()
        began = time.monotonic()
        try:
            with calls.woken_regularly(), calls.woken_regularly():
                await asyncio.sleep(30)
        except asyncio.CancelledError:
            task.uncancel()
        timer.join()
        return time.monotonic() - began

    assert asyncio.run(main()) < 10


@pytest.mark.parametrize("number", range(8))
def test_call_that_is_interrupted_at_any_line_leaves_the_loop_wakeable(number: int) -> None:
    """A signal handler raises between two lines; the next call must reach the loop."""
    lines = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal lines
        if frame.f_code is not LoopCalls.call.__code__:
            return None
        if event == "line":
            lines += 1
            if lines > number:
                raise KeyboardInterrupt
        return trace

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    calls, called = loop_calls(loop), threading.Event()
    sys.settrace(trace)
    with contextlib.suppress(KeyboardInterrupt):
        calls.call(lambda: None)
    sys.settrace(None)
    calls.call(called.set)
    assert called.wait(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
