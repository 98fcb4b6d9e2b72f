"""A map from its call to its result: order, errors in place, interrupts, laziness."""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_magic.backends.thread_bridge import ThreadBridge
from llm_magic.errors import (
    GenerationFailed,
    GenerationStopped,
    Interrupted,
    ModelNotLoaded,
    OptionError,
    PromptError,
    RequestFailed,
    ServerUnreachable,
)
from llm_magic.session import Session
from llm_magic.session.map.mapped import Mapped
from llm_magic.session.map.outcome import Outcome
from llm_magic.session.map.progress import Counts
from llm_magic.session.map.rows import rows_of
from llm_magic.session.map.run import MapRun
from llm_magic.session.map.sender import PreparedRow
from llm_magic.types import Chunk, Message, Reply, Usage
from tests.kernels import within_a_second
from tests.scripted import Hang, ScriptedBackend, scripted_session, stop_when, whole_answer
from tests.until import loop_threads, until

Pair = tuple[Session, ScriptedBackend]


@pytest.fixture
def scripted() -> Iterator[Pair]:
    with scripted_session() as pair:
        yield pair


def test_answers_are_replies_in_the_order_of_the_rows(scripted: Pair) -> None:
    session, backend = scripted
    # The first rows take the longest.
    mapped = session.map("say {item}", range(50), workers=8, system="be brief", temperature=0.1)
    assert list(mapped) == [f"say {i}" for i in range(50)]
    first = mapped[0]
    assert isinstance(first, Reply)
    assert (first.model, first.finish_reason, first.usage.prompt_tokens) == ("tiny", "stop", 7)
    assert (mapped[-1], mapped[1:3]) == ("say 49", ["say 1", "say 2"])
    assert sorted(call.messages[-1].content for call in backend.requests)[0] == "say 0"
    assert backend.requests[0].messages[0] == Message("system", "be brief")
    assert backend.requests[0].config.temperature == 0.1
    assert (mapped.usage.answers, mapped.usage.completion_tokens) == (50, 100)
    assert session.usage().total.answers == 50
    assert (mapped.pending, mapped.errors, mapped.cut, mapped.missing) == ([], {}, [], [])
    assert session.last is None
    lines = repr(mapped).splitlines()
    assert lines[0].startswith("<Mapped: 50 rows, 100 tokens, ")
    assert lines[1:] == [*(f"  {i}: 'say {i}'" for i in range(5)), "  … 45 more rows"]
    with pytest.raises(IndexError):
        mapped[50]
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(OptionError, match=r"Use list\(mapped\) or mapped\.frame\(\)\.$"):
            copied(mapped)
    assert pickle.loads(pickle.dumps(list(mapped))) == list(mapped)


