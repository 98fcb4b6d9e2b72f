"""The next cell, into which ``-f code`` puts the code of an answer; it is never run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_magic.notebook.display.live_output import is_notebook, mime_bundle, muted, write
from llm_magic.notebook.display.markdown import render_code
from llm_magic.text.code_blocks import CodeBlock, first_fenced

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.types import Reply

_PYTHON = frozenset({"", "py", "py3", "pycon", "python", "python3", "ipython", "ipython3"})
# Languages that have a cell magic in every IPython.
_MAGICS = {
    "bash": "%%bash", "sh": "%%bash", "shell": "%%bash", "zsh": "%%bash", "html": "%%html",
    "javascript": "%%javascript", "js": "%%javascript", "perl": "%%perl", "ruby": "%%ruby",
}  # fmt: skip
# In place of a character that a cell cannot have, such as half of a surrogate pair.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# One click selects all of it.
_COPY_STYLE = "user-select: all; -webkit-user-select: all"


def _advice(reply: Reply) -> str:
    """Return what completes a code block that was cut off, or an empty string."""
    if reply.context_full:
        return " The context is full: shorten the prompt."
    return " Use a higher --max-new-tokens." if reply.finish_reason == "length" else ""


class CodeCells:
    """Puts the code of answers into cells, and records which code was put below which cell."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._offered: dict[str, str] = {}

    def offer(self, reply: Reply, cell_id: str | None, *, replace: bool) -> None:
        """Put the first fenced block into the next cell, or with `replace` into the current one."""
        block = first_fenced(reply.text)
        if block is None:
            self._show("The answer contains no fenced code block, so no cell was filled.")
            return
        if not block.closed and reply.finish_reason != "stop":
            self._show(f"The code block is not closed, so no cell was filled.{_advice(reply)}")
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
        if _REPLACEMENT in code and _REPLACEMENT not in reply.text:
            self._show(f"Invalid characters in the code were replaced by {_REPLACEMENT}.")
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
