"""The notebooks do what they show: nbval runs each of them once, and one runs with live output, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.notebooks import books

# As `str` writes outputs: a backslash is doubled, and a new line after a colon is no drive.
_PLACES = re.compile(r"/(?:home|root|work|tmp|Users|usr|opt|var|mnt)/|[A-Za-z]:\\\\")
_KEYS = re.compile(r"\b(?:sk-|hf_|ghp_|xox[bp]-|AKIA|eyJ)[\w-]{12,}|Bearer \S{8,}", re.ASCII)
# What must be in an answer, by the id of its cell.
_FACTS = {
    "01_quickstart.ipynb": {
        # The size depends on the CPU, where the head may be packed.
        "load-model": "SmolLM2-135M-Instruct · local cpu bf16 · ",
        "ask": "Amsterdam",
        "settings": "repetition_penalty  1.15 → 1.0",
        "variables-ask": "The opposite of ugly is beautiful.",
        "output": "complex",
        "output-use": "The model says complex, Tim Peters says complex.",
        "system-ask": "In the face of ambiguity, avoid making assumptions.\n",
        "dry-run": 'Compare beautiful with ugly. Answer as JSON, like this: {"winner": "…", "reason": "…"}',
        "stop": "cut off at 100 tokens",
        "python": "The opposite of explicit is implicit; Tim Peters says implicit.",
        "python-stream": "Tokyo",
        "python-async": "soft",
        "status": "Ready",
        "unload": "Unloaded SmolLM2-135M-Instruct (",
    },
    "02_settings_and_panel.ipynb": {
        "load": "SmolLM2-135M-Instruct · local cpu fp32 · 538 MB · 8,192 ctx · ready in",
        "session": "repetition_penalty  1.15 → 1.0",
        "defaults-ask": "The server is unable to process the request due to a high load.\n",
        "session-ask": "The server is denying access to the resource due to a legal demand.\n",
        "stop": "The server is unable to process the request\n",
        "limit": "cut off at 6 tokens (--max-new-tokens)",
        "dry-run": "max_new_tokens 6, temperature 0.0",
        "precedence": "environment: 8\nsession:     7\nthis call:   6\nand after:   7",
        "traitlets": "max_new_tokens=512, temperature=0.0",
        "seeds": "the same seed, the same text: True\ntexts of three seeds: 3",
        "param": "The server is denying access to the resource due to a legal demand.\n",
        "format-use": "('Not Found', 404)",
        "panel": "llm_magic control panel",
        "panel-magic": "temperature  0.0 → 0.3",
        "unload": "Unloaded SmolLM2-135M-Instruct (538 MB)",
    },
    "03_servers.ipynb": {
        "models": "localhost:8000  SmolLM2-135M-Instruct        8,192",
        "load": "SmolLM2-135M-Instruct · vllm localhost:8000 · 8,192 ctx · ready in",
        "ask": "The opposite of ugly is beautiful.",
        "output-use": "vllm: 37 tokens read, 7 written.",
        "stream": "Tokyo",
        "many": "'explicit': 'implicit'",
        "many-check": "there and back: True\nas in the Zen:  True",
        "wrong-still": "soft",
        "unload": "it stays on localhost:8000",
    },
    "04_chats_and_code.ipynb": {
        "first": "Cairo",
        "second": "61 (44 reused) → 9 tokens",
        "third": "Egyptian pound",
        "fourth": "The longest river in Egypt is the Nile River.\n",
        "check": "True: Egyptian Pound",
        "list": "1.6%",
        "stale": "turns: 4 · sent: 1",
        "stale-show": "stale",
        "import-ask": "Nairobi",
        "trim-error": "Chat 'world' has 2 turns above it: --trim drops",
        "trim": "oldest turn dropped (--trim)",
        "reset": "Deleted: egypt, world.",
        "code": "If no cell was filled, copy it from here.",
        "code-copy": "3.0",
        "code-use": "[6, 7, 9, 9] 7.75",
        "dry": 'db_password = "•••"',
    },
    "05_background_and_async.ipynb": {
        "meanwhile": "'Austria': 'German'",
        "jobs": "Write a short story about a boat on the Nile.",
        "wait": "done",
        "result": "length 60",
        "stop": "Stopped job 2 (SmolLM2-135M-Instruct) after",
        "gather": "Austria: German · on record: German",
        "astream": "Tokyo",
        "timeout": "cancelled",
        "timeout-after": "early",
    },
    "06_over_a_dataframe.ipynb": {
        "data": "French        23\nSpanish       17\nArabic        15\nPortuguese     6",
        "sample": "40     Palestinian Territories",
        "label": "labelled: a new table of 61 rows, with the column answer",
        # The cell asserts that enough of them are right.
        "check": "of the labels are right; French for all rows would be 38%.",
        "confusion": "language",
        "errors": "Guinea",
        "correct": "6 rows change",
        "again": "55 cached",
        "again-check": "of the labels are right.",
        "file": '{"key":"',
        "python": "of 61 answers are cut off.",
    },
    "07_typed_answers.ipynb": {
        "lines": "Copyright",
        "fields": "with a column for each field: name, year",
        # The cells assert that enough of them are right.
        "fields-check": "of the names occur in their line.",
        "choice": "labels are right; the same label for all rows would be",
        "reliability": "(0.8, 1.0]",
        "text": "of the answers without a label",
    },
}
# Under cells that had finished when their answer came: nbval does not see it.
_LATE_FACTS = {"begin": "41 → 60 tokens", "long": "stopped by you; incomplete"}
# Its cells show output while others run. How an answer that streams in its own cell ends is in
# tests/kernel/test_streaming.py.
_LIVE = next(path for path in books.NOTEBOOKS if path.name == "05_background_and_async.ipynb")

every_notebook = pytest.mark.parametrize("path", books.NOTEBOOKS, ids=lambda path: path.stem)
# A whole run takes 20 s where nothing else runs, and minutes where much does.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("model_cache")]


@pytest.fixture(scope="module", params=books.NOTEBOOKS, ids=lambda path: path.stem)
def executed(
    request: pytest.FixtureRequest, model_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> books.Executed:
    """Run a notebook under nbval, once for all tests."""
    return books.run_nbval(request.param, tmp_path_factory.mktemp("nbval"))


def test_nbval_finds_the_same_outputs(executed: books.Executed) -> None:
    assert executed.exit_code == 0, executed.report
    assert executed.counts == [len(books.code_cells(books.read(executed.path))), 0, 0, 0]


def test_answers_hold_the_facts(executed: books.Executed) -> None:
    shown = {name: books.text(outputs) for name, outputs in executed.outputs.items()}
    facts = _FACTS[executed.path.name]
    assert {name: shown[name] for name, fact in facts.items() if fact not in shown[name]} == {}


def test_key_of_the_server_is_in_no_output(executed: books.Executed) -> None:
    assert executed.outputs
    assert books.SECRET not in str(executed.outputs)


def test_live_output_ends_as_what_is_saved() -> None:
    live = books.run(_LIVE, stream="on")
    saved, now = books.code_cells(books.read(_LIVE)), books.code_cells(live)
    assert [cell.id for cell in now] == [cell.id for cell in saved]
    for cell, expected in zip(now, saved, strict=True):
        if "nbval-ignore-output" not in expected.metadata.get("tags", []):
            assert books.sanitized(cell.outputs) == books.sanitized(expected.outputs), cell.id
    shown = {cell.id: books.text(cell.outputs) for cell in now}
    facts = _FACTS[_LIVE.name] | _LATE_FACTS
    assert {name: shown[name] for name, fact in facts.items() if fact not in shown[name]} == {}


@every_notebook
def test_every_code_cell_is_saved_as_run_in_order(path: Path) -> None:
    cells = books.code_cells(books.read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    without_output = {cell.id for cell in cells if not cell.outputs}
    assert without_output <= {"load-extension"}


@every_notebook
def test_only_the_cell_that_shows_a_mistake_fails(path: Path) -> None:
    for cell in books.code_cells(books.read(path)):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in cell.metadata.get("tags", [])), cell.id
        warned = any(output.get("name") == "stderr" for output in cell.outputs)
        assert not warned, books.text(cell.outputs)


@every_notebook
def test_nothing_of_a_machine_or_a_person_is_saved(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    outputs = "\n".join(str(cell.outputs) for cell in books.code_cells(books.read(path)))
    assert _PLACES.findall(outputs) == []
    assert _KEYS.findall(content) == []
    assert set(books.read(path).metadata) == {"kernelspec", "language_info"}


@every_notebook
def test_first_code_cell_asserts_that_the_magics_exist(path: Path) -> None:
    # A failed %load_ext would leave errors that nbval does not count.
    first = books.code_cells(books.read(path))[0].source
    assert first.startswith("%load_ext llm_magic\nassert ")
    assert "magics_manager" in first
