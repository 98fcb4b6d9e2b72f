"""The pictures of the README and the notebooks, taken anew: ``scripts/take-pictures``.

From a real JupyterLab with the embedded model. Open them before you commit them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.browser.conftest import CHROMIUM, CHROMIUM_OPTIONS, jupyter_lab
from tests.browser.lab import Lab, Server
from tests.browser.panel import open_panel
from tests.kernels import ROOT

IMAGES = ROOT / "notebooks" / "images"
_SECONDS = 1000  # Playwright counts milliseconds
# The cells of the quickstart that are to be seen: a value, and a question with it.
_FIRST, _LAST = "import re", "What is the opposite of {worse}?"
_QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")


def quickstart(lab: Lab, file: Path) -> None:
    """Run the quickstart and show a question with a variable, its answer and the footer."""
    book = ROOT / "notebooks" / "01_quickstart.ipynb"
    shutil.copy(book, lab.server.folder / book.name)
    lab.show(book.name)
    sources = lab.sources()
    last = next(n for n, source in enumerate(sources) if _LAST in source)
    for index, source in enumerate(sources[: last + 1]):
        if not lab.is_code(index):
            continue
        assert source, f"cell {index} is empty"
        lab.run(index, timeout=300)
    first = next(n for n, source in enumerate(sources) if source.startswith(_FIRST))
    # No cell in the picture is the active one.
    lab.activate(0)
    lab.cell(first - 1).evaluate("cell => cell.scrollIntoView({block: 'start'})")
    lab.screenshot(file)


def panel(lab: Lab, file: Path) -> None:
    """Load a model, ask it twice in the panel, and show that."""
    setting = "%llm_config temperature=0 repetition_penalty=1"
    lab.open(["%load_ext llm_magic", "%llm_load", setting, "%llm_panel"])
    # In all of the width that the page has, as beside its prompt.
    lab.command("application:toggle-left-area")
    for index in range(3):
        lab.run(index, timeout=300)
    shown = open_panel(lab, 3)
    shown.check("Keep the conversation").click()
    for question in _QUESTIONS:
        shown.ask(question)
        lab.page.wait_for_timeout(1 * _SECONDS)
        shown.at(".llm-copy").last.wait_for(timeout=120 * _SECONDS)
        # What was asked last is answered when the prompt takes another.
        lab.page.wait_for_function(
            "() => [...document.querySelectorAll('.llm-panel button')]"
            ".some(button => button.innerText === 'Stop' && button.disabled)",
            timeout=120 * _SECONDS,
        )
    lab.page.wait_for_timeout(1 * _SECONDS)
    shown.box.screenshot(path=file)


PICTURES: dict[str, tuple[Callable[[Lab, Path], None], tuple[int, int]]] = {
    "quickstart.png": (quickstart, (1000, 620)),
    "panel.png": (panel, (1200, 1400)),
}


def main() -> int:
    """Take all of them; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="llm_magic-pictures-") as folder:
        home = Path(folder)
        with jupyter_lab(home) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=CHROMIUM_OPTIONS.split()
            )
            for name, (take, size) in PICTURES.items():
                _taken(browser, server, take, size, IMAGES / name)
            browser.close()
    return 0


def _taken(
    browser: Browser,
    server: Server,
    take: Callable[[Lab, Path], None],
    size: tuple[int, int],
    file: Path,
) -> None:
    with browser.new_context(viewport={"width": size[0], "height": size[1]}) as context:
        lab = Lab(context.new_page(), server)
        take(lab, file)
        lab.shut_down_kernels()
    sys.stdout.write(f"{file.name}\n")


if __name__ == "__main__":
    sys.exit(main())
