"""The generation settings of a panel: one control for each, made from the option table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from llm_magic.config.option_spec import specs
from llm_magic.config.settings import GenerationConfig
from llm_magic.notebook.arguments.parser import escaped, split_words, unescaped
from llm_magic.notebook.panel.as_magic import config_line, quoted
from llm_magic.notebook.panel.controls import NumberControl

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel


class SettingsSection:
    """Sliders and fields in step with ``%llm_config``."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        self._specs = {n: s for n, s in specs(GenerationConfig).items() if n != "extra"}
        self.numbers = {n: NumberControl.of(s) for n, s in self._specs.items() if n != "stop"}
        self.stop = widgets.Text(
            description="Stop texts",
            placeholder="none; several with a blank between",
            tooltip=self._specs["stop"].help,
            continuous_update=False,
        )
        self.reset = widgets.Button(
            description="Reset", tooltip="Back to the settings of the environment"
        )
        for name, control in self.numbers.items():
            control.observe(partial(self._changed, name), "value")
        self.stop.observe(self._stop_changed, "value")
        self.reset.on_click(lambda _button: panel.act(self._reset))
        self.stop.add_class("llm-wide")
        fields = widgets.Box([*self.numbers.values(), self.stop])
        fields.add_class("llm-fields")
        buttons = widgets.Box([self.reset])
        buttons.add_class("llm-buttons")
        self.box = widgets.VBox([widgets.HTML("<h3>Generation</h3>"), fields, buttons])

    def _changed(self, name: str, change: Mapping[str, Any]) -> None:
        self._panel.act(partial(self._set, name, _whole(change["new"])))

    def _stop_changed(self, change: Mapping[str, Any]) -> None:
        self._panel.act(partial(self._set_stop, change["new"]))

    def _set_stop(self, line: str) -> str:
        return self._set("stop", tuple(unescaped(word) for word in split_words(line)))

    def _set(self, name: str, value: object) -> str:
        self._panel.session.configure(**{name: value})
        return config_line({name: value})

    def _reset(self) -> str:
        self._panel.session.generation.reset()
        return "%llm_config --reset"

    def draw(self) -> None:
        """Show the session's settings, and which of them do something on the active backend."""
        session = self._panel.session
        config, changed = session.generation.config, session.generation.changed
        backend = session.status().backend_type
        for name, control in self.numbers.items():
            value = getattr(config, name)
            # More than a number of a browser can hold is shown as the most that it can.
            control.value = None if value is None else float(min(value, sys.float_info.max))
            control.changed = name in changed
            control.layout.display = "" if self._specs[name].works_on(backend) else "none"
        self.stop.value = " ".join(quoted(escaped(text)) for text in config.stop)
        self.reset.disabled = not changed

    def disable(self) -> None:
        """Let nothing be changed any more."""
        for control in self.numbers.values():
            control.layout.display = "none"
        self.stop.disabled = self.reset.disabled = True


def _whole(value: float | None) -> float | int | None:
    """Return a whole number as one: a slider's numbers all have a fraction."""
    return int(value) if value is not None and value.is_integer() else value
