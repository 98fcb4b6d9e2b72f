"""The generation settings of a session, and the one place where they change."""

from __future__ import annotations

import threading
from typing import Any

from llm_magic.config import GenerationConfig, Settings


class Options:
    """Settings, overlaid by what the session changed: this call > session > settings > model."""

    def __init__(self, given: Settings | None = None) -> None:
        self._given = given
        self._changes: dict[str, Any] = {}
        # A widget's callback may run in another thread while a cell runs.
        self._lock = threading.Lock()
        self.settings = given or Settings.read()

    @property
    def current(self) -> GenerationConfig:
        """What calls are generated with now."""
        return self.settings.generation().replace(**self._changes)

    def change(self, **changes: Any) -> GenerationConfig:
        """Change settings for later calls; all of them, or none if one is wrong."""
        with self._lock:
            checked = self.current.replace(**changes)
            self._changes |= {name: getattr(checked, name) for name in changes}
        return checked

    def reset(self) -> GenerationConfig:
        """Go back to the environment and ``.env``, read again."""
        with self._lock:
            self.settings = self._given or Settings.read()
            self._changes = {}
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
