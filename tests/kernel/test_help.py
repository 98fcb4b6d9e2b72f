"""Help and completion, as a frontend asks for them."""

from __future__ import annotations

import pytest

from llm_magic.catalog import MAGICS, arguments
from tests.kernels import Kernel


@pytest.mark.parametrize("name", MAGICS)
def test_help_names_every_option(scripted: Kernel, name: str) -> None:
    page = scripted.help(f"%{name}")
    assert MAGICS[name].summary in page
    for argument in arguments(name):
        for flag in argument.names:
            assert flag in page
        assert argument.help in page


def test_help_of_the_cell_magic(scripted: Kernel) -> None:
    page = scripted.help("%%llm")
    for words in ("--temperature T", "[0 to 2]", "--dry-run", "-o, --output VAR", "Example:"):
        assert words in page
    assert "markdown, text, code, json, raw" in page


def test_help_of_other_things_still_works(scripted: Kernel) -> None:
    assert "Return the number of items" in scripted.help("len")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("%llm_load -q ", ["none", "8bit", "4bit"]),
        ("%llm_load --quantization 4", ["4bit"]),
        ("%llm_load -d c", ["cpu", "cuda"]),
        ("%llm_load --dtype b", ["bfloat16"]),
        ("%llm_load -b ", ["instructlab", "local", "ollama", "openai", "vllm"]),
        ("%llm_load --tr", ["--trust-remote-code"]),
        ("%%llm --te", ["--temperature"]),
        ("%llm --max", ["--max-new-tokens"]),
        ("%%llm -m ", ["tiny"]),
        ("%%llm -t 0.5 -f j", ["json"]),
        ("%%llm -o answ", ["answer_of_mine"]),
        ("%%llm -c ", ["a_chat"]),
        ("%llm_unload ", ["tiny"]),
        ("%llm_reset ", ["a_chat"]),
        ("%llm_config te", ["temperature="]),
        ("%llm_config top_k=3 top_", ["top_k=", "top_p="]),
        ("%llm_models --b", ["--backend", "--base-url"]),
    ],
)
def test_completion(scripted: Kernel, line: str, offered: list[str]) -> None:
    scripted.ok("answer_of_mine = 1")
    scripted.ok("%llm -c a_chat Hello")
    assert sorted(scripted.complete(line)) == sorted(offered)


def test_models_that_were_listed_are_offered_with_slashes(scripted: Kernel) -> None:
    assert "big" not in scripted.complete("%llm_load ")
    scripted.ok("%llm_models")
    assert scripted.complete("%llm_load b") == ["big"]
    scripted.ok("%llm_load org/wide:7b --name org/wide:7b --keep")
    assert scripted.complete("%llm_load org/w") == ["org/wide:7b"]
    assert scripted.complete("%llm_unload org/wide:") == ["org/wide:7b"]
    scripted.ok("%llm_unload org/wide:7b")


def test_other_completion_is_left_alone(scripted: Kernel) -> None:
    assert "backend" in scripted.complete("backen")
    assert "%llm_load" in scripted.complete("%llm_lo")
    # The prompt below a cell magic is no place for options.
    assert "--temperature" not in scripted.complete("%%llm\n--te")
