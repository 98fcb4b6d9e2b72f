"""The notebooks do what they show: under nbval, in a live kernel, and in what is saved of them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from nbformat import NotebookNode

from tests.notebooks import books

_PLACES = re.compile(r"/(?:home|root|work|tmp|Users|usr|opt|var|mnt)/|[A-Za-z]:\\")
_KEYS = re.compile(r"\b(?:sk-|hf_|ghp_|xox[bp]-|AKIA|eyJ)[\w-]{12,}|Bearer \S{8,}", re.ASCII)
# What must be in an answer, by the id of its cell.
_FACTS = {
    "01_quickstart.ipynb": {
        "load-model": "SmolLM2-135M-Instruct · local cpu bf16 · 269 MB · 8192 ctx · ready in",
        "ask": "Amsterdam",
        "settings": "repetition_penalty  1.0 *",
        "variables-ask": "The opposite of ugly is beautiful.",
        "output": "complex",
        "output-use": "The model says complex, Tim Peters says complex.",
        "system-ask": "Readability",
        "dry-run": 'Compare beautiful with ugly. Answer as JSON, like this: {"winner": "…", "reason": "…"}',
        "stop": "cut off at 100 tokens",
        "python": "The opposite of explicit is implicit; Tim Peters says implicit.",
        "python-stream": "Tokyo",
        "python-async": "soft",
        "status": "Ready",
        "unload": "Unloaded SmolLM2-135M-Instruct (269 MB)",
    }
}
# A whole run takes 20 s where nothing else runs, and minutes where much does.
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("model_cache"),
    pytest.mark.parametrize("path", books.NOTEBOOKS, ids=lambda path: path.stem),
]


@cache
def live(path: Path) -> NotebookNode:
    """Return the notebook as a person's frontend leaves it: with answers that grew as they came."""
    return books.run(path, stream="on")


def test_nbval_finds_the_same_outputs(path: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    # Its own settings: neither the warnings nor the markers of this suite are nbval's business.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    with tempfile.TemporaryDirectory(prefix="llm_magic-ipython-") as profile:
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
                *("-c", str(tmp_path / "pytest.ini"), "--junitxml", str(report)),
                *("--nbval", "--nbval-sanitize-with", str(books.SANITIZE), str(path)),
            ],
            env={**books.environment("off"), "IPYTHONDIR": profile},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = [int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == [len(books.code_cells(books.read(path))), 0, 0, 0]


def test_live_output_ends_as_what_is_saved(path: Path) -> None:
    saved, now = books.code_cells(books.read(path)), books.code_cells(live(path))
    assert [cell.id for cell in now] == [cell.id for cell in saved]
    for cell, expected in zip(now, saved, strict=True):
        if "nbval-ignore-output" not in expected.metadata.get("tags", []):
            assert books.sanitized(cell.outputs) == books.sanitized(expected.outputs), cell.id


def test_answers_hold_the_facts(path: Path) -> None:
    shown = {cell.id: books.text(cell) for cell in books.code_cells(live(path))}
    wrong = {
        name: shown[name] for name, fact in _FACTS[path.name].items() if fact not in shown[name]
    }
    assert wrong == {}


def test_every_code_cell_is_saved_as_run_in_order(path: Path) -> None:
    cells = books.code_cells(books.read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = {cell.id for cell in cells if not cell.outputs}
    assert silent <= {"load-extension"}


def test_only_the_cell_that_shows_a_mistake_fails(path: Path) -> None:
    for cell in books.code_cells(books.read(path)):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in cell.metadata.get("tags", [])), cell.id
        warned = any(output.get("name") == "stderr" for output in cell.outputs)
        assert not warned, books.text(cell)


def test_nothing_of_a_machine_or_a_person_is_saved(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    outputs = "\n".join(str(cell.outputs) for cell in books.code_cells(books.read(path)))
    assert _PLACES.findall(outputs) == []
    assert _KEYS.findall(content) == []
    assert set(books.read(path).metadata) == {"kernelspec", "language_info"}


def test_the_first_code_cell_proves_that_the_magics_are_there(path: Path) -> None:
    # A failed %load_ext would leave errors that nbval does not count.
    first = books.code_cells(books.read(path))[0].source
    assert first.startswith("%load_ext llm_magic\nassert ")
    assert "magics_manager" in first
