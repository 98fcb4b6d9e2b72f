"""The notebooks do what they show: in a live kernel, and in what is saved of them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tests.notebooks import books

# As `str` writes outputs: a backslash is doubled, and a new line after a colon is no drive.
_PLACES = re.compile(r"/(?:home|root|work|tmp|Users|usr|opt|var|mnt)/|[A-Za-z]:\\\\")
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
    },
    "02_settings_and_panel.ipynb": {
        "load": "SmolLM2-135M-Instruct · local cpu fp32 · 538 MB · 8192 ctx · ready in",
        "session": "repetition_penalty  1.0 *",
        "session-ask": "The server is unable to process the request due to a high load.",
        "teapot": "The coffee shop refuses to brew because it is a teapot.",
        "stop": "The server is unable to process the request\n",
        "limit": "cut off at 6 tokens (--max-new-tokens)",
        "dry-run": "max_new_tokens 6, temperature 0.0",
        "precedence": "environment: 8\nsession:     7\nthis call:   6\nand after:   7",
        "traitlets": "max_new_tokens=512, temperature=0.0",
        "seeds": "the same seed, the same text: True\ntexts of three seeds: 3",
        "param": "The coffee shop refuses to brew because it is a teapot.",
        "format-use": "'404 Not Found'",
        "panel": "llm_magic control panel",
        "panel-magic": "temperature         0.3 *",
        "unload": "Unloaded SmolLM2-135M-Instruct (538 MB)",
    },
    "03_servers.ipynb": {
        "models": "localhost:8000  SmolLM2-135M-Instruct        8,192",
        "load": "SmolLM2-135M-Instruct · vllm localhost:8000 · 8192 ctx · ready in",
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
        "second": "61 (44 reused) → 16 tokens",
        "third": "Arabic",
        "fourth": "Egyptian pound",
        "check": "True: Egyptian Pound",
        "list": "1.6%",
        "stale": "turns: 4 · sent: 1",
        "stale-show": "stale",
        "import-ask": "Nairobi",
        "trim-error": "Chat 'world' has 2 turns above it: --trim leaves out",
        "trim": "oldest turn dropped (--trim)",
        "reset": "Deleted: egypt, world.",
        "code": "If no cell was filled, copy it from here.",
        "code-copy": "3.0",
        "code-use": "[6, 14, 7, 9] 9.0",
        "dry": 'db_password = "•••"',
    },
    "05_background_and_async.ipynb": {
        "begin": "41 → 60 tokens",
        "meanwhile": "'Austria': 'German'",
        "jobs": "Write a short story about a boat on the Nile.",
        "wait": "done",
        "result": "length 60",
        "long": "stopped by you; incomplete",
        "stop": "Stopped job 2 (SmolLM2-135M-Instruct) after",
        "stop-wait": "stopped",
        "gather": "Austria: German · on record: German",
        "astream": "Tokyo",
        "timeout": "cancelled",
        "timeout-after": "early",
    },
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
    without_output = {cell.id for cell in cells if not cell.outputs}
    assert without_output <= {"load-extension"}


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
    assert books.SECRET not in nbformat.writes(live(path))


def test_first_code_cell_asserts_that_the_magics_exist(path: Path) -> None:
    # A failed %load_ext would leave errors that nbval does not count.
    first = books.code_cells(books.read(path))[0].source
    assert first.startswith("%load_ext llm_magic\nassert ")
    assert "magics_manager" in first
