"""``-f code``: the first fenced block of an answer as the next cell; never run."""

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


class CodeOffers:
    """Puts the code of answers into cells, and remembers what was put below which."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._offered: dict[str, str] = {}

    def offer(self, reply: Reply, cell_id: str | None, *, replace: bool) -> None:
        """Offer the first fenced block; `replace` puts it in the place of the cell that asked."""
        from llm_magic.notebook.display.markdown import code_blocks

        block = next((block for block in code_blocks(reply.text) if block.fenced), None)
        if block is None:
            self._say("There is no fenced block of code in the answer, so no cell was filled.")
            return
        if not block.closed and reply.finish_reason != "stop":
            self._say("The code is not whole, so no cell was filled.")
            return
        code = cell_of(block)
        if not replace and cell_id and self._offered.get(cell_id) == code:
            # Or each run of the whole notebook would make it longer.
            self._copyable(
                code, "This cell has offered the same code before; to take it again, copy it."
            )
            return
        self._shell.set_next_input(code, replace=replace)
        if cell_id and not replace:
            self._offered[cell_id] = code
        if not cell_id and self._has_frontend:
            # JupyterLab and VS Code name their cells; who does not may take no cells either.
            self._copyable(code, "If no cell was filled, copy it from here.")

    @property
    def _has_frontend(self) -> bool:
        return getattr(self._shell, "kernel", None) is not None

    def _copyable(self, code: str, said: str) -> None:
        from llm_magic.notebook.display.live_output import muted
        from llm_magic.notebook.display.markdown import render_code

        body = f'<div style="{_COPY_STYLE}">{render_code(code, "python")}</div>{muted(said)}'
        self._show(f"{code}\n\n{said}", body)

    def _say(self, said: str) -> None:
        from llm_magic.notebook.display.live_output import muted

        self._show(said, muted(said))

    def _show(self, plain: str, body: str) -> None:
        from IPython.display import display

        from llm_magic.notebook.display.live_output import displayed, write

        if self._has_frontend:
            bundle = displayed({"text/plain": plain, "text/html": body})
            display(bundle, raw=True)  # type: ignore[no-untyped-call]
        else:
            write(f"{plain}\n")


def cell_of(block: CodeBlock) -> str:
    """Return what goes into the cell: Python as it is, anything else below a line that says so.

    That line keeps the cell from doing anything: a single ``rm -r data`` would be taken for one of
    IPython's own commands, and ``%%bash`` on top would run a script with one key press. It goes
    there when somebody has read the script and puts it there.
    """
    code = block.code.rstrip("\n")
    if block.language in _PYTHON:
        return code
    magic = _MAGICS.get(block.language)
    how = f": when you have read it, write {magic} instead of this line" if magic else ""
    return f"# This is {block.language}, not Python{how}\n{code}"
