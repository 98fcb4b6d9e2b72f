"""The generation settings of a session: what ``%llm_config``, ``llm.generation`` and the panel change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from llm_magic.config.option_spec import unknown_option
from llm_magic.config.settings import GenerationConfig, SessionConfig, Settings
from llm_magic.errors import NoAttribute, OptionError, did_you_mean


class GenerationSettings:
    """The generation options and the system prompt as attributes; setting one changes the calls that follow.

    Precedence: this call > these settings > `Settings` > the model's own default.

    `values` holds them as an immutable value, `settings` what the environment and ``.env`` set.

    >>> llm.generation.temperature = 0.3
    >>> llm.generation.system = "Answer in one sentence."
    """

    __slots__ = ("_fixed", "_lock", "_notify", "settings", "values")
    settings: Settings
    values: SessionConfig

    def __init__(
        self, settings: Settings | None = None, notify: Callable[[], None] = lambda: None
    ) -> None:
        """Start from `settings`, or read them from the environment and ``.env``.

        `notify` is called after every change, on the thread that made it.
        """
        self._set("_fixed", settings)
        self._set("_notify", notify)
        # The callback of a widget may run in another thread while a cell runs.
        self._set("_lock", threading.RLock())
        self._start()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _start(self) -> None:
        self._set("settings", self._fixed or Settings.read())
        self._set("values", self.settings.defaults(SessionConfig))

    @property
    def config(self) -> GenerationConfig:
        """The generation options without the system prompt."""
        return self.values.generation

    @property
    def changed(self) -> frozenset[str]:
        """The names of the options that differ from `settings`."""
        with self._lock:
            defaults, values = self.settings.defaults(SessionConfig), self.values
            return frozenset(
                name
                for name in values.model_fields_set
                if getattr(values, name) != getattr(defaults, name)
            )

    def update(self, **changes: Any) -> SessionConfig:
        """Change options for later calls: all of them, or none if one is wrong."""
        with self._lock:
            values = self.values.replace(**changes)
            self._set("values", values)
        self._notify()
        return values

    def reset(self, *names: str) -> SessionConfig:
        """Discard the changes, or those of the named options, and read the environment and ``.env`` again."""
        if unknown := [name for name in names if name not in SessionConfig.model_fields]:
            raise OptionError(unknown_option(unknown[0], SessionConfig.model_fields))
        with self._lock:
            before = self.values
            self._start()
            if names:
                others = before.model_fields_set - set(names)
                self._set("values", self.values.replace(**{n: getattr(before, n) for n in others}))
        self._notify()
        return self.values

    def __getattr__(self, name: str) -> Any:
        if name not in SessionConfig.model_fields:
            near = did_you_mean(name, SessionConfig.model_fields)
            raise NoAttribute(f"There is no generation option {name!r}.{near}")
        return getattr(self.values, name)

    def __setattr__(self, name: str, value: object) -> None:
        self.update(**{name: value})

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *SessionConfig.model_fields]

    def __repr__(self) -> str:
        return repr(self.values)
