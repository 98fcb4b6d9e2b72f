"""The generation settings of a session, and the one place where they change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from llm_magic.config.settings import GenerationConfig, Settings


class Options:
    """Settings, overlaid by what the session changed: this call > session > settings > model."""

    def __init__(
        self, given: Settings | None = None, changed: Callable[[], None] = lambda: None
    ) -> None:
        """`changed` is called after every change, on the thread that made it."""
        self._given, self._changed = given, changed
        self._changes: dict[str, Any] = {}
        self._current: GenerationConfig | None = None
        # A widget's callback may run in another thread while a cell runs.
        self._lock = threading.RLock()
        self.settings = given or Settings.read()

    @property
    def current(self) -> GenerationConfig:
        """What calls are generated with now."""
        with self._lock:
            if self._current is None:
                self._current = self.settings.generation().replace(**self._changes)
            return self._current

    def change(self, **changes: Any) -> GenerationConfig:
        """Change settings for later calls; all of them, or none if one is wrong."""
        with self._lock:
            checked = self.current.replace(**changes)
            self._changes |= {name: getattr(checked, name) for name in changes}
            self._current = None
        self._changed()
        return checked

    def reset(self) -> GenerationConfig:
        """Go back to the environment and ``.env``, read again."""
        with self._lock:
            self.settings = self._given or Settings.read()
            self._changes = {}
            self._current = None
        self._changed()
        return self.current

    @property
    def changed(self) -> frozenset[str]:
        """The names of what differs from the settings."""
        defaults, now = self.settings.generation(), self.current
        return frozenset(n for n in self._changes if getattr(now, n) != getattr(defaults, n))


class Config:
    """The settings as attributes; setting one changes the session."""

    __slots__ = ("_options",)
    _options: Options

    def __init__(self, options: Options) -> None:
        object.__setattr__(self, "_options", options)

    def __getattr__(self, name: str) -> Any:
        if name not in GenerationConfig.model_fields:
            raise AttributeError(name)
        return getattr(self._options.current, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._options.change(**{name: value})

    def __dir__(self) -> list[str]:
        return list(GenerationConfig.model_fields)

    def __repr__(self) -> str:
        return repr(self._options.current)
