"""What every group of magics has: the session, the notebook's names, one line for an interrupt."""

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

from llm_magic.errors import LLMMagicError, OptionError
from llm_magic.notebook.arguments import help_pages
from llm_magic.notebook.display.code_cells import CodeCells
from llm_magic.notebook.frontend import running_cell
from llm_magic.session.interrupts import held_back

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.live_output import LiveArea
    from llm_magic.notebook.display.tables import Table
    from llm_magic.session import Session
    from llm_magic.session.requests import Request
    from llm_magic.types import Reply

# Names that IPython looks up or sets itself; an answer there breaks the notebook or is lost.
_OF_IPYTHON = re.compile(r"In|Out|get_ipython|exit|quit|_(?:i{1,3}|ih|oh|dh|i?\d+)?|_{2,3}")

F = TypeVar("F", bound=Callable[..., Any])


def _magic(function: F) -> F:
    """Give a magic its help and its time of start, and let an interrupt end it where it waits."""

    @functools.wraps(function)
    def guarded(self: SessionMagics, *args: Any) -> Any:
        self.began = time.perf_counter()
        with held_back():
            return function(self, *args)

    # IPython asks an object for its `getdoc` before it looks at the docstring: the help is made
    # from the option table when somebody asks, not when the extension is loaded.
    guarded.getdoc = functools.partial(help_pages.page, function.__name__)  # type: ignore[attr-defined]
    return guarded  # type: ignore[return-value]


def line_magic(function: F) -> F:
    """Register a line magic whose line is not expanded by IPython."""
    return cast(F, _line_magic(no_var_expand(_magic(function))))


def line_cell_magic(function: F) -> F:
    """Register a magic for one line and for a cell, not expanded by IPython."""
    return cast(F, _line_cell_magic(no_var_expand(_magic(function))))


class SessionMagics(Magics):
    """Magics that drive one session; subclasses are registered one by one."""

    shell: InteractiveShell

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        # First: what IPython's configuration sets is set in the session (`traits`).
        self.session = session
        # When the running magic began: imports and waits that follow are part of its times.
        self.began = time.perf_counter()
        super().__init__(shell)

    @property
    def live(self) -> bool:
        """Whether answers are shown while they grow."""
        return self.session.settings.stream == "on"

    def names(self, text: str) -> dict[str, Any]:
        """Return the notebook's own names: not what IPython put there (open, exit, quit, …)."""
        hidden = self.shell.user_ns_hidden
        history = {name for name in ("In", "Out") if f"{name}[" in text}
        return {
            name: value
            for name, value in self.shell.user_ns.items()
            if name in history or hidden.get(name, self) is not value
        }

    def cell_id(self) -> str | None:
        """Return the frontend's id of the running cell, where it sends one."""
        cell = running_cell(self.shell)
        return (cell.id or None) if cell is not None else None

    def wait_for_load(self) -> LiveArea:
        """Wait for a load that was begun with ``--bg``; returns the area that shows it."""
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
        """Ask, and show the answer while it comes, as the options of the line want it."""
        from llm_magic.notebook.display import answer_view, messages

        area = self.wait_for_load()
        if args["dry_run"]:
            area.clear()
            dry = self.session.dry_run(request)
            answer_view.write_notes(notes)
            return messages.dry_run_table(dry)
        info = self.session.ready(request)
        view = answer_view.view(self.shell, info, args.values, self.live, area)
        view.note(notes)

        def ended(reply: Reply) -> None:
            # First: whatever a frontend makes of it, the answer is there.
            self.put(args["output"], reply)
            view.finish(reply)

        try:
            reply = self.session.answer(request, view.take, view.tick, view.rest, ended)
        except LLMMagicError:
            view.leave()
            raise
        if args["format"] == "code":
            replace = bool(args.values.get("replace"))
            self._codes.offer(reply, self.cell_id(), replace=replace)
        return None

    @functools.cached_property
    def _codes(self) -> CodeCells:
        return CodeCells(self.shell)

    def put(self, variable: str | None, value: object) -> None:
        """Give the notebook a value, if a name was asked for."""
        if variable is not None:
            self.shell.user_ns[variable] = value


def variable(name: str | None) -> str | None:
    """Return the name that ``-o`` gives; raises `OptionError` if it is none."""
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise OptionError(f"-o {name}: that is no name of a variable.")
    if name is not None and (name.startswith("__") or _OF_IPYTHON.fullmatch(name)):
        raise OptionError(f"-o {name}: Python or IPython uses that name; choose another.")
    return name
