"""The generation settings as traits, for ``%config LLMMagics`` and ``ipython_config.py``.

A trait stores nothing: it reads and changes `Session.generation`, as ``%llm_config`` and the panel do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from traitlets import Bunch, HasTraits, TraitError, TraitType

from llm_magic.errors import OptionError

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec


class ConfigError(OptionError, TraitError):
    """An invalid value; traitlets then restores what was set together with it."""


class Setting(TraitType[Any, Any]):
    """One generation setting of the session of its object."""

    def __init__(self, spec: OptionSpec) -> None:
        about = spec.help
        if spec.range:
            about += f" {spec.range}, default {spec.default}; None leaves it to the model."
        super().__init__(spec.default, allow_none=True, help=about, config=True)

    def get(self, obj: Any, cls: Any = None) -> Any:
        """Return the current value of the session."""
        return getattr(obj.session.generation, str(self.name))

    def set(self, obj: Any, value: Any) -> None:
        """Change the session; raises `ConfigError` in one line and changes nothing."""
        before = self.get(obj)
        try:
            obj.session.generation.update(**{str(self.name): value})
        except OptionError as error:
            if obj.session.is_configured:
                # ``%config`` has stored it where the next ``%load_ext`` reads it.
                obj.shell.config[type(obj).__name__].pop(self.name, None)
            raise ConfigError(f"{error}") from None
        now = self.get(obj)
        if now != before:
            change = {"owner": obj, "type": "change", "name": self.name, "old": before, "new": now}
            obj.notify_change(Bunch(change))


def declare(cls: type[HasTraits]) -> None:
    """Give a class a trait for each option of the table, once."""
    from llm_magic.config.option_spec import specs
    from llm_magic.config.settings import SessionConfig

    table = specs(SessionConfig)
    if cls.__dict__.keys() >= table.keys():
        return
    settings = {name: Setting(spec) for name, spec in table.items()}
    for name, trait in settings.items():
        setattr(cls, name, trait)
    # A class statement does this with the traits in its body.
    cls.setup_class(dict(settings))
