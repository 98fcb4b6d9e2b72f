"""Interrupts: a real SIGINT to this process while it waits."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from llm_magic.backends.thread_bridge import ThreadBridge
from llm_magic.errors import Interrupted
from llm_magic.session import event_loop
from llm_magic.session.event_loop import LoopThread
from llm_magic.session.interruptible_wait import (
    Noting,
    cancel_waits,
    current_cell,
    held_back,
    translated,
    wait,
)
from tests.kernels import within_a_second
from tests.loop_streams import drain, iterate, relay
from tests.until import until


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    handler = signal.getsignal(signal.SIGINT)
    loop = LoopThread("test-loop")
    yield loop
    assert signal.getsignal(signal.SIGINT) is handler
    loop.close()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


async def answering(*items: object) -> AsyncGenerator[object, None]:
    """Yield the items, then send SIGINT."""
    for item in items:
        yield item
    interrupt()
    await asyncio.Event().wait()


def test_what_was_produced_is_delivered_before_the_interrupt(loop: LoopThread) -> None:
    taken: list[object] = []
    began = time.monotonic()
    with pytest.raises(Interrupted):
        drain(loop, answering(1, 2, 3), taken.append)
    assert taken == [1, 2, 3]
    assert time.monotonic() - began < within_a_second()


def test_reader_that_pauses_is_interrupted_at_once(loop: LoopThread) -> None:
    taken: list[object] = []
    interrupted_at: list[float] = []

    async def source() -> AsyncGenerator[object, None]:
        yield 1
        await asyncio.sleep(0.02)  # the reader pauses
        yield 2
        interrupted_at.append(time.monotonic())
        interrupt()
        await asyncio.Event().wait()

    took = [60.0]
    # On a busy machine, only some are that fast.
    while min(took) >= 0.09:
        assert len(took) < 50, "it waits for the next look"
        with pytest.raises(Interrupted):
            drain(loop, source(), taken.append, pause=lambda: 60.0 if taken else 0.0)
        took.append(time.monotonic() - interrupted_at[-1])
        assert took[-1] < within_a_second()
    assert taken == [1, 2] * (len(took) - 1)


def test_what_comes_while_it_stops_is_delivered_too(loop: LoopThread) -> None:
    taken: list[object] = []

    async def source() -> AsyncGenerator[object, None]:
        yield "before"
        interrupt()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield "last"

    with pytest.raises(Interrupted):
        drain(loop, source(), taken.append)
    assert taken == ["before", "last"]


def test_run_and_iterate_can_be_interrupted_too(loop: LoopThread) -> None:
    async def work() -> None:
        interrupt()
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        loop.run(work())
    taken: list[object] = []
    with pytest.raises(Interrupted), held_back():
        taken.extend(iterate(loop, answering(1, 2)))
    assert taken == [1, 2]


class _InterruptedCall(LoopThread):
    """Is interrupted just after it has passed a call to the loop."""

    def call(self, callback: Callable[[], object]) -> Any:
        super().call(callback)
        raise KeyboardInterrupt


def test_interrupt_while_it_starts_cancels_it() -> None:
    loop = _InterruptedCall()

    async def work() -> None:
        await asyncio.Event().wait()

    for _ in range(20):
        coroutine = work()
        with pytest.raises(KeyboardInterrupt):
            loop.run(coroutine)
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
    loop.close()


def test_a_handler_of_the_user_is_put_back(loop: LoopThread) -> None:
    def handler(_signal: int, _frame: FrameType | None) -> None:
        """Do nothing."""

    previous = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(Interrupted):
            drain(loop, answering(1), lambda _item: None)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, previous)


class Deaf:
    """A source that ignores being cancelled until it is released at the end of the test."""

    def __init__(self, count: int = 1, *, noisy: bool = False) -> None:
        self.count, self.noisy = count, noisy
        self.release, self.done = threading.Event(), threading.Event()
        self.cancels = 0
        self.began = time.monotonic()

    def __enter__(self) -> Deaf:
        # Where the code under test waits for ever, the test must end all the same.
        self._timer = threading.Timer(60, self.release.set)
        self._timer.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._timer.cancel()
        self.release.set()
        assert self.done.wait(30)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    async def source(self) -> AsyncGenerator[object, None]:
        yield "first"
        for _ in range(self.count):
            interrupt()
            await self._step()
            await self._step()
        while not self.release.is_set():
            await self._step()
            if self.noisy:
                yield "more"
        self.done.set()

    async def _step(self) -> None:
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self.cancels += 1


@pytest.mark.parametrize("noisy", [False, True])
def test_work_that_does_not_stop_is_left_behind_within_a_second(
    loop: LoopThread, noisy: bool
) -> None:
    taken: list[object] = []
    with Deaf(noisy=noisy) as deaf:
        with pytest.raises(Interrupted):
            drain(loop, deaf.source(), taken.append)
        assert deaf.elapsed < within_a_second()
    assert taken[0] == "first"
    assert deaf.cancels == 1  # a second one would break its clean-up off


def test_a_second_interrupt_ends_the_waiting_at_once(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop, "GRACE_S", 60)
    with Deaf(count=2) as deaf:
        with pytest.raises(Interrupted):
            drain(loop, deaf.source(), lambda _item: None)
        assert deaf.elapsed < within_a_second()


@pytest.mark.parametrize("way", ["drain", "iterate", "run"])
def test_interrupt_before_the_first_wait_leaves_nothing_running(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    started, finished = threading.Event(), threading.Event()

    def interrupted(*_args: object) -> bool:
        assert started.wait(30)  # what would run
        raise KeyboardInterrupt

    async def source() -> AsyncGenerator[object, None]:
        try:
            started.set()
            yield 1
            await asyncio.Event().wait()
        finally:
            finished.set()

    monkeypatch.setattr("llm_magic.session.interruptible_wait.wait", interrupted)
    use: dict[str, Callable[[Any], object]] = {
        "drain": lambda items: drain(loop, items, print),
        "iterate": lambda items: list(iterate(loop, items)),
        "run": lambda items: loop.run(collected(items)),
    }
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        use[way](source())
    assert finished.is_set()


async def collected(source: AsyncGenerator[object, None]) -> list[object]:
    async with contextlib.aclosing(source) as items:
        return [item async for item in items]


def test_a_coroutine_elsewhere_is_stopped_as_well(loop: LoopThread) -> None:
    async def endless() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            finished.set()

    async def ask() -> None:
        async with contextlib.aclosing(relay(loop, endless())) as items:
            async for _item in items:
                threading.Timer(0.1, loop.interrupt).start()

    finished = threading.Event()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        asyncio.run(ask())
    assert finished.wait(within_a_second())
    assert time.monotonic() - began < within_a_second()


def test_interrupt_after_the_last_item_is_raised(loop: LoopThread) -> None:
    taken: list[object] = []

    async def source() -> AsyncGenerator[object, None]:
        yield "last"

    def take(item: object) -> None:
        taken.append(item)
        time.sleep(0.05)  # the source ends meanwhile
        interrupt()

    with pytest.raises(Interrupted):
        drain(loop, source(), take)
    assert taken == ["last"]


def test_interrupt_at_the_very_end_of_a_wait_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the reader runs code of the user, which blocks, before its next wait."""
    bridge: ThreadBridge[int] = ThreadBridge()
    waited = bridge.wait

    def wait_until_interrupt(timeout: float, pause: float = 0.0) -> bool:
        is_interrupted = waited(timeout, pause)
        signal.raise_signal(signal.SIGINT)
        return is_interrupted

    monkeypatch.setattr(bridge, "wait", wait_until_interrupt)
    bridge.put(1)
    assert wait(bridge, 0)
    assert (bridge.take(), bridge.take_interrupt()) == ([1], False)


