"""Candidates for completion, from memory and the local disk only, because a key press waits for them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_magic.config.server_address import setting_name
from llm_magic.errors import OptionError
from llm_magic.notebook.arguments.magic_options import MAGICS, option_specs

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.magic_options import Argument
    from llm_magic.session import Session

# More than a menu can show, and few enough for a key press.
_MAX_CANDIDATES = 500
_SECRET = re.compile(r"(KEY|TOKEN)$")
_DATA = frozenset(
    {"DataFrame", "Series", "Dataset", "IterableDataset", "Table", "ndarray", "Index"}
)
# A reference being typed: {name, {name.attr, {name["key
_NAME = re.compile(r"(?<![{$])\{((?:[^\W\d]\w*\.)*)(\w*)$")
_KEY = re.compile(r"(?<![{$])\{((?:[^\W\d]\w*\.)*[^\W\d]\w*)\[([\"'])([^\"'\[\]{}]*)$")


class Completion(NamedTuple):
    """A text to insert, its kind, and whether the word continues after it (a folder)."""

    text: str
    kind: str = "value"
    is_open: bool = False


class Candidates:
    """The values of arguments, and the names of the notebook for references in a prompt."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        self._shell, self._session = shell, session

    def of(self, argument: Argument, typed: str, line: Mapping[str, str]) -> Iterable[Completion]:
        """Return the values that start with `typed`; `line` has the other options of the line."""
        source, _, option = argument.complete.partition(":")
        if source == "models":
            return self._models(typed, line)
        if source == "files":
            return _paths(typed)
        session = self._session
        names: Mapping[str, tuple[str, Callable[[], Iterable[str]]]] = {
            "loaded": ("loaded", lambda: (info.name for info in session.status().models)),
            "jobs": ("job", lambda: (*(str(job.number) for job in session.jobs.all), "all")),
            "chats": ("chat", lambda: (chat.name for chat in session.chats.all())),
            "variables": ("variable", self._variables),
            "data": ("data", self._data),
            "types": ("type", self._types),
            "backends": ("backend", self._backends),
            "settings": ("setting", self._settings),
            "magics": ("magic", lambda: MAGICS),
            "choices": ("value", lambda: self._choices(option, line)),
            "": ("value", lambda: argument.choices),
        }
        kind, listed = names[source]
        return _starting_with(typed, listed(), kind)

    def setting(self, name: str, typed: str) -> Iterable[Completion]:
        """Return the values of a setting of the session that start with `typed`."""
        return _starting_with(typed, self._setting_values(name.replace("-", "_")))

    def in_prompt(self, text: str) -> tuple[str, list[Completion]]:
        """Return the part of a {reference} that is being typed, and its completions."""
        if found := _NAME.search(text):
            return found[2], self._attributes(found[1], found[2])
        if found := _KEY.search(text):
            value = self._value(found[1])
            keys = [key for key in _keys(value) if found[2] not in key]
            return found[3], _starting_with(found[3], keys, "key")
        return "", []

    # -- models -------------------------------------------------------------------------------

    def _models(self, typed: str, line: Mapping[str, str]) -> list[Completion]:
        from llm_magic.notebook.display.messages import model_location

        backend, status = line.get("backend"), self._session.status()
        found: dict[str, Completion] = {}
        # Without -b, which may follow, the known models of every server are candidates.
        for name in [backend] if backend else self._backends():
            # An address may still be incomplete.
            with contextlib.suppress(OptionError):
                known = self._session.known_models(name, line.get("base_url"))
                for info in sorted(known, key=lambda info: info.name.casefold()):
                    found.setdefault(info.name, Completion(info.name, model_location(info)))
        if backend in {None, status.backend_type}:
            for info in status.models:
                found.setdefault(info.name, Completion(info.name, "loaded"))
        matching = (c for c in found.values() if _matches(c.text, typed))
        candidates = list(itertools.islice(matching, _MAX_CANDIDATES))
        if backend in {None, "local", "llamacpp"} and typed:
            candidates += [path for path in _paths(typed) if path.text not in found]
        return candidates

    # -- options ------------------------------------------------------------------------------

    def _choices(self, option: str, line: Mapping[str, str]) -> Iterable[str]:
        if option == "key_env":
            return sorted(name for name in os.environ if _SECRET.search(name))
        if option == "base_url":
            backend = line.get("backend", self._session.settings.backend)
            return filter(None, [getattr(self._session.settings, setting_name(backend), "")])
        if option in option_specs("session"):
            return self._setting_values(option)
        spec = option_specs("loading").get(option)
        examples = spec.examples if spec is not None else ()
        return (spec.choices if spec is not None else ()) or examples

    def _setting_values(self, name: str) -> Iterable[str]:
        """Return the current value and none for a number; other values are free text."""
        spec = option_specs("session").get(name)
        if spec is None or not spec.is_number:
            return ()
        now = getattr(self._session.generation, name)
        return dict.fromkeys(("none" if now is None else str(now), "none"))

    def _backends(self) -> list[str]:
        from llm_magic.backends.registry import names

        default = self._session.settings.backend
        return sorted(names(), key=lambda name: name != default)

    def _settings(self) -> list[str]:
        known = option_specs("session").items()
        return [f"{name}=" for name, spec in known if spec.kind != "pairs"]

    # -- the notebook's names -----------------------------------------------------------------

    def _variables(self) -> list[str]:
        hidden = self._shell.user_ns_hidden
        return sorted(
            name
            for name, value in self._shell.user_ns.items()
            if not name.startswith("_") and hidden.get(name, self) is not value
        )

    def _data(self) -> list[str]:
        """Return the variables that have rows: tables, columns, lists, dicts and others."""
        names = self._shell.user_ns
        return [name for name in self._variables() if _has_rows(names[name])]

    def _types(self) -> list[str]:
        """Return the variables that name the type of an answer: classes, and JSON schemas."""
        names = self._shell.user_ns
        return [name for name in self._variables() if isinstance(names[name], (type, dict))]

    def _attributes(self, chain: str, typed: str) -> list[Completion]:
        from IPython.utils.dir2 import dir2

        if not chain:
            return _starting_with(typed, self._variables(), "variable")
        value = self._value(chain.removesuffix("."))
        names = dir2(value) if value is not None else []
        return _starting_with(typed, (n for n in names if not n.startswith("_")), "attribute")

    def _value(self, chain: str) -> Any:
        """Return the value of a chain of names, or None if evaluating it would run code."""
        root, *attributes = chain.split(".")
        value = self._shell.user_ns.get(root)
        for name in attributes:
            value = inspect.getattr_static(value, name, None)
            if hasattr(type(value), "__get__"):
                return None
        return value


