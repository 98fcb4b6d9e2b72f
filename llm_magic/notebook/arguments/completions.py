"""Candidates for completion, from memory and the local disk only, because a key press waits for them."""

from __future__ import annotations

import ast
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
from llm_magic.prompts.trusted_types import family
from llm_magic.text import visible_line

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.magic_options import Argument
    from llm_magic.session import Session

# More than a menu can show, and few enough for a key press.
_MAX_CANDIDATES = 500
_SECRET = re.compile(r"(KEY|TOKEN)$")
# Methods of tables whose result has the columns of the table.
_SAME_COLUMNS = frozenset(
    {"copy", "drop_duplicates", "dropna", "filter", "head", "limit", "nlargest", "nsmallest", "query",
     "sample", "shuffle", "slice", "sort", "sort_index", "sort_values", "tail", "unique"}
)  # fmt: skip
_PEEKED = 100  # rows of a list, whose keys are columns
# In the name of a column, what ends a reference or a quotation.
_ODD = re.compile(r"[{}\"'\\]")
_DATA = frozenset(
    {"DataFrame", "Series", "Dataset", "IterableDataset", "Table", "ndarray", "Index"}
)
# A reference being typed: {name, {name.attr, {name["key
_NAME = re.compile(r"(?<![{$])\{((?:[^\W\d]\w*\.)*)(\w*)$")
# The name of a column with blanks and other characters: {my col
_COLUMN = re.compile(r"(?<![{$])\{([^\s{}\"'\\][^{}\"'\\\n]*)$")
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

    def in_prompt(self, text: str, data: str = "") -> tuple[str, list[Completion]]:
        """Return the part of a {reference} that is being typed, and its completions.

        `data` is the expression after ``--over``, whose columns come first.
        """
        if data and (typed := self._in_row(text, data)) is not None:
            return typed
        if found := _NAME.search(text):
            return found[2], self._attributes(found[1], found[2])
        if found := _KEY.search(text):
            value = self._value(found[1])
            keys = [key for key in _keys(value) if found[2] not in key]
            return found[3], _starting_with(found[3], keys, "key")
        return "", []

    def _in_row(self, text: str, data: str) -> tuple[str, list[Completion]] | None:
        """Return the same for a reference to a row; None if another one is being typed."""
        from llm_magic.session.map.prompts import INDEX, ITEM

        columns = self._columns(data)
        if found := _KEY.search(text):
            keys = [name for name in columns if found[2] not in name]
            return (found[3], _starting_with(found[3], keys, "key")) if found[1] == ITEM else None
        if found := _NAME.search(text):
            if found[1]:
                names = [name for name in columns if name.isidentifier()]
                is_item = found[1] == f"{ITEM}." and names
                return (found[2], _starting_with(found[2], names, "column")) if is_item else None
        elif not (found := _COLUMN.search(text)):
            return None
        typed = found[found.lastindex or 0]
        names = list(dict.fromkeys((*columns, ITEM, INDEX)))
        variables = [name for name in self._variables() if name not in names]
        offered = _starting_with(typed, names, "column")
        return typed, offered + _starting_with(typed, variables, "variable")

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

    def _columns(self, data: str) -> list[str]:
        """Return the names in each row of the data of a map, as far as they are known without its value."""
        with contextlib.suppress(SyntaxError):
            found = self._columns_of(ast.parse(data.strip(), mode="eval").body)
            return [name for name in found if visible_line(name) == name and not _ODD.search(name)]
        return []

    def _columns_of(self, data: ast.expr) -> Sequence[str]:
        match data:
            case ast.Name() | ast.Attribute():
                return _names_in_rows(self._value(ast.unparse(data)))
            case ast.Subscript(value=table, slice=ast.Constant(value=str(name))):
                return [name] if name in self._columns_of(table) else ()
            case ast.Subscript(value=table, slice=ast.List(elts=names)):
                chosen = {one.value for one in names if isinstance(one, ast.Constant)}
                return [name for name in self._columns_of(table) if name in chosen]
            case ast.Subscript(value=ast.Attribute(value=table, attr="loc" | "iloc"), slice=rows):
                return () if isinstance(rows, ast.Tuple) else self._columns_of(table)
            case ast.Subscript(value=table):
                return self._columns_of(table)
            case ast.Call(func=ast.Attribute(value=table, attr=method)) if method in _SAME_COLUMNS:
                return self._columns_of(table)
        return ()

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
    is_table = family(value) in {"frame", "pl_frame"}
    keys = value.columns if is_table else value if type(value) is dict else ()
    yield from (key for key in keys if type(key) is str)


def _names_in_rows(data: Any) -> Sequence[str]:
    """Return the columns of a table, the name of a Series, or the keys in the first rows of others."""
    kind = family(data)
    if kind in {"frame", "pl_frame"}:
        names = data.columns
    elif kind in {"series", "pl_series"}:
        names = [data.name]
    elif type(data).__module__.partition(".")[0] in {"datasets", "pyarrow"}:
        names = getattr(data, "column_names", None) or ()
    else:
        rows = data.values() if type(data) is dict else data if type(data) in {list, tuple} else ()
        records = (row for row in itertools.islice(rows, _PEEKED) if type(row) is dict)
        names = dict.fromkeys(itertools.chain.from_iterable(records))
    return [name for name in names if type(name) is str and name]


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
