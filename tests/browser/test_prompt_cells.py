"""The extension of JupyterLab: prompts are no Python, so they are not highlighted as Python."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.browser.lab import Lab, Server
from tests.browser.panel import until
from tests.kernels import ROOT

pytestmark = pytest.mark.browser

_DATA = "llm_magic-*.data/data/share/jupyter/*"
_TEXT = "for each item in this list, return None if it is not a class, and import nothing"
_KEYWORDS = {"for", "in", "return", "None", "if", "is", "not", "class", "and", "import"}


@pytest.fixture
def extended(lab: Lab, tmp_path: Path) -> Lab:
    """Return JupyterLab with the extension as the wheel of this checkout installs it."""
    install_wheel_data(lab.server, tmp_path)
    return lab


def install_wheel_data(server: Server, folder: Path) -> None:
    """Build the wheel, and copy its files for Jupyter to the folder that the server reads."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    data = server.folder.parent / "data"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            if Path(name).match(_DATA) or "/data/share/jupyter/" in name:
                target = data / name.partition("/data/share/jupyter/")[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))


def keywords(lab: Lab, index: int) -> set[str]:
    """Return the Python keywords that a cell highlights."""
    spans = lab.cell(index).locator(".cm-line span").all_inner_texts()
    return {text for span in spans for text in [span.strip()] if text in _KEYWORDS}


def put(lab: Lab, index: int, source: str) -> None:
    """Replace the text of a cell."""
    lab.page.evaluate(
        "([i, text]) => window.jupyterapp.shell.currentWidget.content.widgets[i]"
        ".model.sharedModel.setSource(text)",
        [index, source],
    )


def test_prompts_are_not_highlighted_as_python(extended: Lab) -> None:
    prompts = [
        f"%%llm\n{_TEXT}",
        f"\n  \n%%llm -t 0 -o reply\n{_TEXT}",
        f"  %%llm\n{_TEXT}",
    ]
    others = [
        _TEXT,
        f"# What IPython runs as Python.\n%%llm\n{_TEXT}",
        f"%%llm_other\n{_TEXT}",
        f"%%time\n{_TEXT}",
        f"x = 1\n%%llm\n{_TEXT}",
    ]
    lab = extended
    lab.open([*prompts, *others])
    cells = range(len(prompts) + len(others))
    expected = [set[str]() if i < len(prompts) else _KEYWORDS for i in cells]
    until(lambda: [keywords(lab, i) for i in cells] == expected, "highlighting")

    # The magic line is removed, and written again.
    put(lab, 0, _TEXT)
    put(lab, 3, prompts[0])
    until(lambda: keywords(lab, 0) == _KEYWORDS, "Python again")
    until(lambda: keywords(lab, 3) == set(), "a prompt now")
    # A new cell, and a page that is loaded again.
    lab.activate(7)
    lab.command("notebook:insert-cell-below")
    put(lab, 8, prompts[1])
    until(lambda: keywords(lab, 8) == set(), "a new prompt")
    lab.reopen()
    until(lambda: [len(keywords(lab, i)) for i in (0, 3, 8)] == [len(_KEYWORDS), 0, 0], "reopened")
