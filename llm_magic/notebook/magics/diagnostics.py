"""``%llm_explain`` and ``%llm_doctor``: help with an exception or with the installation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from IPython.core.magic import magics_class

from llm_magic.errors import Interrupted, LLMMagicError
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.magics.base import SessionMagics, line_magic, variable

if TYPE_CHECKING:
    from llm_magic.doctor import KernelInfo
    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.tables import Table
    from llm_magic.prompts.explain_error import Cell, Failure
    from llm_magic.session.requests import Request


@magics_class
class DiagnosticsMagics(SessionMagics):
    """Explains the last exception, and checks the installation."""

    @line_magic
    def llm_explain(self, line: str) -> Table | None:
        """Explain the last exception: its cause and a fix."""
        from llm_magic.notebook.display.tables import Table
        from llm_magic.prompts import explain_error

        error = explain_error.last_error()
        with _explaining(error):
            args = parser.parse("llm_explain", line)
            variable(args["output"])
            if error is None:
                return Table(("",), [], "No exception has been raised in this kernel yet.")
            if isinstance(error, LLMMagicError):
                # Its message already has the cause and the fix.
                return Table(("",), [], f"{type(error).__name__}: {error}")
            request, notes = self._request(self._failure(error), args)
            return self.ask(request, notes, args)

    def _failure(self, error: BaseException) -> Failure:
        from llm_magic.config.redaction import Redactor
        from llm_magic.prompts import explain_error

        redactor = Redactor(os.environ, self.session.keys.secrets())
        hidden = self.shell.user_ns_hidden
        return explain_error.failure(error, self._cell, self.shell.user_ns, redactor, hidden)

    def _request(self, failed: Failure, args: Parsed) -> tuple[Request, tuple[str, ...]]:
        from llm_magic.config.redaction import MASK
        from llm_magic.prompts import explain_error
        from llm_magic.session.requests import Request

        as_code = args["format"] == "code"
        prompt = explain_error.question(failed, fix=as_code)
        missing = {
            MASK: f"{MASK} in the corrected cell replaces a secret that was not sent.",
            explain_error.CUT: "The cell is too long to send: the corrected cell lacks its middle.",
        }
        sent = failed.cell.source if as_code and failed.cell is not None else ""
        notes = tuple(note for mark, note in missing.items() if mark in sent)
        chat, peek = args["chat"], bool(args["dry_run"])
        key = self.session.cells.key(chat, peek=peek) if chat is not None else None
        options: Any = args.options
        return (
            Request(
                prompt, args["model"], explain_error.SYSTEM, chat, key, options, started=self.began
            ),
            notes,
        )

    def _cell(self, filename: str) -> Cell | None:
        """Return the cell that runs under a file name, as the user typed it if possible."""
        import linecache

        from llm_magic.prompts.explain_error import Cell

        named = self.shell.compile.format_code_name(filename)
        if named is None:
            return None
        label = named[1]
        source = "".join(linecache.getlines(filename))
        number = label.removeprefix("In[").removesuffix("]")
        history = self.shell.history_manager
        typed = history.input_hist_raw if history is not None else []
        if number.isdecimal() and 0 < int(number) < len(typed):
            raw = typed[int(number)]
            # Some cells are not counted, so the number may belong to another cell.
            if self.shell.input_transformer_manager.transform_cell(raw) == source:
                return Cell(label, raw)
        return Cell(label, source)

    @line_magic
    def llm_doctor(self, line: str) -> Table:
        """Check the installation, devices, caches and servers."""
        from llm_magic import doctor
        from llm_magic.notebook.display import messages

        parser.parse("llm_doctor", line)
        return messages.doctor_table(doctor.run_checks(self.session, self._kernel()))

    def _kernel(self) -> KernelInfo:
        from llm_magic.doctor import KernelInfo

        owner = self.shell.magics_manager.magics["cell"].get("llm")
        is_ours = isinstance(getattr(owner, "__self__", None), SessionMagics)
        kernel = getattr(self.shell, "kernel", None)
        return KernelInfo(
            owner="" if is_ours else str(getattr(owner, "__module__", "nobody")),
            in_kernel=kernel is not None,
            subshells=bool(getattr(kernel, "_supports_kernel_subshells", False)),
        )


@contextlib.contextmanager
def _explaining(error: BaseException | None) -> Iterator[None]:
    """Store the explained error in an error that is raised here, so that it can be explained again."""
    try:
        yield
    except KeyboardInterrupt:
        stopped = Interrupted("Stopped.")
        stopped.explaining = error
        raise stopped from None
    except LLMMagicError as own:
        own.explaining = error
        raise
