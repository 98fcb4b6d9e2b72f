"""The panel in a real JupyterLab: with mouse and keyboard, on the real small model and a scripted one."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED, Panel, open_panel, until

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = pytest.mark.browser


def value(control: Locator) -> float:
    return float(control.input_value())


def test_panel_loads_prompts_and_stops_real_model(lab: Lab, model_cache: Path) -> None:
    lab.open(["%load_ext llm_magic", "%llm_panel", "%llm_config"])
    lab.run(0)
    panel = open_panel(lab, 1)
    panel.button("Load").click()
    panel.at(".llm-Ready").wait_for(timeout=120_000)
    until(lambda: "SmolLM2-135M" in panel.status(), "no model is named")
    result = panel.at(".llm-result")
    until(lambda: bool(re.search(r"ready in [\d.]+ s", result.inner_text())), "nothing is result")
    panel.ask("Write a very long story about a ship, in many chapters.")
    until(lambda: len(panel.answer()) > 80, "no text", 60)
    early = panel.answer()
    until(lambda: len(panel.answer()) > len(early) + 40, "it does not grow", 60)
    assert panel.button("Stop").is_enabled(), "the answer came at once"
    until(lambda: "tokens/s now" in panel.status(), "no speed")
    panel.button("Stop").click()
    panel.at(".llm-Ready").wait_for(timeout=10_000)
    until(lambda: "stopped by you" in panel.answer(), "it does not say that it was stopped", 10)
    stopped = panel.answer()
    time.sleep(1)
    assert panel.answer() == stopped, "it goes on"
    panel.button("Unload").click()
    panel.at(".llm-Inactive").wait_for(timeout=30_000)


def test_sliders_and_magic_show_the_same_settings(lab: Lab) -> None:
    lab.open([SCRIPTED, "%llm_panel", "%llm_config", "%llm_config temperature=0.25"])
    lab.run(0)
    panel = open_panel(lab, 1)
    slider, field = panel.slider("temperature"), panel.number("temperature")
    until(lambda: (value(slider), value(field)) == (0.7, 0.7), "not the setting's value")
    slider.focus()
    slider.press("ArrowRight")
    until(lambda: value(field) == 0.75, "the field does not follow")
    until(lambda: "%llm_config temperature=0.75" in panel.box.inner_text(), "no magic is shown")
    lab.run(2)
    assert re.search(r"temperature\s+0\.75 \*", lab.text(2))
    lab.run(3)
    until(lambda: (value(slider), value(field)) == (0.25, 0.25), "the slider does not follow")
    until(lambda: panel.at(".llm-changed").count() == 1, "it is not marked as changed")
    field.press("Control+a")
    field.press_sequentially("9")
    field.press("Enter")
    alert = panel.box.get_by_role("alert")
    alert.wait_for()
    until(lambda: "It must be 0 to 2." in alert.inner_text(), "it does not complain")
    until(lambda: value(field) == 0.25, "the wrong number stays")
    field.press("Control+a")
    field.press("Delete")
    field.press("Tab")
    until(lambda: field.input_value() == "0.25", "an empty field stays empty")
    panel.check("temperature: model's own").click()
    until(lambda: slider.is_disabled() and field.is_disabled(), "it can still be moved")
    panel.check("temperature: model's own").click()
    until(slider.is_enabled, "it cannot be moved")
    slider.press("ArrowLeft")
    until(panel.button("Reset").is_enabled, "there is nothing to take back")
    panel.button("Reset").click()
    until(lambda: value(field) == 0.7 and panel.at(".llm-changed").count() == 0, "no reset")


def test_two_panels_show_the_same(lab: Lab) -> None:
    lab.open([SCRIPTED, "%llm_panel", "%llm_panel"])
    lab.run(0)
    one, two = open_panel(lab, 1), open_panel(lab, 2)
    one.slider("top k").focus()
    one.slider("top k").press("ArrowLeft")
    until(lambda: value(two.number("top k")) == 49, "the other does not follow")
    two.button("Reset").click()
    until(lambda: value(one.number("top k")) == 50, "the first does not follow")
    one.check("Keep the conversation").click()
    two.check("Keep the conversation").click()
    one.ask("hello there")
    until(lambda: "hello there" in two.at(".llm-scroll").inner_text(), "the other does not show it")


CODE = 'def f(x: int) -> dict[str, int]:\n    if x:\n\n        return {"a": (x)}\n    return {}'


@pytest.mark.parametrize("keys", [False, True])
def test_code_is_put_into_the_next_cell_and_not_run(lab: Lab, keys: bool) -> None:
    answer = f"Here:\n\n```python\n{CODE}\n```\nThat is it."
    will = f"{SCRIPTED}\nbackend.will(*whole_answer({answer!r}))"
    lab.open([will, "%llm_panel", "'after'", "'last'"])
    lab.run(0)
    panel = open_panel(lab, 1)
    panel.ask("code?")
    put = panel.button("Put into next cell")
    put.wait_for()
    if keys:
        lab.page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCellIndex = 3")
        put.focus()
        put.press("Enter")
    else:
        put.click()
    until(lambda: len(lab.sources()) == 5, "there is no new cell")
    until(lambda: lab.sources()[2] == CODE, f"{lab.sources()}")
    time.sleep(0.5)
    assert lab.sources()[2:] == [CODE, "'after'", "'last'"]
    assert lab.cell(2).locator(".jp-InputPrompt").inner_text().strip() == "[ ]:"


def test_answer_and_magic_can_be_copied(lab: Lab) -> None:
    lab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    lab.open([f"{SCRIPTED}\nbackend.will(*whole_answer('**bold**\\n\\n- x'))", "%llm_panel"])
    lab.run(0)
    panel = open_panel(lab, 1)
    panel.ask("two\nlines")
    panel.button("Copy answer 1").click()
    read = "() => navigator.clipboard.readText()"
    until(lambda: lab.page.evaluate(read) == "**bold**\n\n- x", "the answer is not copied")
    panel.button("Copy").click()
    until(lambda: lab.page.evaluate(read) == "%%llm\ntwo\nlines", "the magic is not copied")
    until(lambda: "Copied" in panel.box.inner_text(), "it does not say so")


def test_ctrl_enter_runs_no_cell_and_keys_do_not_reach_the_notebook(lab: Lab) -> None:
    lab.open([SCRIPTED, "%llm_panel", "ran = True"])
    lab.run(0)
    panel = open_panel(lab, 1)
    prompt = panel.prompt()
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
    assert lab.sources() == [SCRIPTED, "%llm_panel", "ran = True"]
    assert panel.box.is_visible()
    assert slider.evaluate("element => document.activeElement === element"), "it lost the focus"


def test_panel_shows_answering_cell_and_how_to_stop_it(lab: Lab) -> None:
    lab.open([SCRIPTED, "%llm_panel", "from tests.scripted import Hang\nbackend.will('a ', Hang())\n"
              "llm.generate('?')"])  # fmt: skip
    lab.run(0)
    panel = open_panel(lab, 1)
    lab.start(2)
    until(lambda: "Answering" in panel.status(), "it is not shown")
    until(lambda: "A cell is answering: ■" in panel.box.inner_text(), "it does not say how to stop")
    lab.interrupt()
    panel.at(".llm-Ready").wait_for(timeout=5000)


_SESSION = "window.jupyterapp.shell.currentWidget.sessionContext"
_ICONS = """box => [box, ...box.querySelectorAll('.jupyter-widgets-disconnected')].filter(
    one => !['none', 'normal'].includes(getComputedStyle(one, '::before').content)
).length"""


def test_panel_without_its_kernel_shows_what_to_run(lab: Lab) -> None:
    busy = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    lab.open([SCRIPTED, "%llm_panel", busy])
    for end in ("session.kernel.restart()", "shutdown()"):
        lab.run(0)
        panel = open_panel(lab, 1)
        panel.ask("hello there")
        panel.at(".llm-answer").filter(has_text="tokens").wait_for()
        lab.start(2)
        lab.output(2).get_by_text("begun").wait_for()
        panel.ask("waits for {time}")
        panel.button("Withdraw").wait_for()
        lab.page.evaluate(f"() => {{ {_SESSION}.{end}; }}")
        alert = panel.box.get_by_role("alert").filter(visible=True)
        alert.filter(has_text="Run %load_ext llm_magic and %llm_panel again.").wait_for()
        assert panel.prompt().input_value() == "waits for {time}", "the prompt is lost"
        shown = panel.box.inner_text()
        assert "hello there" in shown, "the conversation is lost"
        assert not [word for word in ("Ready", "Queued", "Load", "Send") if word in shown.split()]
        assert panel.box.evaluate(_ICONS) == 0, "marks of ipywidgets at its parts"
        lab.page.wait_for_function(f"() => {_SESSION}.session?.kernel?.status !== 'busy'")


def test_a_saved_notebook_is_readable_without_its_kernel(lab: Lab) -> None:
    lab.open([f"{SCRIPTED}\n%llm_config temperature=0.25", "%llm_panel"])
    lab.run(0)
    panel = open_panel(lab, 1)
    assert not lab.page.locator(".llm-static").first.is_visible()
    panel.ask("remember me")
    lab.reopen()
    again = Panel(lab, lab.output(1).locator(".llm-panel"))
    again.box.wait_for()
    until(lambda: value(again.number("temperature")) == 0.25, "its values are gone")
    lab.command("docmanager:save")
    lab.shut_down_kernels()
    saved: dict[str, Any] = json.loads((lab.server.folder / lab.name).read_text())
    (lab.server.folder / "copy.ipynb").write_text(json.dumps(saved))
    lab.page.goto("about:blank")
    lab.show("copy.ipynb")
    still = lab.output(1).locator(".llm-static")
    still.wait_for()
    assert still.is_visible()
    assert "temperature 0.25" in still.inner_text()
    assert "Run %llm_panel to open it." in still.inner_text()
    # The widget itself has no words there: its repr is a page of markup.
    texts = ["".join(output["data"]["text/plain"]) for output in saved["cells"][1]["outputs"]]
    static, widget = texts
    assert static.startswith("The llm_magic control panel.")
    assert widget == ""
