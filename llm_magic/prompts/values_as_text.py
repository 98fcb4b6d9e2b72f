"""Values as text: in full for a prompt, or in a line without running any code of theirs.

The difference is the policy `run_code`. A user who writes ``{value}`` into a prompt gets what `str` or
`repr` returns. After an error the values are described without these: a `__repr__` may raise, hang,
query a database or print a password, and a property may do work. So a value of a known type is
described by what the type defines, any other by its type and the attributes in its `__dict__`.
"""

from __future__ import annotations

import ast
import datetime
import decimal
import fractions
import functools
import inspect
import itertools
import linecache
import pathlib
import re
import types
import uuid
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pprint import pformat
from typing import Any

from llm_magic.config.redaction import MASK, is_secret_name
from llm_magic.prompts.allowed_methods import require_strftime
from llm_magic.prompts.trusted_types import (
    ARRAYS,
    CONTAINERS,
    MAX_BITS,
    MAX_TEXT,
    NUMBERS,
    TEXTS,
    Budget,
    NotAllowed,
    bits,
    classes_of,
    family,
    full_name,
    is_environment,
    parts,
    require_length,
    require_small_exponent,
)

Mask = Callable[[str], str]
LONGEST = 300
# Of a text, 200 characters are shown, and 4,000 more searched for a secret that starts in these.
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


_MAX_SHOWN = 200_000  # elements of a list or dict that is inserted
_SHOWN_COST, _TABLE_COST = 20, 20_000  # of the text of an element and a table, in elements
_METHODS = frozenset({types.MethodType, types.MethodWrapperType})
_VIEWS = frozenset({ItemsView, KeysView, ValuesView})
# The format specs of numbers and texts.
_SPEC = re.compile(
    r"(?:.?[<>=^])?[-+ ]?z?#?0?(?P<width>\d{0,30})[_,]?(?:\.(?P<precision>\d{1,30}))?[bcdeEfFgGnosxX%]?"
)
# {a:b} and {a:1} are also entries of a dict without spaces and quotes.
_ENTRY = re.compile(r"[a-zA-Z]+|\d|[1-9]\d*")


@dataclass(frozen=True, slots=True)
class _Style:
    """Whether code of the values may run; if not, how deep they are described, and the mask."""

    run_code: bool
    depth: int = 1
    mask: Mask = str

    @property
    def inner(self) -> _Style:
        """The style of what is in a value."""
        return replace(self, depth=self.depth - 1)


def to_text(value: Any, *, run_code: bool = True) -> str:
    """Return a value as text: for a prompt or, where its code may not run, in short."""
    return _text(value, _Style(run_code))


def describe(name: str, value: object, mask: Mask = str) -> str:
    """Return a value in at most `LONGEST` characters, without running its code.

    A value whose name is one of a secret is masked. `mask` masks secrets in texts before they are
    cut, because it would not recognize half of one.
    """
    try:
        text = mask(_named(name, value, _Style(run_code=False, depth=_DEPTH, mask=mask)))
    except Exception:  # noqa: BLE001 - a class can make even its name raise
        text = "a value that cannot be described"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def _text(value: Any, style: _Style) -> str:
    """Return a value as the first of its classes that is known defines it."""
    if not style.run_code and (text := _builtin(value, style)):
        return text
    for base in classes_of(value):
        if render := _RENDERERS.get(full_name(base)):
            return render(value, style)
    return str(value) if style.run_code else _object(value, style)


# -- without running code -------------------------------------------------------------------------


def _named(name: str, value: object, style: _Style) -> str:
    # Names of classes and functions may be those of secrets: `Token`, `getpass`.
    harmless = value is None or issubclass(type(value), _NO_SECRETS)
    return MASK if is_secret_name(name) and not harmless else _text(value, style)


def _builtin(value: Any, style: _Style) -> str:
    """Return a number, a text or a container in short, else ""; `isinstance` would run code."""
    kind = type(value)
    if kind is int and value.bit_length() > 1000:
        return f"int of {value.bit_length()} bits"
    if kind in _PLAIN:
        return repr(value)
    if kind is str or kind is bytes:
        return _cut(value, style)
    if style.depth and kind in _BRACKETS:
        return _collection(value, style)
    return _mapping(value, style) if issubclass(kind, dict) else ""


