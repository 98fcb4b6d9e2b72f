"""Blocks of code in an answer, and ``-f code`` in IPython without a kernel, which fills the next prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from IPython.core.interactiveshell import InteractiveShell

from llm_magic.notebook.display.code_cells import code_blocks
from llm_magic.notebook.magics import register, unregister
from llm_magic.session import Session
from tests.scripted import ScriptedBackend, scripted_session, whole_answer
from tests.shell import ipython

Terminal = tuple[InteractiveShell, Session, ScriptedBackend]


def typed(shell: InteractiveShell, line: str) -> None:
    """Type a line at the prompt."""
    assert shell.run_cell(line).success  # type: ignore[no-untyped-call]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with ipython() as shell, scripted_session() as (session, backend):
        register(shell, session)
        yield shell, session, backend
        unregister(shell)
        assert session.cells.current() is None


def test_code_block_becomes_the_next_input(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, _session, backend = terminal
    backend.will(*whole_answer("Do:\n```python\nx = 1\n```\n"))
    typed(shell, "%llm -f code --quiet Do it.")
    assert shell.rl_next_input == "x = 1"
    assert capsys.readouterr().out == "Do:\n```python\nx = 1\n```\n"
    shell.rl_next_input = None
    typed(shell, "%llm -f code --quiet Do it.")
    assert shell.rl_next_input is None
    assert capsys.readouterr().out == (
        "Do it.\nThe answer contains no fenced code block, so no cell was filled.\n"
    )


def test_prompt_text_identifies_the_cell_without_ids(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, session, _backend = terminal
    for line in ("-c t One", "-c t Two", "-c t -t 0.5 One", "-c t Three"):
        typed(shell, f"%llm {line}")
    turns = session.chats.get("t").turns
    assert [(t.question.content, t.stale) for t in turns] == [
        ("One", False), ("Two", True), ("Three", False),
    ]  # fmt: skip
    assert "no cell ids" in capsys.readouterr().out
    typed(shell, "%llm -c t Three")
    assert "run again, and replaces its turn." in capsys.readouterr().out


def test_system_prompt_is_filled_reported_and_removed(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, session, backend = terminal
    shell.user_ns["language"] = "French"
    typed(shell, '%llm -c s -s "You speak {langauge}." One')
    assert "langauge" in capsys.readouterr().out
    typed(shell, '%llm -c s -s "You speak {language}." Two')
    assert backend.requests[-1].messages[0].content == "You speak French."
    typed(shell, '%llm -c s -s "" Three')
    assert backend.requests[-1].messages[0].content == ""
    assert session.chats.get("s").system == ""


def test_code_is_found_in_costly_text() -> None:
    costly, code = "a\n===\n" * 40_000, "x = 1\n\ny = 2"
    text = f"{costly}\n```python\n{code}\n```\n~~~\nopen\n```"
    blocks = code_blocks(text)
    assert [(b.language, b.code, b.closed) for b in blocks] == [
        ("python", code, True), ("", "open\n```", False),
    ]  # fmt: skip
    assert [b.code for b in code_blocks("![" * 300_000 + f"\n\n```python\n{code}\n```")] == [code]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("Prose `x` only", []),
        ("A:\n```python\nx = 1\n\ny = 2\n```\nB:\n~~~\nz\n~~~", [("python", "x = 1\n\ny = 2"), ("", "z")]),
        ("````md\n```python\nx\n```\n````", [("md", "```python\nx\n```")]),
        ("- a\n  ```sh\n  ls\n  ```", [("sh", "ls")]),
        ("> ```C++\n> x\n> ```", [("c++", "x")]),
        ("```python\nx = ", [("python", "x = ")]),
        ("```{python}\nx\n```\n```js:a.js\nz\n```", [("python", "x"), ("js", "z")]),
        ("```Python title='a'\ny\n```", [("python", "y")]),
        ("Code:\n\n    x = 1\n", [("", "x = 1")]),
        ("    x = 1\n\n```\ny\n```", [("", "y")]),
        ("```\"><script>\nx\n```", [("", "x")]),
        ("$$\n```\nx\n```\n$$", []),
    ],
)  # fmt: skip
def test_code_blocks(text: str, blocks: list[tuple[str, str]]) -> None:
    assert [(block.language, block.code) for block in code_blocks(text)] == blocks


@pytest.mark.parametrize(
    ("text", "fenced", "closed"),
    [
        ("```\nx\n```", True, True),
        ("```\nx\n```\n", True, True),
        ("```\n```", True, True),
        ("```\n\n```", True, True),
        ("~~~~ py\n```\nx\n~~~~~", True, True),
        ("- ```\n  x\n  ```\n- more", True, True),
        ("> ```\n> x\n> ```", True, True),
        ("```", True, False),
        ("```\n", True, False),
        ("```\nx", True, False),
        ("```\nx\n\n", True, False),
        ("````\nx\n```", True, False),
        ("```\nx\n~~~", True, False),
        ("> ```\n> x\n\nprose", True, False),
        ("    x\n", False, True),
    ],
)
def test_block_has_fence_and_end_as_attributes(text: str, fenced: bool, closed: bool) -> None:
    (block,) = code_blocks(text)
    assert (block.fenced, block.closed) == (fenced, closed)