def test_usage_of_0_along_with_words_is_unknown(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(Chunk("two words", usage=Usage(5, 0)), Chunk(finish_reason="stop"))
    backend.will(Chunk("", usage=Usage(5, 0), finish_reason="stop"))
    mapped = session.map("{item}", ["a", "b"], workers=1)
    replies = [reply for reply in mapped if reply is not None]
    assert [reply.usage.completion_tokens for reply in replies] == [None, 0]


def test_bad_row_stays_in_its_place_and_can_be_sent_again(scripted: Pair) -> None:
    session, backend = scripted
    backend.will("half", GenerationFailed("It broke."))
    backend.will("no", Chunk(finish_reason="length", usage=Usage(5, 1)))
    backend.will("no end")
    backend.will(ValueError("odd\nmore"))
    mapped = session.map("{item}", ["a", "b", "c", "d", None, "e"])
    assert list(mapped) == [None, "no", "no end", None, None, "e"]
    assert mapped.errors == {"It broke.": [0], "ValueError: odd": [3]}
    assert (mapped.cut, mapped.missing) == ([1, 2], [4])
    assert [mapped[i].finish_reason for i in (1, 2)] == ["length", "truncated"]  # type: ignore[union-attr]
    assert "6 rows, 2 cut, 2 failed, 1 missing" in repr(mapped)
    assert "1 row failed: It broke." in repr(mapped)
    progress = mapped.progress
    assert (progress.answered, progress.cut, progress.failed, progress.missing) == (1, 2, 2, 1)
    usage = session.usage().total
    assert (usage.answers, usage.failed) == (5, 2)
    sent = len(backend.requests)
    assert mapped.retry() is mapped
    assert list(mapped) == ["a", "no", "no end", "d", None, "e"]
    assert (mapped.errors, len(backend.requests)) == ({}, sent + 2)
    assert (mapped.progress.done, mapped.progress.failed) == (5, 0)
    assert session.usage().total.answers == 7
    mapped.retry()
    assert len(backend.requests) == sent + 2


def test_on_error_stop_raises_the_error_of_the_row(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(*whole_answer("fine"))
    backend.will(GenerationFailed("It broke."))
    with pytest.raises(GenerationFailed, match="It broke") as caught:
        session.map("{item}", ["a", "b", "c"], on_error="stop")
    assert list(caught.value.mapped) == ["fine", None, None]
    assert caught.value.mapped.pending == [1, 2]

    def prompt(item: str) -> str:
        if item == "b":
            raise RuntimeError("not b")
        return item

    # The row that was finished when the map ended is not sent again.
    assert list(session.map(prompt, ["a", "b", "c"])) == ["fine", None, "c"]
    with pytest.raises(RuntimeError, match="not b"):
        session.map(prompt, ["a", "b", "c"], on_error="stop")


def test_error_of_all_rows_ends_the_map(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(ModelNotLoaded("tiny is no longer loaded."))
    with pytest.raises(ModelNotLoaded) as caught:
        session.map("{item}", range(100))
    assert len(caught.value.mapped.pending) == 100
    assert len(backend.requests) == 1


def test_server_that_cannot_be_reached_ends_the_map_and_the_same_call_goes_on(
    scripted: Pair,
) -> None:
    session, backend = scripted
    backend.will(*whole_answer("first"))
    for _ in range(10):
        backend.will(ServerUnreachable("Nothing there."))
    backend.will(*whole_answer("between"))
    for _ in range(20):
        backend.will(ServerUnreachable("Nothing there."))
    with pytest.raises(ServerUnreachable, match="Nothing there") as caught:
        session.map("{item}", range(100))
    assert len(backend.requests) == 32
    assert caught.value.mapped.errors == {"Nothing there.": [*range(1, 11), *range(12, 31)]}
    assert caught.value.mapped.pending == list(range(31, 100))
    again = session.map("{item}", range(100))
    assert again[:2] + again[11:13] == ["first", "1", "between", "12"]
    assert len(backend.requests) == 32 + 98


def test_row_that_is_always_rejected_fails_in_the_end(scripted: Pair) -> None:
    session, backend = scripted
    for _ in range(25):
        backend.will(
            Chunk(backoff_s=0.001), RequestFailed("Too many.", status=429, retry_after=0.001)
        )
    mapped = session.map("{item}", ["a", "b"])
    assert mapped.errors == {"Too many.": [0]}
    assert mapped[1] == "b"
    assert len(backend.requests) < 30


def test_wrong_call_sends_nothing(scripted: Pair) -> None:
    session, backend = scripted
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"workers": 0}, "workers=0 is not a number of at least 1"),
        ({"sample": True}, "sample=True is not a number"),
        ({"rate": "fast"}, "rate='fast' is not a rate. Use a form such as 500/min"),
        ({"on_error": "skip"}, "on_error='skip' is neither keep nor stop"),
        ({"chat": "c"}, "A map has no chat"),
        ({"temperature": 9}, "temperature"),
        ({"temprature": 1}, 'Did you mean "temperature"'),
        ({"retry_failed": True}, "retry_failed needs save"),
        ({"model": "other"}, "other is not loaded"),
    ]
    for about, message in wrong:
        with pytest.raises((OptionError, ModelNotLoaded), match=message):
            session.map("{item}", [1], **about)
    with pytest.raises(PromptError, match='Did you mean "item"'):
        session.map("{itme}", [1])
    assert backend.requests == []
    assert list(session.map("{item}", [])) == []


