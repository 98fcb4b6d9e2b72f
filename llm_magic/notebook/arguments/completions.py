"""What may stand at a place of a magic line, told from memory and this disk: a key press waits for it."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_magic.errors import OptionError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.table import Argument
    from llm_magic.session import Session

# What people mostly give where any text is allowed.
_SUGGESTED = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "attn": ("eager", "sdpa", "flash_attention_2"),
}
# More than a menu can show, and few enough for a key press.
_MOST_OFFERS = 500
_SECRET = re.compile(r"(KEY|TOKEN)$")
# A reference that is being typed: {name, {name.attr, {name["key
_NAME = re.compile(r"(?<![{$])\{((?:[^\W\d]\w*\.)*)(\w*)$")
_KEY = re.compile(r"(?<![{$])\{((?:[^\W\d]\w*\.)*[^\W\d]\w*)\[([\"'])([^\"'\[\]{}]*)$")


@dataclass(frozen=True, slots=True)
class Offer:
    """A text to choose, what it is, and whether more of the same word follows (a folder)."""

    text: str
    kind: str = "value"
    goes_on: bool = False


class Candidates:
    """The values of arguments, and the notebook's names in a prompt."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        self._shell, self._session = shell, session

    def of(self, argument: Argument, typed: str, line: Mapping[str, str]) -> list[Offer]:
        """Return the values that begin with what is typed; `line` has the options beside it."""
        source, _, option = argument.complete.partition(":")
        if argument.choices:
            return _beginning(typed, argument.choices)
        if source == "choices":
            return _beginning(typed, self._choices(option, line))
        if source == "models":
            return self._models(typed, line)
        names: Mapping[str, tuple[str, Callable[[], Iterable[str]]]] = {
            "loaded": ("loaded", lambda: [info.name for info in self._session.status().models]),
            "jobs": ("job", lambda: [str(job.id) for job in self._session.jobs.all]),
            "chats": ("chat", lambda: [chat.name for chat in self._session.chats.all()]),
            "variables": ("variable", self._variables),
            "backends": ("backend", self._backends),
            "settings": ("setting", self._settings),
        }
        if source not in names:
            return []
        kind, listed = names[source]
        return _beginning(typed, listed(), kind)

    def setting(self, name: str, typed: str) -> list[Offer]:
        """Return values of a generation setting: the one that it has, and none."""
        from llm_magic.config.settings import GenerationConfig

        if name not in GenerationConfig.model_fields or name in {"stop", "extra"}:
            return []
        now = getattr(self._session.generation.config, name)
        return _beginning(typed, dict.fromkeys(("none" if now is None else str(now), "none")))

    def in_prompt(self, text: str) -> tuple[str, list[Offer]]:
        """Return the part of a {reference} that is being typed, and how it may go on."""
        if found := _NAME.search(text):
            return found[2], self._attributes(found[1], found[2])
        if found := _KEY.search(text):
            value = self._value(found[1])
            keys = [key for key in _keys(value) if found[2] not in key]
            return found[3], _beginning(found[3], keys, "key")
        return "", []

    # -- models -------------------------------------------------------------------------------

    def _models(self, typed: str, line: Mapping[str, str]) -> list[Offer]:
        backend = line.get("backend")
        # Without -b it may still come: what is known of every server is offered.
        asked = [backend] if backend else self._backends()
        found: dict[str, Offer] = {}
        for name in asked:
            for offer in self._known(name, line.get("base_url")):
                found.setdefault(offer.text, offer)
        if backend in {None, self._session.status().backend_type}:
            for info in self._session.status().models:
                found.setdefault(info.name, Offer(info.name, "loaded"))
        like = (offer for offer in found.values() if _is_like(offer.text, typed))
        offers = list(itertools.islice(like, _MOST_OFFERS))
        if backend in {None, "local"} and typed:
            offers += [offer for offer in _paths(typed) if offer.text not in found]
        return offers

    def _known(self, backend: str, base_url: str | None) -> Iterator[Offer]:
        from llm_magic.notebook.display.messages import place

        try:
            known = self._session.known_models(backend, base_url)
        except OptionError:
            # An address that is typed only in part: nothing is known there.
            return
        for info in sorted(known, key=lambda info: info.name.casefold()):
            yield Offer(info.name, place(info))

    # -- options ------------------------------------------------------------------------------

    def _choices(self, option: str, line: Mapping[str, str]) -> Iterable[str]:
        from llm_magic.config.option_spec import specs
        from llm_magic.config.settings import LoadConfig

        if option == "key_env":
            return sorted(name for name in os.environ if _SECRET.search(name))
        if option == "base_url":
            backend = line.get("backend", self._session.settings.backend)
            return filter(None, [getattr(self._session.settings, f"{backend}_base_url", "")])
        spec = specs(LoadConfig).get(option)
        return _SUGGESTED.get(option, ()) if spec is None or not spec.choices else spec.choices

    def _backends(self) -> list[str]:
        from llm_magic.backends.registry import BACKENDS

        default = self._session.settings.backend
        return sorted(BACKENDS, key=lambda name: name != default)

    def _settings(self) -> list[str]:
        from llm_magic.config.settings import GenerationConfig

        return [f"{name}=" for name in GenerationConfig.model_fields if name != "extra"]

    # -- the notebook's names -----------------------------------------------------------------

    def _variables(self) -> list[str]:
        hidden = self._shell.user_ns_hidden
        return sorted(
            name
            for name, value in self._shell.user_ns.items()
            if not name.startswith("_") and hidden.get(name, self) is not value
        )

    def _attributes(self, chain: str, typed: str) -> list[Offer]:
        from IPython.utils.dir2 import dir2

        if not chain:
            return _beginning(typed, self._variables(), "variable")
        value = self._value(chain.removesuffix("."))
        names = dir2(value) if value is not None else []
        return _beginning(typed, (n for n in names if not n.startswith("_")), "attribute")

    def _value(self, chain: str) -> Any:
        """Return what a chain of names stands for, if that can be told without running code."""
        root, *rest = chain.split(".")
        value = self._shell.user_ns.get(root)
        for name in rest:
            value = inspect.getattr_static(value, name, None)
            if hasattr(type(value), "__get__"):
                return None
        return value


def _keys(value: Any) -> Iterator[str]:
    """Yield the keys of a dictionary, and the columns of a DataFrame, that are texts."""
    has_columns = type(value).__name__ == "DataFrame"
    keys = value.columns if has_columns else value if isinstance(value, dict) else ()
    yield from (key for key in keys if isinstance(key, str))


def _paths(typed: str) -> Iterator[Offer]:
    from llm_magic.backends.local.files.sources import paths

    for path in paths(typed):
        is_folder = path.endswith(os.sep)
        yield Offer(path, "folder" if is_folder else "file", goes_on=is_folder)


def _beginning(typed: str, texts: Iterable[str], kind: str = "value") -> list[Offer]:
    return [Offer(text, kind) for text in texts if text.startswith(typed)]


def _is_like(model: str, typed: str) -> bool:
    """Say whether a model is meant: by its id, or by its name without the organisation."""
    wanted = typed.casefold()
    return any(
        name.casefold().startswith(wanted) for name in (model, model.rpartition("/")[2])
    )  # fmt: skip
