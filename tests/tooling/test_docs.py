"""The pages: generated parts are current, messages and tables match the source, links have targets."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_magic.config.commands import command, option, use_magics
from llm_magic.config.settings import Settings
from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.arguments.magic_options import MAGICS
from llm_magic.notebook.arguments.magic_options import arguments as options_of
from llm_magic.session import kernel_session
from tests.docs import ALL, DOCS, PAGES, Block, blocks, helped, name_of, text_of, written
from tests.echo_package import SOURCE
from tests.kernels import ROOT

_VARIES = "…"
# Options of commands that are no magics, and of a peer.
_COMMANDS = {
    "--headless", "--json", "--links", "--nbval", "--nbval-lax", "--nbval-sanitize-with", "--no-deps",
    "--only", "--page", "--peers", "--pipeline-parallel-size", "--schema", "--strict",
    "--tensor-parallel-size", "--version",
}  # fmt: skip

every_page = pytest.mark.parametrize("path", ALL, ids=name_of)


@every_page
def test_generated_parts_are_current(path: Path) -> None:
    assert text_of(path) == written(path), f"{name_of(path)} is stale: run scripts/update-docs"


def test_every_magic_has_its_help_in_one_page() -> None:
    assert sorted(name for path in PAGES for name in helped(path)) == sorted(MAGICS)


def test_every_page_is_listed_once_in_the_index() -> None:
    # The lists are the sidebar of the site.
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): ", text_of(DOCS / "index.md"), re.MULTILINE)
    pages = [str(path.relative_to(DOCS)) for path in PAGES if path.name != "index.md"]
    assert sorted(listed) == sorted(pages)
    assert "](docs/index.md)" in text_of(ROOT / "README.md")


@every_page
def test_code_runs_or_has_a_reason_not_to(path: Path) -> None:
    assert [block.text for block in blocks(path) if not block.is_explained] == []


def test_code_without_a_reason_is_found() -> None:
    assert not Block("sh", "ls").is_explained
    assert not Block("sh", "ls", "a comment").is_explained
    assert Block("sh", "ls", "not run: an example").is_explained
    assert Block("ipython", "%llm_load x", "not run: an example").is_explained
    assert not Block("ipython", "%llm_load x", "not run: an example").runs


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
        if block.has_magics and not block.runs:
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
        if name == "llm":
            assert parser.parse_with_prompt(name, arguments).prompt
        elif name in MAGICS:
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
        span
        for span in re.findall(r"`([^`\n]+)`", text)
        if not re.match(r"pip |ollama |hf |pytest |vllm ", span)
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
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Call):
        return _flag(node.value)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _flag(call: ast.Call) -> str:
    """Return what `option` or `command` puts in, with … for a value that is not constant."""
    spells: dict[str, Callable[..., str]] = {
        "option": option,
        "spelled": option,
        "command": command,
    }
    spell = spells.get(ast.unparse(call.func))
    if spell is None or any(one.arg is None for one in call.keywords):
        return ""
    given = [one.value if isinstance(one, ast.Constant) else _VARIES for one in call.args]
    named = {
        str(one.arg): one.value.value if isinstance(one.value, ast.Constant) else _VARIES
        for one in call.keywords
    }
    use_magics(True)
    try:
        return spell(*given, **named)
    finally:
        use_magics(False)


def test_messages_are_those_that_are_raised() -> None:
    page = text_of(DOCS / "troubleshooting.md")
    quoted = re.findall(r"^\*\*`.*`\*\*$", page, re.MULTILINE)
    quotes = [quote for line in quoted for _, quote in re.findall(r"\*\*(`+) ?(.*?) ?\1\*\*", line)]
    assert len(quotes) > 60
    known = messages()
    # The problem and the advice of an error are two texts.
    sentences = [one for quote in quotes for one in re.split(r"(?<=[.)…]) (?=[A-Z%])", quote)]
    assert [one for one in sentences if not any(one in text for text in known)] == []


@pytest.mark.parametrize("page", ["python", "errors"])
def test_python_runs_in_a_program(
    page: str,
    model_cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(model_cache))
    first = next(b for b in blocks(DOCS / "reference" / f"{page}.md") if b.language == "python")
    try:
        exec(compile(f"from llm_magic import llm\nllm.load()\n{first.text}", page, "exec"), {})
    finally:
        # The code uses the session of this process, whose threads would outlive the test.
        kernel_session().close()
    assert re.search(
        "Tokyo|temperature=9 is out of range. It must be 0 to 2", capsys.readouterr().out
    )


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", sorted(Settings.model_fields))
def test_every_setting_is_listed_with_its_default(field: str) -> None:
    info = Settings.model_fields[field]
    page = text_of(DOCS / "reference" / "settings.md")
    row = re.search(rf"\| `{info.validation_alias}` \|([^|]*)\|", page)
    assert row, f"{info.validation_alias} is not in the table"
    if info.default is not None:
        assert f"`{info.default}`" in row[1]


def drawn_tree() -> dict[str, str]:
    """Return the files of the tree in the architecture page, and the description of each."""
    page = text_of(DOCS / "explanation" / "architecture.md")
    lines = re.findall(r"```text\n(llm_magic/\n.*?)```", page, re.DOTALL)[0].splitlines()
    files: dict[str, str] = {}
    folders: list[str] = []
    for line in lines:
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        else:
            files["".join([*folders, name])] = description.strip()
    return files


def test_tree_is_that_of_the_package() -> None:
    found = [
        path
        for end in ("py", "js", "css", "txt")
        for path in (ROOT / "llm_magic").rglob(f"*.{end}")
    ]
    files = {str(path.relative_to(ROOT)) for path in found}
    expected = {f for f in files if not f.endswith("__init__.py") or f == "llm_magic/__init__.py"}
    drawn = drawn_tree()
    assert set(drawn) == expected
    assert [path for path, description in drawn.items() if not description] == []


def test_the_path_of_a_prompt_names_files_that_exist() -> None:
    page = text_of(DOCS / "explanation" / "architecture.md")
    named = re.findall(r"`([a-z]\w*/[\w/]+\.py)`", page)
    package = ROOT / "llm_magic"
    missing = [
        f for f in named if not any((package / top / f).is_file() for top in ("", "backends"))
    ]
    assert len(named) > 8
    assert missing == []


def test_errors_are_listed_and_drawn_in_their_tree() -> None:
    from llm_magic import errors

    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LLMMagicException)
    }
    page = text_of(DOCS / "reference" / "errors.md")
    assert set(re.findall(r"autoexception:: (\w+)", page)) == classes
    assert errors.__doc__ is not None
    assert {name for name in classes if not re.search(rf"\b{name}\b", errors.__doc__)} == set()


# -- files -----------------------------------------------------------------------------------------


def test_the_example_is_short() -> None:
    lines = (SOURCE / "llm_magic_echo.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 90


def test_changelog_starts_with_this_version() -> None:
    from llm_magic import __version__

    first = re.search(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert first is not None
    assert first[1] == __version__
