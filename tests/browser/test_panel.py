"""The panel in a real JupyterLab: with mouse and keyboard, on the real small model and a scripted one."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED, Panel, open_panel
from tests.until import until

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = pytest.mark.browser


def value(control: Locator) -> float:
    return float(control.input_value())


def test_panel_loads_prompts_and_stops_real_model(lab: Lab, model_cache: Path) -> None:
    # So long that it has not ended before the button is pressed.
    length = "%llm_config max_new_tokens=4000 -p min_new_tokens=4000"
    lab.open([f"%load_ext llm_magic\n{length}", "%llm_panel"])
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
    panel.at(".llm-Ready").wait_for(timeout=30_000)
    until(lambda: "stopped by you" in panel.answer(), "it does not say that it was stopped")
    stopped = panel.answer()
    time.sleep(1)
    assert panel.answer() == stopped, "it goes on"
    panel.button("Unload").click()
    panel.at(".llm-Inactive").wait_for(timeout=30_000)


def test_two_panels_show_the_same(lab: Lab) -> None:
    lab.open([SCRIPTED, "%llm_panel", "%llm_panel"])
    lab.run(0)
    one = open_panel(lab, 1)
    one.check("Keep the conversation").click()
    one.ask("first question")
    one.at(".llm-answer").filter(has_text="token").wait_for()
    two = open_panel(lab, 2)
    until(lambda: "first question" in two.answer(), "the conversation is not shown")
    until(two.check("Keep the conversation").is_checked, "the box differs")
    one.slider("top k").focus()
    one.slider("top k").press("ArrowLeft")
    until(lambda: value(two.number("top k")) == 49, "the other does not follow")
    two.button("Reset").click()
    until(lambda: value(one.number("top k")) == 50, "the first does not follow")
    two.ask("second question")
    until(lambda: "second question" in one.answer(), "the first does not show it")
    until(lambda: (one.prompt().input_value(), two.prompt().input_value()) == ("", ""), "not sent")
    # The cell of one is run again: the other stays.
    one = open_panel(lab, 1)
    until(lambda: "second question" in one.answer(), "the conversation is not shown again")
    two.check("Keep the conversation").click()
    until(lambda: not one.check("Keep the conversation").is_checked(), "they differ")


CODE = 'def f(x: int) -> dict[str, int]:\n    if x:\n\n        return {"a": (x)}\n    return {}'


def test_code_is_put_into_the_next_cell_and_not_run(lab: Lab) -> None:
    answer = f"Here:\n\n```python\n{CODE}\n```\nThat is it."
    will = f"{SCRIPTED}\nbackend.will(*whole_answer({answer!r}))"
    lab.open([will, "%llm_panel", "'after'", "'last'"])
    lab.run(0)
    panel = open_panel(lab, 1)
    panel.ask("code?")
    put = panel.button("Put into next cell")
    put.wait_for()
    for with_keys in (False, True):
        if with_keys:
            lab.activate(3)
            put.focus()
            put.press("Enter")
        else:
            put.click()
        until(lambda: len(lab.sources()) == 5, "there is no new cell")
        until(lambda: lab.sources()[2] == CODE, f"{lab.sources()}")
        time.sleep(0.5)
        assert lab.sources()[2:] == [CODE, "'after'", "'last'"]
        assert lab.cell(2).locator(".jp-InputPrompt").inner_text().strip() == "[ ]:"
        lab.activate(2)
        lab.command("notebook:delete-cell")


_SESSION = "window.jupyterapp.shell.currentWidget.sessionContext"
_ICONS = """box => [box, ...box.querySelectorAll('.jupyter-widgets-disconnected')].filter(
    one => !['none', 'normal'].includes(getComputedStyle(one, '::before').content)
).length"""


def assert_texts_are_left(panel: Panel) -> None:
    until(lambda: panel.prompt().input_value() == "waits for {time}", "the prompt is lost")
    assert "hello there" in panel.box.inner_text(), "the conversation is lost"
    controls = {"Ready", "Queued", "Load", "Send"}
    until(lambda: not controls & set(panel.box.inner_text().split()), "controls are left")
    until(lambda: panel.box.evaluate(_ICONS) == 0, "marks of ipywidgets at its parts")


def test_panel_without_its_kernel_shows_what_to_run(lab: Lab) -> None:
    busy = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    lab.open([SCRIPTED, "%llm_panel", busy])
    for end in ("session.kernel.restart()", "shutdown()"):
        lab.run(0)
        panel = open_panel(lab, 1)
        panel.ask("hello there")
        panel.at(".llm-answer").filter(has_text="token").wait_for()
        lab.start(2)
        lab.output(2).get_by_text("begun").wait_for()
        panel.ask("waits for {time}")
        panel.button("Withdraw").wait_for()
        lab.page.evaluate(f"() => {{ {_SESSION}.{end}; }}")
        alert = panel.box.get_by_role("alert").filter(visible=True)
        alert.filter(has_text="Run %load_ext llm_magic and %llm_panel again.").wait_for()
        assert_texts_are_left(panel)
        lab.page.wait_for_function(
            f"() => ['idle', undefined].includes({_SESSION}.session?.kernel?.status)"
        )


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
