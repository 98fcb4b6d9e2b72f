"""Find the words of ``old_words.txt`` in names, docstrings, comments, messages and pages.

python -m tests.tooling.old_words                       hits per file
python -m tests.tooling.old_words llm_magic/session     each hit below a path
python -m tests.tooling.old_words --update              add the files without hits to clean_files.txt
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = Path(__file__).with_name("old_words.txt")
CLEAN = Path(__file__).with_name("clean_files.txt")
_KINDS = ("all", "class", "name", "prose", "text")
_NO_VOCABULARY = {"LICENSE", "tests/tooling/old_words.py", "tests/tooling/test_vocabulary.py"}
_SUFFIXES = {".py", ".md", ".ipynb", ".js", ".toml", ""}
_OPTION_TEXT = re.compile(r"(?<!\S)(?:%%?llm|llm\.)")


@dataclass(frozen=True, slots=True)
class Word:
    """An old word, where it is looked up, and what to write instead."""

    kind: str
    pattern: re.Pattern[str]
    instead: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A name or a text in a file: `kind` is ``name``, ``prose`` or ``text``."""

    kind: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    """An old word in a file."""

    path: str
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word!r}; write: {self.instead}"


@cache
def old_words() -> tuple[Word, ...]:
    """Return the old words."""
    found = []
    for line in WORDS.read_text().splitlines():
        if line and not line.startswith("#"):
            kind, _, others = line.partition("|")
            pattern, _, instead = others.rpartition("|")
            bounded = pattern.strip() if kind.strip() == "text" else rf"\b(?:{pattern.strip()})\b"
            flags = re.IGNORECASE if kind.strip() in {"all", "prose"} else re.NOFLAG
            found.append(Word(kind.strip(), re.compile(bounded, flags), instead.strip()))
    return tuple(found)


@cache
def _any_of(kind: str) -> re.Pattern[str]:
    """Return an expression that finds a text with an old word of a kind sooner than each of theirs."""
    patterns = [word.pattern for word in old_words() if word.kind == kind]
    return re.compile("|".join(p.pattern for p in patterns), patterns[0].flags)


def hits(path: str) -> list[Hit]:
    """Return the old words in a file and in its name."""
    text = (ROOT / path).read_text(errors="replace")
    return [
        Hit(path, piece.line, found, instead)
        for piece in (*_file_name(path), *_pieces(path, text))
        for found, instead in _found(piece.kind, piece.text)
    ]


@cache  # Most names stand in many places.
def _found(kind: str, text: str) -> tuple[tuple[str, str], ...]:
    """Return the old words in the text of a piece, and what to write instead."""
    compared = {word_kind: _compared(word_kind, kind, text) for word_kind in _KINDS}
    used = {each for each, its_text in compared.items() if _any_of(each).search(its_text)}
    return tuple(
        (match[0], word.instead)
        for word in old_words()
        if word.kind in used
        for match in word.pattern.finditer(compared[word.kind])
    )


def _compared(word_kind: str, kind: str, text: str) -> str:
    """Return the text of a piece as words of a kind are compared with it; "" if they are not."""
    if kind != "name":
        return text if word_kind in {kind, "all", "text"} else ""
    if word_kind == "class":
        return text.lstrip("_")
    if word_kind not in {"name", "all"}:
        return ""
    return re.sub(r"_+|(?<=[a-z0-9])(?=[A-Z])", " ", text).lower()


def _file_name(path: str) -> Iterator[Piece]:
    for part in Path(path).with_suffix("").parts:
        yield Piece("name", 1, part.replace("-", "_"))


def _pieces(path: str, text: str) -> Iterator[Piece]:
    if path.endswith(".py"):
        yield from _of_python(text, messages=path.startswith(("llm_magic/", "scripts/")))
    elif path.endswith(".ipynb"):
        for cell in json.loads(text)["cells"]:
            kind = "prose" if cell["cell_type"] == "markdown" else "text"
            yield Piece(kind, 1, "".join(cell["source"]))
    elif path.endswith(".md"):
        yield from _of_page(text)
    else:
        marker = "//" if path.endswith(".js") else "#"
        for number, line in enumerate(text.splitlines(), 1):
            yield Piece("prose", number, line.partition(marker)[2])


def _of_page(text: str) -> Iterator[Piece]:
    """Yield the lines of a Markdown page; code is not prose."""
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        yield Piece("text", number, line)
        if not in_code:
            yield Piece("prose", number, re.sub(r"`[^`]*`|\]\([^)]*\)", "``", line))


def _of_python(text: str, *, messages: bool) -> Iterator[Piece]:
    nodes = list(ast.walk(ast.parse(text)))
    docstrings = set(_docstrings(nodes))
    for node in nodes:
        yield from _names(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_message = messages and node.value.count(" ") > 1
            for line, written in enumerate(node.value.splitlines(), node.lineno):
                if is_message or id(node) in docstrings:
                    yield Piece("prose", line, re.sub(r"``?[^`\n]*``?", "``", written))
                if messages or _OPTION_TEXT.search(written):
                    yield Piece("text", line, written)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Piece("prose", token.start[0], re.sub(r"`[^`]*`", "``", token.string))


def _docstrings(nodes: Sequence[ast.AST]) -> Iterator[int]:
    """Yield the ids of the constants that are docstrings."""
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr):
                yield id(first.value)


def _names(node: ast.AST) -> Iterator[Piece]:
    """Yield the name that a node defines."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield Piece("name", node.lineno, node.name)
        case ast.arg():
            yield Piece("name", node.lineno, node.arg)
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            yield Piece("name", node.lineno, name)
        case ast.alias(asname=str(name)):
            yield Piece("name", node.lineno, name)


def all_files() -> list[str]:
    """Return the files that the vocabulary is for: code, tests, scripts and pages."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return sorted(
        path
        for path in listed
        if path
        and path not in _NO_VOCABULARY
        and not Path(path).name.startswith(".")
        and Path(path).suffix in _SUFFIXES
        and (ROOT / path).is_file()
    )


def clean_files() -> list[str]:
    """Return the files that are clean and stay clean; the list only grows."""
    return CLEAN.read_text().split()


def main(arguments: Sequence[str]) -> int:
    """Print the hits: of each file the number or, below a path, each hit."""
    paths = [argument for argument in arguments if not argument.startswith("-")]
    files = all_files()
    if paths:
        files = [file for file in files if file.startswith(tuple(paths))]
    found = {file: hits(file) for file in files}
    for file, listed in found.items():
        if listed:
            sys.stdout.writelines(f"{hit}\n" for hit in listed if paths)
            sys.stdout.write("" if paths else f"{len(listed):5} {file}\n")
    sys.stdout.write(f"{sum(map(len, found.values())):5} in all\n")
    if "--update" in arguments:
        clean = {file for file in clean_files() if (ROOT / file).is_file()}
        clean |= {file for file, listed in found.items() if not listed}
        CLEAN.write_text("".join(f"{file}\n" for file in sorted(clean)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
