"""A job in JupyterLab: it streams under its own cell while another one blocks the kernel."""

from __future__ import annotations

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import GO_ON, SCRIPTED, WAIT, open_panel
from tests.until import until

pytestmark = pytest.mark.browser

_SCRIPTS = """
from tests.scripted import Pause
from llm_magic.errors import GenerationFailed
backend.will('begun', *[step for n in range(4000) for step in (Pause(0.1), f' {n}')])
backend.will(GenerationFailed('It broke.'))
"""


def test_it_streams_while_another_cell_blocks(lab: Lab) -> None:
    cells = ["%%llm --bg\nCount.", "%llm_panel", WAIT, "%%llm --bg\nBreak."]
    lab.open([SCRIPTED + _SCRIPTS, *cells])
    lab.run(0)
    lab.run(1)
    panel = open_panel(lab, 2)
    lab.start(3)
    lab.page.wait_for_timeout(1000)
    before = lab.output(1).inner_text()
    until(lambda: len(lab.output(1).inner_text()) > len(before) + 10, "it does not grow")
    assert before.startswith("begun 0 1")
    (lab.server.folder / GO_ON).touch()
    lab.run(4)
    (lab.server.folder / GO_ON).unlink()
    until(lambda: "GenerationFailed: It broke." in lab.output(4).inner_text(), "no error")
    panel.button("Stop 1").click()
    until(lambda: "stopped by you" in lab.output(1).inner_text(), "it does not stop")
    assert lab.output(3).inner_text().strip() == ""
