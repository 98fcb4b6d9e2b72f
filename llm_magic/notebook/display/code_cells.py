"""Put the first fenced block of an answer into the next cell (``-f code``); it is never run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.display.markdown import CodeBlock
    from llm_magic.types import Reply

_PYTHON = frozenset({"", "py", "py3", "pycon", "python", "python3", "ipython", "ipython3"})
# Languages that have a cell magic in every IPython.
_MAGICS = {
    "bash": "%%bash", "sh": "%%bash", "shell": "%%bash", "zsh": "%%bash", "html": "%%html",
    "javascript": "%%javascript", "js": "%%javascript", "perl": "%%perl", "ruby": "%%ruby",
}  # fmt: skip
# One click selects all of it.
_COPY_STYLE = "user-select: all; -webkit-user-select: all"


class CodeCells:
    """Puts the code of answers into cells, and records which code was put below which cell."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._offered: dict[str, str] = {}

    def offer(self, reply: Reply, cell_id: str | None, *, replace: bool) -> None:
        """Put the first fenced block into the next cell, or with `replace` into the current one."""
        from llm_magic.notebook.display.markdown import code_blocks

        block = next((block for block in code_blocks(reply.text) if block.fenced), None)
        if block is None:
            self._notify("There is no fenced block of code in the answer, so no cell was filled.")
            return
        if not block.closed and reply.finish_reason != "stop":
            self._notify("The block of code has no end, so no cell was filled.")
            return
        code = cell_of(block)
        if not replace and cell_id and self._offered.get(cell_id) == code:
            # Else each run of the whole notebook would add cells.
            self._copyable(
                code,
                "This cell has already put the same code into a cell. Copy it to use it again.",
            )
            return
        self._shell.set_next_input(code, replace=replace)
        if cell_id and not replace:
            self._offered[cell_id] = code
        if not cell_id and self._has_frontend:
            # A frontend that sends no cell ids, as JupyterLab and VS Code do, may not add cells either.
            self._copyable(code, "If no cell was filled, copy it from here.")

    @property
    def _has_frontend(self) -> bool:
        return getattr(self._shell, "kernel", None) is not None

    def _copyable(self, code: str, message: str) -> None:
        from llm_magic.notebook.display.live_output import muted
        from llm_magic.notebook.display.markdown import render_code

        body = f'<div style="{_COPY_STYLE}">{render_code(code, "python")}</div>{muted(message)}'
        self._show(f"{code}\n\n{message}", body)

    def _notify(self, message: str) -> None:
        from llm_magic.notebook.display.live_output import muted

        self._show(message, muted(message))

    def _show(self, plain: str, body: str) -> None:
        from IPython.display import display

        from llm_magic.notebook.display.live_output import displayed, write

        if self._has_frontend:
            bundle = displayed({"text/plain": plain, "text/html": body})
            display(bundle, raw=True)  # type: ignore[no-untyped-call]
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
