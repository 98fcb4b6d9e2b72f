"""A page that is loaded again while a cell runs or a model is loaded: what its outputs lack is completed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED
from tests.until import until

pytestmark = pytest.mark.browser

_HOLD = """
import pathlib, threading, time
from tests.scripted import Hang
def go_on(hang, file):
    while not pathlib.Path(file).exists():
        time.sleep(0.02)
    hang.go.set()
def until_there_is(name):
    hang = Hang()
    threading.Thread(target=go_on, args=(hang, f'{folder}/{name}'), daemon=True).start()
    return hang
"""
_SCRIPTS = """
for name in ('1', '2'):
    backend.will('The start', until_there_is(name), ' and the end.', *whole_answer())
"""
_INCOMPLETE = "incomplete so far · when complete: llm.last"


def _leave(lab: Lab, index: int, shown: str) -> None:
    """Start a cell, save the notebook when a text is shown, and leave the page."""
    lab.start(index)
    lab.output(index).get_by_text(shown).wait_for()
    lab.command("docmanager:save")
    lab.page.goto("about:blank")


def test_answer_is_completed_in_a_page_that_is_loaded_again(lab: Lab, tmp_path: Path) -> None:
    setup = f"{SCRIPTED}\nfolder = {str(tmp_path)!r}\n{_HOLD}"
    lab.open([setup, _SCRIPTS, "%%llm\nOne", "%%llm\nTwo"])
    lab.run(0)
    lab.run(1)

    _leave(lab, 2, _INCOMPLETE)
    lab.show(lab.name, is_idle=False)
    until(lambda: lab.text(2).startswith("The start\n"), "the saved output")
    (tmp_path / "1").touch()
    until(lambda: lab.text(2).startswith("The start and the end.\n\ntiny · "), "while it runs")

    _leave(lab, 3, _INCOMPLETE)
    (tmp_path / "2").touch()
    lab.show(lab.name)
    until(lambda: lab.text(3).startswith("The start and the end.\n\ntiny · "), "after its end")
    assert [output["metadata"] for output in lab.outputs(3)] == [{}]
    # A cell that runs again is shown as usual.
    lab.run(2)
    until(lambda: lab.text(2).startswith("One\n\ntiny · "), "run again")


def test_loads_and_waits_are_completed_in_a_page_that_is_loaded_again(
    lab: Lab, tmp_path: Path
) -> None:
    hold = "backend.trouble['load'] = until_there_is({!r})\n{}"
    in_background = hold.format("1", "%llm_load second --bg")
    reports = (
        "from llm_magic.types import Progress\nbackend.reports['load'] = [Progress('reading')]"
    )
    setup = f"{SCRIPTED}\nfolder = {str(tmp_path)!r}\n{_HOLD}\n{reports}"
    lab.open([setup, in_background, "%llm_wait", hold.format("2", "%llm_load third")])
    lab.run(0)

    lab.run(1)
    _leave(lab, 2, "Loading second: ")
    lab.show(lab.name, is_idle=False)
    loading = ["Loading second"] * 2
    until(lambda: [lab.text(1)[:14], lab.text(2)[:14]] == loading, "the saved outputs")
    (tmp_path / "1").touch()
    until(lambda: lab.text(1).startswith("second · "), "the load, while a cell runs")
    until(lambda: lab.text(2) == "The active model is second.", "the wait, while it runs")

    _leave(lab, 3, "Loading third: reading")
    (tmp_path / "2").touch()
    lab.show(lab.name)
    until(lambda: lab.text(3).startswith("third · "), "the load, after its end")
    for index in (1, 2, 3):
        assert [output["metadata"] for output in lab.outputs(index)] == [{}]