def _cut(value: str | bytes, style: _Style) -> str:
    if len(value) <= _TEXT:
        return style.mask(repr(value))
    text = repr(value[: _TEXT + _SECRET])
    return f"{style.mask(text)[: _TEXT + 1]}{text[-1]}… ({len(value):,} in all)"


def _collection(value: Any, style: _Style) -> str:
    left, right = _BRACKETS[type(value)]
    items = [_text(item, style.inner) for item in itertools.islice(value, _ITEMS)]
    more = f", … ({len(value):,} in all)" if len(value) > _ITEMS else ""
    return f"{left}{', '.join(items)}{more}{right}"


def _mapping(value: dict[Any, Any], style: _Style) -> str:
    title = "" if type(value) is dict else f"{type(value).__qualname__} "
    count = dict.__len__(value)
    if not style.depth:
        return f"{title}{{{'…' if count else ''}}}"
    shown = [
        f"{_text(key, replace(style, depth=0))}: {_named(_name(key), item, style.inner)}"
        for key, item in itertools.islice(dict.items(value), _ITEMS)
    ]
    more = f", … ({count:,} in all)" if count > _ITEMS else ""
    return f"{title}{{{', '.join(shown)}{more}}}"


def _name(key: object) -> str:
    return str(key) if type(key) is str else ""


def _object(value: object, style: _Style) -> str:
    kind = type(value)
    title = kind.__qualname__ if kind.__module__ == "builtins" else _title(kind)
    attributes = _attributes(value)
    if not style.depth or not attributes:
        return f"{title} object"
    shown = [
        f"{name}={_named(name, item, style.inner)}"
        for name, item in itertools.islice(attributes.items(), _ITEMS)
    ]
    more = ", …" if len(attributes) > _ITEMS else ""
    return f"{title} object with {', '.join(shown)}{more}"


