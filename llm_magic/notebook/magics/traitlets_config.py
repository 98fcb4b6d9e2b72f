"""The generation settings as traits, so that ``%config LLMMagics`` and ``ipython_config.py`` know them.

A trait keeps nothing: it reads the session and changes it, so it cannot fall out of step with
``%llm_config``, the panel and ``llm.generation``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from traitlets import Bunch, HasTraits, TraitError, TraitType

from llm_magic.errors import OptionError

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec


class ConfigError(OptionError, TraitError):
    """A value that a setting cannot have; traitlets takes back what was set together with it."""


class Setting(TraitType[Any, Any]):
    """One generation setting of the session of its object."""

    def __init__(self, spec: OptionSpec) -> None:
        about = spec.help
        if spec.range:
            about += f" {spec.range}, by itself {spec.default}; None leaves it to the model."
        super().__init__(spec.default, allow_none=True, help=about, config=True)

    def get(self, obj: Any, cls: Any = None) -> Any:
        """Return what calls are generated with now."""
        return getattr(obj.session.generation.config, str(self.name))

    def set(self, obj: Any, value: Any) -> None:
        """Change the session; raises `ConfigError` in one line, and changes nothing then."""
        before = self.get(obj)
        try:
            obj.session.configure(**{str(self.name): value})
        except OptionError as error:
            raise ConfigError(f"{error}") from None
        now = self.get(obj)
        if now != before:
            change = {"owner": obj, "type": "change", "name": self.name, "old": before, "new": now}
            obj.notify_change(Bunch(change))


def declare(cls: type[HasTraits]) -> None:
    """Give a class a trait for each option of the table, once."""
    from llm_magic.config.option_spec import specs
    from llm_magic.config.settings import GenerationConfig

    table = specs(GenerationConfig)
    if cls.__dict__.keys() >= table.keys():
        return
    settings = {name: Setting(spec) for name, spec in table.items()}
    for name, trait in settings.items():
        setattr(cls, name, trait)
    # What a class statement does with the traits in its body.
    cls.setup_class(dict(settings))
