"""Loading through the session: now or later, stopped or failed; and what closing it leaves."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.base import TokenCount
from llm_magic.errors import (
    Interrupted,
    LLMMagicError,
    LoadFailed,
    LoadInProgress,
    ModelNotLoaded,
    OptionError,
)
from llm_magic.session import Session
from llm_magic.session.chats import Chat
from llm_magic.session.requests import Request
from llm_magic.types import Message, Reply
from tests.kernels import within_a_second
from tests.scripted import Hang, ScriptedBackend, scripted_session, stop_when
from tests.until import until

Pair = tuple[Session, ScriptedBackend]


@pytest.fixture
def scripted() -> Iterator[Pair]:
    with scripted_session(load=False) as pair:
        yield pair


def finished(session: Session, status: str) -> None:
    """Wait until a load that was started is over."""
    until(lambda: session.status().status == status, status)


def test_load_returns_the_model_and_what_was_unloaded(scripted: Pair) -> None:
    session, backend = scripted
    assert session.load("org/a", device="cpu", dtype="bf16").name == "a"
    result = session.load_with_details("org/b", name="alias")
    assert (result.info.name, [gone.name for gone in result.unloaded]) == ("alias", ["a"])
    assert session.load_with_details("alias").was_loaded
    assert backend.events == ["check org/a", "load a", "check org/b", "unload a", "load alias"]
    assert [info.name for info in session.models()] == ["big", "tiny"]
    assert {"big", "tiny"} <= {info.name for info in session.known_models("local")}
    assert session.unload().name == "alias"
    with pytest.raises(ModelNotLoaded):
        session.generate("?")


def test_model_can_be_a_path_and_no_other_object(scripted: Pair) -> None:
    session, _ = scripted
    assert session.load(Path("models") / "mine").name == "mine"
    wrong: list[tuple[str, Callable[[Any], object]]] = [
        ("the name of a model", session.load),
        ("the name of a model", lambda name: session.load("org/b", name=name)),
        ("the name of a model", session.use),
        ("the name of a model", session.unload),
        ("the name of a model", lambda name: session.generate("?", model=name)),
        ("the name of a chat", lambda name: session.generate("?", chat=name)),
    ]
    for value in (5, ["a"], ""):
        for what, call in wrong:
            with pytest.raises(OptionError, match=rf"^{re.escape(repr(value))} .* {what}\b"):
                call(value)
    assert [info.name for info in session.status().models] == ["mine"]
    assert session.chats.all() == []


def test_settings_are_the_defaults_of_a_load() -> None:
    with scripted_session(load=False, model="org/mine", device="cpu") as (session, backend):
        assert session.load().name == "mine"
        assert session.load_with_details("org/mine", device="cpu").was_loaded
        session.load(quantization="4bit")
        assert backend.events.count("load mine") == 2


def test_interrupt_stops_a_load_and_keeps_the_model_before_it(scripted: Pair) -> None:
    session, backend = scripted
    session.load("a")
    stop_when(backend.hang("check").reached)
    with pytest.raises(Interrupted, match="Stopped loading org/b"):
        session.load("org/b")
    backend.trouble.clear()
    assert backend.events[-1] == "check org/b cancelled"
    assert session.generate("still here").model == "a"


def test_wait_for_a_load_that_stops_slowly_ends_within_a_second(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load", deaf=True)
    stop_when(hang.reached)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        session.load("a")
    assert time.monotonic() - began < within_a_second()
    following = session.load_later("b")
    with pytest.raises(LoadInProgress, match="waiting for the end of a stopped one"):
        session.load_later("c")
    hang.go.set()
    assert following.result(5).info.name == "b"
    assert session.generate("hello").model == "b"


def test_interrupt_at_the_end_of_a_load_reports_that_it_is_loaded(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load")

    def interrupt() -> None:
        hang.go.set()
        finished(session, "Ready")
        while session.is_loading_in_background:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"^Stopped just after org/a was loaded\.$"):
        session.load_with_details("org/a", on_wait=interrupt)
    assert session.status().active_model == "a"
    hang = backend.hang("load")
    session.load_later("org/b")
    with pytest.raises(Interrupted, match=r"^Stopped just after the model was loaded\.$"):
        session.wait_for_load(interrupt)
    assert session.status().active_model == "b"


# -- later ----------------------------------------------------------------------------------------


def test_next_call_waits_for_a_load_in_the_background(scripted: Pair) -> None:
    session, backend = scripted
    asks: list[Callable[[], str | None]] = [
        lambda: session.generate("?").model,
        lambda: next(session.status().active_model for _chunk in session.stream("?")),
        lambda: session.dry_run(Request("?")).model,
        lambda: session.ask(Request("?")).model,
        lambda: session.unload().name,
        lambda: session.unload_all()[0].name,
        lambda: asyncio.run(session.agenerate("?")).model,
    ]
    for ask in asks:
        hang = backend.hang("load")
        session.load_later("org/tiny")
        assert session.status().status == "Loading"
        threading.Timer(0.02, hang.go.set).start()
        assert ask() == "tiny"
        session.unload_all()


def _release_waiting(hang: Hang) -> None:
    """Release a load half a second after the main thread began to wait for it."""
    usual = signal.getsignal(signal.SIGINT)
    until(lambda: signal.getsignal(signal.SIGINT) is not usual, "nothing waits")
    time.sleep(0.5)
    hang.go.set()


def test_times_include_the_wait_for_a_load(scripted: Pair) -> None:
    session, backend = scripted
    asks: list[Callable[[], object]] = [
        lambda: session.generate("?"),
        lambda: list(session.stream("?")),
        lambda: asyncio.run(session.agenerate("?")),
    ]
    for ask in asks:
        hang = backend.hang("check")
        session.load_later("org/tiny")
        threading.Thread(target=_release_waiting, args=(hang,)).start()
        ask()
        reply = session.last
        assert reply is not None
        assert reply.timing.first_token_s is not None
        assert reply.timing.total_s >= reply.timing.first_token_s > 0.15
        session.unload_all()


def test_time_of_load_is_from_the_call_to_the_end(scripted: Pair) -> None:
    session, backend = scripted
    for stage in ("check", "load"):
        hang = backend.hang(stage)

        def release(hang: Hang = hang) -> None:
            hang.reached.wait(30)
            time.sleep(0.2)
            hang.go.set()

        threading.Thread(target=release).start()
        began = time.perf_counter()
        info = session.load(f"org/{stage}")
        assert info.load_s is not None
        assert 0.15 < info.load_s <= time.perf_counter() - began
    earlier = session.load_with_details("org/a", began=time.perf_counter() - 5).info
    assert earlier.load_s is not None
    assert earlier.load_s > 5


def test_all_calls_of_an_async_cell_wait_for_it(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load")
    session.load_later("tiny")

    async def cell() -> list[str]:
        threading.Timer(0.02, hang.go.set).start()
        return [r.text for r in await asyncio.gather(*(session.agenerate(p) for p in "abc"))]

    assert asyncio.run(cell()) == ["a", "b", "c"]


def test_who_stops_waiting_does_not_stop_the_load(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load")
    session.load_later("tiny")
    stop_when(hang.reached)
    with pytest.raises(Interrupted, match="the model is still loading"):
        session.generate("?")

    async def cell() -> None:
        task = asyncio.create_task(session.agenerate("?"))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(cell())
    hang.go.set()
    assert session.generate("now").text == "now"


def test_a_second_load_is_refused_while_one_runs(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load")
    session.load_later("tiny")
    assert hang.reached.wait(5)
    for load in (session.load, session.load_later):
        with pytest.raises(LoadInProgress, match="tiny is being loaded"):
            load("other")
    hang.go.set()
    assert session.generate("?").model == "tiny"


@pytest.mark.parametrize("error", [LoadFailed("damaged"), RuntimeError("a bug")])
def test_a_failure_surfaces_once_in_the_next_call(scripted: Pair, error: Exception) -> None:
    session, backend = scripted
    calls: list[Callable[[], object]] = [
        lambda: session.generate("?"),
        lambda: asyncio.run(session.agenerate("?")),
    ]
    for call in calls:
        backend.trouble["load"] = error
        session.load_later("tiny")
        with pytest.raises(type(error), match=str(error)):
            call()
        with pytest.raises(ModelNotLoaded, match="No model is loaded"):
            call()
        backend.trouble.clear()
        session.load("tiny")
        assert session.generate("fine").text == "fine"
        session.unload()


def test_a_failure_is_history_once_another_model_is_loaded(scripted: Pair) -> None:
    session, backend = scripted
    backend.trouble["check"] = LoadFailed("there is no such model")
    session.load_later("typo")
    finished(session, "Failed")
    backend.trouble.clear()
    session.load("tiny")
    assert session.generate("?").model == "tiny"


# -- chats ----------------------------------------------------------------------------------------


def contents(chat: Chat) -> list[str]:
    return [text for turn in chat.turns for text in (turn.question.content, turn.answer.content)]


def test_a_chat_is_made_of_turns_by_cell(scripted: Pair) -> None:
    session, backend = scripted
    session.load("tiny")
    session.generate("first", chat="c", system="be brief")
    session.ask(Request("second", chat="c", key="cell 2")).result()
    assert [m.content for m in backend.requests[-1].messages] == [
        "be brief", "first", "first", "second",
    ]  # fmt: skip
    session.ask(Request("second, changed", chat="c", key="cell 2")).result()
    session.generate("first", chat="c")  # without a cell every call is a new turn
    (chat,) = session.chats.all()
    before = ["first", "first", "second, changed", "second, changed"]
    assert contents(chat) == [*before, "first", "first"]
    assert [m.content for m in backend.requests[-1].messages] == ["be brief", *before, "first"]
    assert session.reset("c") == ["c"]
    assert session.reset() == []


def test_what_failed_or_was_only_shown_changes_no_chat(scripted: Pair) -> None:
    session, backend = scripted
    session.load("tiny")
    session.generate("first", chat="c")
    before = contents(session.chats.all()[0])
    backend.will("half", LLMMagicError("broken"))
    with pytest.raises(LLMMagicError):
        session.generate("second", chat="c")
    backend.will("cut off")
    session.generate("second", chat="c")
    with pytest.raises(LLMMagicError):
        session.generate("second", chat="c", temperature=9)
    dry = session.dry_run(Request("second", chat="c", options={"temperature": 0}))
    assert contents(session.chats.all()[0]) == before
    assert len(session.chats.all()) == 1
    assert dry.messages == (
        Message("user", "first"), Message("assistant", "first"), Message("user", "second"),
    )  # fmt: skip
    assert (dry.model, dry.count) == ("tiny", TokenCount(3, 8192))
    assert dry.config.temperature == 0


# -- the end --------------------------------------------------------------------------------------


def test_closing_frees_everything_and_the_session_can_be_used_again(scripted: Pair) -> None:
    session, backend = scripted
    session.close()
    session.load("tiny")
    threads = {thread.name for thread in threading.enumerate()}
    assert "llm_magic-loop" in threads
    session.close()
    assert (backend.loaded, backend.events[-1]) == ([], "close")
    assert "llm_magic-loop" not in {thread.name for thread in threading.enumerate()}
    session.close()
    assert session.status().status == "Inactive"
    session.load("tiny")
    assert session.generate("again").text == "again"


def test_closing_ends_a_load_and_an_answer_that_run(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load")
    session.load_later("tiny")
    assert hang.reached.wait(5)
    session.close()
    assert "load tiny cancelled" in backend.events
    backend.trouble.clear()
    session.load("tiny")
    backend.will("a", answer := Hang())
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            session.generate("?")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it must end
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert answer.reached.wait(5)
    session.close()
    thread.join(5)
    assert (len(errors), backend.requests[-1].outcome) == (1, "closed")
    assert repr(session) == "<Session: Inactive, nothing loaded>"


def test_closing_ends_a_load_that_another_thread_waits_for_with_our_error(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load")
    with ThreadPoolExecutor(1) as threads:
        load = threads.submit(session.load, "tiny")
        assert hang.reached.wait(5)
        session.close()
        with pytest.raises(
            Interrupted, match=r"^llm\.close\(\) stopped this call before it was complete\.$"
        ):
            load.result(5)


def test_after_a_load_was_stopped_the_model_before_answers(scripted: Pair) -> None:
    session, backend = scripted
    session.load("org/a")
    asks: list[Callable[[], Reply]] = [
        lambda: session.generate("?"),
        lambda: asyncio.run(session.agenerate("?")),
    ]
    for ask in asks:
        hang = backend.hang("check")
        session.load_later("org/b")
        assert hang.reached.wait(5)
        session.stop_loading()
        assert ask().model == "a"
    hang = backend.hang("check")
    session.load_later("org/b")
    assert hang.reached.wait(5)
    session.stop_loading()
    assert session.unload().name == "a"
    with pytest.raises(ModelNotLoaded):
        session.generate("?")


def test_load_that_stops_slowly_is_cancelled_once(scripted: Pair) -> None:
    session, backend = scripted
    hang = backend.hang("load", deaf=True)
    session.load_later("org/a")
    assert hang.reached.wait(5)
    for _ in range(3):
        session.stop_loading()
        time.sleep(0.05)
        assert session.is_loading_in_background
        assert session.status().status == "Inactive"
    hang.go.set()
    assert session.load("org/b").name == "b"
    assert backend.events == ["check org/a", "load a", "load a cancelled", "check org/b", "load b"]
