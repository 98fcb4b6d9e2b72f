"""The panel in a real JupyterLab: one page and one kernel for all tests."""

from __future__ import annotations

import ast
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import GO_ON, HELD, SCRIPTED, WAIT, Panel, open_panel
from tests.kernels import within_a_second
from tests.until import until

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = pytest.mark.browser

_SETUP = f"""{SCRIPTED}
import pathlib, time
from tests.scripted import Hang, Pause
price = 12
def lines(start, end):
    return [step for n in range(start, end) for step in (f"line {{n}}\\n\\n", Pause(0.05))]
{HELD}"""
_REQUESTED = "[request.messages[-1].content for request in backend.requests]"
_SETUP_CELL, _PANEL_CELL, _FREE_CELL = range(3)


@pytest.fixture(scope="module")
def shared(lab_of_module: Lab) -> Panel:
    """Return one panel for the tests of this file."""
    lab_of_module.open([_SETUP, "%llm_panel", ""])
    lab_of_module.run(_SETUP_CELL)
    return open_panel(lab_of_module, _PANEL_CELL)


@pytest.fixture
def panel(shared: Panel) -> Panel:
    """Return the panel in its usual size, with an empty prompt box and no script left over."""
    shared.lab.page.set_viewport_size({"width": 1200, "height": 1400})
    shared.prompt().fill("")
    # An answer of the test before may still be written.
    shared.at(".llm-Ready").wait_for()
    (shared.lab.server.folder / GO_ON).unlink(missing_ok=True)
    run(shared, "backend.scripts.clear(); backend.requests.clear(); llm.generation.reset()")
    return shared


def run(panel: Panel, source: str) -> list[dict[str, Any]]:
    """Run Python code in the notebook's last cell and return its outputs."""
    panel.lab.write(_FREE_CELL, source)
    return panel.lab.run(_FREE_CELL)


def start(panel: Panel, source: str = "") -> None:
    """Begin to run the notebook's last cell, which waits for `finish` and then runs `source`."""
    (panel.lab.server.folder / GO_ON).unlink(missing_ok=True)
    panel.lab.write(_FREE_CELL, f"{WAIT}\n{source}")
    panel.lab.start(_FREE_CELL)
    status = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
    panel.lab.page.wait_for_function(f"() => {status} === 'busy'")


def finish(panel: Panel) -> None:
    """Let the cell that was started go on, and wait for its end."""
    go_on(panel)
    panel.lab.wait(_FREE_CELL)


def go_on(panel: Panel) -> None:
    """Let a cell or an answer that waits go on."""
    (panel.lab.server.folder / GO_ON).touch()


def requested(panel: Panel) -> list[str]:
    """Return the prompts that reached the backend."""
    (output,) = run(panel, _REQUESTED)
    prompts: list[str] = ast.literal_eval("".join(output["data"]["text/plain"]))
    return prompts


def value(control: Locator) -> float:
    return float(control.input_value())


def is_at_end(panel: Panel) -> bool:
    return bool(
        panel.at(".llm-scroll").evaluate(
            "box => box.scrollHeight > box.clientHeight + 50"
            " && box.scrollHeight - box.scrollTop - box.clientHeight < 4"
        )
    )


def top(panel: Panel) -> float:
    return float(panel.at(".llm-scroll").evaluate("box => box.scrollTop"))


def stands_still(panel: Panel) -> bool:
    """Return whether the box does not scroll for a while, as it does after a wheel."""
    before = top(panel)
    panel.lab.page.wait_for_timeout(300)
    return top(panel) == before


def test_conversation_follows_answer_until_reader_scrolls_up(panel: Panel) -> None:
    run(panel, "held(lines(0, 30), lines(30, 60) + whole_answer())")
    run(panel, "backend.will(*lines(0, 30)[::2], *whole_answer())")
    box = panel.at(".llm-scroll")
    panel.ask("a long answer")
    until(lambda: "line 29" in panel.answer() and is_at_end(panel), "it does not follow")
    assert box.get_attribute("aria-busy") == "true"
    box.hover()
    panel.lab.page.mouse.wheel(0, -150)
    until(lambda: not is_at_end(panel), "it cannot be scrolled up")
    until(lambda: stands_still(panel), "it scrolls on")
    before, text = top(panel), panel.answer()
    go_on(panel)
    until(lambda: "line 59" in panel.answer() and "token" in panel.answer(), "it does not end")
    assert panel.answer() != text
    assert top(panel) == before, "the reader was scrolled away"
    until(lambda: box.get_attribute("aria-busy") == "false", "no end is announced")
    panel.ask("another one")
    until(lambda: "another one" in panel.answer() and is_at_end(panel), "the next is not shown")
    assert panel.box.get_by_role("log", name="Conversation").is_visible()


