"""The code in an answer, and the next cell that ``-f code`` puts it into; it is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_magic.notebook.display.live_output import is_notebook, mime_bundle, muted, write
from llm_magic.notebook.display.markdown import (
    TooMuchWork,
    fence_language,
    is_closed,
    parser,
    render_code,
)
from llm_magic.text import replace_surrogates

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell
    from markdown_it.token import Token

    from llm_magic.types import Reply

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")
_PYTHON = frozenset({"", "py", "py3", "pycon", "python", "python3", "ipython", "ipython3"})
# Languages that have a cell magic in every IPython.
_MAGICS = {
    "bash": "%%bash", "sh": "%%bash", "shell": "%%bash", "zsh": "%%bash", "html": "%%html",
    "javascript": "%%javascript", "js": "%%javascript", "perl": "%%perl", "ruby": "%%ruby",
}  # fmt: skip
# One click selects all of it.
_COPY_STYLE = "user-select: all; -webkit-user-select: all"


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One block of code in an answer, and the language that its fence names ("" if none).

    A block that is not `fenced` is indented; one that is not `closed` goes on to the end of the text.
    """

    language: str
    code: str
    fenced: bool = True
    closed: bool = True


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

    state = StateCore(text, parser(has_formulas=True, has_brackets=True), {})
    normalize(state)
    block(state)
    return state.tokens


def _fences(text: str) -> Iterator[CodeBlock]:
    """Yield the fenced blocks between the lines of a text that is too long to be parsed."""
    fence, language, code = "", "", list[str]()
    for line in re.split(r"\r\n?|\n", text):
        if not fence and (opening := _FENCE.match(line)):
            fence, language = opening[1], fence_language(opening[2])
        elif fence and line.strip() == fence[0] * max(len(fence), len(line.strip())):
            yield CodeBlock(language, "\n".join(code))
            fence, code = "", []
        elif fence:
            code.append(line)
    if fence:
        yield CodeBlock(language, "\n".join(code), closed=False)


def _code_block(token: Token) -> CodeBlock:
    fenced = token.type == "fence"
    code = token.content.removesuffix("\n")
    return CodeBlock(fence_language(token.info), code, fenced, not fenced or is_closed(token))


class CodeCells:
    """Puts the code of answers into cells, and records which code was put below which cell."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._offered: dict[str, str] = {}

    def offer(self, reply: Reply, cell_id: str | None, *, replace: bool) -> None:
        """Put the first fenced block into the next cell, or with `replace` into the current one."""
        block = next((block for block in code_blocks(reply.text) if block.fenced), None)
        if block is None:
            self._show("The answer contains no fenced code block, so no cell was filled.")
            return
        if not block.closed and reply.finish_reason != "stop":
            more = " Use a higher --max-new-tokens." if reply.finish_reason == "length" else ""
            self._show(f"The code block is not closed, so no cell was filled.{more}")
            return
        code = cell_of(block)
        if not replace and cell_id and self._offered.get(cell_id) == code:
            # Otherwise each run of the whole notebook would add cells.
            message = (
                "This cell has already put the same code into a cell. Copy it to use it again."
            )
            self._show(message, code)
            return
        self._shell.set_next_input(code, replace=replace)
        if cell_id and not replace:
            self._offered[cell_id] = code
        if not cell_id and is_notebook(self._shell):
            # A frontend that sends no cell ids, as JupyterLab and VS Code do, may not add cells either.
            self._show("If no cell was filled, copy it from here.", code)

    def _show(self, message: str, code: str = "") -> None:
        from IPython.display import display

        plain, html = f"{code}\n\n{message}" if code else message, muted(message)
        if code:
            html = f'<div style="{_COPY_STYLE}">{render_code(code, "python")}</div>{html}'
        if is_notebook(self._shell):
            display(mime_bundle(plain, html), raw=True)  # type: ignore[no-untyped-call]
        else:
            write(f"{plain}\n")


def cell_of(block: CodeBlock) -> str:
    """Return the content of the cell: Python unchanged, any other language below a comment.

    With the comment, running the cell does nothing harmful: without it, IPython would run a single
    ``rm -r data`` as a command, and below ``%%bash`` one key press would run a script. The user
    writes that line after reading the script.
    """
    code = block.code.rstrip("\n")
    if block.language in _PYTHON:
        return code
    magic = _MAGICS.get(block.language)
    how = f". Read it, then replace this line by {magic}" if magic else ""
    return f"# This is {block.language}, not Python{how}\n{code}"
