"""``-f code`` in a real JupyterLab: the block is the next cell, once, and has not run."""

from __future__ import annotations

import time

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED
from tests.until import until

pytestmark = pytest.mark.browser

CODE = "made = True\nprint('<b>made</b>')"
ANSWER = f"Do this:\n\n```python\n{CODE}\n```\n\nor `that`."
ASK = "%%llm -f code\nDo it."


def test_code_block_becomes_next_cell_or_replaces_this_one(lab: Lab) -> None:
    answers = f"for _ in range(3): backend.will(*whole_answer({ANSWER!r}))"
    replacing = ASK.replace("code", "code --replace")
    first = f"{SCRIPTED}\n{answers}\nmade = False"
    lab.open([first, ASK, "print(made)", replacing])
    lab.run(0)
    lab.run(1)
    until(lambda: len(lab.sources()) == 5, "there is no new cell")
    assert lab.sources() == [first, ASK, CODE, "print(made)", replacing]
    assert lab.cell(2).locator(".jp-InputPrompt").inner_text().strip() == "[ ]:"
    assert "".join(lab.run(3)[0]["text"]) == "False\n", "it has run"

    lab.run(1)
    until(lambda: "already put the same code into a cell" in lab.text(1), lab.text(1))
    time.sleep(0.5)
    assert len(lab.sources()) == 5, "a second run makes the notebook longer"

    lab.run(4)
    until(lambda: lab.sources()[4] == CODE, f"{lab.sources()}")
    assert len(lab.sources()) == 5