def _attributes(value: object) -> dict[str, object]:
    """Return the `__dict__` of an object, without running code of its class."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    if type(held) is not dict:
        return {}
    return {name: item for name, item in list(held.items()) if not _name(name).startswith("__")}


def _title(kind: type) -> str:
    module = str(kind.__module__)
    return str(kind.__qualname__) if module == "__main__" else f"{module}.{kind.__qualname__}"


# -- tables and arrays ----------------------------------------------------------------------------


def _frame(frame: Any, style: _Style) -> str:
    """Return the shape of a table, with the first and last ten rows and columns or with the types.

    The types are what goes wrong, and the rows may be private.
    """
    rows, columns = frame.shape
    title = f"{type(frame).__name__}, {rows} rows × {columns} columns"  # noqa: RUF001
    if style.run_code:
        return f"{title}\n{_rows(frame)}"
    pairs = zip(frame.columns, frame.dtypes, strict=True)
    shown = [
        f"{to_text(name, run_code=False)} {kind}"
        for name, kind in itertools.islice(pairs, _COLUMNS)
    ]
    return f"{title}: {', '.join(shown)}{', …' if columns > _COLUMNS else ''}"


def _rows(frame: Any, **options: Any) -> str:
    return str(frame.to_string(max_rows=20, max_cols=20, max_colwidth=60, **options))


def _series(series: Any, style: _Style) -> str:
    title, name = type(series).__name__, series.name
    if name is not None or not style.run_code:
        title += f" {to_text(name, run_code=False)}"
    title += f", {len(series)} values, {series.dtype}"
    # As a frame with one column, because only frames cut long cells.
    return f"{title}\n{_rows(series.to_frame(), header=False)}" if style.run_code else title


def _index(index: Any, style: _Style) -> str:
    return (
        str(index)
        if style.run_code
        else f"{type(index).__name__}, {len(index)} values, {index.dtype}"
    )


def _array(array: Any, style: _Style) -> str:
    """Return the shape of an array with its values, of a large one only a corner."""
    title = f"{type(array).__name__}, shape {tuple(array.shape)}, {array.dtype}"
    if style.run_code and prod(array.shape) <= 100:
        return f"{title}\n{array}" if array.shape else str(array.item())
    if style.run_code:
        edge = {1: 20, 2: 6}.get(len(array.shape), 2)
        return f"{title}; the first values:\n{array[(slice(edge),) * len(array.shape)]}"
    if array.size <= _NUMBERS and array.dtype.kind in "biufc":
        return f"{title}: {array.tolist()}"
    return title


def _tensor(tensor: Any, style: _Style) -> str:
    if style.run_code:
        return _array(tensor, style)
    # Without numbers: after an error on a GPU, reading one raises the error again.
    grad = ", requires grad" if tensor.requires_grad else ""
    return f"Tensor, shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}{grad}"


def _scalar(scalar: Any, style: _Style) -> str:
    if style.run_code:
        return str(scalar)
    return (
        f"{type(scalar).__name__} {scalar.item()!r}" if scalar.dtype.kind in "biufc" else "scalar"
    )


# -- modules, functions and classes ---------------------------------------------------------------


def _module(module: types.ModuleType, style: _Style) -> str:
    if style.run_code:
        return str(module)
    names = types.ModuleType.__getattribute__(module, "__dict__")
    version = names.get("__version__")
    return f"module {names.get('__name__')}{f' {version}' if type(version) is str else ''}"


def _function(function: Any, style: _Style) -> str:
    if style.run_code:
        return _source(function)
    if type(function) is types.BuiltinFunctionType:
        return f"built-in {function.__name__}"
    kind = "function"
    if type(function) is types.MethodType:
        function, kind = function.__func__, "method"
    if type(function) is not types.FunctionType:
        return f"{kind} of {_title(type(function))}"
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return f"{kind} {function.__qualname__}({', '.join(names)})"


def _class(kind: type, style: _Style) -> str:
    if style.run_code:
        return _source(kind)
    bases = ", ".join(base.__name__ for base in kind.__bases__ if base is not object)
    return f"class {_title(kind)}({bases})"


def _source(value: Any) -> str:
    """Return the source of a function or a class where Python has it, else its repr."""
    try:
        return inspect.cleandoc("\n" + inspect.getsource(value))
    except (OSError, TypeError):
        if isinstance(value, types.MethodType):  # Its repr contains that of its object.
            raise NotAllowed("is a method; call it") from None
        return _cell_source(value) or repr(value)


def _cell_source(value: Any) -> str:
    """Return the source of a class from the last cell that defines it, which `inspect` cannot."""
    cells = [entry[2] for entry in linecache.cache.values() if len(entry) == 4 and not entry[1]]
    for lines in reversed(cells if value.__module__ == "__main__" else []):
        source = "".join(lines)
        with suppress(SyntaxError):  # of cells that never ran
            for node in ast.parse(source).body if f"class {value.__name__}" in source else ():
                if isinstance(node, ast.ClassDef) and node.name == value.__name__:
                    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                    return "".join(lines[first - 1 : node.end_lineno]).rstrip()
    return ""


def _pretty(value: Any, style: _Style) -> str:
    if style.run_code:
        return pformat(value, width=100, compact=True, sort_dicts=False)
    return _object(value, style)


def _repr(value: Any, style: _Style) -> str:
    return repr(value) if style.run_code else _object(value, style)


_RENDERERS: Mapping[str, Callable[[Any, _Style], str]] = {
    "builtins.str": lambda text, style: text if style.run_code else _object(text, style),
    "builtins.bytes": _repr,
    **{f"builtins.{kind}": _pretty for kind in ("dict", "list", "tuple", "set", "frozenset")},
    **{
        f"builtins.{kind}": _function
        for kind in ("function", "method", "builtin_function_or_method")
    },
    "builtins.module": _module,
    "builtins.type": _class,
    "pydantic.BaseModel": _repr,
    "pandas.DataFrame": _frame,
    "pandas.Series": _series,
    "pandas.Index": _index,
    "numpy.ndarray": _array,
    "numpy.generic": _scalar,
    "torch.Tensor": _tensor,
}


# -- bounds on the text of what an expression returns ---------------------------------------------


def require_printable(value: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if the text of a value would be very long or contain the environment."""
    pending, length, visited, work = [value], 0, 0, 0.0
    while pending:
        one = pending.pop()
        kind = family(one)
        visited += 1
        length += len(one) if kind in TEXTS else 1
        work += _TABLE_COST if kind in ARRAYS else _SHOWN_COST
        if bits(one) > 10 * MAX_BITS:
            raise NotAllowed(f"has a number of over {10 * MAX_BITS:,} bits", advice="")
        if kind in {"unknown", *ARRAYS}:
            _require_no_environment(one, budget)
        if kind in CONTAINERS:
            require_length(visited + len(pending) + len(one), _MAX_SHOWN, "elements in its text")
            for part in parts(one):
                pending += part
        require_length(length, 20 * MAX_TEXT)
    budget.spend(work + length / 50)


