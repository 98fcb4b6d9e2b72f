"""The base class of magics: the session, the notebook's names, interrupts."""

from __future__ import annotations

import collections
import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from IPython.core.display_functions import display
from IPython.core.magic import Magics, no_var_expand
from IPython.core.magic import line_cell_magic as _line_cell_magic
from IPython.core.magic import line_magic as _line_magic
from traitlets.config import Config

from llm_magic.notebook.arguments import HelpRequested
from llm_magic.notebook.frontend import running_cell
from llm_magic.session.interruptible_wait import held_back

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.help_pages import HelpPage
    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.live_output import LiveArea
    from llm_magic.session import Session
    from llm_magic.session.jobs import Job

F = TypeVar("F", bound=Callable[..., Any])
_MAX_AREAS = 30  # that a page which is loaded again can ask for


def _magic(function: F) -> F:
    """Wrap a magic: adds its help, records its start time, and raises interrupts at waits only."""

    @functools.wraps(function)
    def guarded(self: SessionMagics, *args: Any) -> Any:
        self.began = time.perf_counter()
        try:
            with held_back():
                return function(self, *args)
        except HelpRequested:
            display(_help(function.__name__))  # type: ignore[no-untyped-call]
            return None

    # IPython calls `getdoc` of an object before it reads the docstring: so the help is generated
    # when it is shown, not when the extension is loaded.
    guarded.getdoc = lambda: repr(_help(function.__name__))  # type: ignore[attr-defined]
    return guarded  # type: ignore[return-value]


def _help(magic: str) -> HelpPage:
    from llm_magic.notebook.arguments.help_pages import HelpPage

    return HelpPage(magic)


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
        # The latest outputs that were updated in place.
        self.areas: collections.deque[LiveArea] = collections.deque(maxlen=_MAX_AREAS)
        # The configuration is applied once: ``%reload_ext`` keeps the settings of the session.
        config = {"config": Config()} if session.is_configured else {}
        super().__init__(shell, **config)

    @property
    def live(self) -> bool:
        """Whether answers are shown while they are generated."""
        return self.session.settings.stream == "on"

    @property
    def cell_id(self) -> str | None:
        """The frontend's id of the running cell, if it sends one."""
        cell = running_cell(self.shell)
        return (cell.id or None) if cell is not None else None

    def parse(self, name: str, line: str, *, fill: bool = True) -> Parsed:
        """Return the values of a magic's line; `fill` replaces {references} with the notebook's values."""
        from llm_magic.notebook.arguments import parser

        return parser.parse(name, line, self.notebook_names if fill else None)

    def notebook_names(self, text: str) -> dict[str, Any]:
        """Return the variables where the magic is called, without those of IPython (open, exit, …).

        The local variables of a function come before the notebook's, as in Python.
        """
        hidden = self.shell.user_ns_hidden
        history = {name for name in ("In", "Out") if f"{name}[" in text}
        names = {
            name: value
            for name, value in self.shell.user_ns.items()
            if name in history or hidden.get(name, self) is not value
        }
        return names | self._local_names()

    def _local_names(self) -> dict[str, Any]:
        """Return the variables of the function or class body that calls the magic, if there is one.

        Those of the functions around it are included while these run, although Python gives a
        function only those that its own code names.
        """
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals is not self.shell.user_global_ns:
            frame = frame.f_back
        if frame is None or frame.f_locals is self.shell.user_ns:
            return {}
        names, inner = dict(frame.f_locals), frame.f_code
        while (frame := frame.f_back) is not None:
            code = frame.f_code
            # A class body is not optimized, and its functions do not see its variables.
            if code.co_flags & inspect.CO_OPTIMIZED and inner in code.co_consts:
                names, inner = {**frame.f_locals, **names}, code
        return names

    def live_area(self) -> LiveArea:
        """Return an output of the running cell that is updated in place where answers are."""
        from llm_magic.notebook.display.live_output import LiveArea, is_notebook

        area = LiveArea(live=self.live and is_notebook(self.shell))
        self.areas.append(area)
        return area

    def wait_for_jobs(self, jobs: Sequence[Job]) -> None:
        """Wait until jobs have ended, however; their progress is shown meanwhile."""
        from llm_magic.notebook.display.live_output import JobsView

        area = self.live_area()
        with JobsView(area, jobs) as view:
            self.session.wait(jobs, view.draw)
        area.clear()

    def show_load(self, area: LiveArea, deadline: float = math.inf) -> None:
        """Wait for a load started with ``--bg``, if one runs, and show its progress; cleared if it fails."""
        from llm_magic.notebook.display.live_output import LoadView

        session = self.session
        if not session.is_loading_in_background:
            return
        with LoadView(self.shell, area) as view:
            session.wait_for_load(
                lambda: view.waiting(session.loading or "the model", session.progress), deadline
            )

    def wait_for_load(self) -> None:
        """Wait for a load started with ``--bg``, if one runs; its progress is shown meanwhile."""
        area = self.live_area()
        self.show_load(area)
        area.clear()
