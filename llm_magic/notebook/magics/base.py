"""The base class of magics: the session, the notebook's names, interrupts."""

from __future__ import annotations

import functools
import keyword
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from IPython.core.magic import Magics, no_var_expand
from IPython.core.magic import line_cell_magic as _line_cell_magic
from IPython.core.magic import line_magic as _line_magic

from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import help_pages
from llm_magic.notebook.display.code_cells import CodeCells
from llm_magic.notebook.frontend import running_cell
from llm_magic.session.interruptible_wait import held_back

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.live_output import LiveArea
    from llm_magic.notebook.display.tables import Table
    from llm_magic.session import Session
    from llm_magic.session.requests import Request

# Names that IPython reads or sets: a Reply there breaks the notebook or is overwritten.
_IPYTHON_NAMES = re.compile(r"In|Out|get_ipython|exit|quit|_(?:i{1,3}|ih|oh|dh|i?\d+)?|_{2,3}")

F = TypeVar("F", bound=Callable[..., Any])


def _magic(function: F) -> F:
    """Wrap a magic: adds its help, records its start time, and raises interrupts at waits only."""

    @functools.wraps(function)
    def guarded(self: SessionMagics, *args: Any) -> Any:
        self.began = time.perf_counter()
        with held_back():
            return function(self, *args)

    # IPython calls `getdoc` of an object before it reads the docstring: so the help is generated
    # when it is shown, not when the extension is loaded.
    guarded.getdoc = functools.partial(help_pages.page, function.__name__)  # type: ignore[attr-defined]
    return guarded  # type: ignore[return-value]


def line_magic(function: F) -> F:
    """Register a line magic; IPython does not expand variables in its line."""
    return cast(F, _line_magic(no_var_expand(_magic(function))))


def line_cell_magic(function: F) -> F:
    """Register a line and cell magic; IPython does not expand variables in its line."""
    return cast(F, _line_cell_magic(no_var_expand(_magic(function))))


class SessionMagics(Magics):
    """Magics of one session."""

    shell: InteractiveShell

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        # Set first: the constructor below applies IPython's configuration to the session.
        self.session = session
        # The start of the running magic: its times include imports and waits.
        self.began = time.perf_counter()
        super().__init__(shell)

    @property
    def live(self) -> bool:
        """Whether answers are shown while they are generated."""
        return self.session.settings.stream == "on"

    def names(self, text: str) -> dict[str, Any]:
        """Return the notebook's variables without those of IPython (open, exit, quit, …)."""
        hidden = self.shell.user_ns_hidden
        history = {name for name in ("In", "Out") if f"{name}[" in text}
        return {
            name: value
            for name, value in self.shell.user_ns.items()
            if name in history or hidden.get(name, self) is not value
        }

    def cell_id(self) -> str | None:
        """Return the frontend's id of the running cell, if it sends one."""
        cell = running_cell(self.shell)
        return (cell.id or None) if cell is not None else None

    def wait_for_load(self) -> LiveArea:
        """Wait for a load started with ``--bg``; returns the area that shows its progress."""
        from llm_magic.notebook.display.live_output import LoadView

        session, view = self.session, LoadView(self.shell, live=self.live)
        try:
            session.wait_for_load(
                lambda: view.waiting(session.loading or "the model", session.progress)
            )
        except BaseException:
            view.area.clear()
            raise
        return view.area

    def ask(self, request: Request, notes: tuple[str, ...], args: Parsed) -> Table | None:
        """Send a request and show the answer as the options of the line require."""
        from llm_magic.notebook.display import answer_view, messages

        area = self.wait_for_load()
        if args["dry_run"]:
            area.clear()
            dry = self.session.dry_run(request)
            answer_view.write_notes(notes)
            return messages.dry_run_table(dry)
        response = self.session.ask(request)
        view = answer_view.view(self.shell, response, args.values, self.live, area)
        try:
            with response:
                view.note(notes)
                for _ in response.updates(view.pause):
                    view.draw()
        finally:
            if response.has_reply:
                # First: the variable is set even if displaying the answer fails.
                self.put(args["output"], response.reply)
                view.finish()
            else:
                view.leave()
        reply = response.result()
        if args["format"] == "code":
            replace = bool(args.values.get("replace"))
            self._codes.offer(reply, self.cell_id(), replace=replace)
        return None

    @functools.cached_property
    def _codes(self) -> CodeCells:
        return CodeCells(self.shell)

    def put(self, variable: str | None, value: object) -> None:
        """Store a value in a variable of the notebook, if one is named."""
        if variable is not None:
            self.shell.user_ns[variable] = value


def variable(name: str | None) -> str | None:
    """Return the variable of ``-o``; raises `OptionError` for an invalid name."""
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise OptionError(f"-o {name}: this is not a valid variable name.")
    if name is not None and (name.startswith("__") or _IPYTHON_NAMES.fullmatch(name)):
        raise OptionError(f"-o {name}: Python or IPython uses this name. Choose another.")
    return name
