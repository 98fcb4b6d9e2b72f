"""The README: short, with commands that exist, and a way to every magic and option."""

from __future__ import annotations

import re

import pytest

from tests.kernels import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block_after(mark: str) -> str:
    """Return the first code block after an HTML comment."""
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no {mark}"
    return found[1]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_comparison_is_a_part_of_the_full_one() -> None:
    full = (ROOT / "docs" / "explanation" / "comparison.md").read_text(encoding="utf-8")
    rows = len(re.findall(r"^\| [A-Z4■]", full, re.MULTILINE))
    assert f"has {rows} rows" in README


@pytest.mark.parametrize("mark", ["the run command", "the test command"])
def test_commands_name_files_that_exist(mark: str) -> None:
    for path in re.findall(r"(?:scripts|tests)/[\w./-]+", block_after(mark)):
        assert (ROOT / path).exists(), path
