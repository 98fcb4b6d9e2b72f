"""The pages in docs/: help is that of the magics, messages are those of the source, links have targets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.arguments.magic_options import MAGICS
from llm_magic.notebook.arguments.magic_options import arguments as options_of
from tests.docs import ALL, DOCS, PAGES, blocks, helped, text_of, written
from tests.echo_package import SOURCE
from tests.kernels import ROOT

_VARIES = "…"
# Options of commands that are no magics, and of a peer.
_COMMANDS = {"--headless", "--json", "--no-deps", "--peers", "--readme", "--schema", "--strict"}

every_page = pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_is_made_is_new(path: Path) -> None:
    assert text_of(path) == written(path), f"docs/{path.name} is stale: type scripts/update-docs"


def test_every_magic_has_its_help_in_one_page() -> None:
    assert sorted(name for path in PAGES for name in helped(path)) == sorted(MAGICS)


def test_every_page_is_one_click_from_the_readme() -> None:
    readme = text_of(ROOT / "README.md")
    assert [p.name for p in PAGES if f"](docs/{p.name})" not in readme] == []


@every_page
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        if anchor:
            assert anchor in set(anchors(page)), target


def anchors(path: Path) -> Iterator[str]:
    """Yield the anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@every_page
def test_lines_fit(path: Path) -> None:
    rows = [line for line in text_of(path).splitlines() if not line.startswith("|")]
    assert [line for line in rows if len(line) > 140] == []


@every_page
def test_cells_of_magics_are_read_without_an_error(path: Path) -> None:
    for block in blocks(path):
        if block.is_of_magics:
            read(block.text)


def read(cell: str) -> None:
    """Parse the magics of a cell; raises `OptionError` for one that would be refused."""
    first, _, body = cell.partition("\n")
    if first.startswith("%%"):
        name, _, line = first.removeprefix("%%").partition(" ")
        assert body.strip(), "a question goes below"
        parser.parse(name, line)
        return
    for line in cell.splitlines():
        name, _, arguments = line.removeprefix("%").partition(" ")
        if name in MAGICS:
            parser.parse(name, arguments)
        else:
            assert line == "%load_ext llm_magic"


def test_a_cell_that_would_be_refused_is_found() -> None:
    with pytest.raises(OptionError):
        read("%llm_load the small model")


@every_page
def test_options_that_are_named_exist(path: Path) -> None:
    known = {name for magic in MAGICS for option in options_of(magic) for name in option.names}
    known |= _COMMANDS
    # In backquotes, without commands of a shell.
    text = re.sub(r"```sh\n.*?```", "", text_of(path), flags=re.DOTALL)
    spans = [
        span for span in re.findall(r"`([^`\n]+)`", text) if not re.match(r"pip |ollama |hf ", span)
    ]
    named = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    assert sorted(named - known) == []


def messages() -> set[str]:
    """Return the texts of the source, with … where a value is put in."""
    trees = (
        ast.parse(path.read_text(encoding="utf-8"))
        for path in (ROOT / "llm_magic").rglob("*.py")
    )  # fmt: skip
    texts = {_text(node) for tree in trees for node in ast.walk(tree)}
    return {re.sub(f"{_VARIES}+", _VARIES, text) for text in texts}


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) or _VARIES for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_messages_are_those_that_are_raised() -> None:
    page = text_of(DOCS / "troubleshooting.md")
    quoted = re.findall(r"^\*\*`.*`\*\*$", page, re.MULTILINE)
    quotes = [quote for line in quoted for quote in re.findall(r"\*\*`(.*?)`\*\*", line)]
    assert len(quotes) > 30
    known = messages()
    assert [quote for quote in quotes if not any(quote in text for text in known)] == []


def test_the_example_is_short() -> None:
    lines = (SOURCE / "llm_magic_echo.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 90


def test_changelog_starts_with_this_version() -> None:
    from llm_magic import __version__

    first = re.search(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert first is not None
    assert first[1] == __version__
