"""``-f code``: what is put into a cell, where it is only shown, and that nothing is run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels import Kernel

ASK = "%%llm -f code --quiet\n"


def offered(k: Kernel, answer: str, line: str = ASK, cell_id: str | None = "x") -> list[Any]:
    """Ask for a scripted answer; returns the text that goes into a cell, if any."""
    k.ok(f"backend.will(*whole_answer({answer!r}))")
    ran = k.ok(f"{line}Do it.", cell_id=cell_id)
    assert {payload["source"] for payload in ran.payload} <= {"set_next_input"}
    return [payload["text"] for payload in ran.payload]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Do:\n```python\na = 1\n\nprint(a)\n```\nor\n```\n2\n```", "a = 1\n\nprint(a)"),
        ("~~~py\nx = '```'\n~~~", "x = '```'"),
        ("````\n```python\ninner\n```\n````", "```python\ninner\n```"),
        ("1. First:\n\n   ```python\n   if x:\n       y\n   ```\n", "if x:\n    y"),
        ("> ```python\n> quoted\n> ```", "quoted"),
        ("no ```inline``` block\n```{python}\nz\n```", "z"),
        ("```pycon\n>>> 1 + 1\n2\n```", ">>> 1 + 1\n2"),
        ("Forgot the end:\n```python\nwhole", "whole"),
        ("```python\n  \nindented\n\n```", "  \nindented"),
    ],
)
def test_the_first_fenced_block_is_the_next_cell(scripted: Kernel, answer: str, code: str) -> None:
    assert offered(scripted, answer, cell_id=None) == [code]


@pytest.mark.parametrize("cell_id", ["a", None])
def test_it_is_never_run(scripted: Kernel, cell_id: str | None) -> None:
    scripted.ok("made = 0")
    assert offered(scripted, "```\nmade = 1\n```", cell_id=cell_id) == ["made = 1"]
    assert scripted.value("made") == 0
    assert offered(scripted, "```\nmade = 2\n```", "%%llm -o reply\n") == []
    assert scripted.value("(made, reply.code())") == (0, "made = 2")


@pytest.mark.parametrize(
    "answer",
    ["No code here.", "import os\nprint(os.name)", "Text:\n\n    indented = 1\n", "```x```"],
)
def test_without_a_fence_nothing_is_guessed(scripted: Kernel, answer: str) -> None:
    scripted.ok(f"backend.will(*whole_answer({answer!r}))")
    ran = scripted.ok(f"{ASK}Do it.", cell_id="x")
    assert ran.payload == []
    assert ran.text.endswith("The answer contains no fenced code block, so no cell was filled.")


@pytest.mark.parametrize(("language", "magic"), [("bash", "%%bash"), ("sql", "")])
def test_another_language_comes_with_a_line_that_keeps_it_from_running(
    scripted: Kernel, language: str, magic: str
) -> None:
    (cell,) = offered(scripted, f"```{language}\nrm -r data\n```", cell_id=f"in {language}")
    first, *others = cell.split("\n")
    assert first.startswith(f"# This is {language}, not Python")
    assert magic in first
    assert others == ["rm -r data"]
    scripted.ok("import os; os.mkdir('data')")
    assert scripted.run(cell).ename == "SyntaxError"
    assert scripted.value("os.path.isdir('data')")
    scripted.ok("os.rmdir('data')")


def test_replace_takes_the_place_of_the_cell(scripted: Kernel) -> None:
    scripted.ok("backend.will(*whole_answer('```\\nnew\\n```'))")
    ran = scripted.ok("%%llm -f code --replace\nDo it.", cell_id="x")
    assert [(p["text"], p["replace"]) for p in ran.payload] == [("new", True)]
    ran = scripted.run("%%llm --replace\nDo it.", cell_id="x")
    assert (ran.ename, ran.payload) == ("OptionError", [])
    assert ran.error == "--replace requires -f code."


def test_a_frontend_that_names_no_cells_is_shown_a_block_to_copy(scripted: Kernel) -> None:
    scripted.ok("backend.will(*whole_answer('```python\\nx = \"<b>\"\\n```'))")
    ran = scripted.ok(f"{ASK}Do it.")
    assert ran.text.endswith('x = "<b>"\n\nIf no cell was filled, copy it from here.')
    assert "user-select: all" in ran.html
    assert "<b>" not in ran.html
    scripted.ok("backend.will(*whole_answer('```python\\nx\\n```'))")
    assert "copy it" not in scripted.ok(f"{ASK}Do it.", cell_id="y").text


def test_running_all_again_does_not_make_the_notebook_longer(scripted: Kernel) -> None:
    assert offered(scripted, "```\none\n```", cell_id="again") == ["one"]
    scripted.ok("backend.will(*whole_answer('Once more:\\n```\\none\\n```'))")
    ran = scripted.ok(f"{ASK}Do it.", cell_id="again")
    assert ran.payload == []
    assert "has already put the same code into a cell" in ran.text
    assert offered(scripted, "```\ntwo\n```", cell_id="again") == ["two"]
    assert offered(scripted, "```\none\n```", cell_id="other") == ["one"]


def test_half_a_block_is_not_offered(scripted: Kernel) -> None:
    scripted.ok("backend.will(*whole_answer('```python\\nfor x in', finish='length'))")
    ran = scripted.ok(f"{ASK}Do it.", cell_id="x")
    assert ran.payload == []
    assert ran.text.endswith(
        "The code block is not closed, so no cell was filled. Use a higher --max-new-tokens."
    )
    scripted.ok("backend.will(*whole_answer('```python\\nx\\n```\\nIt', finish='length'))")
    assert [p["text"] for p in scripted.ok(f"{ASK}Do it.", cell_id="x").payload] == ["x"]


def test_what_was_stopped_offers_nothing(scripted: Kernel) -> None:
    scripted.ok("from tests.scripted import Hang\nbackend.will('```\\nx\\n```\\n', Hang())")
    cell = scripted.send(f"{ASK}Do it.", "stopped")
    scripted.wait_for_output(cell, "x")
    scripted.interrupt()
    ran = scripted.wait(cell)
    assert (ran.ename, ran.payload) == ("Interrupted", [])
    assert "no cell was filled" not in ran.text


def test_code_with_characters_that_were_replaced_has_a_line(scripted: Kernel) -> None:
    line = "Invalid characters in the code were replaced by \N{REPLACEMENT CHARACTER}."
    for answer, code in {"a\x00b": "a\ufffdb", "x = '\ufffd'": "x = '\ufffd'"}.items():
        scripted.ok(f"backend.will(*whole_answer({f'```{chr(10)}{answer}{chr(10)}```'!r}))")
        ran = scripted.ok(f"{ASK}Do it.", cell_id=code)
        assert [payload["text"] for payload in ran.payload] == [code]
        assert ran.text.endswith(line) == ("\x00" in answer)
