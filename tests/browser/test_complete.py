"""Tab in a real JupyterLab: an item is chosen, and the line reads right."""

from __future__ import annotations

import contextlib

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED
from tests.until import until

pytestmark = pytest.mark.browser
_LIST = ".jp-Completer:not(.lm-mod-hidden)"
_CELLS = "window.jupyterapp.shell.currentWidget.content.widgets"


def source(lab: Lab, index: int) -> str:
    text: str = lab.page.evaluate(f"i => {_CELLS}[i].model.sharedModel.getSource()", index)
    return text


def type_and_tab(lab: Lab, index: int, text: str) -> None:
    """Type at the end of a cell as a person does, then press Tab."""
    editor = lab.cell(index).locator(".cm-content")
    editor.click()
    lab.page.keyboard.press("Control+End")
    lab.page.keyboard.type(text, delay=30)
    lab.page.wait_for_timeout(300)
    # JupyterLab waits for a slow kernel a second only.
    for _ in range(10):
        lab.page.keyboard.press("Tab")
        with contextlib.suppress(AssertionError):
            return until(lab.page.locator(_LIST).is_visible, within=3)
    raise AssertionError("there is no list")


def choose(lab: Lab, item: str) -> None:
    """Take an item of the list that Tab opened."""
    lab.page.locator(f"{_LIST} .jp-Completer-item").filter(has_text=item).first.click()


def test_line_is_correct_after_a_completion(lab: Lab) -> None:
    lab.open([SCRIPTED, "", "", ""])
    lab.run(0)
    lab.page.evaluate(f"() => {{ {_CELLS}[0].model.sharedModel.setSource('%llm_models\\n' + "
                      "'%llm_load org/wide:7b --name org/wide:7b --keep\\n' + "
                      "'%llm_load org/wide:13b --name org/wide:13b --keep\\n' + "
                      "'answer_of_mine, answer_of_yours = 1, 2') }")  # fmt: skip
    lab.run(0)

    type_and_tab(lab, 1, "%llm_load -q ")
    choose(lab, "none")
    until(lambda: source(lab, 1) == "%llm_load -q none", f"a value: {source(lab, 1)!r}")

    type_and_tab(lab, 2, "%llm_unload org/wide:")
    choose(lab, "org/wide:7b")
    until(lambda: source(lab, 2) == "%llm_unload org/wide:7b", f"a model: {source(lab, 2)!r}")

    type_and_tab(lab, 3, "%%llm -t 0\nWhat is {answer_of_")
    choose(lab, "answer_of_mine")
    expected = "%%llm -t 0\nWhat is {answer_of_mine"
    until(lambda: source(lab, 3) == expected, f"a reference: {source(lab, 3)!r}")
