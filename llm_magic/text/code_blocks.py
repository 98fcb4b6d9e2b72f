"""The code in an answer.

The parser limits its work, because it runs on the thread that interrupts stop. The limits count steps, not
seconds: the same text has the same blocks on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from llm_magic.text import replace_surrogates

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.token import Token

_MAX_STEPS, _MAX_TOKENS = 30_000, 30_000
_TOKENS_OF_CELL = 3  # its start, text and end
# Models indent blocks in lists by any number of spaces.
_FENCE = re.compile(r"[ \t]*+(`{3,}+(?=[^`]*+$)|~{3,}+)(.*)")
_LINE = re.compile(r"([^\r\n]*+)(?:\r\n?|\n|\Z)")
# What formulas begin with, and how their last lines end.
_FORMULAS = {
    "$$": re.compile(r"\$\$\s*\Z"),
    "\\[": re.compile(r"\\\]\s*\Z"),
    "\\begin{": re.compile(r"\\end\{[^{}]*\}\s*\Z"),
}


class TooMuchWork(Exception):
    """Raised where a text takes the parser, or a page, more work than is allowed."""


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One block of code in an answer, and the language that its fence names ("" if none).

    A block that is not `fenced` is indented; one that is not `closed` goes on to the end of the text.
    """

    language: str
    code: str
    fenced: bool = True
    closed: bool = True


@dataclass(frozen=True, slots=True)
class FencedSpan:
    """Where a fenced block and its code are in a text; the block may go on to the end of the text."""

    language: str
    start: int
    end: int
    code_start: int
    code_end: int
    closed: bool


def first_fenced(text: str) -> CodeBlock | None:
    """Return the first fenced block of an answer, None if it has none."""
    return next((block for block in code_blocks(text) if block.fenced), None)


def code_blocks(text: str) -> list[CodeBlock]:
    """Return the fenced blocks of an answer or, if it has none, the indented ones."""
    text = replace_surrogates(text)
    try:
        tokens = _blocks(text)
    except TooMuchWork:
        return list(_fences(text))
    fences = [token for token in tokens if token.type == "fence"]
    found = fences or [token for token in tokens if token.type == "code_block"]
    return [_code_block(token) for token in found]


def _blocks(text: str) -> list[Token]:
    """Return the blocks of a text; what is in its lines is not parsed."""
    from markdown_it.rules_core import StateCore, block, normalize

    state = StateCore(text, _parser(), {})
    normalize(state)
    block(state)
    return state.tokens


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    made = MarkdownIt("commonmark").enable("table").disable("html_block")
    alt = ["paragraph", "reference", "blockquote", "list"]
    made.block.ruler.before("table", "count", count_line, {"alt": alt})
    made.block.ruler.before("fence", "formula", _formula, {"alt": alt})
    return made


def spend(env: MutableMapping[str, Any], steps: int) -> None:
    """Count steps of a text; raises `TooMuchWork` if there are too many."""
    env["steps"] = env.get("steps", 0) + steps
    if env["steps"] > _MAX_STEPS:
        raise TooMuchWork


def count_line(state: StateBlock, line: int, _end: int, _only_check: bool) -> bool:
    """Count a line where a block may start; rows of a table are such lines."""
    cells = state.src.count("|", state.bMarks[line], state.eMarks[line])
    if len(state.tokens) + _TOKENS_OF_CELL * cells > _MAX_TOKENS:
        raise TooMuchWork
    spend(state.env, 1)
    return False


def _formula(state: StateBlock, start_line: int, end_line: int, only_check: bool) -> bool:
    """Pass a formula, which ends in its paragraph: a fence in it starts no code."""
    start = state.bMarks[start_line] + state.tShift[start_line]
    opening = next((one for one in _FORMULAS if state.src.startswith(one, start)), None)
    if opening is None or state.is_code_block(start_line):
        return False
    line, start = start_line, start + len(opening)
    while line < end_line and not state.isEmpty(line) and state.sCount[line] >= state.blkIndent:
        spend(state.env, 1)
        if _FORMULAS[opening].search(state.src[start : state.eMarks[line]]):
            state.line = state.line if only_check else line + 1
            return True
        line += 1
        start = state.bMarks[line]
    return False


def _fences(text: str) -> Iterator[CodeBlock]:
    """Yield the fenced blocks between the lines of a text that is too long to be parsed."""
    for span in fenced_spans(text):
        code = re.sub(r"\r\n?", "\n", text[span.code_start : span.code_end])
        yield CodeBlock(span.language, code.removesuffix("\n"), closed=span.closed)


def fenced_spans(text: str) -> Iterator[FencedSpan]:
    """Yield where the fenced blocks of a text are, in time that is linear in its length."""
    fence, language, start, code_start = "", "", 0, 0
    for line in _LINE.finditer(text):
        if not fence and (opening := _FENCE.match(line[1])):
            fence, language = opening[1], fence_language(opening[2])
            start, code_start = line.start(), line.end()
        elif fence and (closing := line[1].strip()) == fence[0] * max(len(fence), len(closing)):
            yield FencedSpan(language, start, line.end(1), code_start, line.start(), closed=True)
            fence = ""
    if fence:
        yield FencedSpan(language, start, len(text), code_start, len(text), closed=False)


def _code_block(token: Token) -> CodeBlock:
    fenced = token.type == "fence"
    code = token.content.removesuffix("\n")
    return CodeBlock(fence_language(token.info), code, fenced, not fenced or is_closed(token))


def is_closed(fence: Token) -> bool:
    """Return whether a block of code has its end: a line besides its first and those of its code."""
    first, end = fence.map or [0, 0]
    lines = fence.content.count("\n") + (fence.content[-1:] not in {"", "\n"})
    return end - first == lines + 2


def fence_language(info: str) -> str:
    """Return the language of a fence's info string, in letters fit for an attribute."""
    parts = re.split(r"[\s,:{]", info.strip().lstrip("{.").rstrip("}").lower(), maxsplit=1)
    return parts[0] if re.fullmatch(r"[a-z0-9+#-]{1,30}", parts[0]) else ""
