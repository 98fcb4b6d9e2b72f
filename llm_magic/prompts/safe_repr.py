"""Values in a line or two, without running any code of theirs.

A `__repr__` may raise, hang, ask a database or print a password, and a property may do work; after an
error they are likelier to. So this reads what an object has and never asks it: types that are known
are shown as they are written, of all others the type and the attributes in their `__dict__`.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import itertools
import pathlib
import types
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_magic.config.redaction import MASK, is_secret_name

Mask = Callable[[str], str]
LONGEST = 300
# Of a text so much is shown, and so much more looked at, for a secret that begins in what is shown.
_ITEMS, _DEPTH, _TEXT, _SECRET = 8, 3, 200, 4000
_COLUMNS, _NUMBERS = 20, 10
# Their repr is their own, and short.
_PLAIN = frozenset(
    {
        bool, int, float, complex, type(None), type(Ellipsis), type(NotImplemented), range,
        datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone,
        decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PosixPath, pathlib.WindowsPath,
        pathlib.PurePosixPath, pathlib.PureWindowsPath,
    }
)  # fmt: skip
_NO_SECRETS = (
    bool, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
)  # fmt: skip
_BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}"), frozenset: ("frozenset({", "})"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Look:
    """How deep a value is looked into, and what masks the secrets in its texts."""

    depth: int = 1
    mask: Mask = str

    @property
    def deeper(self) -> _Look:
        return _Look(self.depth - 1, self.mask)


def describe(name: str, value: object, mask: Mask = str) -> str:
    """Return a value in at most `LONGEST` characters; a mask where its name tells a secret.

    `mask` is what masks those in its texts, before they are cut: half of one would not be known.
    """
    try:
        text = mask(_named(name, value, _Look(_DEPTH, mask)))
    except Exception:  # noqa: BLE001 - a class can make even its name raise
        text = "a value that cannot be looked at"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def _named(name: str, value: object, look: _Look) -> str:
    # Classes and functions have telling names and are no secrets: `Token`, `getpass`.
    harmless = value is None or issubclass(type(value), _NO_SECRETS)
    return MASK if is_secret_name(name) and not harmless else _short(value, look)


def _short(value: Any, look: _Look) -> str:
    """Look at the type alone: `isinstance` would ask the object for its class."""
    kind = type(value)
    if kind is int and value.bit_length() > 1000:
        return f"int of {value.bit_length()} bits"
    if kind in _PLAIN:
        return repr(value)
    if kind is str or kind is bytes:
        return _cut(value, look)
    if look.depth and kind in _BRACKETS:
        return _collection(value, kind, look)
    if issubclass(kind, dict):
        return _mapping(kind, value, look)
    for base in kind.__mro__:
        if render := _KNOWN.get(f"{str(base.__module__).partition('.')[0]}.{base.__name__}"):
            return render(value)
    return _object(value, kind, look)


def _cut(value: str | bytes, look: _Look) -> str:
    if len(value) <= _TEXT:
        return look.mask(repr(value))
    text = repr(value[: _TEXT + _SECRET])
    return f"{look.mask(text)[: _TEXT + 1]}{text[-1]}… ({len(value):,} in all)"


def _collection(value: Any, kind: type, look: _Look) -> str:
    left, right = _BRACKETS[kind]
    items = [_short(item, look.deeper) for item in itertools.islice(value, _ITEMS)]
    more = f", … ({len(value):,} in all)" if len(value) > _ITEMS else ""
    return f"{left}{', '.join(items)}{more}{right}"


def _mapping(kind: type, value: dict[Any, Any], look: _Look) -> str:
    title = "" if kind is dict else f"{kind.__qualname__} "
    count = dict.__len__(value)
    if not look.depth:
        return f"{title}{{{'…' if count else ''}}}"
    pairs = itertools.islice(dict.items(value), _ITEMS)
    shown = [
        f"{_short(key, _Look(0, look.mask))}: {_named(_text(key), item, look.deeper)}"
        for key, item in pairs
    ]
    more = f", … ({count:,} in all)" if count > _ITEMS else ""
    return f"{title}{{{', '.join(shown)}{more}}}"


def _text(key: object) -> str:
    return str(key) if type(key) is str else ""


def _object(value: object, kind: type, look: _Look) -> str:
    title = kind.__qualname__ if kind.__module__ == "builtins" else _title(kind)
    attributes = _attributes(value)
    if not look.depth or not attributes:
        return f"{title} object"
    shown = [
        f"{name}={_named(name, item, look.deeper)}"
        for name, item in itertools.islice(attributes.items(), _ITEMS)
    ]
    more = ", …" if len(attributes) > _ITEMS else ""
    return f"{title} object with {', '.join(shown)}{more}"


def _attributes(value: object) -> dict[str, object]:
    """Return what is in the `__dict__` of an object, without asking its class."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    if type(held) is not dict:
        return {}
    return {name: item for name, item in list(held.items()) if not _text(name).startswith("__")}


def _title(kind: type) -> str:
    module = str(kind.__module__)
    return str(kind.__qualname__) if module == "__main__" else f"{module}.{kind.__qualname__}"


# -- what other packages make ---------------------------------------------------------------------


def _frame(frame: Any) -> str:
    """Show shape, columns and their types: those are what goes wrong, and no row is anybody's business."""
    rows, columns = frame.shape
    pairs = zip(frame.columns, frame.dtypes, strict=True)
    shown = [f"{_short(name, _Look())} {kind}" for name, kind in itertools.islice(pairs, _COLUMNS)]
    more = ", …" if columns > _COLUMNS else ""
    return f"DataFrame, {rows} rows × {columns} columns: {', '.join(shown)}{more}"  # noqa: RUF001


def _series(series: Any) -> str:
    return f"Series {_short(series.name, _Look())}, {len(series)} values, {series.dtype}"


def _index(index: Any) -> str:
    return f"{type(index).__name__}, {len(index)} values, {index.dtype}"


def _array(array: Any) -> str:
    title = f"ndarray, shape {tuple(array.shape)}, {array.dtype}"
    if array.size <= _NUMBERS and array.dtype.kind in "biufc":
        return f"{title}: {array.tolist()}"
    return title


def _scalar(scalar: Any) -> str:
    return (
        f"{type(scalar).__name__} {scalar.item()!r}" if scalar.dtype.kind in "biufc" else "scalar"
    )


def _tensor(tensor: Any) -> str:
    """Read no number: after an error on a GPU that would raise the error again."""
    grad = ", requires grad" if tensor.requires_grad else ""
    return f"Tensor, shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}{grad}"


def _module(module: types.ModuleType) -> str:
    names = types.ModuleType.__getattribute__(module, "__dict__")
    version = names.get("__version__")
    return f"module {names.get('__name__')}{f' {version}' if type(version) is str else ''}"


def _function(function: types.FunctionType) -> str:
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return f"function {function.__qualname__}({', '.join(names)})"


def _class(kind: type) -> str:
    bases = ", ".join(base.__name__ for base in kind.__bases__ if base is not object)
    return f"class {_title(kind)}({bases})"


_KNOWN: Mapping[str, Callable[[Any], str]] = {
    "pandas.DataFrame": _frame,
    "pandas.Series": _series,
    "pandas.Index": _index,
    "numpy.ndarray": _array,
    "numpy.generic": _scalar,
    "torch.Tensor": _tensor,
    "builtins.module": _module,
    "builtins.function": _function,
    "builtins.method": lambda method: _short(method.__func__, _Look(0)).replace(
        "function", "method", 1
    ),
    "builtins.builtin_function_or_method": lambda function: f"built-in {function.__name__}",
    "builtins.type": _class,
}
