"""The generation settings in the panel: one control for each option."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from llm_magic.backends.registry import generation_specs
from llm_magic.config.option_spec import OptionSpec
from llm_magic.errors import OptionError
from llm_magic.notebook.arguments.parser import split_line
from llm_magic.notebook.panel.as_magic import config_line, quoted
from llm_magic.notebook.panel.controls import MessageLine, NumberControl, QueueNotice
from llm_magic.session.requests import limit_note
from llm_magic.text import escape, unescape

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel
    from llm_magic.types import ModelInfo


class SettingsSection:
    """Sliders and fields that show and change the same settings as ``%llm_config``."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        known = generation_specs()
        self.numbers = {n: NumberControl.of(s) for n, s in known.items() if s.is_number}
        self.texts = {n: _text(s) for n, s in known.items() if s.kind == "repeated"}
        self.errors = {name: MessageLine().add_class("llm-wide") for name in self.texts}
        self.notes = {name: widgets.HTML().add_class("llm-wide") for name in self.texts}
        # What was typed and refused, with the value in use: both are shown, with the error, until that
        # is corrected or the setting is changed elsewhere.
        self._refused: dict[str, tuple[Any, object]] = {}
        self._complaints: dict[str, str] = {}
        self.reset = widgets.Button(
            description="Reset", tooltip="Restore the settings of the environment"
        )
        for name, control in self.numbers.items():
            control.observe(partial(self._number_changed, name), "value")
            control.observe(partial(self._no_number_typed, name), "error")
        for name, text in self.texts.items():
            text.observe(partial(self._text_changed, name), "value")
        self.message = MessageLine()
        self.reset.on_click(lambda _button: panel.act(self._reset, self.message.show))
        below = (self.texts, self.errors, self.notes)
        texts = [parts[name] for name in self.texts for parts in below]
        controls = [*self.numbers.values(), *texts]
        fields = widgets.Box(controls).add_class("llm-fields")
        buttons = widgets.Box([self.reset]).add_class("llm-buttons")
        title = widgets.HTML("<h3>Generation</h3>")
        parts = [title, fields, buttons, self.message, QueueNotice()]
        self.box = widgets.VBox(parts).add_class("llm-section")

    def _number_changed(self, name: str, change: Mapping[str, Any]) -> None:
        typed = change["new"]
        self._try(name, typed, lambda: _whole(typed))

    def _no_number_typed(self, name: str, change: Mapping[str, Any]) -> None:
        if (text := change["new"]) and not self._panel.is_drawing:

            def refuse() -> None:
                raise OptionError(text)

            self._try(name, self.numbers[name].value, refuse)

    def _text_changed(self, name: str, change: Mapping[str, Any]) -> None:
        line = change["new"]
        self._try(name, line, lambda: _texts(line))

    def _try(self, name: str, typed: Any, parse: Callable[[], object]) -> None:
        """Set what was typed; if it is refused, it stays with its error."""
        self._panel.act(partial(self._set, name, typed, parse), partial(self._complain, name))

    def _set(self, name: str, typed: Any, parse: Callable[[], object]) -> str:
        generation = self._panel.session.generation
        self._refused[name] = typed, getattr(generation, name)
        value = parse()
        generation.update(**{name: value})
        del self._refused[name]
        return config_line({name: value})

    def _complain(self, name: str, text: str) -> None:
        """Store an error, which `draw` shows; the next action does not remove it."""
        if text:
            self._complaints[name] = text

    def check(self) -> None:
        """Raise `OptionError` while a field shows a value that was refused and is not used."""
        session, known = self._panel.session, generation_specs()
        backend = session.status().backend_type
        for name, (_, used) in self._refused.items():
            if used == getattr(session.generation, name) and known[name].works_on(backend):
                raise OptionError(f"Nothing was sent. {self._complaints.get(name, '')}")

    def _reset(self) -> str:
        self._panel.session.generation.reset()
        self._refused.clear()
        return "%llm_config --reset"

    def _shown(self, name: str, value: object) -> tuple[Any, str]:
        """Return what the field of a setting contains, and the error at it."""
        typed, used = self._refused.get(name, (None, value))
        if used != value:
            del self._refused[name]
        if name not in self._refused:
            return value, ""
        return typed, self._complaints.get(name, "")

    def draw(self) -> None:
        """Show the settings, and only those that the active backend supports."""
        session, known = self._panel.session, generation_specs()
        config, changed = session.generation.config, session.generation.changed
        status = session.status()
        backend = status.backend_type
        self.numbers["max_new_tokens"].note = _limit_note(config.max_new_tokens, status.active)
        for name, control in self.numbers.items():
            control.used = _drawn(getattr(config, name))
            value, control.error = self._shown(name, getattr(config, name))
            control.value = _drawn(value)
            control.changed = name in changed
            control.layout.display = "" if known[name].works_on(backend) else "none"
        for name, text in self.texts.items():
            value, error = self._shown(name, getattr(config, name))
            is_refused = name in self._refused
            text.value = value if is_refused else " ".join(quoted(escape(one)) for one in value)
            self.errors[name].show(error)
            self.notes[name].value = "" if is_refused else _comma_note(value)
            _mark(text, "llm-refused", is_refused)
            _mark(text, "llm-changed", name in changed)
            text.layout.display = "" if known[name].works_on(backend) else "none"
        self.reset.disabled = not (changed or self._refused)


def _text(spec: OptionSpec) -> Any:
    """Return the field of an option that takes several texts."""
    return widgets.Text(
        description=spec.label or spec.name,
        placeholder="none; separate several by a space",
        tooltip=spec.help,
        continuous_update=False,
    ).add_class("llm-wide")


def _texts(line: str) -> tuple[str, ...]:
    """Return the texts of a line, which spaces separate."""
    texts = tuple(unescape(word) for word in split_line(line))
    if "" in texts:
        raise OptionError("A stop text is empty. Clear the field for none.")
    return texts


def _limit_note(max_new_tokens: int | None, model: ModelInfo | None) -> str:
    """Return the note of a limit that no answer can reach, on one line: the answer has the whole note."""
    if model is None or not limit_note(max_new_tokens, model):
        return ""
    return f"More than the context: {model.context_length:,} tokens."


def _comma_note(texts: tuple[str, ...]) -> str:
    """Return a note about a comma that may have been meant to separate texts, as HTML."""
    found = next((text for text in texts if re.search(r"\w,", text)), "")
    note = f"The comma is part of the stop text “{found}”. Separate stop texts by a space."
    return f'<div class="llm-note llm-quiet">{html.escape(note)}</div>' if found else ""


def _mark(widget: Any, name: str, is_set: bool) -> None:
    (widget.add_class if is_set else widget.remove_class)(name)


def _drawn(value: float | None) -> float | None:
    """Return a number for a browser: it has a maximum, which replaces all larger ones."""
    return None if value is None else float(min(value, sys.float_info.max))


def _whole(value: float | None) -> float | int | None:
    """Return a number without a fraction as an int: a slider sends only floats."""
    return int(value) if value is not None and value.is_integer() else value
