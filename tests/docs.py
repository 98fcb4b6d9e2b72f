"""The pages of the documentation: the files at the root and docs/. What is generated in them, what runs.

``python -m tests.docs`` (scripts/update-docs) writes what is generated: the help of magics after
``<!-- help: NAME ... -->``, a file of docs/ after ``<!-- file: PATH -->``, and a table of the hosted
providers after ``<!-- providers: TABLE -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_magic.notebook.arguments.help_pages import page
from tests.kernels import ROOT
from tests.provider_tables import PROVIDER_TABLES

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
ALL = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *PAGES,
]

_MADE = re.compile(
    r"(<!-- (help|file|providers): ([^\n]*?) -->\n).*?(<!-- end of \2 -->\n)", re.DOTALL
)
_BLOCK = re.compile(
    r"^(?:<!-- ([^\n]*?) -->\n)?```(\{?[\w-]+\}?)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
_RUN = {"ipython", "python"}
# Blocks that readers do not run: directives of Sphinx, drawings and messages.
_NOT_CODE = {"{eval-rst}", "text"}
_NOT_RUN, _RAISES = "not run: ", "raises "
# Comments that explain why a block does not run: it is generated, or CI runs it as it is written.
_EXPLAINED = (_NOT_RUN, "file: ", "the run command", "the test command")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the comment on the line above it."""

    language: str
    text: str
    comment: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is a cell that runs in the tests."""
        return self.language in _RUN and not self.comment.startswith(_EXPLAINED)

    @property
    def raises(self) -> str:
        """The error that the cell shows, if any."""
        return self.comment.removeprefix(_RAISES) if self.comment.startswith(_RAISES) else ""

    @property
    def is_explained(self) -> bool:
        """Whether it runs, is no code, or has a comment that explains why it does not run."""
        return self.runs or self.language in _NOT_CODE or self.comment.startswith(_EXPLAINED)

    @property
    def has_magics(self) -> bool:
        """Whether it is a cell of magics."""
        return self.language == "ipython" and self.text.startswith("%")


def name_of(path: Path) -> str:
    """Return the path of a page in the repository."""
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """Return a page as it is stored."""
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    for comment, language, text in _BLOCK.findall(text_of(path)):
        yield Block(language, text.rstrip("\n"), comment)


def written(path: Path) -> str:
    """Return a page with its generated parts as they should be now."""
    return _MADE.sub(_made, text_of(path))


def helped(path: Path) -> list[str]:
    """Return the magics whose help is in a page."""
    return [name for found in _MADE.finditer(text_of(path)) for name in _names(found)]


def _names(found: re.Match[str]) -> list[str]:
    return found[3].split() if found[2] == "help" else []


def _made(found: re.Match[str]) -> str:
    if found[2] == "file":
        file = DOCS / found[3]
        language = {".py": "python", ".toml": "toml"}[file.suffix]
        made = [f"```{language}\n{file.read_text(encoding='utf-8')}```\n"]
    elif found[2] == "providers":
        made = [PROVIDER_TABLES[found[3]]()]
    else:
        made = [f"```text\n{page(name)}```\n" for name in _names(found)]
    return found[1] + "\n".join(made) + found[4]


def main() -> None:
    """Write the pages."""
    for path in ALL:
        path.write_text(written(path), encoding="utf-8")


if __name__ == "__main__":
    main()