@pytest.mark.parametrize("data", [{"data": "Where is {item}?"}, {}])
def test_data_before_the_prompt_is_an_error_with_the_order(
    scripted: Pair, data: dict[str, str]
) -> None:
    session, backend = scripted
    with pytest.raises(
        OptionError, match=r"prompt comes first: llm\.map\(PROMPT, DATA\)\. .*{item}"
    ):
        session.map(["Rome"], **data)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="The data is None"):
        session.map("Where is {item}?")
    with pytest.raises(
        OptionError, match=r"The prompt is empty\. It comes first: llm\.map\(PROMPT, DATA\)"
    ):
        session.map()
    with pytest.raises(
        OptionError, match=r"'prompts' is not an option\. For several prompts: llm\.map"
    ):
        session.map(prompts=["Rome"])  # type: ignore[call-arg]
    with pytest.raises(
        OptionError, match=r"'worker' is not an option\. Did you mean \"workers\"\?"
    ):
        session.map("{item}", ["Rome"], worker=2)  # type: ignore[call-arg]
    assert not backend.requests


def test_iterator_is_read_on_the_callers_thread_and_only_a_little_ahead(scripted: Pair) -> None:
    session, backend = scripted
    read: list[int] = []
    threads: set[threading.Thread] = set()

    def rows() -> Iterator[int]:
        for i in itertools.count():
            read.append(i)
            threads.add(threading.current_thread())
            yield i

    replies = session.imap("say {item}", rows())
    assert [next(replies) for _ in range(3)] == ["say 0", "say 1", "say 2"]
    replies.close()  # type: ignore[attr-defined]
    assert len(read) < 60
    assert len(backend.requests) <= len(read)
    assert threads == {threading.main_thread()}
    sent = len(backend.requests)
    time.sleep(0.05)
    assert len(backend.requests) == sent
    assert list(session.imap("{item}", iter(["a", "", "b"]))) == ["a", None, "b"]


def test_lazy_map_yields_the_answers_before_an_error_of_the_data(scripted: Pair) -> None:
    session, _ = scripted

    def rows() -> Iterator[int]:
        yield from range(5)
        raise OSError("the file is gone")

    replies = session.imap("say {item}", rows())
    assert [next(replies) for _ in range(5)] == [f"say {i}" for i in range(5)]
    with pytest.raises(OSError, match="the file is gone"):
        next(replies)


def test_error_of_the_iterator_keeps_what_was_sent(scripted: Pair) -> None:
    def rows() -> Iterator[str]:
        yield from "abcdef"
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        scripted[0].map("{item}", rows())


@pytest.mark.parametrize("is_async", [False, True])
def test_interrupt_keeps_what_is_finished(scripted: Pair, is_async: bool) -> None:
    session, backend = scripted
    hang = Hang()
    for i in range(10):
        backend.will(*whole_answer(f"answer {i}"))
    backend.will(hang)
    began = time.perf_counter()
    if is_async:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(_cancelled(session, hang))
    else:
        stop_when(hang.reached)
        with pytest.raises(Interrupted) as caught:
            session.map("{item}", range(1_000))
        mapped = caught.value.mapped
        assert list(mapped[:11]) == [*(f"answer {i}" for i in range(10)), None]
        assert len(mapped.pending) == 990
        assert str(caught.value).startswith("Stopped after 10 of 1,000 rows. They are kept")
    assert time.perf_counter() - began < within_a_second()
    assert len(backend.requests) == 11
    assert backend.requests[-1].outcome == "closed"
    assert session.usage().total.answers == 10


