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
    """Shows a session and changes it. All state is in the session, so several panels always agree.

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
        # Where the last error is shown.
        self._shows_error: Callable[[str], None] = lambda _text: None
        self.magic = CopyText(label="Copy", shown=True)
        self._sections = (self.loading, self.settings, self.asking, self.jobs)
        left = widgets.VBox([self.loading.box, self.settings.box])
        right = widgets.VBox([self.asking.box, self.jobs.box])
        columns = widgets.Box([left, right]).add_class("llm-columns")
        title = widgets.HTML("<h3>As a magic</h3>")
        parts = [self.status, columns, title, self.magic]
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
            return self.asking.is_waiting

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

    def close(self) -> None:
        """Stop listening to the session and remove the widgets from the page."""
        self._disconnect()
        for widget in _parts(self.box):
            widget.close()

    def _disconnect(self) -> None:
        self.is_retired = True
        self._stop_listening()
        self._stop_waiting()
        self._refresher.stop()

    def retire(self) -> None:
        """Show that the session is closed, and disable all controls."""
        self._disconnect()
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
            # Before the action: it may start a thread that fails at once.
            self.show_error("", report)
            try:
                magic = action()
            except LLMMagicException as error:
                succeeded = False
                self.show_error(error, report)
            else:
                if magic:
                    self.magic.value = magic
        self.draw()
        return succeeded

    def between_cells(self, call: Callable[[], None]) -> None:
        """Call a function on the main thread: at once if this is it, else when no cell runs."""
        if self._main_loop is None or threading.current_thread() is threading.main_thread():
            call()
        else:
            self._main_loop.call_soon_threadsafe(call)

    def show_error(self, error: BaseException | str, report: Callable[[str], None]) -> None:
        """Show an error instead of the last one; an error of another package with its type."""
        if isinstance(error, LLMMagicException):
            error = error_message(error)
        elif isinstance(error, BaseException):
            error = f"{type(error).__name__}: {error}"
        self._shows_error("")
        self._shows_error = report
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
    """Yield a widget, its children, layout and style: each has a channel to the page."""
    for child in getattr(widget, "children", ()):
        yield from _parts(child)
    for part in ("layout", "style"):
        if isinstance(owned := getattr(widget, part, None), widgets.Widget):
            yield owned
    yield widget
