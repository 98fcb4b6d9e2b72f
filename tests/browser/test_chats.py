"""Chats in a real JupyterLab: cells have ids, and deleted cells are reported."""

from __future__ import annotations

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED
from tests.until import until

pytestmark = pytest.mark.browser

TURNS = "print([(t.question.content, t.stale) for t in llm.chats.get('talk').turns])"


def turns(lab: Lab, index: int) -> str:
    return "".join(lab.run(index)[0]["text"]).strip()


def test_cells_run_again_and_cells_deleted(lab: Lab) -> None:
    asks = [f"%%llm -c talk\n{text}" for text in ("One", "Two", "Three", "Three")]
    lab.open([SCRIPTED, *asks, TURNS, "%llm -f text Some words"])
    for index in range(5):
        lab.run(index)
    fresh = "[('One', False), ('Two', False), ('Three', False), ('Three', False)]"
    assert turns(lab, 5) == fresh, "cells with the same text are not the same cell"
    lab.run(2)
    assert turns(lab, 5) == "[('One', False), ('Two', False), ('Three', True), ('Three', True)]"
    for index in (3, 4):
        lab.run(index)
    assert turns(lab, 5) == fresh

    lab.page.evaluate(
        "() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 2; }"
    )
    lab.command("notebook:delete-cell")
    assert turns(lab, 4) == "[('One', False), ('Two', True), ('Three', True), ('Three', True)]"
    lab.run(2)
    until(lambda: "1 turn of chat 'talk' is stale and not sent" in lab.text(2), lab.text(2))
    assert turns(lab, 4) == "[('One', False), ('Two', True), ('Three', False), ('Three', True)]"
    # JupyterLab would break its lines within words, and indent it.
    lab.run(5)
    style = (
        lab.output(5)
        .locator("pre")
        .evaluate("pre => [getComputedStyle(pre).wordBreak, getComputedStyle(pre).marginLeft]")
    )
    assert style == ["normal", "0px"]
