"""The table of the magics is whole and without contradictions."""

from __future__ import annotations

import pytest

from llm_magic.notebook.arguments import magic_options
from llm_magic.notebook.arguments.magic_options import MAGICS


@pytest.mark.parametrize("name", MAGICS)
def test_no_option_means_two_things(name: str) -> None:
    names = [n for argument in magic_options.arguments(name) for n in argument.names]
    assert len(names) == len(set(names))
    dests = [argument.dest for argument in magic_options.arguments(name)]
    assert len(dests) == len(set(dests))


def test_the_magics_are_those_that_are_registered() -> None:
    from llm_magic.notebook.magics import GROUPS

    names = {kind: [n for group in GROUPS for n in group.magics[kind]] for kind in ("line", "cell")}
    assert sorted(MAGICS) == sorted(names["line"])
    assert sorted(names["cell"]) == ["llm", "llm_explain"]
