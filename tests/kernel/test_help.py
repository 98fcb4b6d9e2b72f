"""Help and configuration, as a new user reads them."""

from __future__ import annotations

import pytest

from llm_magic.backends.registry import LoadOptions
from llm_magic.notebook.arguments.help_pages import page
from llm_magic.notebook.arguments.magic_options import MAGICS
from llm_magic.session.requests import AskOptions
from tests.kernels import Kernel


@pytest.mark.parametrize("name", MAGICS)
def test_help_is_the_page_of_the_magic(scripted: Kernel, name: str) -> None:
    assert page(name) in scripted.help(f"%{name}")


def test_help_option_prints_the_page(scripted: Kernel) -> None:
    for name in MAGICS:
        assert scripted.ok(f"%{name} -h").text == page(name).rstrip()
    for line in ("%%llm --help -t 9\nx", "%llm_load nothere --help", "x = %llm_models -h"):
        assert "-h, --help" in scripted.ok(line).text
    assert scripted.value("x") is None


def test_misspelled_magic_fails_with_a_suggestion(scripted: Kernel) -> None:
    for code, near in (
        ("%llm_lod tiny", "%llm_load"),
        ("%llm_statsu", "%llm_status"),
        ("%%llmm\nx", "%%llm"),
        ("%%lmm\nx", "%%llm"),
        ("%%LLM\nx", "%%llm"),
        ("%LLM_load tiny", "%llm_load"),
    ):
        ran = scripted.run(code)
        assert ran.status == "error"
        assert len(ran.text.splitlines()) == 2
        assert f'Did you mean "{near}"' in ran.text.splitlines()[1]
    for name, near in (
        ("llm_history", "llm_chats"), ("llm_ask hello", "llm"), ("llm_prompt x", "llm"),
        ("llm_cancel", "llm_stop"), ("llm_modles", "llm_models"), ("LLM_ask", "llm"),
        ("llm_code x", "llm -f code"), ("llm_chat x", "llm -c NAME"), ("llm_map x", "llm --over DATA"),
    ):  # fmt: skip
        assert scripted.run(f"%{name}").text.splitlines()[1] == f'Did you mean "%{near}"?'
    assert len(scripted.run("%llm_banana").text.splitlines()) == 1
    assert scripted.run("%llm_help history").error == (
        'There is no magic %history. Did you mean "%llm_chats"? %llm_help lists all.'
    )
    assert scripted.run("%nothere").text.count("\n") == 1


def test_text_above_the_cell_magic_fails_with_advice(scripted: Kernel) -> None:
    for code in ("# a question\n%%llm\nx", "x = 1\n\n%%llm -t 0\nx"):
        ran = scripted.run(code)
        assert (ran.status, ran.text.splitlines()[1:]) == (
            "error",
            [
                "%%llm must be the first line of the cell: write nothing above it, not even a comment."
            ],
        )


def test_a_lone_line_of_the_cell_magic_shows_help_or_the_next_step(scripted: Kernel) -> None:
    for code in ("%%llm -h", "%%llm --help\n", "\n%%llm -t 0 -h\n\n"):
        assert scripted.ok(code).text == page("llm").rstrip()
    for code in ("%%llm", "%%llm\n", "%%llm -t 0", "%%llm\n  \n "):
        ran = scripted.run(code)
        assert (ran.ename, len(ran.traceback)) == ("OptionError", 1)
        assert ran.error.startswith("The prompt is empty.")
    ran = scripted.run("%%llm What is this?")
    assert ran.error.startswith(
        "'What' is not an option of %%llm. Put the prompt below the first line"
    )
    # Another line may follow in a terminal.
    complete = "get_ipython().input_transformer_manager.check_complete"
    assert scripted.value(f"[{complete}(text)[0] for text in ('%%llm', '%%llm -h', '%%llm\\nx\\n\\n')]") == [
        "incomplete", "incomplete", "complete",
    ]  # fmt: skip


def test_help_of_the_cell_magic(scripted: Kernel) -> None:
    shown = scripted.help("%%llm")
    for text in ("--temperature T", "(0 to 2; default 0.7)", "--dry-run", "-o, --output VAR"):
        assert text in shown
    assert "(markdown, text, code, json)" in shown


def test_help_of_python_names_every_option(scripted: Kernel) -> None:
    for method, names in (
        ("load", LoadOptions.__annotations__),
        ("generate", AskOptions.__annotations__),
    ):
        shown = scripted.ok(f"help(llm.{method})").text
        assert [name for name in names if name not in shown] == []


def test_help_magic_lists_the_magics_and_shows_their_pages(scripted: Kernel) -> None:
    shown = scripted.ok("%llm_help").text
    assert [name for name in MAGICS if f"%{name} " not in shown] == []
    for name in ("%llm_load", "llm_load", "load"):
        assert scripted.ok(f"%llm_help {name}").text == page("llm_load").rstrip()
    for name in ("over", "--over", "%over"):
        assert "%llm --over DATA" in scripted.ok(f"%llm_help {name}").text
    assert "%llm_load -b, --backend" in scripted.ok("%llm_help -b").text
    wrong = scripted.run("%llm_help lod")
    assert (wrong.ename, 'Did you mean "%llm_load"?' in wrong.error) == ("OptionError", True)
    assert "llm_load" in scripted.complete("%llm_help ")


def test_help_of_other_things_still_works(scripted: Kernel) -> None:
    assert "Return the number of items" in scripted.help("len")


def test_the_settings_are_those_of_config(scripted: Kernel) -> None:
    assert "LLMMagics.temperature=<Setting>" in scripted.ok("%config LLMMagics").text
    scripted.ok("%config LLMMagics.temperature = 0.2")
    assert scripted.value("llm.generation.temperature") == 0.2
    assert "0.2 *" in scripted.ok("%llm_config").text
    assert (
        "temperature=9 is out of range. It must be 0 to 2."
        in scripted.ok("%config LLMMagics.temperature = 9").text
    )
    scripted.ok("%llm_config temperature=0.4")
    assert scripted.ok("%config LLMMagics.temperature").text == "0.4"
    assert scripted.completed("%config LLMMagics.temp|") == ["%config LLMMagics.temperature"]
    scripted.ok("%llm_config --reset")