def test_an_interrupt_leaves_the_loop_usable(loop: LoopThread) -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1

    for _ in range(3):
        with pytest.raises(Interrupted):
            drain(loop, answering(), lambda _item: None)
        assert list(iterate(loop, source())) == [1]


def test_other_threads_are_left_alone(loop: LoopThread) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def elsewhere() -> None:
        bridge: ThreadBridge[object] = ThreadBridge()
        threading.Timer(0.05, lambda: seen.append(signal.getsignal(signal.SIGINT))).start()
        wait(bridge, 0.2)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    until(lambda: seen, "the timer does not run")
    assert seen == [before]


def test_held_back_signal_is_raised_at_the_next_wait(loop: LoopThread) -> None:
    done: list[object] = []

    @held_back()
    def work() -> None:
        interrupt()
        done.append("the line after it")
        try:
            drain(loop, answering(), done.append)
        finally:
            done.append("the wait")

    with pytest.raises(Interrupted, match=r"^Stopped\.$"):
        work()
    assert done == ["the line after it", "the wait"]


def test_held_back_signal_without_a_wait_is_raised_at_the_end() -> None:
    done: list[str] = []

    @held_back()
    def work() -> None:
        with held_back():
            interrupt()
            done.append("all of it")

    with pytest.raises(Interrupted):
        work()
    assert done == ["all of it"]


def test_held_back_signal_does_not_hide_another_error() -> None:
    @held_back()
    def work() -> None:
        interrupt()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_code_that_never_waits_is_interrupted_within_a_second() -> None:
    @held_back()
    def work() -> None:
        interrupt()
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        work()
    assert time.monotonic() - began < within_a_second()


def test_held_back_signal_reaches_the_block_inside() -> None:
    handler = signal.getsignal(signal.SIGINT)
    entered: list[str] = []

    @held_back()
    def inside() -> None:
        entered.append("inside")

    @held_back()
    def work() -> None:
        interrupt()
        inside()

    with pytest.raises(Interrupted):
        work()
    assert entered == []
    assert signal.getsignal(signal.SIGINT) is handler


def test_cancelled_task_is_interrupted_only_by_a_signal(loop: LoopThread) -> None:
    async def cancelled() -> type[BaseException]:
        task = asyncio.ensure_future(loop.arun(asyncio.sleep(30)))
        await asyncio.sleep(0.05)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError as error:
            return type(error)
        raise AssertionError("it was not cancelled")

    assert asyncio.run(cancelled()) is asyncio.CancelledError


# --- a cell that awaits


def test_answers_of_earlier_cells_that_gather_cancels_are_stopped_with_the_cell() -> None:
    stopping: list[str] = []

    async def ask(name: str, stop_s: float) -> None:
        with translated(lambda: stopping.append(name)):
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(stop_s)  # the end of its request

    async def cells() -> None:
        current_cell.set("first")
        earlier, left_alone = (asyncio.create_task(ask(one, 60)) for one in ("earlier", "left"))
        await asyncio.sleep(0)
        current_cell.set("second")
        gathered = asyncio.gather(ask("quick", 0), earlier)
        await asyncio.sleep(0)
        gathered.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gathered
        assert not earlier.done(), "gather ends with the first"
        cancel_waits("second")
        assert (stopping, left_alone.cancelling()) == (["earlier"], 0)
        earlier.cancel()
        left_alone.cancel()
        await asyncio.wait([earlier, left_alone], timeout=0.1)
        left_alone.cancel()
        await asyncio.wait([earlier, left_alone])

    Noting.noted = True  # as by SIGINT
    try:
        asyncio.run(cells())
    finally:
        Noting.reset()
