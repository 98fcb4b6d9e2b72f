"""Widgets that ipywidgets does not have: a slider with a number field, a prompt box, a text to copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from llm_magic.config.option_spec import OptionSpec

_HERE = Path(__file__).parent


class _Control(anywidget.AnyWidget):
    """A widget of ``controls.js``; `kind` selects which one."""

    _esm = _HERE / "controls.js"
    _css = _HERE / "controls.css"
    kind = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)


class NumberControl(_Control):
    """A number as slider and field, with a check box for the model's own value (None).

    It accepts any number; the session validates it.
    """

    help = traitlets.Unicode().tag(sync=True)
    none_label = traitlets.Unicode("model's own").tag(sync=True)
    value = traitlets.Float(None, allow_none=True).tag(sync=True)
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
            none_label=spec.none_label,
            fallback=float(fallback),
            minimum=spec.minimum or 0.0,
            maximum=spec.slider[0] if spec.slider else spec.maximum or 0.0,
            step=spec.slider[1] if spec.slider else 1.0,
            bounded=spec.maximum is not None,
            slides=spec.slider is not None,
        )


class PromptBox(_Control):
    """A text box; Ctrl+Enter sends its text."""

    value = traitlets.Unicode().tag(sync=True)
    placeholder = traitlets.Unicode().tag(sync=True)

    def __init__(self, send: Callable[[str], None], **traits: Any) -> None:
        super().__init__(kind="prompt", **traits)
        self._on_send = send
        self.on_msg(self._received)

    def _received(self, _widget: object, content: object, _buffers: object) -> None:
        if isinstance(content, dict) and content.get("do") == "send":
            self._on_send(str(content.get("text", "")))


class CopyText(_Control):
    """A text, visible or not, with a button to copy it and one to put `code` into the next cell."""

    value = traitlets.Unicode().tag(sync=True)
    code = traitlets.Unicode().tag(sync=True)
    shown = traitlets.Bool(True).tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(kind="text", **traits)
