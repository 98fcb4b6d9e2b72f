"""The generation settings in the panel: one control for each option."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from llm_magic.backends.registry import generation_specs
from llm_magic.config.option_spec import OptionSpec
from llm_magic.notebook.arguments.parser import split_line
from llm_magic.notebook.display.messages import limit_note
from llm_magic.notebook.panel.as_magic import config_line, quoted
from llm_magic.notebook.panel.controls import MessageLine, NumberControl, QueueNotice
from llm_magic.text import escape, unescape

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel


class SettingsSection:
    """Sliders and fields that show and change the same settings as ``%llm_config``."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        known = generation_specs()
        self.numbers = {n: NumberControl.of(s) for n, s in known.items() if s.is_number}
        self.texts = {n: _text(s) for n, s in known.items() if s.kind == "repeated"}
        self.reset = widgets.Button(
            description="Reset", tooltip="Restore the settings of the environment"
        )
        for name, control in self.numbers.items():
            control.observe(partial(self._number_changed, name), "value")
        for name, text in self.texts.items():
            text.observe(partial(self._text_changed, name), "value")
        self.message = MessageLine()
        self.reset.on_click(lambda _button: panel.act(self._reset, self.message.show))
        controls = [*self.numbers.values(), *self.texts.values()]
        fields = widgets.Box(controls).add_class("llm-fields")
        buttons = widgets.Box([self.reset]).add_class("llm-buttons")
        title = widgets.HTML("<h3>Generation</h3>")
        parts = [title, fields, buttons, self.message, QueueNotice()]
        self.box = widgets.VBox(parts).add_class("llm-section")

    def _number_changed(self, name: str, change: Mapping[str, Any]) -> None:
        control = self.numbers[name]
        self._panel.act(
            partial(self._set, name, _whole(change["new"])), partial(setattr, control, "error")
        )

    def _text_changed(self, name: str, change: Mapping[str, Any]) -> None:
        self._panel.act(partial(self._set_texts, name, change["new"]), self.message.show)

    def _set_texts(self, name: str, line: str) -> str:
        return self._set(name, tuple(unescape(word) for word in split_line(line)))

    def _set(self, name: str, value: object) -> str:
        self._panel.session.generation.update(**{name: value})
        return config_line({name: value})

    def _reset(self) -> str:
        self._panel.session.generation.reset()
        return "%llm_config --reset"

    def draw(self) -> None:
        """Show the settings, and only those that the active backend supports."""
        session, known = self._panel.session, generation_specs()
        config, changed = session.generation.config, session.generation.changed
        status = session.status()
        backend = status.backend_type
        self.numbers["max_new_tokens"].note = limit_note(config.max_new_tokens, status.active)
        for name, control in self.numbers.items():
            value = getattr(config, name)
            # Numbers in a browser have a maximum, which replaces all larger ones.
            control.value = None if value is None else float(min(value, sys.float_info.max))
            control.changed = name in changed
            control.layout.display = "" if known[name].works_on(backend) else "none"
        for name, text in self.texts.items():
            text.value = " ".join(quoted(escape(one)) for one in getattr(config, name))
            text.layout.display = "" if known[name].works_on(backend) else "none"
        self.reset.disabled = not changed


def _text(spec: OptionSpec) -> Any:
    """Return the field of an option that takes several texts."""
    return widgets.Text(
        description=spec.label or spec.name,
        placeholder="none; separate several by a space",
        tooltip=spec.help,
        continuous_update=False,
    ).add_class("llm-wide")


def _whole(value: float | None) -> float | int | None:
    """Return a number without a fraction as an int: a slider sends only floats."""
    return int(value) if value is not None and value.is_integer() else value
