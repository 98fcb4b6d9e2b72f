"""The loop thread: items in order, errors once, clean-up awaited, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any

import pytest

from llm_magic.errors import Interrupted, OptionError
from llm_magic.session.event_loop import GRACE_S, LoopThread
from llm_magic.types import Chunk
from tests.kernels import within_a_second
from tests.loop_streams import drain, iterate, relay
from tests.until import until


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    threads = threading.active_count()
    loop = LoopThread("test-loop")
    yield loop
    until(lambda: others(loop) == 0, "tasks are left")
    loop.close()
    # A timer of the test may still end.
    until(lambda: threading.active_count() <= threads, "threads are left")


def others(loop: LoopThread) -> int:
    """Return how many tasks run on the loop."""

    async def count() -> int:
        await asyncio.sleep(0)  # those that are just ending may end
        return len(asyncio.all_tasks() - {asyncio.current_task()})

    return loop.submit(count()).result(30)


class Weight:
    """Something large that a coroutine of the loop refers to."""


async def fails_beside(weight: Weight, error: Exception) -> AsyncGenerator[object, None]:
    """Raise `error` in a frame of this package that refers to `weight`, as a context, too."""
    module = {"__name__": "llm_magic.backends.custom"}
    exec("def check(kept, error):\n try: 1 / 0\n except ZeroDivisionError: raise error", module)
    check: Any = module["check"]
    yield 1
    check(weight, error)


class Source:
    """An async generator that records its end: yields `items`, then does what `then` is."""

    def __init__(self, *items: object, then: BaseException | str = "end") -> None:
        self.items, self.then = items, then
        self.cancels = 0
        self.cleaned = threading.Event()
        self.thread = ""

    async def __call__(self) -> AsyncGenerator[object, None]:
        self.thread = threading.current_thread().name
        try:
            for item in self.items:
                yield item
            if isinstance(self.then, BaseException):
                raise self.then
            if self.then == "hang":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancels += 1
            raise
        finally:
            await asyncio.sleep(0.01)  # a clean-up that takes its time
            self.cleaned.set()


def test_items_come_in_order_on_the_calling_thread(loop: LoopThread) -> None:
    taken: list[tuple[object, str]] = []
    source = Source(1, None, "three", 0)
    here = threading.current_thread().name
    drain(loop, source(), lambda item: taken.append((item, threading.current_thread().name)))
    assert taken == [(1, here), (None, here), ("three", here), (0, here)]
    assert source.thread == "test-loop"
    assert source.cleaned.is_set()
    assert list(iterate(loop, Source(1, None, 3)())) == [1, None, 3]
    assert list(iterate(loop, Source()())) == []


def test_reader_is_woken_while_no_items_come(loop: LoopThread) -> None:
    wakes: list[str] = []

    async def slow() -> AsyncGenerator[int, None]:
        while not wakes:
            await asyncio.sleep(0.01)
        yield 1

    drain(loop, slow(), lambda _item: None, lambda: wakes.append(threading.current_thread().name))
    assert set(wakes) == {threading.current_thread().name}


class Reader:
    """Takes items as a display does: records when it was woken, and pauses between two wakes."""

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self.taken: list[object] = []
        self.wakes: list[list[object]] = [[]]

    def take(self, item: object) -> None:
        self.taken.append(item)
        self.wakes[-1].append(item)

    def after_batch(self) -> None:
        self.wakes.append([])

    def pause(self) -> float:
        return self._pause if self.taken else 0.0


async def paced(count: int, seconds: float, taken: list[object]) -> AsyncGenerator[int, None]:
    """Yield numbers; all but the first after a reader has `taken` that."""
    for number in range(count):
        yield number
        while not taken:
            await asyncio.sleep(0)
        await asyncio.sleep(seconds)


def test_reader_that_pauses_is_not_woken_for_every_item(loop: LoopThread) -> None:
    reader = Reader(0.05)
    began = time.monotonic()
    drain(loop, paced(200, 0.002, reader.taken), reader.take, reader.after_batch, reader.pause)
    assert reader.taken == list(range(200))
    assert reader.wakes[0] == [0]
    assert len(reader.wakes) <= 3 + (time.monotonic() - began) / 0.05


def test_the_end_is_not_waited_for(loop: LoopThread) -> None:
    reader = Reader(2.0)
    began = time.monotonic()
    for _ in range(20):
        drain(loop, paced(2, 0.001, reader.taken), reader.take, reader.after_batch, reader.pause)
    assert reader.taken == [0, 1] * 20
    assert time.monotonic() - began < 20 * 2.0 / 2


def test_reader_that_is_slower_than_its_source_takes_several_batches(loop: LoopThread) -> None:
    reader = Reader(0.0)

    def take(item: object) -> None:
        reader.take(item)
        time.sleep(0.001)

    drain(loop, paced(300, 0.0, reader.taken), take, reader.after_batch)
    assert reader.taken == list(range(300))
    assert len(reader.wakes) > 1


@pytest.mark.parametrize("text", ["word ", "x" * 100_000])
def test_fast_source_waits_for_its_reader(loop: LoopThread, text: str) -> None:
    produced, taken, ahead = 0, 0, 0

    async def flood() -> AsyncGenerator[Chunk, None]:
        nonlocal produced
        for produced in range(1, 20_001):  # noqa: B007
            yield Chunk(text=text)

    def take(_chunk: Chunk) -> None:
        nonlocal taken, ahead
        ahead = max(ahead, produced - taken)
        taken += 1

    drain(loop, flood(), take)
    assert taken == 20_000
    assert ahead <= 4_100
    assert ahead * len(text) <= 1_200_000


def test_interrupt_ends_flood_and_loses_nothing(loop: LoopThread) -> None:
    produced, taken = 0, list[int]()

    async def flood() -> AsyncGenerator[int, None]:
        nonlocal produced
        while True:
            produced += 1
            yield produced

    def take(item: int) -> None:
        taken.append(item)
        if not pressed:
            time.sleep(0.0001)

    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        loop.interrupt()

    timer = threading.Timer(0.5, press)
    timer.start()
    with pytest.raises(Interrupted):
        drain(loop, flood(), take)
    assert time.monotonic() - pressed[0] < within_a_second() + 1
    assert taken == list(range(1, produced + 1))


def test_fast_source_waits_for_a_reader_on_another_loop(loop: LoopThread) -> None:
    async def read() -> list[object]:
        return [item async for item in relay(loop, Source(*range(20_000))())]

    assert asyncio.run(read()) == list(range(20_000))


def test_an_error_comes_once_and_after_the_items(loop: LoopThread) -> None:
    taken: list[object] = []
    with pytest.raises(ValueError, match="broken"):
        drain(loop, Source(1, 2, then=ValueError("broken"))(), taken.append)
    assert taken == [1, 2]
    items = iterate(loop, Source(1, then=ValueError("broken"))())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert list(items) == []


def test_an_error_while_taking_stops_the_source_and_waits_for_its_clean_up(
    loop: LoopThread,
) -> None:
    source = Source(1, 2, then="hang")

    def take(item: object) -> None:
        if item == 2:
            raise RuntimeError("the display broke")

    with pytest.raises(RuntimeError, match="the display broke"):
        drain(loop, source(), take)
    assert (source.cancels, source.cleaned.is_set()) == (1, True)


def test_leaving_a_for_loop_stops_the_source_and_waits_for_its_clean_up(loop: LoopThread) -> None:
    source = Source(1, 2, 3, then="hang")
    for item in iterate(loop, source()):
        if item == 2:
            break
    assert (source.cancels, source.cleaned.is_set()) == (1, True)


def test_a_source_that_is_never_begun_costs_nothing(loop: LoopThread) -> None:
    source = Source(1)
    items = iterate(loop, source())
    items.close()  # type: ignore[attr-defined]
    assert source.thread == ""


def test_a_long_clean_up_goes_on_in_the_background_and_is_cancelled_only_once(
    loop: LoopThread,
) -> None:
    cancels, release, done = [], threading.Event(), threading.Event()

    async def stubborn() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            while not release.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    cancels.append("again")
            done.set()

    began = time.monotonic()
    for _item in iterate(loop, stubborn()):
        break
    assert time.monotonic() - began > GRACE_S * 0.9
    assert not done.is_set()
    release.set()
    assert done.wait(30)
    assert cancels == []


def test_run_gives_the_result_or_the_error(loop: LoopThread) -> None:
    async def give(value: object) -> object:
        await asyncio.sleep(0)
        return value

    async def fail() -> None:
        raise KeyError("no")

    assert loop.run(give(3)) == 3
    assert loop.run(give(None)) is None
    with pytest.raises(KeyError, match="no"):
        loop.run(fail())


def test_run_works_inside_a_running_loop(loop: LoopThread) -> None:
    async def cell() -> list[object]:
        return list(iterate(loop, Source(1, 2)()))

    assert asyncio.run(cell()) == [1, 2]


def test_closing_ends_the_thread_and_the_next_use_starts_another() -> None:
    loop = LoopThread("test-loop")
    loop.close()  # nothing was started
    for _ in range(3):
        assert list(iterate(loop, Source(1)())) == [1]
        thread = next(t for t in threading.enumerate() if t.name == "test-loop")
        assert thread.daemon
        loop.close()
        assert not thread.is_alive()
    loop.close()


def test_closing_ends_what_another_thread_waits_for() -> None:
    loop, source = LoopThread("test-loop"), Source(1, then="hang")
    taken, errors = threading.Event(), []

    def wait() -> None:
        try:
            drain(loop, source(), lambda _item: taken.set())
        except asyncio.CancelledError:
            errors.append("cancelled")

    thread = threading.Thread(target=wait)
    thread.start()
    assert taken.wait(5)
    loop.close()
    thread.join(5)
    assert (errors, source.cleaned.is_set()) == (["cancelled"], True)


def test_call_that_comes_while_the_loop_is_closed_ends() -> None:
    loop, raised, late = LoopThread("test-loop"), list[type[BaseException]](), threading.Event()

    def call(coroutine: Coroutine[Any, Any, object]) -> None:
        try:
            loop.run(coroutine)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it must end
            raised.append(type(error))

    async def hang() -> None:
        late.set()
        await asyncio.Event().wait()

    threads = [threading.Thread(target=call, args=(hang(),), daemon=True)]

    async def calls_at_its_end(started: threading.Event) -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            # Another thread calls after `close` has cancelled what ran, and before the loop stops.
            threads[0].start()
            while not late.is_set():
                await asyncio.sleep(0.001)

    started = threading.Event()
    threads.append(threading.Thread(target=call, args=(calls_at_its_end(started),), daemon=True))
    threads[1].start()
    assert started.wait(5)
    loop.close()
    for thread in threads:
        thread.join(5)
    assert raised == [Interrupted, Interrupted]


@pytest.mark.parametrize("turns", range(10))
def test_call_that_is_over_when_the_loop_stops_ends(turns: int) -> None:
    loop, outcomes, late = LoopThread("test-loop"), list[object](), threading.Event()

    def call() -> None:
        try:
            outcomes.append(loop.run(ends()))
        except Interrupted:
            outcomes.append("interrupted")

    async def ends() -> str:
        late.set()
        for _ in range(turns):
            # The loop is busy: what `close` calls meanwhile comes in the next turn.
            time.sleep(0.01)
            await asyncio.sleep(0)
        return "done"

    thread = threading.Thread(target=call, daemon=True)

    async def calls_at_its_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            thread.start()
            while not late.is_set():
                await asyncio.sleep(0)

    loop.submit(calls_at_its_end())
    loop.close()
    thread.join(5)
    assert outcomes in (["done"], ["interrupted"])


def test_calls_during_many_closes_all_end() -> None:
    loop, outcomes, is_over = LoopThread("test-loop"), Counter[str](), threading.Event()

    def call() -> None:
        while not is_over.is_set():
            try:
                outcomes[loop.run(asyncio.sleep(0.0001, "done"))] += 1
            except Interrupted:
                outcomes["interrupted"] += 1

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: outcomes["done"] > 0)
    for _ in range(200):
        loop.close()
    is_over.set()
    for thread in threads:
        thread.join(5)
    assert not [thread for thread in threads if thread.is_alive()]
    loop.close()


def test_two_hundred_short_drains_leave_nothing(loop: LoopThread) -> None:
    threads = set()
    for number in range(200):
        taken: list[object] = []
        drain(loop, Source(number)(), taken.append)
        assert taken == [number]
        threads.add(sum(thread.name == "test-loop" for thread in threading.enumerate()))
    assert len(threads) == 1


def test_several_threads_use_it_at_once(loop: LoopThread) -> None:
    results: dict[int, list[object]] = {}

    def use(number: int) -> None:
        results[number] = list(iterate(loop, Source(*[number] * 50)()))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {n: [n] * 50 for n in range(8)}


# -- from another loop ----------------------------------------------------------------------------


def test_relay_gives_the_items_to_another_loop(loop: LoopThread) -> None:
    async def cell() -> list[object]:
        return [item async for item in relay(loop, Source(1, None, 3)())]

    assert asyncio.run(cell()) == [1, None, 3]


def test_relay_raises_the_error_after_the_items(loop: LoopThread) -> None:
    async def cell() -> None:
        items = relay(loop, Source(1, then=ValueError("broken"))())
        assert await anext(items) == 1
        with pytest.raises(ValueError, match="broken"):
            await anext(items)

    asyncio.run(cell())


def test_cancelling_the_cell_closes_the_source(loop: LoopThread) -> None:
    source = Source(1, then="hang")

    async def read(seen: asyncio.Event) -> None:
        async with contextlib.aclosing(relay(loop, source())) as items:
            async for _item in items:
                seen.set()

    async def cell() -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(read(seen))
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (source.cancels, source.cleaned.is_set()) == (1, True)

    asyncio.run(cell())


def test_leaving_an_async_for_loop_closes_the_source(loop: LoopThread) -> None:
    source = Source(1, 2, then="hang")

    async def cell() -> None:
        async with contextlib.aclosing(relay(loop, source())) as items:
            async for _item in items:
                break
        assert source.cleaned.is_set()

    asyncio.run(cell())


def test_arun(loop: LoopThread) -> None:
    async def give(value: object) -> object:
        await asyncio.sleep(0.01)
        if isinstance(value, Exception):
            raise value
        return value

    async def cell() -> None:
        assert await asyncio.gather(*(loop.arun(give(n)) for n in (1, None, 3))) == [1, None, 3]
        with pytest.raises(ValueError, match="broken"):
            await loop.arun(give(ValueError("broken")))

    asyncio.run(cell())


async def collected(source: AsyncGenerator[object, None]) -> list[object]:
    return [item async for item in source]


WAYS: dict[str, Callable[[LoopThread, AsyncGenerator[object, None]], object]] = {
    "run": lambda loop, source: loop.run(collected(source)),
    "drain": lambda loop, source: drain(loop, source, lambda _item: None),
    "iterate": lambda loop, source: list(iterate(loop, source)),
    "arun": lambda loop, source: asyncio.run(loop.arun(collected(source))),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_error_of_package_leaves_loop_without_frames(
    loop: LoopThread, way: Callable[[LoopThread, AsyncGenerator[object, None]], object]
) -> None:
    refs: list[weakref.ref[Weight]] = []

    def made() -> Weight:
        refs.append(weakref.ref(weight := Weight()))
        return weight

    with pytest.raises(OptionError) as caught:
        way(loop, fails_beside(made(), OptionError("No.")))
    assert caught.value.__context__ is caught.value.__cause__ is None
    gc.collect()
    assert refs[0]() is None


def test_other_error_keeps_its_traceback_and_frees_the_variables_of_the_package(
    loop: LoopThread,
) -> None:
    module = {"__name__": "llm_magic.backends.custom"}
    exec("async def check(made):\n kept = made()\n raise KeyError('x')\n yield", module)
    refs: list[weakref.ref[Weight]] = []

    def made() -> Weight:
        refs.append(weakref.ref(weight := Weight()))
        return weight

    check: Any = module["check"]
    with pytest.raises(KeyError) as caught:
        list(iterate(loop, check(made)))
    names = [entry.name for entry in caught.traceback]
    assert "check" in names
    assert refs[0]() is None