def _has_rows(value: object) -> bool:
    """Return whether a value may be the data of a map, without running its code."""
    kind = type(value)
    if issubclass(kind, (str, bytes, type, ModuleType)):
        return False
    return issubclass(kind, (Sequence, Mapping, Iterator)) or kind.__name__ in _DATA


def _keys(value: Any) -> Iterator[str]:
    """Yield the keys of a dictionary, or the columns of a DataFrame, that are strings."""
    has_columns = type(value).__name__ == "DataFrame"
    keys = value.columns if has_columns else value if isinstance(value, dict) else ()
    yield from (key for key in keys if isinstance(key, str))


def _paths(typed: str) -> Iterator[Completion]:
    from llm_magic.backends.local.files.sources import paths

    for path in paths(typed):
        is_folder = path.endswith(os.sep)
        yield Completion(path, "folder" if is_folder else "file", is_open=is_folder)


def _starting_with(typed: str, texts: Iterable[str], kind: str = "value") -> list[Completion]:
    return [Completion(text, kind) for text in texts if text.startswith(typed)]


def _matches(model: str, typed: str) -> bool:
    """Return whether a model's id, or its name without the organization, starts with `typed`."""
    prefix = typed.casefold()
    return any(name.casefold().startswith(prefix) for name in (model, model.rpartition("/")[2]))