# Scrolls the notebook until the prompt is at its lower edge.
_TO_THE_EDGE = """prompt => {
    const page = prompt.closest('.jp-WindowedPanel-outer');
    page.scrollTop += prompt.getBoundingClientRect().bottom - page.getBoundingClientRect().bottom;
    prompt.querySelector('textarea').focus({ preventScroll: true });
}"""
_IS_ABOVE_THE_EDGE = """box => box.getBoundingClientRect().bottom
    <= box.closest('.jp-WindowedPanel-outer').getBoundingClientRect().bottom"""


def is_on_screen(panel: Panel) -> bool:
    return bool(panel.at(".llm-scroll").evaluate(_IS_ABOVE_THE_EDGE))


@pytest.mark.parametrize("size", [(1200, 1000), (1500, 700), (700, 800)])
def test_page_scrolls_to_the_answer_until_reader_does_anything(
    panel: Panel, size: tuple[int, int]
) -> None:
    page, answer = panel.lab.page, panel.at(".llm-answer").filter(has_text="token")
    log = panel.at(".llm-scroll")
    run(panel, "backend.will(*lines(0, 3), *whole_answer())")
    run(panel, "held(lines(0, 10), lines(10, 20) + whole_answer())")
    page.set_viewport_size({"width": size[0], "height": size[1]})
    for question in (f"first in {size}", f"second in {size}"):
        panel.prompt().fill(question)
        panel.at(".llm-prompt").evaluate(_TO_THE_EDGE)
        page.keyboard.press("Control+Enter")
        panel.at(".llm-question").filter(has_text=question).wait_for()
        until(lambda: is_on_screen(panel), "it is below the page")
        if "first" in question:
            answer.filter(has_text="line 2").wait_for()
            until(lambda: is_on_screen(panel), "it grows below the page")
            until(lambda: log.get_attribute("aria-busy") == "false", "no end is announced")
    page.mouse.move(400, 400)
    page.mouse.wheel(0, -500)
    until(lambda: not is_on_screen(panel), "the page cannot be scrolled up")
    go_on(panel)
    answer.filter(has_text="line 19").wait_for()
    assert not is_on_screen(panel), "the page scrolls away from its reader"


def test_prompts_sent_at_once_are_not_glued_together(panel: Panel) -> None:
    prompt = panel.prompt()
    for text in ("first", "second"):
        prompt.press_sequentially(text)
        prompt.press("Control+Enter")
        panel.at(".llm-answer").filter(has_text=text).filter(has_text="token").wait_for()
    assert prompt.input_value() == ""
    assert requested(panel) == ["first", "second"]


def test_prompt_that_is_not_accepted_stays(panel: Panel) -> None:
    prompt = panel.prompt()
    panel.ask("a share of {price / 0}")
    alert = panel.box.get_by_role("alert")
    alert.wait_for()
    assert "division by zero" in alert.inner_text()
    assert "--" not in alert.inner_text()
    until(lambda: prompt.input_value() == "a share of {price / 0}", "the text is lost")
    assert requested(panel) == []
    panel.ask("")
    until(lambda: "The prompt is empty." in alert.inner_text(), "no complaint")


def test_prompt_whose_request_fails_returns_to_the_box(panel: Panel) -> None:
    prompt, alert = panel.prompt(), panel.box.get_by_role("alert")
    run(panel, "backend.will(ValueError('at once')); held([], [ValueError('later')])")
    panel.ask("mine")
    until(lambda: "at once" in "".join(alert.all_inner_texts()), "no error")
    until(lambda: prompt.input_value() == "mine", "the text is lost")
    assert "ended early" not in panel.answer()
    prompt.press("Control+Enter")
    until(lambda: prompt.input_value() == "", "it is not sent")
    prompt.press_sequentially("next")
    go_on(panel)
    until(lambda: "later" in "".join(alert.all_inner_texts()), "no error")
    until(lambda: prompt.input_value() == "mine\n\nnext", "a text is lost")
    panel.ask("fine")
    # Until then the answer of before is shown.
    panel.at(".llm-answer").filter(has_text="fine").filter(has_text="token").wait_for()
    assert (alert.count(), prompt.input_value()) == (0, "")


def test_variables_are_filled_in_with_notes(panel: Panel) -> None:
    panel.ask("{price:.2f} and {prize}")
    # Until then the answer of before is shown.
    panel.at(".llm-answer").filter(has_text="12.00").filter(has_text="token").wait_for()
    assert requested(panel) == ["12.00 and {prize}"]
    assert 'Note: {prize} was not replaced: prize is not defined. Did you mean "price"?' in (
        panel.answer()
    )


