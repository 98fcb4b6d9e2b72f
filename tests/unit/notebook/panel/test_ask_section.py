"""The prompt of a panel: ask, see the answer grow, stop it, talk on, take it along."""

from __future__ import annotations

import re

import pytest

from llm_magic.errors import GenerationFailed, LLMMagicError, PromptTooLong, RequestFailed
from llm_magic.notebook.panel import ControlPanel
from llm_magic.session.requests import Request
from llm_magic.types import Chunk, ModelInfo
from tests.panels import (
    Scripted,
    copied_text,
    is_idle,
    press,
    put,
    scripted_panel,
    send,
    shown_error,
    visible_text,
)
from tests.scripted import Hang, Pause, whole_answer
from tests.until import until


def answer(panel: ControlPanel) -> str:
    return visible_text(panel.asking.answer.value)


def turns(panel: ControlPanel) -> str:
    """Return the text above the answer, with ``[tiny]`` for the figures of the model."""
    return re.sub(r"tiny · [^M]*? · 269 MB", "[tiny]", visible_text(panel.asking.turns.value))


def ask(panel: ControlPanel, text: str) -> None:
    send(panel, text)
    until(lambda: is_idle(panel) and "token" in answer(panel))


def keep_conversation(panel: ControlPanel) -> None:
    put(panel.asking.chat, True)
    until(lambda: panel.asking.clear.layout.display == "")


def chats(scripted: Scripted) -> list[tuple[str, str]]:
    return [
        (turn.question.content, turn.answer.content)
        for chat in scripted.session.chats.all()
        for turn in chat.turns
    ]


def test_prompts_are_sent_one_after_the_other(scripted: Scripted) -> None:
    panel = scripted.panel
    ask(panel, "one two")
    send(panel, "three four")
    until(lambda: is_idle(panel) and "three four three four" in answer(panel))
    assert [prepared.messages[-1].content for prepared in scripted.backend.requests] == [
        "one two", "three four",
    ]  # fmt: skip
    assert scripted.session.last is not None
    assert "7 → 2 tokens" in answer(panel)
    assert panel.as_magic.layout.display == ""
    assert scripted.session.chats.all() == []


def test_the_answer_grows_and_is_markdown(scripted: Scripted) -> None:
    panel, hang = scripted.panel, Hang()
    scripted.backend.will("**bo", "ld**", hang, *whole_answer(" and `code`"))
    send(panel, "?")
    until(lambda: "<strong>bold</strong>" in panel.asking.answer.value)
    assert (copied_text(panel), panel.asking.take.code) == ("", "")
    assert (panel.asking.prompt.disabled, panel.asking.stop.disabled) == (True, False)
    hang.go.set()
    until(lambda: "<code" in panel.asking.answer.value)
    until(lambda: copied_text(panel) == "**bold** and `code`")


def test_answer_without_text_shows_that_it_is_waited_for(scripted: Scripted) -> None:
    panel, hang = scripted.panel, Hang()
    scripted.backend.will(hang, *whole_answer("x"))
    send(panel, "why?")
    assert "why? tiny · waiting for the first token …" in answer(panel)
    until(lambda: "Answering" in visible_text(panel.status.value))
    until(lambda: "waiting for the first token … 4 s" in answer(panel), "the seconds are not shown")
    hang.go.set()
    until(lambda: is_idle(panel) and "waiting for" not in answer(panel))
    until(lambda: "Ready" in visible_text(panel.status.value))


@pytest.mark.parametrize("before", [(), ("half an ", "answer ")])
def test_stop_ends_answer_and_labels_it(scripted: Scripted, before: tuple[str, ...]) -> None:
    panel, hang = scripted.panel, Hang()
    scripted.backend.will(*before, hang)
    send(panel, "?")
    assert hang.reached.wait(5)
    until(lambda: "".join(before).strip() in answer(panel))
    press(panel.asking.stop)
    until(lambda: is_idle(panel))
    until(lambda: scripted.backend.requests[-1].outcome == "closed")
    label = "stopped by you" if before else "stopped before the first word"
    until(lambda: label in answer(panel), "it does not say that it was stopped")
    assert not any(word in answer(panel) for word in ("waiting for", "…"))
    until(lambda: copied_text(panel) == "".join(before).strip())
    assert shown_error(panel) == ""
    ask(panel, "and now?")


def test_immediate_stop_ends_the_answer(scripted: Scripted) -> None:
    panel = scripted.panel
    for _ in range(20):
        scripted.backend.will(Pause(0.001), "word ", Hang())
        send(panel, "?")
        press(panel.asking.stop)
        until(lambda: is_idle(panel) and not scripted.session.answering)
        until(lambda: "stopped" in answer(panel) and "waiting for" not in answer(panel))


