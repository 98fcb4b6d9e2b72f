"""The vocabulary: no old word in the files that are clean, and the search finds what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tooling import old_words


def test_clean_files_have_no_old_words() -> None:
    # Files that were renamed since are listed anew by `python -m tests.tooling.old_words --update`.
    clean = [path for path in old_words.clean_files() if (old_words.ROOT / path).is_file()]
    assert clean
    found = [hit for path in clean for hit in old_words.hits(path)]
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", "def make_way(): ...", ["make way"]),
        ("a.py", "class Doors: ...", ["doors"]),
        ("a.py", "class Call: ...", ["Call"]),
        ("a.py", "def call(*, draft): self.kept = 1", ["kept"]),
        ("a.py", '"""Tells the caller."""', ["Tells"]),
        ("a.py", "# What nobody\nx = 1", ["nobody"]),
        ("a.py", "import places as thoughts", ["thoughts"]),
        ("a.py", "replaced = x.settle(asked=1)", []),
        ("a.py", '"""Return `thoughts`."""', []),
        ("a.py", "x = '%llm --raw a'", ["--raw"]),
        ("a.md", "It says so.\n\n```\nIt says so.\n```\n", ["says"]),
        ("a.md", "```\n%%llm -f raw\n```\n", ["-f raw"]),
        ("pump.md", "", ["pump"]),
        ("a.ipynb", '{"cells": [{"cell_type": "markdown", "source": ["a door"]}]}', ["door"]),
        ("a.js", "const door = 1; // a door", ["door"]),
    ],
)
def test_old_words_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: list[str]
) -> None:
    monkeypatch.setattr(old_words, "ROOT", tmp_path)
    (tmp_path / name).write_text(text)
    assert [hit.word for hit in old_words.hits(name)] == expected


def test_every_line_of_the_list_is_valid() -> None:
    assert {word.kind for word in old_words.old_words()} == {
        "all",
        "class",
        "name",
        "prose",
        "text",
    }
    assert all(word.instead for word in old_words.old_words())