_SECONDS_UNTIL_QUEUED = """box => new Promise(resolve => {
    const started = performance.now();
    const queued = box.querySelector('.llm-prompt .llm-queued');
    new MutationObserver(() => {
        if (queued.textContent.startsWith('Queued')) resolve((performance.now() - started) / 1000);
    }).observe(queued, { childList: true });
    [...box.querySelectorAll('.llm-prompt button')].find(b => b.textContent === 'Send').click();
})"""


def test_prompt_waits_for_a_running_cell_and_can_be_withdrawn(panel: Panel) -> None:
    panel.prompt().fill("about {price}")
    start(panel)
    seconds = float(panel.box.evaluate(_SECONDS_UNTIL_QUEUED))
    assert seconds < within_a_second()
    assert "Queued: the kernel is running a cell." in panel.box.inner_text()
    panel.button("Withdraw").focus()
    panel.button("Withdraw").press("Enter")
    until(lambda: panel.prompt().input_value() == "about {price}", "the text is lost")
    focused = "box => document.activeElement === box"
    until(lambda: panel.prompt().evaluate(focused), "the box has no focus")
    finish(panel)
    assert requested(panel) == []
    start(panel, "price = 13")
    panel.prompt().press("Control+Enter")
    panel.button("Withdraw").wait_for()
    panel.prompt().press_sequentially("the next")
    finish(panel)
    until(lambda: "about 13" in panel.answer(), "it was not sent after the cell")
    until(panel.button("Withdraw").is_hidden, "it is still queued")
    assert panel.prompt().input_value() == "the next"
    assert requested(panel) == ["about 13"]


def test_click_during_a_cell_is_shown_as_queued(panel: Panel) -> None:
    start(panel, "price = 12")
    panel.button("Refresh list").click()
    notice = panel.box.get_by_role("status").filter(
        has_text="Queued: the kernel is running a cell."
    )
    notice.wait_for()
    finish(panel)
    notice.wait_for(state="hidden")


def test_sliders_and_magic_show_the_same_settings(panel: Panel) -> None:
    slider, field = panel.slider("temperature"), panel.number("temperature")
    until(lambda: (value(slider), value(field)) == (0.7, 0.7), "not the setting's value")
    slider.focus()
    slider.press("ArrowRight")
    until(lambda: value(field) == 0.75, "the field does not follow")
    until(lambda: "%llm_config temperature=0.75" in panel.box.inner_text(), "no magic is shown")
    run(panel, "%llm_config")
    assert re.search(r"temperature\s+0\.75 \*", panel.lab.text(_FREE_CELL))
    run(panel, "%llm_config temperature=0.25")
    until(lambda: (value(slider), value(field)) == (0.25, 0.25), "the slider does not follow")
    until(lambda: panel.at(".llm-changed").count() == 1, "it is not marked as changed")
    field.press("Control+a")
    field.press_sequentially("9")
    field.press("Enter")
    alert = panel.box.get_by_role("alert")
    alert.wait_for()
    until(lambda: "It must be 0 to 2." in alert.inner_text(), "it does not complain")
    assert value(field) == 9
    field.press("Control+a")
    field.press("Delete")
    field.press("Tab")
    until(lambda: field.input_value() == "0.25", "an empty field stays empty")
    until(lambda: alert.count() == 0, "the error stays")
    panel.check("temperature: model's own").click()
    until(lambda: slider.is_disabled() and field.is_disabled(), "it can still be moved")
    panel.check("temperature: model's own").click()
    until(slider.is_enabled, "it cannot be moved")
    slider.press("ArrowLeft")
    # JupyterLab does not keep the order of messages: the click must not overtake the value.
    until(lambda: "%llm_config temperature=0.65" in panel.box.inner_text(), "it is not set")
    until(panel.button("Reset").is_enabled, "there is nothing to take back")
    panel.button("Reset").click()
    until(lambda: value(field) == 0.7 and panel.at(".llm-changed").count() == 0, "no reset")


# The word is there for three seconds only: notes where it was.
_NOTE_COPIED = """() => {
    window.__copied = {};
    new MutationObserver(changes => changes.forEach(({target}) => {
        if (target.textContent !== 'Copied') return;
        window.__copied[target.closest('.llm-scroll') ? 'answer' : 'magic'] = true;
    })).observe(document.querySelector('.llm-panel'), {childList: true, subtree: true});
}"""


