"""The inference thread: one job at a time, failures without frames, stops that are waited for."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from typing import Any

import pytest

from llm_magic.backends.local.worker import Cancelled, Job, Worker
from llm_magic.errors import GenerationFailed, LLMMagicError
from llm_magic.types import Chunk, Progress


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test-worker")
    yield worker
    worker.close()
    assert "test-worker" not in {thread.name for thread in threading.enumerate()}


def translate(error: BaseException) -> LLMMagicError:
    return GenerationFailed(f"{type(error).__name__}: {error}", details="the traceback")


def in_time(coroutine: Any) -> Any:
    """Run a coroutine that must not hang."""

    async def limited() -> Any:
        async with asyncio.timeout(30):
            return await coroutine

    return asyncio.run(limited())


def until_cancelled(started: threading.Event, finished: threading.Event) -> Callable[..., None]:
    def work(cancel: threading.Event, *_emit: object) -> None:
        started.set()
        cancel.wait(5)
        finished.set()
        raise Cancelled

    return work


def test_jobs_run_one_after_another_on_one_daemon_thread(worker: Worker) -> None:
    assert "test-worker" not in {thread.name for thread in threading.enumerate()}  # not yet
    order: list[int] = []

    def job(number: int, _cancel: threading.Event) -> threading.Thread:
        order.append(number)
        return threading.current_thread()

    async def main() -> list[threading.Thread]:
        return await asyncio.gather(*(worker.run(partial(job, n), translate) for n in range(5)))

    threads = set(in_time(main()))
    assert order == [0, 1, 2, 3, 4]
    assert [(thread.name, thread.daemon) for thread in threads] == [("test-worker", True)]


def test_failure_is_raised_translated(worker: Worker) -> None:
    def fail(_cancel: threading.Event) -> None:
        raise ValueError("no")

    for _ in range(2):  # and the thread lives on
        with pytest.raises(GenerationFailed, match="ValueError: no") as caught:
            in_time(worker.run(fail, translate))
        assert caught.value.details == "the traceback"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_nothing_that_a_job_raises_ends_the_thread(worker: Worker, error: BaseException) -> None:
    def fail(_cancel: threading.Event) -> None:
        raise error

    with pytest.raises(GenerationFailed, match=type(error).__name__):
        in_time(worker.run(fail, translate))
    assert in_time(worker.run(lambda _cancel: 1, translate)) == 1


def test_translation_that_fails_is_an_error_and_no_hang(worker: Worker) -> None:
    def fail(_cancel: threading.Event) -> None:
        raise ValueError("the first error")

    def failing(_error: BaseException) -> LLMMagicError:
        raise OSError("a library is missing")

    with pytest.raises(LLMMagicError, match="ValueError: the first error") as caught:
        in_time(worker.run(fail, failing))
    assert "a library is missing" in caught.value.details
    assert in_time(worker.run(lambda _cancel: 1, translate)) == 1


class Big:
    """Stands for a tensor."""


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Free only what nothing refers to: no garbage collection runs meanwhile."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("own", [False, True])
def test_stored_error_holds_no_objects_of_the_job(worker: Worker, own: bool) -> None:
    alive: list[weakref.ref[Big]] = []

    def deep() -> None:
        tensor = Big()
        alive.append(weakref.ref(tensor))
        error = ValueError("its frame refers to it, and it to its frame")
        raise error

    def fail(_cancel: threading.Event) -> None:
        weights = Big()
        alive.append(weakref.ref(weights))
        try:
            deep()
        except ValueError as error:  # Python stores the chain of causes, too
            raise (GenerationFailed if own else RuntimeError)("wrapped") from error

    with pytest.raises(GenerationFailed, match="wrapped") as caught:
        in_time(worker.run(fail, lambda e: e if isinstance(e, LLMMagicError) else translate(e)))
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.usefixtures("no_gc")
def test_result_is_freed_before_the_next_job(worker: Worker) -> None:
    ref = weakref.ref(in_time(worker.run(lambda _cancel: Big(), translate)))
    deadline = time.monotonic() + 30
    while ref() is not None and time.monotonic() < deadline:
        time.sleep(0.001)  # the thread may not have reached the line that frees it
    assert ref() is None


def test_cancelling_sets_the_flag_and_waits_until_the_job_has_seen_it(worker: Worker) -> None:
    started, finished = threading.Event(), threading.Event()

    async def main() -> None:
        task = asyncio.ensure_future(worker.run(until_cancelled(started, finished), translate))
        await asyncio.to_thread(started.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert finished.is_set()

    in_time(main())


def test_queued_job_that_is_cancelled_never_runs(worker: Worker) -> None:
    started, finished, ran = threading.Event(), threading.Event(), threading.Event()

    async def main() -> None:
        first = asyncio.ensure_future(worker.run(until_cancelled(started, finished), translate))
        await asyncio.to_thread(started.wait, 5)
        second = asyncio.ensure_future(worker.run(lambda _cancel: ran.set(), translate))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second  # it does not have to wait for the first
        assert not finished.is_set()
        first.cancel()
        await asyncio.wait({first})
        await worker.run(lambda _cancel: None, translate)

    in_time(main())
    assert not ran.is_set()


# -- streams --------------------------------------------------------------------------------------


def test_items_are_in_order_and_the_failure_is_last(worker: Worker) -> None:
    async def main(fails: bool) -> list[int]:
        def work(job: Job[None]) -> None:
            for number in range(1000):
                job.emit(number)
            if fails:
                raise ValueError("failed")

        taken: list[int] = []
        with contextlib.suppress(GenerationFailed) if fails else contextlib.nullcontext():
            async for number in worker.stream(work, translate):
                taken.append(number)
            assert not fails, "the failure did not arrive"
        return taken

    assert in_time(main(False)) == list(range(1000))
    assert in_time(main(True)) == list(range(1000))


def test_pieces_of_text_that_wait_are_read_as_one(worker: Worker) -> None:
    emitted = threading.Event()
    tokens = [Chunk("d", tokens=1), Chunk("e", tokens=1)]
    progress, end = Chunk(progress=Progress("reading the prompt", 0.5)), Chunk(finish_reason="stop")

    def work(job: Job[None]) -> None:
        for number in range(1, 4):
            job.emit(Chunk("ab", time=float(number)))
        job.emit(progress)
        job.emit(Chunk(reasoning="why", time=5.0))
        job.emit(Chunk("c", time=6.0))
        for token in tokens:
            job.emit(token)
        job.emit(end)
        emitted.set()

    async def read() -> list[Chunk]:
        stream = worker.stream(work, translate, queued=None)
        # The first one may be read at once.
        chunks = [await anext(stream)]
        assert emitted.wait(5)
        return chunks + [chunk async for chunk in stream]

    first, *others = in_time(read())
    assert first.text[:2] == "ab"
    assert "".join(chunk.text for chunk in (first, *others)) == "abababcde"
    assert others[-5:] == [progress, Chunk("c", "why", time=6.0), *tokens, end]
    assert len(others) <= 6


def test_job_that_waits_emits_it_once_also_where_the_running_one_takes_no_more(
    worker: Worker,
) -> None:
    started, close, end = (threading.Event() for _ in range(3))

    def run(job: Job[None]) -> None:
        started.set()
        assert close.wait(60)
        job.set_accepts(False)
        assert end.wait(60)

    async def main() -> None:
        def stream(work: Callable[[Job[None]], None], group: str) -> AsyncGenerator[str, None]:
            return worker.stream(work, translate, "queued", group)

        def answer(job: Job[None]) -> None:
            job.emit("text")

        first = asyncio.ensure_future(anext(stream(run, "a"), None))
        await asyncio.to_thread(started.wait, 60)
        second, other = stream(answer, "a"), stream(answer, "b")
        waits = asyncio.ensure_future(anext(second))
        while not worker.has_next("a"):
            await asyncio.sleep(0.001)
        # Unlike the second one, it cannot join the one that runs.
        assert await anext(other) == "queued"
        assert not waits.done()
        close.set()
        assert await waits == "queued"
        third = stream(answer, "a")
        assert await anext(third) == "queued"
        end.set()
        await first
        assert [[item async for item in one] for one in (second, other, third)] == [["text"]] * 3

    in_time(main())


def test_closed_stream_sets_the_flag_and_waits(worker: Worker) -> None:
    finished = threading.Event()

    def work(job: Job[None]) -> None:
        number = 0
        while not job.cancel.wait(0.001):
            job.emit(number := number + 1)
        finished.set()
        raise Cancelled

    async def main() -> None:
        items = worker.stream(work, translate)
        async for number in items:
            if number == 3:
                break
        await items.aclose()
        assert finished.is_set()

    in_time(main())


def test_closed_stream_whose_job_has_not_started_does_not_wait_for_others(
    worker: Worker,
) -> None:
    started, finished, ran = threading.Event(), threading.Event(), threading.Event()

    async def main() -> None:
        first = asyncio.ensure_future(worker.run(until_cancelled(started, finished), translate))
        await asyncio.to_thread(started.wait, 5)
        items: AsyncGenerator[None, None] = worker.stream(lambda _job: ran.set(), translate)
        second = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait({second})
        assert not finished.is_set()
        first.cancel()
        await asyncio.wait({first})

    in_time(main())
    assert not ran.is_set()


def test_closed_worker_finishes_its_queue_and_can_be_used_again(worker: Worker) -> None:
    def give(number: int, _cancel: threading.Event) -> int:
        return number

    worker.close()  # nothing was started
    for _ in range(2):
        futures = [worker.submit(partial(give, n), translate)[0] for n in range(3)]
        worker.close()
        assert [future.result(0) for future in futures] == [0, 1, 2]


def _given(number: int, _cancel: threading.Event) -> int:
    return number


def test_thread_goes_on_after_its_after_job_failed(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("no such library")

    worker = Worker("test-worker", after_job=fail)
    for number in (1, 2):
        assert in_time(worker.run(partial(_given, number), translate)) == number
    worker.close()
    assert "after a job of test-worker" in caplog.text
