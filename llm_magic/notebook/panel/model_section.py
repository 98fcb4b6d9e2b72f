"""The model section of the panel: choose a backend, server and model; load and unload it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import html
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from llm_magic.backends import registry
from llm_magic.config.option_spec import OptionSpec
from llm_magic.config.providers import PROVIDERS
from llm_magic.config.redaction import is_key
from llm_magic.config.server_address import parse_url, setting_name
from llm_magic.config.settings import LoadConfig, ServerLoadConfig
from llm_magic.errors import LLMMagicError, ModelError, ModelNotLoaded, OptionError
from llm_magic.notebook.display.messages import ready_lines, shown_name, unloaded_line
from llm_magic.notebook.frontend import reach_busy_kernels
from llm_magic.notebook.panel.as_magic import load_line
from llm_magic.notebook.panel.controls import LONG_WAIT_S, MessageLine, QueueNotice
from llm_magic.types import Progress

if TYPE_CHECKING:
    from llm_magic.backends.manager import LoadResult
    from llm_magic.notebook.panel import ControlPanel
    from llm_magic.session.jobs import Job
    from llm_magic.types import ModelInfo

# As many as a browser can filter at each key press; other names can be typed.
_MAX_NAMES = 500
# They belong to one server, as the model does.
_SERVER_FIELDS = ("key_env", "base_url")


class LoadSection:
    """The controls for a load; only those of the selected backend are visible."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        settings = panel.session.settings
        registry.check_name(settings.backend, settings.backend)
        self.backend = widgets.Dropdown(
            options=list(registry.names()), value=settings.backend, description="Backend"
        )
        self.model = widgets.Combobox(
            description="Model", placeholder="the default", ensure_option=False, options=[]
        )
        self.options = {
            name: _control(spec, settings.default_of(spec))
            for name, spec in registry.load_specs().items()
            if spec.label
        }
        self.keep = widgets.Checkbox(description="Keep the loaded models", indent=False)
        self.load = widgets.Button(description="Load", button_style="primary")
        self.stop = widgets.Button(description="Stop loading")
        self.unload = widgets.Button(description="Unload")
        self.list = widgets.Button(description="Refresh list")
        self.result = widgets.HTML()
        self.message = MessageLine()
        # The result lines of the last action, and numbers that identify actions.
        self._result_lines: Sequence[str] = ()
        self._numbers = itertools.count(1)
        self._latest = self._lists = 0
        # The active model when the result and the error were shown: they are about the time before another.
        self._active: ModelInfo | None = None
        # The errors of the values that were cleared. The button that is clicked next reports them again:
        # a click on it also commits the field, and would continue with the default value.
        self._refused: dict[str, OptionError] = {}
        # The error of the last load, and the model that it did not load while another one can answer: they
        # are true until the next load, or until a field is changed.
        self._failure = self.not_loaded = ""
        # The active model that was drawn last, and what was written into the field for it.
        self._followed: str | None = None
        self._filled_in = ""
        # What was last in the fields of each backend, and the model that an error is about, with the backend
        # that the error advises to choose.
        self._last_fields: dict[str, dict[str, str]] = {}
        self._advised = ("", "")
        # The answer for which an unload was refused: the error is true until it ends.
        self._answering: Job | None = None
        # Whether a model is being loaded or unloaded, and since when it was drawn.
        self.is_busy = False
        self._busy_since: float | None = None
        self.model.add_class("llm-wide")
        self.box = self._assembled()
        self._connect()

    def _assembled(self) -> widgets.VBox:
        # The model below the options that decide which models there are.
        server = [c for n, c in self.options.items() if n in ServerLoadConfig.model_fields]
        others = [c for n, c in self.options.items() if n not in ServerLoadConfig.model_fields]
        controls = [self.backend, *server, self.model, *others, self.keep]
        fields = widgets.Box(controls).add_class("llm-fields")
        actions = [self.load, self.stop, self.unload, self.list]
        buttons = widgets.Box(actions).add_class("llm-buttons")
        title = widgets.HTML("<h3>Model</h3>")
        parts = [title, fields, buttons, self.message, QueueNotice(), self.result]
        return widgets.VBox(parts).add_class("llm-section")

    def _connect(self) -> None:
        panel, show = self._panel, self._show_error
        self.load.on_click(lambda _button: panel.act(self._load, show))
        self.stop.on_click(lambda _button: panel.act(self._stop, show))
        self.unload.on_click(lambda _button: panel.act(self._unload, show))
        self.list.on_click(lambda _button: panel.act(self._list, show))
        self.backend.observe(lambda change: self._choose(change["old"]), "value")
        for name in ("base_url", "key_env"):
            self.options[name].observe(partial(self._check, name), "value")
        for control in (self.backend, self.model, *self.options.values()):
            control.observe(lambda _change: self._clear_failure(), "value")

    # -- what the user does -------------------------------------------------------------------

    def given(self) -> dict[str, Any]:
        """Return the options of a load, without those that the backend does not support."""
        backend = str(self.backend.value)
        defaults = registry.load_config(self._panel.session.settings, {"backend": backend})
        chosen = {
            name: _read(control.value)
            for name, control in self.options.items()
            if name in type(defaults).model_fields
        }
        changed = {
            name: value
            for name, value in chosen.items()
            # A text field holds a number as text.
            if value is not None
            and value not in (getattr(defaults, name), str(getattr(defaults, name)))
        }
        return {"backend": backend, **changed}

    def _check(self, name: str, change: Mapping[str, Any]) -> None:
        """Clear a field with an invalid value: it may be a secret, which is saved with the notebook."""
        text = change["new"].strip()
        if not text:
            return
        self._refused.pop(name, None)
        try:
            if name == "base_url":
                parse_url(str(self.backend.value), text)
            else:
                _check_variable(text, _key_variable(str(self.backend.value)))
        except OptionError as error:
            self.options[name].value = ""
            self._refused[name] = error
            self._panel.show_error(error, self._show_error)
            return
        self._panel.show_error("", self._show_error)
        if name == "base_url":
            # Not for a key: it may belong to the address that is typed next.
            self._list_anew()

    def _choose(self, before: str) -> None:
        """Show the fields of another backend: what was last in them, else nothing."""
        if self._panel.is_retired:
            return
        self._refused.clear()
        fields = {"model": self.model, **{name: self.options[name] for name in _SERVER_FIELDS}}
        backend, url = str(self.backend.value), self.options["base_url"]
        self._last_fields[before] = {name: field.value for name, field in fields.items()}
        last, address = self._last_fields.get(backend, {}), url.value
        if not last and self._advised == (backend, self.model.value.strip()):
            last = {"model": self.model.value}
        for name, field in fields.items():
            field.value = last.get(name, "")
        self.draw()
        if url.value in {"", address}:
            # Otherwise the change of the address has done it.
            self._list_anew()

    def _list_anew(self) -> None:
        """List the models of another server or backend: the shown ones are not there."""
        self.model.options = []
        self._show_result([])
        self.refresh()

    def _check_refused(self) -> None:
        errors, self._refused = list(self._refused.values()), {}
        if errors:
            raise errors[0]

    def _list(self) -> None:
        self._check_refused()
        self.refresh()

    def _load(self) -> str:
        self._check_refused()
        model, options, keep = self.model.value.strip() or None, self.given(), bool(self.keep.value)
        magic = self._magic(model, options, keep)
        self._clear_failure()
        future = self._panel.session.load_later(model, keep=keep, **options)
        before, self._result_lines = self._result_lines, ()
        self._latest = next(self._numbers)
        future.add_done_callback(partial(self._loaded, magic, before))
        return magic

    def _magic(self, model: str | None, options: Mapping[str, Any], keep: bool) -> str:
        usual = (self._panel.session.settings.backend, LoadConfig().backend)
        given = dict(options)
        if usual == (given["backend"], given["backend"]):
            del given["backend"]
        return load_line(model, given, keep=keep)

    def _loaded(
        self, magic: str, before: Sequence[str], future: concurrent.futures.Future[LoadResult]
    ) -> None:
        """Show the result of a load after that of `before`; called on the event-loop thread."""
        # Its error is shown here, so the next prompt does not raise it.
        not_loaded = self._panel.session.discard_failed_load()
        self._panel.session.discard_finished_load()
        if future.cancelled():
            self._show_result(["Stopped loading."])
            return
        error = future.exception()
        if error is None:
            result, session = future.result(), self._panel.session
            lines = ready_lines(result, session.jobs.running, session.generation.values)
            # The notes about a model are true until another one is loaded.
            notes = before[1:] if result.was_loaded and result.info is self._active else ()
            self._show_result([*lines, *notes])
            return
        self._advised = (getattr(error, "choice", ""), self.model.value.strip())
        self._show_result([])
        self._panel.withdraw(magic)
        # The error of a prompt that waited for it may be shown already.
        self.not_loaded = not_loaded
        self._panel.show_error(error, self._show_failure, beside=True)

    def _show_failure(self, text: str) -> None:
        """Show the error of a load, which the next action does not remove."""
        self._failure = text or self._failure
        self._show_error(text)

    def _clear_failure(self) -> None:
        if self._failure:
            self._failure = self.not_loaded = ""
            self.message.show("")

    def _show_error(self, text: str) -> None:
        """Show an error of another action; without one, that of the last load."""
        self.message.show(text or self._failure)

    def _stop(self) -> None:
        self._panel.session.stop_loading()

    def _unload(self) -> str:
        if answers := self._panel.session.answers_of():
            self._answering = answers[0]
            # The click would block the kernel until they have ended.
            raise ModelError(
                f"{answers[0].model} is still answering ({answers[0].short_name}). Stop it first, or wait for"
                " its end."
            )
        session = self._panel.session
        self._show_result([unloaded_line(session.unload(), session.jobs.running)])
        return "%llm_unload"

    def refresh(self) -> None:
        """Request the models of the backend; they are shown when they arrive."""
        if self._panel.is_retired:
            return
        options = {n: v for n, v in self.given().items() if n in {"backend", "base_url", "key_env"}}
        self._show_error("")
        try:
            future = self._panel.session.models_later(**options)
        except LLMMagicError as error:
            self._show_result([])
            self._panel.show_error(error, self._show_error)
            return
        self._lists = self._latest = next(self._numbers)
        future.add_done_callback(partial(self._listed, self._lists))

    def _listed(self, number: int, future: concurrent.futures.Future[list[ModelInfo]]) -> None:
        """Show the listed models; called on the event-loop thread."""
        if future.cancelled() or number != self._lists:
            return
        error = future.exception()
        # If a load was started since, its result is shown instead.
        is_latest = number == self._latest
        if error is None:
            names = [info.name for info in future.result()]
            self.model.options = names[:_MAX_NAMES]
            if is_latest:
                self._show_result([_found(names)])
        elif is_latest:
            self._show_result([])
            self._panel.show_error(error, self._show_error)

    def _show_result(self, lines: Sequence[str]) -> None:
        # Only `draw` writes the widget: a drawing that has already started could overwrite it.
        self._active = self._panel.session.status().active
        self._latest, self._result_lines = next(self._numbers), lines
        self._panel.request_draw()

    # -- what is shown ------------------------------------------------------------------------

    def draw(self) -> None:
        """Show the controls of the backend and the progress of a load."""
        status, table = self._panel.session.status(), registry.load_specs()
        backend = str(self.backend.value)
        for name, control in self.options.items():
            control.layout.display = "" if table[name].works_on(backend) else "none"
        self._follow_active(status.active_model)
        default = getattr(self._panel.session.settings, setting_name(backend), "")
        self.options["base_url"].placeholder = default
        self.options["key_env"].placeholder = f"such as {_key_variable(backend)}"
        self.model.placeholder = "the served model" if default else "the default"
        busy = self.is_busy = status.status in {"Loading", "Configuring", "Unloading"}
        self._busy_since = (self._busy_since or time.monotonic()) if busy else None
        if not busy and status.active is not self._active:
            self._active, self._result_lines = status.active, ()
            self._clear_failure()
            self.message.show("")
        if self._answering is not None and self._answering.done:
            self._answering = None
            self._show_error("")
        self.load.disabled = busy
        in_cell = self._panel.is_loading_in_cell
        # A click would be handled only after the cell that it should stop.
        hint = "■ in the toolbar stops it" if in_cell and not reach_busy_kernels() else ""
        self.stop.layout.display = "" if busy and not hint else "none"
        self.unload.disabled = busy or not status.models
        progress = status.progress or (Progress("loading") if hint else None)
        self.result.value = self._bar(progress, hint) if busy and progress else self._result_html()

    def _follow_active(self, name: str | None) -> None:
        """Show the model that was loaded elsewhere, unless the user has typed another one."""
        if name == self._followed:
            return
        self._followed = name
        if name is None or self.model.value.strip() not in {"", self._filled_in}:
            return
        with contextlib.suppress(ModelNotLoaded):
            loaded = self._panel.session.loaded_model(name)
            self.backend.value = loaded.config.backend
            for option, control in self.options.items():
                value = getattr(loaded.config, option, None)
                if option in _SERVER_FIELDS:
                    value = value or ""
                if value is not None:
                    control.value = value if isinstance(value, bool) else str(value)
            self._filled_in = loaded.requested or name
            self.model.value = self._filled_in

    def _bar(self, progress: Progress, hint: str) -> str:
        """Return a progress bar with the stage, the seconds of a long load, and a hint."""
        share = "" if progress.share is None else f' value="{progress.share:.3f}"'
        detail = f" ({progress.detail})" if progress.detail else ""
        text = html.escape(f"{progress.stage}{detail}")
        waited = time.monotonic() - self._busy_since if self._busy_since is not None else 0.0
        seconds = f" … {waited:.0f} s" if waited >= LONG_WAIT_S else ""
        return (
            f'<div class="llm-status"><progress max="1"{share} aria-label="{text}"></progress>'
            f"<span>{text}{seconds}{f' · {hint}' if hint else ''}</span></div>"
        )

    def _result_html(self) -> str:
        lines = "<br>".join(map(html.escape, self._result_lines))
        return f'<div class="llm-result" role="status">{lines}</div>'


