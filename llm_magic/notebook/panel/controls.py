"""Widgets that ipywidgets does not have: a slider with a number field, a prompt box, a text to copy."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets

from llm_magic.config.option_spec import OptionSpec

_HERE = Path(__file__).parent
# From then on, a wait is shown with its seconds, as in a cell.
LONG_WAIT_S = 3.0


class MessageLine(widgets.HTML):  # type: ignore[misc]
    """An error, shown beside the controls that it is about."""

    def show(self, text: str) -> None:
        """Show an error; an empty one hides the line."""
        self.value = (
            f'<div class="llm-error" role="alert">{html.escape(text)}</div>' if text else ""
        )


class _Control(anywidget.AnyWidget):
    """A widget of ``controls.js``; `kind` selects which one.

    It answers the page's pings: without an answer, the page shows that the kernel is busy.
    """

    _esm = _HERE / "controls.js"
    _css = _HERE / "controls.css"
    kind = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.on_msg(self._on_message)

    def _on_message(self, _widget: object, content: object, _buffers: object) -> None:
        if isinstance(content, dict):
            self._received(content)

    def _received(self, content: dict[str, Any]) -> None:
        if content.get("do") == "ping":
            self.send({"heard": content.get("id")})


class NumberControl(_Control):
    """A number as slider and field, with a check box for the model's own value (None).

    It accepts any number; the session validates it. A refused one stays: `used` is the valid one, which an
    emptied field gets. Below the field are its `error` and a `note`.
    """

    error = traitlets.Unicode().tag(sync=True)
    note = traitlets.Unicode().tag(sync=True)
    range = traitlets.Unicode().tag(sync=True)
    help = traitlets.Unicode().tag(sync=True)
    none_label = traitlets.Unicode("model's own").tag(sync=True)
    value = traitlets.Float(None, allow_none=True).tag(sync=True)
    used = traitlets.Float(None, allow_none=True).tag(sync=True)
    fallback = traitlets.Float(0.0).tag(sync=True)
    minimum = traitlets.Float(0.0).tag(sync=True)
    maximum = traitlets.Float(1.0).tag(sync=True)
    step = traitlets.Float(0.01).tag(sync=True)
    bounded = traitlets.Bool(False).tag(sync=True)
    slides = traitlets.Bool(True).tag(sync=True)
    changed = traitlets.Bool(False).tag(sync=True)

    @classmethod
    def of(cls, spec: OptionSpec) -> NumberControl:
        """Return the control for an option."""
        fallback = spec.default if isinstance(spec.default, int | float) else spec.minimum or 0
        return cls(
            kind="number",
            label=spec.name.replace("_", " "),
            help=f"{spec.help} ({spec.range})",
            range=spec.range,
            none_label=spec.none_label,
            fallback=float(fallback),
            minimum=spec.minimum or 0.0,
            maximum=spec.slider[0] if spec.slider else spec.maximum or 0.0,
            step=spec.slider[1] if spec.slider else 1.0,
            bounded=spec.maximum is not None,
            slides=spec.slider is not None,
        )


class PromptBox(_Control):
    """A text box with a button; the button and Ctrl+Enter send the text.

    The page sends a text once the kernel has answered a ping: until then it can be withdrawn. It
    clears the box, and restores the text if `send` does not accept it, or when `restore` is called.

    Some kernels handle messages of widgets while a cell runs, on another thread. A text with
    references, or one that a cell loads the model for, waits for the end of the cell: `between_cells`
    calls a function then.
    """

    value = traitlets.Unicode().tag(sync=True)
    placeholder = traitlets.Unicode().tag(sync=True)
    hint = traitlets.Unicode().tag(sync=True)
    disabled = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        send: Callable[[str], bool],
        between_cells: Callable[[Callable[[], None]], None],
        is_loading_in_cell: Callable[[], bool],
        **traits: Any,
    ) -> None:
        super().__init__(kind="prompt", **traits)
        self._on_send, self._between_cells = send, between_cells
        self._is_loading_in_cell = is_loading_in_cell
        # The text that was accepted last, whether the page still waits for the answer about a text, and
        # whether that was restored in the meantime. A drawing thread may restore it.
        self._accepted: object = None
        self._is_unanswered = self._is_restored = False
        self._lock = threading.Lock()

    def restore(self) -> None:
        """Return the text that was accepted last to the box; the page still has it."""
        with self._lock:
            if self._is_unanswered:
                self._is_restored = True
            else:
                self.send({"sent": self._accepted, "failed": True})

    def _received(self, content: dict[str, Any]) -> None:
        handle = self._take_text if content.get("do") == "send" else super()._received
        uses_variables = content.get("waits") or "{" in str(content.get("text"))
        if uses_variables or self._is_loading_in_cell():
            self._between_cells(partial(handle, content))
        else:
            handle(content)

    def _take_text(self, content: dict[str, Any]) -> None:
        accepted, self._is_unanswered, self._is_restored = False, True, False
        try:
            accepted = self._on_send(str(content.get("text", "")))
        finally:
            with self._lock:
                self._is_unanswered = False
                if accepted:
                    self._accepted = content.get("id")
                has_left = accepted and not self._is_restored
                self.send({"sent": content.get("id"), "accepted": has_left})


class QueueNotice(_Control):
    """Shows, after a click in its section, that the kernel is running a cell and has not handled it."""

    def __init__(self) -> None:
        super().__init__(kind="queue")


class Conversation(_Control):
    """Scrolls the box around it to the newest answer, and adds a button to each answer that copies it."""

    busy = traitlets.Bool(False).tag(sync=True)

    def __init__(self) -> None:
        super().__init__(kind="conversation")


class CopyText(_Control):
    """A text, visible or not, with a button to copy it and one to put `code` into the next cell."""

    value = traitlets.Unicode().tag(sync=True)
    code = traitlets.Unicode().tag(sync=True)
    shown = traitlets.Bool(True).tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(kind="text", **traits)