def test_status_is_correct_while_stopped_model_finishes(scripted: Scripted) -> None:
    panel, hang = scripted.panel, Hang(deaf=True)
    scripted.backend.will("half ", hang)
    send(panel, "?")
    assert hang.reached.wait(5)
    press(panel.asking.stop)
    panel.draw()
    hint = visible_text(panel.asking.note.value) + str(panel.asking.stop.tooltip)
    hang.go.set()
    assert "cell" not in hint, "no cell is answering"
    until(lambda: is_idle(panel))


@pytest.mark.parametrize("error", [GenerationFailed("The model broke."), ZeroDivisionError("zero")])
def test_error_is_shown_and_prompt_stays(scripted: Scripted, error: Exception) -> None:
    panel = scripted.panel
    scripted.backend.will("half", error)
    send(panel, "?")
    until(lambda: is_idle(panel))
    until(lambda: str(error) in shown_error(panel), "nobody hears of the error")
    assert "half" in answer(panel)
    assert "ended early" in answer(panel)
    ask(panel, "again")
    assert shown_error(panel) == ""


@pytest.mark.parametrize(
    "error",
    [PromptTooLong.measured("tiny", 9000, 8192), RequestFailed("Error 500.", status=500)],
)
def test_prompt_without_an_answer_returns_to_its_box(
    scripted: Scripted, error: LLMMagicError, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel, sent, hang = scripted.panel, list[object](), Hang()
    monkeypatch.setattr(panel.asking.prompt, "send", sent.append)
    scripted.backend.will(hang, error)
    send(panel, "my prompt")
    hang.go.set()
    until(lambda: is_idle(panel) and error.problem in shown_error(panel))
    assert answer(panel) == "", "its text is in the box"
    panel.draw()
    returned = [{"sent": "1", "accepted": True}, {"sent": "1", "failed": True}]
    assert sent == returned
    sent.clear()
    scripted.backend.will(error)
    send(panel, "my prompt")
    until(lambda: len(sent) == 2 or sent == [{"sent": "1", "accepted": False}])
    assert len(sent) == 1 or sent == returned, "it failed before the page learned of its acceptance"


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(scripted: Scripted, prompt: str) -> None:
    send(scripted.panel, prompt)
    assert "The prompt is empty." in shown_error(scripted.panel)
    assert "%%llm" not in shown_error(scripted.panel), "there is no cell here"
    assert (scripted.backend.requests, scripted.panel.magic.value) == ([], "")
    assert scripted.panel.as_magic.layout.display == "none", "a heading above nothing"


def test_prompt_without_model_shows_next_step() -> None:
    with scripted_panel(load=False) as scripted:
        send(scripted.panel, "?")
        assert "No model is loaded." in shown_error(scripted.panel)
        hang = scripted.backend.hang("load")
        press(scripted.panel.loading.load)
        assert hang.reached.wait(5)
        send(scripted.panel, "at once?")
        assert shown_error(scripted.panel) == ""
        assert "at once? default · queued until the model is loaded …" in answer(scripted.panel)
        hang.go.set()
        until(lambda: is_idle(scripted.panel) and "token" in answer(scripted.panel))
        assert [r.messages[-1].content for r in scripted.backend.requests] == ["at once?"]


def test_prompt_of_a_load_that_fails_shows_the_error() -> None:
    with scripted_panel(load=False) as scripted:
        hang = scripted.backend.hang("load")
        press(scripted.panel.loading.load)
        assert hang.reached.wait(5)
        send(scripted.panel, "?")
        press(scripted.panel.loading.stop)
        until(lambda: is_idle(scripted.panel))
        until(lambda: "No model is loaded" in shown_error(scripted.panel))


def test_earlier_turn_shows_that_it_was_stopped(scripted: Scripted) -> None:
    panel, hang = scripted.panel, Hang()
    keep_conversation(panel)
    scripted.backend.will("half an answer", hang)
    send(panel, "first")
    until(lambda: "half an answer" in answer(panel))
    press(panel.asking.stop)
    until(lambda: is_idle(panel))
    ask(panel, "second")
    assert turns(panel) == "first half an answer [tiny] · stopped by you; incomplete"


def test_turn_of_a_cell_is_below_the_earlier_turn_of_the_panel(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    keep_conversation(panel)
    ask(panel, "first")
    session.ask(Request("second", chat="panel", key="cell")).result()
    until(lambda: turns(panel) == "first first [tiny] second second tiny")
    assert (answer(panel), panel.asking.note.value) == ("", "")
    ask(panel, "third")
    assert turns(panel) == "first first [tiny] second second tiny"
    assert "third third" in answer(panel)


def test_footer_names_the_control_of_the_limit(scripted: Scripted) -> None:
    panel = scripted.panel
    scripted.backend.will(*whole_answer("half", finish="length"))
    put(panel.asking.chat, True)
    ask(panel, "?")
    assert answer(panel).endswith("cut off at 1 token (max new tokens)")
    ask(panel, "next")
    assert turns(panel) == "? half [tiny] · cut off at 1 token (max new tokens)"
    scripted.backend.will(*whole_answer("all", finish="length", prompt_tokens=8191))
    ask(panel, "full")
    assert answer(panel).endswith("cut off at 1 token (the context is full)")
    ask(panel, "next")
    assert "all [tiny] · cut off at 1 token (the context is full)" in turns(panel)


def test_last_answer_stays_until_the_next_one_has_words(scripted: Scripted) -> None:
    panel, hang = scripted.panel, Hang()
    scripted.backend.will(*whole_answer("old\n\n```\ncode\n```"))
    ask(panel, "first")
    scripted.backend.will(hang, RequestFailed("Error 500.", status=500))
    send(panel, "second")
    assert "first old" in turns(panel), "the answer on the screen is gone"
    assert "second tiny · waiting for the first token …" in answer(panel)
    hang.go.set()
    until(lambda: is_idle(panel) and "Error 500" in shown_error(panel))
    assert ("first old" in turns(panel), answer(panel)) == (True, "")
    assert panel.asking.take.code == "code"
    assert panel.as_magic.layout.display == "none", "it offers what has just failed"
    scripted.backend.will("half", ValueError("broken"))
    send(panel, "third")
    until(lambda: is_idle(panel) and "broken" in shown_error(panel))
    assert ("first old" in turns(panel), "third half" in answer(panel)) == (True, True)
    ask(panel, "fourth")
    assert turns(panel) == ""
    assert panel.as_magic.layout.display == ""


def test_missing_end_of_an_answer_has_a_note(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = scripted.panel

    async def load(_plan: object, name: str, _report: object) -> ModelInfo:
        return ModelInfo(name, "openai", server="localhost:1")

    monkeypatch.setattr(scripted.backend, "load", load)
    scripted.session.load("served", keep=True)
    scripted.backend.will(*whole_answer("half", finish="truncated"))
    send(panel, "?")
    until(lambda: "ended early; incomplete" in answer(panel))
    expected = "localhost:1 did not send the end of the answer. Send the prompt again."
    assert expected in answer(panel)


def test_a_second_question_waits_for_the_first(scripted: Scripted) -> None:
    hang = Hang()
    scripted.backend.will("a", hang)
    send(scripted.panel, "first")
    send(scripted.panel, "second")
    assert "Stop it first" in shown_error(scripted.panel)
    assert scripted.panel.magic.value == "%%llm\nfirst"
    hang.go.set()
    until(lambda: is_idle(scripted.panel))
    assert len(scripted.backend.requests) == 1
    assert shown_error(scripted.panel) == "", "no answer is being written any more"


def test_reasoning_is_folded(scripted: Scripted) -> None:
    scripted.backend.will(Chunk(reasoning="let me see", tokens=1, time=1.0), *whole_answer("Paris"))
    ask(scripted.panel, "?")
    assert "<details" in scripted.panel.asking.answer.value
    until(lambda: copied_text(scripted.panel) == "Paris")


def test_first_block_of_code_is_offered(scripted: Scripted) -> None:
    code = "def f(x):\n    if x:\n\n        return 'a'\n    return {}"
    scripted.backend.will(*whole_answer(f"Here:\n\n```python\n{code}\n```\n\n```\nother\n```"))
    ask(scripted.panel, "?")
    until(lambda: scripted.panel.asking.take.code == code)
    ask(scripted.panel, "no code")
    until(lambda: scripted.panel.asking.take.code == "")


def test_chat_sends_earlier_turns_until_cleared(scripted: Scripted) -> None:
    panel = scripted.panel
    keep_conversation(panel)
    ask(panel, "first")
    panel.draw()
    ask(panel, "second")
    contents = [message.content for message in scripted.backend.requests[-1].messages]
    assert contents == ["first", "first", "second"]
    assert turns(panel) == "first first [tiny]"
    assert "second" in answer(panel)
    press(panel.asking.clear)
    assert (scripted.session.chats.all(), panel.asking.turns.value) == ([], "")
    assert (panel.asking.answer.value, panel.asking.note.value) == ("", "")
    ask(panel, "third")
    assert [m.content for m in scripted.backend.requests[-1].messages] == ["third"]
    put(panel.asking.chat, False)
    ask(panel, "alone")
    assert [m.content for m in scripted.backend.requests[-1].messages] == ["alone"]
    assert chats(scripted) == [("third", "third")]


def test_stale_turns_are_neither_shown_nor_sent(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    keep_conversation(panel)
    session.ask(Request("one", chat="panel", key="cell")).result()
    for question in ("two", "three"):
        ask(panel, question)
    assert turns(panel) == "one one tiny two two [tiny]"
    session.ask(Request("uno", chat="panel", key="cell")).result()
    until(lambda: turns(panel) == "uno uno tiny")
    ask(panel, "four")
    contents = [message.content for message in scripted.backend.requests[-1].messages]
    assert contents == ["uno", "uno", "four"]


def test_the_counter_is_of_the_conversation_against_the_context(scripted: Scripted) -> None:
    panel = scripted.panel
    ask(panel, "alone in no conversation")
    keep_conversation(panel)
    assert visible_text(panel.asking.note.value) == "", "that was no part of it"
    ask(panel, "one two")
    assert visible_text(panel.asking.note.value) == "9 tokens of context used of 8,192 (0%)"
    scripted.session.unload()
    until(lambda: visible_text(panel.asking.note.value) == "", "it is of no model")


def test_clear_during_an_answer_removes_its_turn(scripted: Scripted) -> None:
    panel, hang = scripted.panel, Hang()
    keep_conversation(panel)
    ask(panel, "first")
    scripted.backend.will("second", hang, *whole_answer(" end"))
    send(panel, "second")
    assert hang.reached.wait(5)
    if not panel.asking.clear.disabled:
        press(panel.asking.clear)
        hang.go.set()
        until(lambda: not scripted.session.answering)
        assert chats(scripted) == []
    hang.go.set()


def test_clearing_an_empty_chat_is_no_error(scripted: Scripted) -> None:
    keep_conversation(scripted.panel)
    press(scripted.panel.asking.clear)
    assert (shown_error(scripted.panel), scripted.panel.magic.value) == ("", "")


def test_system_prompt_is_that_of_the_session(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    put(panel.asking.system, "Be brief.")
    ask(panel, "?")
    messages = scripted.backend.requests[-1].messages
    assert [(message.role, message.content) for message in messages] == [
        ("system", "Be brief."), ("user", "?"),
    ]  # fmt: skip
    session.generation.system = "Be long."
    until(lambda: panel.asking.system.value == "Be long.")
    press(panel.settings.reset)
    until(lambda: panel.asking.system.value == "")


def test_answer_has_note_about_limit_above_the_context(scripted: Scripted) -> None:
    scripted.session.generation.max_new_tokens = 9000
    ask(scripted.panel, "?")
    assert "Note: max_new_tokens 9,000 is more than the context" in answer(scripted.panel)


def test_new_panel_shows_a_conversation_that_exists(scripted: Scripted) -> None:
    scripted.session.ask(Request("first", chat="panel", key="cell")).result()
    again = ControlPanel(scripted.session)
    assert again.asking.chat.value
    assert visible_text(again.asking.turns.value) == "first first tiny"
    ask(again, "second")
    contents = [message.content for message in scripted.backend.requests[-1].messages]
    assert contents == ["first", "first", "second"]


def test_references_are_filled_in_and_notes_are_shown() -> None:
    names = {"price": 12}
    with scripted_panel() as scripted:
        panel = ControlPanel(scripted.session, lambda _text: names)
        ask(panel, "{price:.2f} {prize}")
        assert scripted.backend.requests[-1].messages[-1].content == "12.00 {prize}"
        assert "Note: {prize} was not replaced: prize is not defined" in answer(panel)
        assert panel.magic.value == "%%llm\n{price:.2f} {prize}"
        ask(panel, "none")
        assert "Note:" not in answer(panel)


@pytest.mark.parametrize(
    ("text", "accepted"), [("fine", True), ("", False), ("{price / 0}", False)]
)
def test_page_learns_whether_a_prompt_is_accepted(
    monkeypatch: pytest.MonkeyPatch, text: str, accepted: bool
) -> None:
    sent: list[object] = []
    with scripted_panel() as scripted:
        panel = ControlPanel(scripted.session, lambda _text: {"price": 12})
        monkeypatch.setattr(panel.asking.prompt, "send", sent.append)
        send(panel, text)
        until(lambda: is_idle(panel))
        assert sent == [{"sent": "1", "accepted": accepted}]
        assert bool(shown_error(panel)) != accepted
        assert not shown_error(panel).count("--literal")
