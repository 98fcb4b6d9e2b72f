"""The control panel: everything with a mouse, over the same session as the magics."""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import ipywidgets as widgets

from llm_magic.errors import LLMMagicError
from llm_magic.notebook.panel.ask_section import AskSection
from llm_magic.notebook.panel.controls import CopyText
from llm_magic.notebook.panel.jobs_section import JobsSection
from llm_magic.notebook.panel.model_section import LoadSection
from llm_magic.notebook.panel.redraw import Refresher
from llm_magic.notebook.panel.settings_section import SettingsSection
from llm_magic.notebook.panel.status_bar import status_html

if TYPE_CHECKING:
    from llm_magic.session import Session


class ControlPanel:
    """Shows a session and changes it; it keeps nothing itself, so that two panels cannot disagree.

    Callbacks come from whatever thread the kernel runs them in, drawing from a timer's: one lock
    keeps them apart.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.RLock()
        # The thread that draws, if one does: what changes on it was not done by the user.
        self._drawer: int | None = None
        self.is_retired = False
        self.loading = LoadSection(self)
        self.settings = SettingsSection(self)
        self.asking = AskSection(self)
        self.jobs = JobsSection(self)
        self.status = widgets.HTML()
        self.trouble = widgets.HTML()
        self.magic = CopyText(label="Copy", shown=True)
        left = widgets.VBox([self.loading.box, self.settings.box])
        columns = widgets.Box([left, widgets.VBox([self.asking.box, self.jobs.box])])
        columns.add_class("llm-columns")
        self.box = widgets.VBox(
            [self.status, self.trouble, columns, _titled("As a magic", self.magic)]
        )
        self.box.add_class("llm-panel")
        self._refresher = Refresher(self.draw)
        self._unwatch = session.watch(self._refresher.nudge)
        self._unclosed = session.when_closed(self.retire)
        self.draw()
        self.loading.refresh()

    # -- from the session to the widgets ------------------------------------------------------

    def draw(self) -> None:
        """Show the session as it is now."""
        with self._lock, self._programmatic():
            if self.is_retired:
                return
            self.status.value = status_html(self.session)
            self.loading.draw()
            self.settings.draw()
            self.asking.draw()
            self.jobs.draw()

    @contextlib.contextmanager
    def _programmatic(self) -> Iterator[None]:
        before, self._drawer = self._drawer, threading.get_ident()
        try:
            yield
        finally:
            self._drawer = before

    def nudge(self) -> None:
        """Draw soon."""
        self._refresher.nudge()

    def close(self) -> None:
        """Stop following the session, and take the widgets off the page."""
        self._leave()
        _close(self.box)

    def _leave(self) -> None:
        self.is_retired = True
        self._unwatch()
        self._unclosed()
        self._refresher.stop()

    def retire(self) -> None:
        """Say that the session is gone, and let nothing be pressed any more."""
        self._leave()
        with self._lock, self._programmatic():
            self.status.value = (
                '<div class="llm-status" role="status"><span class="llm-state">Closed</span>'
                "<span>This panel belongs to an extension that was reloaded."
                " Run %llm_panel again.</span></div>"
            )
            for section in (self.loading, self.settings, self.asking, self.jobs):
                section.disable()

    # -- from the user to the session ---------------------------------------------------------

    def act(self, action: Callable[[], str | None]) -> None:
        """Do what the user asked for; show its magic, or in one line what is wrong with it."""
        if self._drawer == threading.get_ident() or self.is_retired:
            return
        with self._lock:
            # Before, not after: what is begun may fail at once, on a thread of its own.
            self.tell_trouble("")
            try:
                magic = action()
            except LLMMagicError as error:
                self.tell_trouble(str(error))
            else:
                if magic:
                    self.magic.value = magic
        self.draw()

    def tell_error(self, error: BaseException) -> None:
        """Show an error; one that is not ours with its kind, because its words may say little."""
        kind = "" if isinstance(error, LLMMagicError) else f"{type(error).__name__}: "
        self.tell_trouble(f"{kind}{error}")

    def tell_trouble(self, text: str) -> None:
        """Show what went wrong, or nothing."""
        self.trouble.value = (
            f'<div class="llm-trouble" role="alert">{html.escape(text)}</div>' if text else ""
        )

    def static_html(self) -> str:
        """Return what a notebook shows in place of the panel where no kernel runs."""
        status = self.session.status()
        model = status.active_model or "no model"
        given = ", ".join(
            f"{name} {value}"
            for name, value in status.generation_config.model_dump().items()
            if value not in (None, (), {})
        )
        words = f"The control panel of llm_magic: {model} · {given} · %llm_panel opens it again."
        return f'<div class="llm-static">{html.escape(words)}</div>'


def _close(widget: widgets.Widget) -> None:
    """Close a widget and all that belongs to it: each has a channel to the page."""
    for child in getattr(widget, "children", ()):
        _close(child)
    for part in ("layout", "style"):
        if isinstance(belonging := getattr(widget, part, None), widgets.Widget):
            belonging.close()
    widget.close()


def _titled(title: str, content: widgets.Widget) -> widgets.VBox:
    return widgets.VBox([widgets.HTML(f"<h3>{html.escape(title)}</h3>"), content])
