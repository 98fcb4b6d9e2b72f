"""Driving JupyterLab: open a notebook, run cells, read what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

_SECONDS = 1000  # Playwright counts milliseconds
# The page's own objects: there with --expose-app-in-browser.
_PANEL = "window.jupyterapp.shell.currentWidget"
_KERNEL = f"{_PANEL}.sessionContext.session.kernel"
_CELLS = f"{_PANEL}.content.widgets"
_READY = """([name, isIdle]) => {
    const panel = window.jupyterapp?.shell?.currentWidget;
    return panel?.content?.widgets && panel.context.path === name
        && (!isIdle || panel.sessionContext?.session?.kernel?.status === 'idle');
}"""
# The launcher opens when nothing is open: others are closed last.
_OPEN = """async name => {
    const {shell, commands} = window.jupyterapp;
    const others = [...shell.widgets('main')];
    await commands.execute('docmanager:open', {path: name, factory: 'Notebook'});
    others.forEach(widget => widget.dispose());
    shell.expandLeft();
}"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running `jupyter lab` without a token, and the folder that it shows."""

    url: str
    folder: Path


class Lab:
    """One window of JupyterLab with one notebook.

    Cells are counted from 0. Whatever is not here is in `page`, a Playwright page; `cell(i)` and
    `output(i)` contain the widgets.
    """

    def __init__(self, page: Page, server: Server, name: str = "test.ipynb") -> None:
        """`name` is the notebook's file; a page opens each file once."""
        self.page = page
        self.server = server
        self.name = name

    def is_up(self) -> bool:
        """Return whether the page is JupyterLab already."""
        return self.page.url.startswith(f"{self.server.url}/lab")

    def sources(self) -> list[str]:
        """Return what stands in the cells, one after the other."""
        cells: list[str] = self.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.content.widgets"
            ".map(cell => cell.model.sharedModel.getSource())"
        )
        return cells

    def write(self, index: int, source: str) -> None:
        """Replace what stands in a cell."""
        self.page.evaluate(
            f"([i, source]) => {_CELLS}[i].model.sharedModel.setSource(source)", [index, source]
        )

    def is_code(self, index: int) -> bool:
        """Return whether a cell is one that runs."""
        kind: str = self.page.evaluate(f"i => {_CELLS}[i].model.type", index)
        return kind == "code"

    def open(self, cells: Sequence[str], name: str = "") -> None:
        """Write a notebook of these code cells, show it alone and wait for its kernel."""
        self.name = name or self.name
        (self.server.folder / self.name).write_text(json.dumps(_notebook(cells)))
        if not self.is_up():
            self.show(self.name)
            return
        self.page.evaluate(_OPEN, self.name)
        self._wait_until_ready()

    def reopen(self) -> None:
        """Save the notebook, leave the page and open the file again; the kernel goes on."""
        self.command("docmanager:save")
        self.page.goto("about:blank")
        self.show(self.name)

    def run(self, index: int, timeout: float = 60) -> list[dict[str, Any]]:
        """Run a cell, wait until it and the kernel are done, and return its outputs."""
        self.start(index)
        self.wait(index, timeout)
        return self.outputs(index)

    def start(self, index: int) -> None:
        """Begin to run a cell, as Ctrl+Enter does, and do not wait for it."""
        self.activate(index)
        # Not awaited: the command's promise ends with the cell.
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")

    def activate(self, index: int) -> None:
        """Make a cell the active one."""
        self.page.evaluate(f"i => {{ {_PANEL}.content.activeCellIndex = i; }}", index)

    def wait(self, index: int, timeout: float = 60) -> None:
        """Wait until a started cell is done: it has its number and the kernel is idle."""
        self.page.wait_for_function(
            f"i => {_CELLS}[i].model.executionState === 'idle'"
            f" && {_CELLS}[i].model.executionCount !== null && {_KERNEL}.status === 'idle'",
            arg=index,
            timeout=timeout * _SECONDS,
        )

    def is_running(self, index: int) -> bool:
        """Return whether a started cell is not done."""
        state: str = self.page.evaluate(f"i => {_CELLS}[i].model.executionState", index)
        return state != "idle"

    def interrupt(self) -> None:
        """Press the ■ of the toolbar."""
        self.command("notebook:interrupt-kernel")

    def outputs(self, index: int) -> list[dict[str, Any]]:
        """Return a cell's outputs as the notebook file has them, at this moment."""
        outputs: list[dict[str, Any]] = self.page.evaluate(
            f"i => {_CELLS}[i].model.outputs.toJSON()", index
        )
        return outputs

    def text(self, index: int) -> str:
        """Return what a cell's output area shows, as text."""
        return self.output(index).inner_text()

    def cell(self, index: int) -> Locator:
        """Return the place of a cell in the page."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def output(self, index: int) -> Locator:
        """Return the place of a cell's outputs in the page."""
        return self.cell(index).locator(".jp-Cell-outputArea")

    def command(self, name: str, **arguments: Any) -> None:
        """Execute one of JupyterLab's commands and wait for its end."""
        self.page.evaluate(
            "([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)",
            [name, arguments],
        )

    def theme(self, name: str) -> None:
        """Change to "JupyterLab Light" or "JupyterLab Dark"."""
        self.command("apputils:change-theme", theme=name)
        light = "true" if "Light" in name else "false"
        body = f'body[data-jp-theme-name="{name}"][data-jp-theme-light="{light}"]'
        self.page.wait_for_selector(body, state="attached")

    def screenshot(self, path: Path, index: int | None = None) -> None:
        """Take a picture of the page, or of a cell's outputs."""
        self.page.wait_for_timeout(500)  # fonts and formulas
        (self.page if index is None else self.output(index)).screenshot(path=path)

    def shut_down_kernels(self) -> None:
        """End this server's kernels: the next test shall not share the machine with them."""
        with urlopen(f"{self.server.url}/api/sessions", timeout=30) as answer:
            sessions = json.load(answer)
        for session in sessions:
            url = f"{self.server.url}/api/sessions/{session['id']}"
            urlopen(Request(url, method="DELETE"), timeout=30).close()

    def show(self, name: str, *, is_idle: bool = True) -> None:
        """Load the page with a notebook of the server's folder and, where it is idle, wait for its kernel."""
        self.name = name
        self.page.goto(f"{self.server.url}/lab/tree/{name}?reset")
        self._wait_until_ready(is_idle)

    def _wait_until_ready(self, is_idle: bool = True) -> None:
        self.page.wait_for_function(_READY, arg=[self.name, is_idle], timeout=120 * _SECONDS)


def _notebook(cells: Sequence[str]) -> dict[str, Any]:
    return {
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "source": source,
                "metadata": {},
                "execution_count": None,
                "outputs": [],
            }
            for number, source in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