def test_answer_and_magic_can_be_copied(panel: Panel) -> None:
    page = panel.lab.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    run(panel, "backend.will(*whole_answer('**bold**\\n\\n- x'))")
    panel.ask("two\nlines")
    panel.at(".llm-answer").filter(has_text="bold").filter(has_text="token").wait_for()
    page.evaluate(_NOTE_COPIED)
    panel.button("Copy answer 1").click()
    read = "() => navigator.clipboard.readText()"
    until(lambda: page.evaluate(read) == "**bold**\n\n- x", "the answer is not copied")
    panel.button("Copy").click()
    until(lambda: page.evaluate(read) == "%%llm\ntwo\nlines", "the magic is not copied")
    until(lambda: page.evaluate("() => window.__copied.magic"), "it does not say so")
    # Without the permission, and without the API.
    page.context.clear_permissions()
    without = "{ value: undefined, configurable: true }"
    page.evaluate(f"() => Object.defineProperty(navigator, 'clipboard', {without})")
    page.evaluate(_NOTE_COPIED)
    panel.at(".llm-scroll").get_by_role("button", name="Copy answer").last.click()
    until(lambda: page.evaluate("() => window.__copied.answer"), "it does not say so")
    panel.prompt().focus()
    page.keyboard.press("Control+v")
    page.evaluate("() => delete navigator.clipboard")
    assert panel.prompt().input_value() == "**bold**\n\n- x"


def test_ctrl_enter_runs_no_cell_and_keys_do_not_reach_the_notebook(panel: Panel) -> None:
    prompt, before = panel.prompt(), panel.lab.sources()
    prompt.click()
    # Keys that delete, add and run cells where the notebook hears them.
    prompt.press_sequentially("ddabxyz")
    prompt.press("Control+Enter")
    until(lambda: "ddabxyz" in panel.answer(), "nothing was sent")
    field = panel.number("top k")
    field.click()
    for key in ("a", "b", "d", "d", "x"):
        field.press(key)
    slider = panel.slider("top k")
    slider.focus()
    for key in ("a", "b", "d", "d", "x", "ArrowDown", "ArrowUp"):
        slider.press(key)
    time.sleep(0.5)
    assert panel.lab.sources() == before
    assert panel.box.is_visible()
    assert slider.evaluate("element => document.activeElement === element"), "it lost the focus"


def test_panel_shows_answering_cell_and_how_to_stop_it(panel: Panel) -> None:
    panel.lab.write(_FREE_CELL, "backend.will('a ', Hang())\nllm.generate('?')")
    panel.lab.start(_FREE_CELL)
    until(lambda: "Answering" in panel.status(), "it is not shown")
    until(lambda: "A cell is answering: ■" in panel.box.inner_text(), "it does not say how to stop")
    panel.lab.interrupt()
    panel.at(".llm-Ready").wait_for(timeout=30_000)
    panel.lab.wait(_FREE_CELL)


def test_wrong_value_shows_what_is_allowed_at_its_field(panel: Panel) -> None:
    field, error = (
        panel.number("top p"),
        panel.at('.llm-number:has([aria-label="top p"]) .llm-wrong'),
    )
    for typed, text, expected in (
        ("7", "7", "top p: 7 is out of range. It must be 0 to 1."),
        # What is no number has no value in a page.
        ("-", "", "top p must be a number, 0 to 1."),
    ):
        field.press("Control+a")
        field.press_sequentially(typed)
        field.press("Tab")
        error.filter(has_text=expected).wait_for()
        assert error.get_attribute("role") == "alert"
        panel.ask(f"Another action after {typed}")
        panel.box.get_by_text(f"Nothing was sent. {expected}").wait_for()
        assert (field.input_value(), error.inner_text()) == (text, expected)
        assert field.get_attribute("aria-invalid") == "true"
        assert run(panel, "llm.generation.top_p")[0]["data"]["text/plain"] == "0.9"
    panel.button("Reset").click()
    until(lambda: field.input_value() == "0.9", "Reset does not restore the value in use")
    until(lambda: panel.box.get_by_role("alert").count() == 0, "the error stays after Reset")
    field.fill("7")
    field.press("Tab")
    error.filter(has_text="out of range").wait_for()
    field.fill("0.5")
    field.press("Tab")
    until(lambda: panel.box.get_by_role("alert").count() == 0, "the error stays")


def test_model_field_shows_what_a_cell_loaded(panel: Panel) -> None:
    model = panel.box.get_by_role("combobox", name="Model")
    until(lambda: model.input_value() == "tiny", "the loaded model is not shown")
    run(panel, "%llm_load org/other")
    until(lambda: model.input_value() == "org/other", "the new model is not shown")
    model.fill("what I type")
    run(panel, "%llm_load tiny")
    time.sleep(0.5)  # for a drawing that overwrites it
    assert model.input_value() == "what I type"