def _check_variable(name: str, example: str) -> None:
    """Raise `OptionError` for a text that is not the name of a variable for a key."""
    try:
        ServerLoadConfig().replace(key_env=name)
    except OptionError:
        what = "This is a key" if is_key(name) else "This is not the name of a variable"
        raise OptionError(
            f"{what}. Enter the name of an environment variable that holds the key, such as {example}.",
            option="key_env",
        ) from None


def _key_variable(backend: str) -> str:
    """Return a name for the variable of a backend's key: that of a hosted provider, or an example."""
    provider = PROVIDERS.get(backend)
    return provider.key_variable if provider else f"{backend.replace('-', '_').upper()}_API_KEY"


def _found(names: Sequence[str]) -> str:
    """Return how many models a backend lists, and the name of a single one."""
    if not names:
        return "No models found."
    return f"1 model: {shown_name(names[0])}." if len(names) == 1 else f"{len(names):,} models."


def _control(spec: OptionSpec, default: object) -> Any:
    """Return the ipywidgets control of an option, which shows its default."""
    label, text = spec.label, "" if default is None else str(default)
    if spec.examples:
        return widgets.Combobox(
            description=label, options=spec.examples, value=text, ensure_option=False
        )
    if spec.choices:
        return widgets.Dropdown(description=label, options=list(spec.choices), value=text)
    if spec.kind == "switch":
        return widgets.Checkbox(description=label, value=default is True, indent=False)
    return widgets.Text(description=label, value=text, continuous_update=False)


def _read(value: object) -> object:
    """Return the value of a control; None for an empty text."""
    return (value.strip() or None) if isinstance(value, str) else value
