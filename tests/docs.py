"""The pages that are read: README.md and docs/. What is made in them, and what can be run.

``python -m tests.docs`` (scripts/update-docs) writes what is made: the help of magics after
``<!-- help: NAME ... -->``, and a file of docs/ after ``<!-- file: PATH -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_magic.notebook.arguments.help_pages import page
from tests.kernels import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ALL = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES]

_MADE = re.compile(r"(<!-- (help|file): ([^\n]*?) -->\n).*?(<!-- end of \2 -->\n)", re.DOTALL)
_BLOCK = re.compile(r"^(?:<!-- raises (\w+) -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Run in a kernel; `text` blocks of magics are read by their parsers only: they need servers or GPUs.
_RUN = {"ipython", "python"}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the error that it is there to show, if any."""

    language: str
    text: str
    raises: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is a cell that a reader could run anywhere."""
        return self.language in _RUN

    @property
    def is_of_magics(self) -> bool:
        """Whether it is a cell of magics, to be read and not run."""
        return self.language == "text" and self.text.startswith("%")


def text_of(path: Path) -> str:
    """Return a page as it is stored."""
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    for raises, language, text in _BLOCK.findall(text_of(path)):
        yield Block(language, text.rstrip("\n"), raises)


def written(path: Path) -> str:
    """Return a page with what is made in it as it is to be now."""
    return _MADE.sub(_made, text_of(path))


def helped(path: Path) -> list[str]:
    """Return the magics whose help stands in a page."""
    return [name for found in _MADE.finditer(text_of(path)) for name in _names(found)]


def _names(found: re.Match[str]) -> list[str]:
    return found[3].split() if found[2] == "help" else []


def _made(found: re.Match[str]) -> str:
    if found[2] == "file":
        file = DOCS / found[3]
        language = {".py": "python", ".toml": "toml"}[file.suffix]
        made = [f"```{language}\n{file.read_text(encoding='utf-8')}```\n"]
    else:
        made = [f"```text\n{page(name)}```\n" for name in _names(found)]
    return found[1] + "\n".join(made) + found[4]


def main() -> None:
    """Write the pages."""
    for path in PAGES:
        path.write_text(written(path), encoding="utf-8")


if __name__ == "__main__":
    main()
