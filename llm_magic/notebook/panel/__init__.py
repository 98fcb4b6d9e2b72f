"""The control panel: widgets over the same session as the magics."""

from __future__ import annotations

import asyncio
import contextlib
import html
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from llm_magic.errors import LLMMagicException
from llm_magic.notebook.panel.ask_section import AskSection
from llm_magic.notebook.panel.controls import CopyText, NumberControl
from llm_magic.notebook.panel.error_messages import error_message
from llm_magic.notebook.panel.jobs_section import JobsSection
from llm_magic.notebook.panel.model_section import LoadSection
from llm_magic.notebook.panel.redraw import Refresher
from llm_magic.notebook.panel.settings_section import SettingsSection
from llm_magic.notebook.panel.status_bar import status_html

if TYPE_CHECKING:
    from llm_magic.session import Session


class ControlPanel:
    """Shows a session and changes it. Cells display the same panel: what one shows, all show.

    The kernel may run callbacks on any thread, and a timer thread draws: one lock separates them.
    """

    def __init__(
        self,
        session: Session,
        names: Callable[[str], Mapping[str, Any]] = lambda _text: {},
    ) -> None:
        """`names` returns the variables that the references of a prompt may use."""
        self.session, self.names = session, names
        self._lock = threading.RLock()
        # The loop of the main thread, which runs cells one after the other.
        self._main_loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):
            self._main_loop = asyncio.get_running_loop()
        # The thread that draws: changes of widgets on it are not actions of the user.
        self._drawer: int | None = None
        self.is_retired = False
        self.loading = LoadSection(self)
        self.settings = SettingsSection(self)
        self.asking = AskSection(self)
        self.jobs = JobsSection(self)
        self.status = widgets.HTML()
        # Where errors are shown.
        self._showing: list[Callable[[str], None]] = []
        # The magic of an action that failed after it had started.
        self._failed_magic = ""
        self.magic = CopyText(label="Copy", shown=True)
        self._sections = (self.loading, self.settings, self.asking, self.jobs)
        asking = widgets.VBox([self.asking.box, self.jobs.box]).add_class("llm-ask")
        parts = [self.loading.box, asking, self.settings.box]
        columns = widgets.Box(parts).add_class("llm-columns")
        title = widgets.HTML("<h3>As a magic</h3>")
        # Hidden until there is one.
        self.as_magic = widgets.VBox([title, self.magic], layout={"display": "none"})
        parts = [self.status, columns, self.as_magic]
        self.box = widgets.VBox(parts).add_class("llm-panel")
        self._refresher = Refresher(self.draw)
        self._stop_listening = session.listen(self._refresher.request)
        self._stop_waiting = session.when_closed(self.retire)
        self.draw()
        self.loading.refresh()

    # -- from the session to the widgets ------------------------------------------------------

    def draw(self) -> bool:
        """Show the current state of the session; returns whether that changes with time."""
        with self._lock, self._programmatic():
            if self.is_retired:
                return False
            self.status.value = status_html(self.session)
            for section in self._sections:
                section.draw()
            is_offered = self.magic.value not in {"", self._failed_magic}
            self.as_magic.layout.display = "" if is_offered else "none"
            return self.asking.is_waiting or self.loading.is_busy

    @contextlib.contextmanager
    def _programmatic(self) -> Iterator[None]:
        before, self._drawer = self._drawer, threading.get_ident()
        try:
            yield
        finally:
            self._drawer = before

    @property
    def is_drawing(self) -> bool:
        """Whether this thread draws, so that a change of a widget is not an action of the user."""
        return self._drawer == threading.get_ident()

    @property
    def is_loading_in_cell(self) -> bool:
        """Whether a cell loads or unloads a model."""
        busy = self.session.status().status in {"Loading", "Configuring", "Unloading"}
        return busy and not self.session.is_loading_in_background

    def request_draw(self) -> None:
        """Schedule a drawing."""
        self._refresher.request()

    @property
    def is_closed(self) -> bool:
        """Whether it cannot be used any more: its session was closed, or its widgets were."""
        return self.is_retired or self.box.comm is None

    def retire(self) -> None:
        """Show that the session is closed, and disable all controls."""
        self.is_retired = True
        self._stop_listening()
        self._stop_waiting()
        self._refresher.stop()
        with self._lock, self._programmatic():
            self.status.value = (
                '<div class="llm-status" role="status"><span class="llm-state">Closed</span>'
                "<span>The extension was reloaded after this panel was opened."
                " Run %llm_panel again.</span></div>"
            )
            for widget in _parts(self.box):
                if widget.has_trait("disabled"):
                    widget.disabled = True
                elif isinstance(widget, NumberControl):
                    widget.layout.display = "none"

    # -- from the user to the session ---------------------------------------------------------

    def act(self, action: Callable[[], str | None], report: Callable[[str], None]) -> bool:
        """Run an action of the user and show the magic that it returns.

        `report` shows an error where the action's control is. Returns whether there was none.
        """
        if self.is_drawing or self.is_retired:
            return False
        succeeded = True
        with self._lock:
            failed, self._failed_magic = self._failed_magic, ""
            # Before the action: it may start a thread that fails at once.
            self.show_error("", report)
            try:
                magic = action()
            except LLMMagicException as error:
                succeeded, magic = False, None
                self.show_error(error, report)
            if magic:
                self.magic.value = magic
            else:
                self._failed_magic = self._failed_magic or failed
        self.draw()
        return succeeded

    def between_cells(self, call: Callable[[], None]) -> None:
        """Call a function on the main thread: at once if this is it, else when no cell runs."""
        if self._main_loop is None or threading.current_thread() is threading.main_thread():
            call()
        else:
            self._main_loop.call_soon_threadsafe(call)

    def withdraw(self, magic: str) -> None:
        """Offer the magic of an action no more, because it failed."""
        self._failed_magic = magic
        self.request_draw()

    def show_error(
        self, error: BaseException | str, report: Callable[[str], None], *, beside: bool = False
    ) -> None:
        """Show an error, `beside` the others or instead of them; one of another package with its type."""
        if isinstance(error, LLMMagicException):
            error = error_message(error)
        elif isinstance(error, BaseException):
            error = f"{type(error).__name__}: {error}"
        if not beside:
            for clear in self._showing:
                clear("")
            self._showing = []
        self._showing.append(report)
        report(error)

    def static_html(self) -> str:
        """Return what a notebook without a kernel shows in place of the panel."""
        status = self.session.status()
        model = status.active_model or "no model"
        settings = ", ".join(
            f"{name} {value}"
            for name, value in status.generation_config.model_dump().items()
            if value not in (None, (), {})
        )
        text = f"llm_magic control panel: {model} · {settings}. Run %llm_panel to open it."
        return f'<div class="llm-static">{html.escape(text)}</div>'


def _parts(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """Yield a widget and those in it."""
    for child in getattr(widget, "children", ()):
        yield from _parts(child)
    yield widget