def _require_no_environment(value: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if the text of a value would contain the environment variables."""
    if _is_bound(value):
        raise NotAllowed("is a method; call it")
    held = list(_contents(value, budget))
    for one in held:
        if type(one) in {list, tuple} and len(one) <= 1000:  # the dicts of a chain of dicts
            held += one
        if is_environment(getattr(one, "__self__", None) if _is_bound(one) else one):
            raise NotAllowed("has all environment variables in it")


def _is_bound(value: object) -> bool:
    """Return whether a value is a method, whose text would contain that of its object."""
    if isinstance(value, types.BuiltinFunctionType) and type(value) is types.BuiltinFunctionType:
        return not isinstance(value.__self__, (types.ModuleType, type(None)))
    return type(value) in _METHODS


def _contents(value: Any, budget: Budget) -> Iterator[Any]:
    """Yield what an object of an unknown class or an array of objects contains, one level deep."""
    yield value
    if type(value) in _VIEWS:
        yield value._mapping
    elif type(value) is functools.partial:
        yield from (value.func, *value.args, *value.keywords.values())
    elif family(value) == "unknown":
        with suppress(AttributeError):  # of an object with slots
            yield from list(object.__getattribute__(value, "__dict__").values())[:1000]
    columns = [value]
    if family(value) == "frame":
        columns = [value.iloc[:, number] for number in range(min(1000, value.shape[1]))]
    for column in columns if family(value) in {"frame", "series", "index"} else ():
        if str(column.dtype) == "object":
            budget.spend(len(column))
            yield from (cell for cell in column.array if type(cell) not in {str, int, float})


def format_value(value: Any, spec: str, budget: Budget) -> str:
    """Return a value by a format spec, as in an f-string; raises `NotAllowed` if it is unsafe."""
    if _ENTRY.fullmatch(spec):
        reason = "may be an entry of a dict or CSS; for a format spec put > after the colon"
        raise NotAllowed(reason, advice="")
    kind = family(value)
    if kind in {"date", "datetime", "time", "period", "missing"}:
        require_strftime(spec)
        if "%" not in spec:
            raise NotAllowed(f'has the date format "{spec}", which has no %', advice="")
        return format(value, spec)
    if kind not in NUMBERS | TEXTS | {"timedelta", "none", "uuid", "path"} | CONTAINERS | ARRAYS:
        raise NotAllowed(f"has a format spec, which the class {type(value).__name__} would read")
    if kind == "scalar" and value.dtype.kind not in "iufcbU":
        raise NotAllowed(f"has a format spec for a {type(value).__name__}")
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise NotAllowed(f'has the format spec "{spec}", which Python does not support', advice="")
    digits = max(int(match["width"] or 0), int(match["precision"] or 0))
    if digits > 1000:
        raise NotAllowed("has a format spec with a width or precision over 1,000", advice="")
    require_small_exponent(value)
    require_printable(value, budget)
    return format(value, spec)