def test_interrupt_of_a_wait_reads_no_more_rows(
    scripted: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next row may take minutes."""
    session, backend = scripted
    backend.will(Hang())
    waited, read = ThreadBridge.wait, list[int]()

    def rows() -> Iterator[int]:
        for i in range(9):
            read.append(i)
            time.sleep(0.1)  # so that there is a wait after each row
            yield i

    def wait(bridge: ThreadBridge[object], timeout: float, pause: float = 0.0) -> bool:
        if read:
            signal.raise_signal(signal.SIGINT)
        return waited(bridge, timeout, pause)

    monkeypatch.setattr(ThreadBridge, "wait", wait)
    with pytest.raises(Interrupted):
        session.map("{item}", rows())
    assert read == [0]


async def _cancelled(session: Session, hang: Hang) -> None:
    task = asyncio.create_task(session.amap("{item}", range(1_000)))
    while not hang.reached.is_set():
        await asyncio.sleep(0.005)
    task.cancel()
    await task


def test_awaited_map_runs_beside_other_tasks(scripted: Pair) -> None:
    session, _backend = scripted

    async def both() -> list[Any]:
        maps = (session.amap("{item}", data) for data in (["a", "b"], ["c"]))
        return [list(one) for one in await asyncio.gather(*maps)]

    assert asyncio.run(both()) == [["a", "b"], ["c"]]


def test_running_map_shows_its_progress_and_can_be_stopped(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will(*whole_answer("one"))
    backend.will(hang)
    run = session.start_map("{item}", ["a", "b", "c", ""])
    assert (run.state, backend.requests) == ("running", [])
    with run:
        for _ in run.updates():
            if hang.reached.is_set():
                break
        progress = run.progress
        assert (progress.total, progress.done, progress.answered, progress.running) == (4, 1, 1, 1)
        (latest,) = progress.latest
        assert (latest.position, latest.prompt, latest.outcome.text) == (0, "a", "one")
        assert (progress.completion_tokens, run.mapped[0], run.mapped[1]) == (1, "one", None)
        assert "tiny, running" in repr(run)
    assert run.state == "stopped"
    with pytest.raises(GenerationStopped, match="Stopped after 1 of 4 rows") as caught:
        run.result()
    assert caught.value.mapped.pending == [1, 2, 3]
    done = session.start_map("{item}", ["d"])
    assert list(done.result()) == ["d"]
    assert (done.state, done.total, done.progress.eta_s) == ("done", 1, 0.0)


def test_background_map_starts_no_loop_after_the_session_was_closed(scripted: Pair) -> None:
    session, _ = scripted
    reads, goes_on = threading.Event(), threading.Event()

    def rows() -> Iterator[int]:
        yield 0
        reads.set()
        assert goes_on.wait(10)
        yield 1

    session.start_map("{item}", rows()).start_in_background()
    assert reads.wait(10)
    session.close()
    goes_on.set()
    until(lambda: "llm_magic-map" not in [thread.name for thread in threading.enumerate()])
    assert loop_threads() == []


def test_background_map_needs_no_cell(scripted: Pair) -> None:
    session, _backend = scripted
    run = session.start_map("{item}", range(30)).start_in_background()
    run.wait(60)
    assert list(run.mapped) == [str(i) for i in range(30)]


def test_rows_of_a_background_map_are_read_once_while_others_wait(scripted: Pair) -> None:
    session, _backend = scripted

    def prompt(item: int) -> str:
        # Other threads run meanwhile.
        time.sleep(0.002)
        return f"{item}"

    run = session.start_map(prompt, range(60))
    session.jobs.add(run)
    assert list(run.start_in_background().result()) == [str(i) for i in range(60)]

    async def wait() -> Mapped:
        awaited = session.start_map(prompt, range(60, 120))
        session.jobs.add(awaited)
        return await awaited.start_in_background()

    assert list(asyncio.run(wait())) == [str(i) for i in range(60, 120)]
    assert list(asyncio.run(_awaited(run))) == [str(i) for i in range(60)]
    assert list(asyncio.run(_awaited(session.start_map(prompt, [7])))) == ["7"]


async def _awaited(run: MapRun) -> Mapped:
    return await run


def test_interrupt_of_a_retry_ends_it_also_for_a_job(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(GenerationFailed("It broke."))
    run = session.start_map("{item}", ["a", "b"], workers=1)
    session.jobs.add(run)
    mapped = run.start_in_background().result()
    assert list(mapped) == [None, "b"]
    hang = Hang()
    backend.will(hang)
    stop_when(hang.reached)
    with pytest.raises(Interrupted, match="Stopped after"):
        mapped.retry()
    assert (run.done, run.state, mapped.pending) == (True, "stopped", [0])


def test_retry_right_after_the_end_of_a_job_loses_no_row(scripted: Pair) -> None:
    session, backend = scripted
    for _ in range(200):
        backend.will(GenerationFailed("It broke."))
        run = session.start_map("{item}", ["a", "b"], workers=1, temperature=1)
        session.jobs.add(run)
        assert list(run.start_in_background().result().retry()) == ["a", "b"]


def test_unload_waits_for_a_map(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will(hang, *whole_answer("late"))
    run = session.start_map("{item}", ["a", "b"])
    assert not session.mapping
    run.start_in_background()
    assert hang.reached.wait(5)
    assert list(session.mapping) == [run]
    assert (run.short_name, run.amount) == ("a map", "0 of 2 rows")
    waited: list[object] = []

    def go_on() -> None:
        waited.append(session.answers_of())
        hang.go.set()

    session.unload(on_wait=go_on)
    assert waited[0] == (run,)
    assert list(run.mapped) == ["late", "b"]
    assert not session.mapping


def test_sample_estimates_all_rows(scripted: Pair) -> None:
    session, backend = scripted
    mapped = session.map("{item}", ["one", "two words"] * 500, sample=10)
    assert len(mapped) == len(backend.requests) == 10
    estimate = mapped.estimate
    assert estimate is not None
    assert (estimate.rows, estimate.prompt_tokens, estimate.cost) == (1_000, 7_000, None)
    assert 1_000 < (estimate.completion_tokens or 0) < 2_000
    assert estimate.seconds >= estimate.least_seconds > 0
    assert "estimate for all 1,000 rows: 7,000 prompt tokens, 1," in repr(mapped)
    assert session.map("{item}", ["one"]).estimate is None


@pytest.mark.parametrize(
    ("at_once", "rate", "seconds"),
    [
        # 4 rows of 3 s each at once, and 1 s for the start: 100 rows need 25 times as long together.
        (4, math.inf, (1 + 75, 1 + 75)),
        (20, math.inf, (1 + 15, 1 + 75)),
        # One after another, they would have taken 12 s: more of them ran at once at first.
        (1, math.inf, (100, 100)),
        (20, 2.0, (50, 1 + 75)),
        (20, 0.5, (200, 200)),
    ],
)
def test_estimate_counts_the_rows_that_run_at_once(
    at_once: int, rate: float, seconds: tuple[float, float]
) -> None:
    counts, rows = Counts(), rows_of(list(range(4)))
    for position in range(4):
        outcome = Outcome("a", "stop", Usage(5, 2), seconds=3.0)
        counts.add(PreparedRow(position, position, ()), outcome, is_sent=True)
    counts.finished_at = counts.started + 4.0
    mapped = Mapped(rows, [Outcome("a", "stop")] * 4, counts, ("tiny", "local"), lambda _: None)
    mapped.sampled_from, mapped.at_once, mapped.rate = 100, at_once, rate
    estimate = mapped.estimate
    assert estimate is not None
    assert (estimate.least_seconds, estimate.seconds) == pytest.approx(seconds)
    assert (estimate.prompt_tokens, estimate.completion_tokens) == (500, 200)
