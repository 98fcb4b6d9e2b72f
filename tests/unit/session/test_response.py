"""A response: iterated, awaited, updated, stopped, and what it holds at each moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from llm_magic.errors import GenerationFailed, GenerationStopped, Interrupted, OptionError
from llm_magic.session import Session
from llm_magic.session.interruptible_wait import held_back
from llm_magic.session.requests import Request
from llm_magic.session.response import Response
from llm_magic.types import Chunk
from tests.kernels import within_a_second
from tests.scripted import (
    Hang,
    Pause,
    ScriptedBackend,
    read,
    scripted_session,
    show,
    stop_when,
    whole_answer,
)

Pair = tuple[Session, ScriptedBackend]


@pytest.fixture
def scripted() -> Iterator[Pair]:
    with scripted_session() as pair:
        yield pair


def iterated(response: Response) -> str:
    return "".join(chunk.text for chunk in response)


def awaited(response: Response) -> str:
    async def cell() -> str:
        return (await response).text

    return asyncio.run(cell())


def iterated_async(response: Response) -> str:
    async def cell() -> str:
        return "".join([chunk.text async for chunk in response])

    return asyncio.run(cell())


def updated(response: Response) -> str:
    for _ in response.updates():
        pass
    return response.text


def result(response: Response) -> str:
    return response.result().text


WAYS = [iterated, awaited, iterated_async, updated, result]
READ = pytest.mark.parametrize("get", WAYS)


@READ
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_every_way_to_read_gives_the_same_text(
    scripted: Pair, get: Callable[[Response], str], late: bool, background: bool
) -> None:
    session, backend = scripted
    backend.will("one", *([] if late else [Pause(0.05)]), *whole_answer(" two", " three"))
    response = session.ask(Request("?", chat="c"), background=background)
    if late:
        response.wait(5)
    assert get(response) == "one two three"
    assert (response.state, response.done, response.tokens) == ("done", True, 3)
    assert response.reply is session.last
    assert get(response) == "one two three", "read again"
    assert [len(chat.turns) for chat in session.chats.all()] == [1], "recorded once"
    assert session.answering == ()


@READ
def test_every_way_to_read_raises_the_error(scripted: Pair, get: Callable[[Response], str]) -> None:
    session, backend = scripted
    backend.will("half", Pause(0.02), GenerationFailed("The model broke."))
    response = session.ask(Request("?"))
    if get is not updated:
        with pytest.raises(GenerationFailed, match="The model broke") as caught:
            get(response)
        assert caught.value.reply is response.reply
    else:
        assert get(response) == "half"
    assert (response.state, str(response.error)) == ("failed", "The model broke.")
    assert session.last is response.reply
    assert (response.text, session.answering) == ("half", ())


@READ
def test_cancel_ends_every_way_to_read(scripted: Pair, get: Callable[[Response], str]) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will("half", hang)
    response = session.ask(Request("?"))

    def cancel() -> None:
        hang.reached.wait(5)
        response.cancel()

    threading.Thread(target=cancel).start()
    if get is not updated:
        message = "^The answer was stopped after 1 token; the answer so far is in llm.last"
        with pytest.raises(GenerationStopped, match=message) as caught:
            get(response)
        assert caught.value.reply is response.reply
    else:
        assert get(response) == "half"
    assert (response.state, backend.requests[0].outcome) == ("stopped", "closed")
    assert response.reply is not None
    assert response.reply.finish_reason == "cancelled"


def test_wrong_request_is_refused_before_it_starts(scripted: Pair) -> None:
    session, backend = scripted
    with pytest.raises(OptionError):
        session.ask(Request("?", options={"temperature": 9}))
    assert (backend.requests, session.answering, session.jobs.all) == ([], (), ())


def test_response_runs_without_a_reader(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(*whole_answer(*"abc"))
    response = session.ask(Request("?"))
    response.wait(5)
    assert (response.text, response.state, session.last) == ("abc", "done", response.reply)


def test_many_short_chunks_take_little_more_memory_than_their_text(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will(hang)
    response = session.ask(Request("?"), background=True)
    assert hang.reached.wait(5)
    tracemalloc.start()
    for number in range(200_000):
        # Texts that Python does not share.
        response.add(Chunk(f"{number:05d}"))
    used, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(response.text) == 1_100_000
    assert used < 8_000_000, used


def test_late_reader_gets_the_text_so_far_as_one_chunk(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will("a", "b", hang, *whole_answer("c"))
    response = session.ask(Request("?"))
    assert hang.reached.wait(5)
    texts: list[str] = []
    for chunk in response:
        texts.append(chunk.text)
        hang.go.set()
    assert [text for text in texts if text] == ["ab", "c"]
    assert response.result().usage.completion_tokens == 3


def test_text_is_what_the_reader_has_seen(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(*map(str, range(1000)), Hang())
    seen = ""
    for chunk in session.stream("?", chat="c"):
        seen += chunk.text
        if len(seen) > 500:
            break
    assert session.last is not None
    assert session.last.text == seen
    assert session.chats.messages("c")[-1].content == seen


def test_leaving_a_block_stops_the_response_unless_it_is_in_the_background(scripted: Pair) -> None:
    session, backend = scripted
    for background in (False, True):
        backend.will("a", hang := Hang())
        with session.ask(Request("?"), background=background) as response:
            assert hang.reached.wait(5)
        assert (response.state == "stopped") is not background
    session.jobs.stop()
    response.wait(5)
    assert response.state == "stopped"


@pytest.mark.parametrize("background", [False, True])
def test_timeout_leaves_the_response_running(scripted: Pair, background: bool) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will("a", hang, *whole_answer("b"))
    response = session.ask(Request("?"), background=background)
    with pytest.raises(TimeoutError, match=r"is still running after 0\.2 s"):
        response.result(timeout=0.2)
    assert not response.done
    hang.go.set()
    assert response.result(timeout=5).text == "ab"


def test_interrupt_of_waiting_leaves_a_background_response_running(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will("a", hang, *whole_answer("b"))
    response = session.ask(Request("?"), background=True)
    for wait in (response.result, lambda: show(response, lambda: None), lambda: list(response)):
        stop_when(hang.reached)
        with pytest.raises(Interrupted, match=r"Stopped waiting; job 1 continues\."):
            wait()
        assert not response.done
    hang.go.set()
    assert response.result().text == "ab"


@pytest.mark.parametrize("read", [lambda job: list(job.updates()), list])
def test_interrupt_of_reading_a_finished_background_response_is_raised(
    scripted: Pair, read: Callable[[Response], object]
) -> None:
    session, _ = scripted
    job = session.ask(Request("?"), background=True)
    job.result(5)

    def interrupted() -> None:
        with held_back():
            os.kill(os.getpid(), signal.SIGINT)
            read(job)

    with pytest.raises(Interrupted, match=r"^Stopped waiting\.$"):
        interrupted()


def test_between_chunks_the_signal_belongs_to_the_user(scripted: Pair) -> None:
    session, backend = scripted
    backend.will("a", Hang())
    seen: list[type[BaseException]] = []

    def press(_chunk: Chunk) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except BaseException as error:
            seen.append(type(error))
            raise

    with pytest.raises(KeyboardInterrupt):
        read(session.stream("?"), press)
    assert seen == [KeyboardInterrupt]
    assert backend.requests[0].outcome == "closed"


@pytest.mark.parametrize("hold", [contextlib.nullcontext, held_back])
def test_interrupt_of_a_slow_display_keeps_what_was_shown(
    scripted: Pair, hold: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    session, backend = scripted
    backend.will("a", Hang())
    response = session.ask(Request("?"))
    began = time.monotonic()

    def draw() -> None:
        if response.text:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    with pytest.raises(Interrupted, match="Stopped after 1 token") as caught, hold():
        show(response, draw)
    assert time.monotonic() - began < within_a_second()
    assert caught.value.reply is response.reply is session.last
    assert backend.requests[0].outcome == "closed"


def test_leaving_the_updates_early_does_not_stop_the_response(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will("a", hang, *whole_answer("b"))
    response = session.ask(Request("?"))
    for _ in response.updates():
        if response.text:
            break
    hang.go.set()
    assert response.result(5).text == "ab"


@pytest.mark.parametrize("way", ["stream", "updates"])
def test_interrupt_with_the_last_chunk_still_counts(scripted: Pair, way: str) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will("a", hang, *whole_answer())
    texts: list[str] = []

    def take(text: str) -> None:
        texts.append(text)
        hang.go.set()
        for response in session.answering:
            response.wait(5)
        session.interrupt()

    def ask() -> None:
        if way == "stream":
            read(session.stream("?"), lambda chunk: take(chunk.text))
        else:
            response = session.ask(Request("?"))
            show(response, lambda: take(response.text) if response.text else None)

    with pytest.raises(Interrupted, match="just after the answer was complete"):
        ask()
    assert texts[0] == "a"
    assert session.last is not None
    assert session.last.finish_reason == "stop"


def test_deaf_work_is_left_behind_with_the_text_so_far(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang(deaf=True)
    backend.will("half", hang, " more")
    stop_when(hang.reached)
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        session.generate("?", chat="c")
    assert time.monotonic() - began < within_a_second()
    assert caught.value.reply is session.last
    assert session.last is not None
    assert session.last.text == "half"
    hang.go.set()
    time.sleep(0.05)
    assert session.last.text == "half", "what comes later is ignored"
    assert len(session.chats.get("c").turns) == 1


def test_updates_come_at_once_and_then_at_the_pace_of_the_display(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(
        *[step for word in range(100) for step in (str(word), Pause(0.002))], *whole_answer()
    )
    response = session.ask(Request("?"))
    updates, began = 0, time.monotonic()
    for _ in response.updates(lambda: 0.05 if response.text else 0.0):
        updates += 1
    assert response.done
    assert updates <= 4 + (time.monotonic() - began) / 0.05


def test_several_readers_follow_a_background_response(scripted: Pair) -> None:
    session, backend = scripted
    backend.will("a", Pause(0.05), *whole_answer("b"))
    response = session.ask(Request("?"), background=True)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda get=get: texts.append(get(response))) for get in WAYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert texts == ["ab"] * len(WAYS)
