"""nbval finds in the notebooks what is saved in them.

In a file of its own: pytest-xdist runs files side by side, and each notebook runs for a while.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest

from tests.notebooks import books

# A whole run takes 20 s where nothing else runs, and minutes where much does.
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("model_cache"),
    pytest.mark.parametrize("path", books.NOTEBOOKS, ids=lambda path: path.stem),
]


def test_nbval_finds_the_same_outputs(path: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    # Its own settings: neither the warnings nor the markers of this suite are nbval's business.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    with books.stage(path, "off") as around:
        copy = tmp_path / path.name
        nbformat.write(around.open(path), copy)
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
                *("-c", str(tmp_path / "pytest.ini"), "--junitxml", str(report)),
                *("--nbval", "--nbval-sanitize-with", str(books.SANITIZE), str(copy)),
            ],
            env=dict(around.environment),
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = [int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == [len(books.code_cells(books.read(path))), 0, 0, 0]
