"""Two panels, panels and magics, threads, and a session that goes: they never disagree."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from llm_magic.notebook.panel import ControlPanel
from llm_magic.session.event_loop import LoopStream
from tests.kernels import within_a_second
from tests.panels import (
    Scripted,
    everything,
    is_idle,
    press,
    put,
    send,
    shown_error,
    visible_text,
)
from tests.scripted import Hang, whole_answer
from tests.until import loop_threads, until


@pytest.fixture
def other(scripted: Scripted) -> ControlPanel:
    """Return a second panel of the same session."""
    return ControlPanel(scripted.session)


def test_two_panels_show_the_same_settings_and_status(
    scripted: Scripted, other: ControlPanel
) -> None:
    panel = scripted.panel
    put(panel.settings.numbers["temperature"], 0.2)
    until(lambda: other.settings.numbers["temperature"].value == 0.2)
    assert other.settings.numbers["temperature"].changed
    put(other.settings.texts["stop"], "END")
    until(lambda: panel.settings.texts["stop"].value == "END")
    press(other.settings.reset)
    until(lambda: panel.settings.numbers["temperature"].value == 0.7)
    press(other.loading.unload)
    until(lambda: "Inactive" in visible_text(panel.status.value))
    until(lambda: panel.loading.unload.disabled)


def test_two_panels_continue_one_conversation(scripted: Scripted, other: ControlPanel) -> None:
    for panel, question in (
        (scripted.panel, "first"),
        (other, "second"),
        (scripted.panel, "third"),
    ):
        put(panel.asking.chat, True)
        send(panel, question)
        until(lambda: is_idle(scripted.panel) and is_idle(other))
    contents = [message.content for message in scripted.backend.requests[-1].messages]
    assert contents == ["first", "first", "second", "second", "third"]


def test_the_answer_of_one_panel_can_be_stopped_in_the_other(
    scripted: Scripted, other: ControlPanel
) -> None:
    hang = Hang()
    scripted.backend.will("a", hang)
    send(scripted.panel, "?")
    assert hang.reached.wait(5)
    until(lambda: not other.asking.stop.disabled)
    assert "cell" not in visible_text(other.asking.note.value), "no cell is answering"
    press(other.asking.stop)
    until(lambda: is_idle(scripted.panel) and is_idle(other), "the button does nothing")


def test_starting_answer_of_a_panel_is_not_shown_as_a_cell(
    scripted: Scripted, other: ControlPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = LoopStream.start
    seen: list[str] = []

    def slow(stream: LoopStream[Any]) -> None:
        start(stream)
        # The answer is there, and what began it has not come back yet: others draw meanwhile.
        assert hang.reached.wait(5)
        drawing = threading.Thread(target=draw)
        drawing.start()
        drawing.join(0.1)

    def draw() -> None:
        other.draw()
        seen.append(visible_text(other.asking.note.value))

    hang = Hang()
    scripted.backend.will("a", hang)
    monkeypatch.setattr(LoopStream, "start", slow)
    send(scripted.panel, "?")
    until(lambda: seen == ["An answer is being written: Stop ends it."], str(seen))
    press(other.asking.stop)
    until(lambda: is_idle(scripted.panel) and is_idle(other))


def test_stop_ends_the_answer_of_a_cell(scripted: Scripted) -> None:
    hang, finished = Hang(), threading.Event()
    scripted.backend.will("half", hang)

    def cell() -> None:
        with pytest.raises(BaseException, match=r"Stopped after 1 token;"):
            scripted.session.generate("?")
        finished.set()

    thread = threading.Thread(target=cell)
    thread.start()
    assert hang.reached.wait(5)
    until(lambda: "A cell is answering" in visible_text(scripted.panel.asking.note.value))
    assert not scripted.panel.asking.stop.disabled
    press(scripted.panel.asking.stop)
    assert finished.wait(within_a_second())
    thread.join()
    until(lambda: is_idle(scripted.panel) and scripted.panel.asking.note.value == "")


def test_a_panel_asks_while_a_cell_does(scripted: Scripted) -> None:
    hang = Hang()
    scripted.backend.will("cell", hang, *whole_answer(" done"))
    thread = threading.Thread(target=scripted.session.generate, args=("?",))
    thread.start()
    assert hang.reached.wait(5)
    send(scripted.panel, "from the panel")
    until(
        lambda: "from the panel from the panel" in visible_text(scripted.panel.asking.answer.value)
    )
    hang.go.set()
    thread.join(5)
    until(lambda: is_idle(scripted.panel))
    assert scripted.session.last is not None
    assert scripted.session.last.text == "cell done"


def test_callbacks_of_other_threads_during_an_answer(
    scripted: Scripted,
) -> None:
    panel, failures = scripted.panel, list[BaseException]()

    def subshell(number: int) -> None:
        try:
            for step in range(1, 15):
                put(panel.settings.numbers["top_k"], number * 100 + step)
                put(panel.asking.chat, step % 2 == 0)
                panel.loading.refresh()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=subshell, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for question in ("one two three", "four"):
        assert scripted.session.generate(question).text == question
        send(panel, question)
        until(lambda: is_idle(panel), within=10)
    for thread in threads:
        thread.join(20)
    assert failures == []
    until(lambda: panel.settings.numbers["top_k"].value == scripted.session.generation.top_k)
    assert shown_error(panel) == ""


def test_load_in_a_thread_and_unload_in_another(scripted: Scripted) -> None:
    for _ in range(5):
        worker = threading.Thread(target=press, args=(scripted.panel.loading.unload,))
        worker.start()
        worker.join(5)
        assert scripted.session.status().models == ()
        press(scripted.panel.loading.load)
        until(lambda: not scripted.panel.loading.unload.disabled)


def test_panel_of_closed_session_shows_that_it_is_closed(
    scripted: Scripted, other: ControlPanel
) -> None:
    scripted.session.close()
    for panel in (scripted.panel, other):
        assert "Closed" in visible_text(panel.status.value)
        assert "Run %llm_panel again" in visible_text(panel.status.value)
        for button in (panel.loading.load, panel.loading.list, panel.asking.prompt):
            assert button.disabled


def test_closed_panel_ignores_all_actions(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    session.close()
    before = everything(panel)
    put(panel.loading.backend, "vllm")
    put(panel.loading.options["base_url"], "http://localhost:1")
    put(panel.settings.numbers["temperature"], 0.1)
    put(panel.settings.texts["stop"], "END")
    put(panel.asking.chat, True)
    send(panel, "hello?")
    panel.request_draw()
    panel.draw()
    assert everything(panel) == before
    assert session.generation.changed == frozenset(), "it changes the session that came after it"
    assert panel.loading.load.disabled
    assert loop_threads() == [], "it woke the session up again"


def test_closing_during_changes_leaves_the_panel_closed(scripted: Scripted) -> None:
    for _ in range(10):
        scripted.session.load("org/tiny")
        panel = ControlPanel(scripted.session)
        scripted.backend.will(*whole_answer(*["word "] * 200))
        send(panel, "?")
        scripted.session.close()
        assert "Closed" in visible_text(panel.status.value)
        threading.Event().wait(0.05)
        assert "Closed" in visible_text(panel.status.value), "drawn over"


def test_closed_panel_stops_listening(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    session = scripted.session
    called_back: list[object] = []

    def counted(name: str) -> None:
        register = getattr(session, name)

        def registered(callback: Callable[[], None]) -> Callable[[], None]:
            called_back.append(callback)
            remove = register(callback)

            def removed() -> None:
                called_back.remove(callback)
                remove()

            return removed

        monkeypatch.setattr(session, name, registered)

    counted("listen")
    counted("when_closed")
    for _ in range(3):
        panel = ControlPanel(session)
        assert len(called_back) == 2
        panel.retire()
    assert called_back == []


def test_cell_that_waits_for_its_first_token_is_shown(scripted: Scripted) -> None:
    hang = Hang()
    scripted.backend.will(hang, *whole_answer("x"))
    thread = threading.Thread(target=scripted.session.generate, args=("?",))
    thread.start()
    assert hang.reached.wait(5)
    try:
        until(
            lambda: "Answering" in visible_text(scripted.panel.status.value),
            "nobody told the panel",
        )
        until(lambda: not scripted.panel.asking.stop.disabled)
        scripted.session.load("org/big", keep=True)
        expected = "Answering tinyactive: big · local"
        until(lambda: expected in visible_text(scripted.panel.status.value))
        assert "also loaded" not in visible_text(scripted.panel.status.value)
    finally:
        hang.go.set()
        thread.join(5)
