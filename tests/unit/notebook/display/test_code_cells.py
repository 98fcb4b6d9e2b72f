"""``-f code`` in IPython without a kernel, which fills the next prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from IPython.core.interactiveshell import InteractiveShell

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
