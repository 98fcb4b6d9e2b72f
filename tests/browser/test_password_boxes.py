"""The box in a cell that an API key is typed into: it is there only while something reads it."""

from __future__ import annotations

import pytest

from tests.browser.lab import Lab
from tests.until import until

pytestmark = pytest.mark.browser

_SERVER = "-b openai --base-url http://127.0.0.1:9/v1 --key-env NOT_SET_ANYWHERE"


def test_box_for_a_key_is_gone_after_an_interrupt_and_a_restart(lab: Lab) -> None:
    load = f"print('before')\n%llm_load tiny {_SERVER}"
    lab.open(["%load_ext llm_magic", load, "name = input('Name: ')"])
    lab.run(0)
    boxes = [lab.output(index).locator("input") for index in range(3)]

    lab.start(1)
    boxes[1].wait_for()
    lab.interrupt()
    lab.wait(1)
    until(lambda: boxes[1].count() == 0, "the box for a key is gone")
    assert [output["output_type"] for output in lab.outputs(1)] == ["stream", "error"]
    until(lambda: "No key was entered." in lab.text(1), "no error")

    # What was typed into another box may be of use; it stays, as JupyterLab has it.
    lab.start(2)
    boxes[2].fill("half a novel")
    lab.interrupt()
    lab.wait(2)
    assert boxes[2].input_value() == "half a novel"

    # The box that is answered goes as JupyterLab has it.
    lab.start(1)
    boxes[1].press_sequentially(" ")
    boxes[1].press("Enter")
    lab.wait(1)
    until(lambda: boxes[1].count() == 0, "the answered box is gone")

    lab.start(1)
    boxes[1].wait_for()
    # Without the dialog that asks whether to restart.
    lab.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    until(lambda: boxes[1].count() == 0, "the box is gone with its kernel")
