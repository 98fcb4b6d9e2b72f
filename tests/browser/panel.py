"""A control panel in a page: where its parts are, by what a screen reader calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.browser.lab import Lab

if TYPE_CHECKING:
    from playwright.sync_api import Locator

# Runs first: the model ``tiny`` generates the script of `backend`, or repeats the prompt.
SCRIPTED = """
from llm_magic.notebook.magics import register
from llm_magic.session import Session
from tests.scripted import ScriptedBackend, whole_answer
backend = ScriptedBackend()
llm = Session(create=lambda _name: backend)
register(get_ipython(), llm)
%llm_load tiny
""".strip()

# A cell that runs until this file is in the folder of the notebook, however slow the page is.
GO_ON = "go-on"
WAIT = f"import pathlib, time\nwhile not pathlib.Path({GO_ON!r}).exists(): time.sleep(0.05)"
# The same for an answer: the script of `held` has a step that waits.
HELD = f"""
import threading
from tests.scripted import Hang
def held(before, after):
    hang = Hang()
    def go_on():
        while not pathlib.Path({GO_ON!r}).exists(): time.sleep(0.05)
        hang.go.set()
    threading.Thread(target=go_on, daemon=True).start()
    backend.will(*before, hang, *after)
"""


class Panel:
    """One panel; `box` is its place in the page."""

    def __init__(self, lab: Lab, box: Locator) -> None:
        self.lab, self.box = lab, box

    def button(self, name: str) -> Locator:
        """Return a button."""
        return self.box.get_by_role("button", name=name, exact=True)

    def slider(self, name: str) -> Locator:
        """Return the slider of a setting."""
        return self.box.get_by_role("slider", name=f"{name}, slider", exact=True)

    def number(self, name: str) -> Locator:
        """Return the field of a setting."""
        return self.box.get_by_role("spinbutton", name=name, exact=True)

    def check(self, name: str) -> Locator:
        """Return a check box."""
        return self.box.get_by_role("checkbox", name=name, exact=True)

    def prompt(self) -> Locator:
        """Return the prompt box."""
        return self.box.get_by_role("textbox", name="Prompt", exact=True)

    def at(self, selector: str) -> Locator:
        """Return what a CSS selector finds."""
        return self.box.locator(selector)

    def ask(self, text: str) -> None:
        """Type a prompt and press Ctrl+Enter."""
        self.prompt().fill(text)
        self.prompt().press("Control+Enter")

    def answer(self) -> str:
        """Return what is shown of the conversation."""
        return self.at(".llm-scroll").inner_text()

    def status(self) -> str:
        """Return the status line."""
        return self.at(".llm-status").first.inner_text()


def open_panel(lab: Lab, index: int) -> Panel:
    """Run a cell with ``%llm_panel`` and return its panel."""
    lab.run(index)
    panel = Panel(lab, lab.output(index).locator(".llm-panel"))
    panel.box.wait_for()
    panel.prompt().wait_for()
    panel.slider("temperature").wait_for()
    return panel
