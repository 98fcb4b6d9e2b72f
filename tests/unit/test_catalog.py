"""The help of every magic names all it takes."""

from __future__ import annotations

import pytest

from llm_magic import catalog
from llm_magic.catalog import MAGICS
from llm_magic.config import GenerationConfig
from llm_magic.specs import specs

UNLOAD = """\
Free a model and show what came back.

    %llm_unload [NAME | --all]

  NAME   The model; else the active one.
  --all  Free every model.
"""


@pytest.mark.parametrize("name", MAGICS)
def test_the_help_names_every_option_and_its_meaning(name: str) -> None:
    text = catalog.help_text(name)
    magic = MAGICS[name]
    assert text.startswith(f"{magic.summary}\n\n    {magic.usage}\n")
    for argument in catalog.arguments(name):
        assert f"{', '.join(argument.names)} {argument.metavar}".strip() in text
        assert argument.help in text
        for choice in argument.choices:
            assert choice in text
    if magic.positional is not None:
        assert f"  {magic.positional.metavar} " in text
        assert magic.positional.help in text
    for row in magic.example.splitlines():
        assert f"    {row}\n" in text


def test_a_help_text_as_it_is_shown() -> None:
    assert catalog.help_text("llm_unload") == UNLOAD


def test_ranges_are_shown_as_they_are_checked() -> None:
    text = catalog.help_text("llm")
    for spec in specs(GenerationConfig).values():
        if spec.range:
            assert f"{spec.help} [{spec.range}]" in text


@pytest.mark.parametrize("name", MAGICS)
def test_no_option_means_two_things(name: str) -> None:
    names = [n for argument in catalog.arguments(name) for n in argument.names]
    assert len(names) == len(set(names))
    dests = [catalog.dest(argument) for argument in catalog.arguments(name)]
    assert len(dests) == len(set(dests))


def test_the_magics_are_those_that_are_registered() -> None:
    from llm_magic.magics import LLMMagics

    kinds = LLMMagics.magics
    assert MAGICS.keys() == kinds["line"].keys()
    assert kinds["cell"].keys() == {"llm"}
