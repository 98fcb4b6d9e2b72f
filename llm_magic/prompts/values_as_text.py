"""Values as text: in full for a prompt, or in a line without running any code of theirs.

A user who writes ``{value}`` into a prompt gets what `str` or `repr` returns. After an error the values
are described without these: a `__repr__` may raise, hang, query a database or print a password, and a
property may do work. So a value of a trusted type is described by what the type defines, any other by
its type and the attributes in its `__dict__`.
"""

from __future__ import annotations

import ast
import functools
import gc
import inspect
import linecache
import re
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import prod
from pprint import PrettyPrinter
from typing import Any

from llm_magic.config.redaction import MASK, is_secret_name
from llm_magic.prompts.allowed_methods import require_strftime
from llm_magic.prompts.trusted_types import (
    ARRAYS,
    CONTAINERS,
    MAX_BITS,
    MAX_TEXT,
    MOMENTS,
    NUMBERS,
    PANDAS,
    PART,
    SCALARS,
    TEXTS,
    Budget,
    NotAllowed,
    bits,
    classes_of,
    columns,
    family,
    full_name,
    is_environment,
    parts,
    require_length,
    require_small_exponent,
    trusted_type,
)
from llm_magic.text import counted

Mask = Callable[[str], str]
LONGEST = 300
# Of a text, 200 characters are shown, and 4,000 more searched for a secret that starts in these.
_ITEMS, _DEPTH, _TEXT, _SECRET = 8, 3, 200, 4000
_COLUMNS, _NUMBERS = 20, 10
# The rows and columns of a table in a prompt, the rows of a part that the prompt asks for, the
# characters of a cell, the values of an array.
_MAX_LINES, _MAX_PICKED, _MAX_CELL, _MAX_VALUES = 20, 100, 60, 100
_CUT_TEXTS = f"with texts cut at {_MAX_CELL} characters"
# Of a table or an array with more cells, a note recommends a part: no model reads all of them.
_MAX_COMPLETE = 10_000
# What returns all of a table or an array.
_ALL_OF_IT: Mapping[str, str] = {
    "frame": "to_csv()", "series": "to_list()", "index": "to_list()", "array": "tolist()",
    "tensor": "tolist()", "pl_frame": "write_csv()", "pl_series": "to_list()",
}  # fmt: skip
_PART_OF_IT: Mapping[str, str] = {
    "frame": ".head(20)", "series": ".head(20)", "index": "[:20]", "array": "[:20].tolist()",
    "tensor": "[:20].tolist()", "pl_frame": ".head(20).write_csv()",
    "pl_series": ".head(20).to_list()",
}  # fmt: skip
_NO_SECRETS = (
    bool, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
)  # fmt: skip
_BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}"), frozenset: ("frozenset({", "})"),
}  # fmt: skip

_MAX_SHOWN = 200_000  # elements of a list or dict that is inserted
_SHOWN_COST, _TABLE_COST = 20, 20_000  # of the text of an element and a table, in elements
_METHODS = frozenset({types.MethodType, types.MethodWrapperType})
# The text of one contains that of what it refers to.
_SHOWN_WITHIN = (dict, list, tuple, functools.partial, types.BuiltinFunctionType, *_METHODS)
# The format specs of numbers and texts.
_SPEC = re.compile(
    r"(?:.?[<>=^])?[-+ ]?z?#?0?(?P<width>\d{0,30})[_,]?(?:\.(?P<precision>\d{1,30}))?[bcdeEfFgGnosxX%]?"
)
# {a:b} and {a:1} are also entries of a dict without spaces and quotes, and {a:red} is nothing else.
_ENTRY = re.compile(r"[a-zA-Z]+|\d|[1-9]\d*")
_PLAIN_NAME = re.compile(r"[\w .%/-]{1,20}")  # a column that a note names
_WORD = re.compile(r"(?![bcdeEfFgGnosxX]$)[a-zA-Z]+")


_JOB = "llm_magic.Response"


# -- in full --------------------------------------------------------------------------------------


def full_repr(value: Any) -> str:
    """Return the repr of a value, of a text all of it, whatever its class shows."""
    return str.__repr__(value) if family(value) == "str" else repr(value)


def to_text(value: Any, *, is_part: bool = False) -> str:
    """Return a value as text for a prompt, as the first of its classes that is known defines it.

    `is_part`: the prompt asks for these rows of a table, so that more of them are shown.
    """
    if is_part and (render_part := _PARTS.get(family(value))):
        return render_part(value, _MAX_PICKED)
    if _is_listed(value):
        return _listed(value)
    for base in classes_of(value):
        if render := _IN_FULL.get(full_name(base)):
            return render(value)
    return str(value)


def is_plain_text(value: object) -> bool:
    """Return whether a value is a text, which is inserted as it is: a str, or the answer of a job."""
    return family(value) == "str" or any(full_name(one) == _JOB for one in classes_of(value))


def _frame(frame: Any, rows: int = _MAX_LINES) -> str:
    """Return the shape of a table, and its first and last ten rows and columns."""
    return f"{_title(frame, 'frame')}\n{_rows(frame, rows)}"


def _series(series: Any, rows: int = _MAX_LINES) -> str:
    title = _title(series, "series")
    if not len(series):
        return title
    # As a frame with one column, because only frames cut long cells. pandas shifts the values of a
    # shortened frame by a row if it omits the header above the names of the index.
    has_header = any(name is not None for name in series.index.names)
    text = _rows(series.to_frame(""), rows, header=has_header)
    if has_header:
        text = text.partition("\n")[2]
    return f"{title}\n{text}"


def _rows(frame: Any, rows: int, cell: int | None = _MAX_CELL, **options: Any) -> str:
    lines = {"max_rows": rows, "max_cols": _MAX_LINES}
    return str(frame.to_string(**lines, max_colwidth=cell, **options))


def _array(array: Any) -> str:
    """Return the shape of an array with its values, of a large one only a corner."""
    title = _title(array, "array")
    if prod(array.shape) <= _MAX_VALUES:
        return f"{title}\n{array}" if array.shape else str(array.item())
    return f"{title}; the first values:\n{_corner(array)}"


def _is_range(labels: Any) -> bool:
    return full_name(type(labels)) == "pandas.RangeIndex"


def _is_listed(value: Any) -> bool:
    """Return whether a value is an array of texts or the labels of a table, which become a list.

    Dates and the like have a better text of their own.
    """
    if family(value) not in {"array", "index"} or len(value.shape) != 1 or _is_range(value):
        return False
    is_numpy = full_name(type(value)).startswith("numpy.")
    is_spans = str(value.dtype).startswith(("period", "interval", "Sparse"))
    return value.dtype.kind in ("OU" if is_numpy else "OUbiuf") and not is_spans


def _listed(array: Any) -> str:
    """Return the values of an array as a list, of a large one only the first."""
    is_complete = len(array) <= _MAX_VALUES
    values = _pretty([_cut(one) for one in _first_values(array)])
    return values if is_complete else f"{_title(array, 'array')}; the first values:\n{values}"


def _first_values(array: Any) -> list[Any]:
    return list((array if len(array) <= _MAX_VALUES else _corner(array)).tolist())


def _cut(value: Any) -> Any:
    is_long = family(value) == "str" and len(value) > _MAX_CELL
    return f"{value[: _MAX_CELL - 3]}..." if is_long else value


def _corner(array: Any) -> Any:
    edge = {1: 20, 2: 6}.get(len(array.shape), 2)
    return array[(slice(edge),) * len(array.shape)]


def shortening(
    value: Any, text: str, *, is_python: bool, is_part: bool = False
) -> tuple[str, str, str]:
    """Return what the text of a table or an array lacks, and what follows its name to send more of it.

    That is a method that returns all of it, or else, of a large one, what selects a part. `is_python`:
    the text is that of `str` or `repr`, not of `to_text`. All are "" for a complete text.
    """
    kind = family(value)
    if kind not in ARRAYS:
        return "", "", ""
    lacks = ""
    if _is_listed(value) and not is_python:
        lacks = _lacks_of_list(value)
    elif is_python or kind not in {"frame", "series", "array", "tensor"}:
        if "..." in text or "…" in text:
            lacks = "in the short form that its library prints"
    elif kind in {"array", "tensor"}:
        lacks = _without(value)
    else:
        frame = value.to_frame() if kind == "series" else value
        lacks = _lacks(frame, text, kind, _MAX_PICKED if is_part else _MAX_LINES)
    if not lacks:
        return "", "", ""
    if prod(map(int, value.shape)) <= _MAX_COMPLETE:
        # A list would lose the labels of a Series; those of a plain range are only positions.
        is_labeled = kind == "series" and not _is_range(value.index)
        return lacks, f".{_ALL_OF_IT['frame' if is_labeled else kind]}", ""
    fits = kind in PANDAS or 20 * prod(map(int, value.shape[1:])) <= _MAX_COMPLETE
    return lacks, "", _part_of_it(value, kind) if fits else ""


def _part_of_it(value: Any, kind: str) -> str:
    """Return what selects a part of a table or an array that is shown completely."""
    if kind != "frame" or value.shape[1] <= _MAX_LINES:
        return _PART_OF_IT[kind]
    names = value.columns[:2].tolist()
    is_plain = all(type(name) is str and _PLAIN_NAME.fullmatch(name) for name in names)
    columns = ", ".join(f'"{name}"' for name in names)
    return f"[[{columns}]].head(20)" if is_plain else ".iloc[:20, :2]"


def _without(array: Any) -> str:
    count = prod(array.shape)
    missing = count - prod(_corner(array).shape) if count > _MAX_VALUES else 0
    return f"without {missing:,} of {count:,} values" if missing else ""


def _lacks_of_list(array: Any) -> str:
    """Return what `_listed` omits of an array."""
    cells = _CUT_TEXTS if any(_cut(one) is not one for one in _first_values(array)) else ""
    return " and ".join(filter(None, (_without(array), cells)))


def _lacks(frame: Any, text: str, kind: str, rows: int) -> str:
    """Return what `_rows` omits of a table or a column, whose text contains dots then."""
    units = ("values", "") if kind == "series" else ("rows", "columns")
    missing = " and ".join(
        f"{count - most:,} of {count:,} {unit}"
        for count, unit, most in zip(frame.shape, units, (rows, _MAX_LINES), strict=True)
        if count > most
    )
    is_cut = "..." in text and _rows(frame, rows) != _rows(frame, rows, None)
    cells = _CUT_TEXTS if is_cut else ""
    return " and ".join(filter(None, (f"without {missing}" if missing else "", cells)))


def _title(table: Any, kind: str) -> str:
    """Return the type and the size of an array, a column or a table."""
    name = type(table).__name__
    if kind in {"frame", "pl_frame"}:
        height, width = counted(table.shape[0], "row"), counted(table.shape[1], "column")
        return f"{name}, {height} × {width}"  # noqa: RUF001
    if kind in {"series", "pl_series"}:
        name += "" if table.name is None else f" {describe('', table.name)}"
        return f"{name}, {counted(len(table), 'value')}, {table.dtype}"
    return f"{name}, shape {tuple(table.shape)}, {table.dtype}"


def _source(value: Any) -> str:
    """Return the source of a function or a class where Python has it, else its repr."""
    is_lambda = type(value) is types.FunctionType and value.__name__ == "<lambda>"
    if is_lambda and (source := _lambda_source(value)):
        return source
    try:
        return inspect.cleandoc("\n" + inspect.getsource(value))
    except (OSError, TypeError):
        if isinstance(value, types.MethodType):  # Its repr contains that of its object.
            raise NotAllowed("is a method; call it") from None
        return _cell_source(value) or repr(value)


def _lambda_source(value: Any) -> str:
    """Return the source of a lambda alone, without the statement around it."""
    source = "".join(linecache.getlines(value.__code__.co_filename))
    positions = frozenset(value.__code__.co_positions())
    with suppress(SyntaxError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Lambda):
                body = node.body
                columns = body.col_offset, body.end_col_offset
                if (body.lineno, body.end_lineno, *columns) in positions:
                    return ast.get_source_segment(source, node) or ""
    return ""


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


class _Printer(PrettyPrinter):
    """Formats containers; the texts in them are complete, whatever their class shows as its repr."""

    def format(
        self, value: Any, context: dict[int, int], maxlevels: int, level: int
    ) -> tuple[str, bool, bool]:
        """Return the text of a value, and what `pprint` needs to know about it."""
        if family(value) == "str":
            return full_repr(value), True, False
        return super().format(value, context, maxlevels, level)


_pretty = _Printer(width=100, compact=True, sort_dicts=False).pformat
_CONTAINERS = ("dict", "list", "tuple", "set", "frozenset")
_WITH_SOURCE = ("function", "method", "builtin_function_or_method", "type")
_IN_FULL: Mapping[str, Callable[[Any], str]] = {
    # A plain one: a subclass may have attributes, which a message would keep in memory.
    "builtins.str": str.__str__,
    "builtins.bytes": repr,
    "pydantic.BaseModel": repr,
    **{f"builtins.{kind}": _pretty for kind in _CONTAINERS},
    **{f"builtins.{kind}": _source for kind in _WITH_SOURCE},
    "pandas.DataFrame": _frame,
    "pandas.Series": _series,
    "numpy.ndarray": _array,
    "torch.Tensor": _array,
    # Of a job that was stopped, the text so far; a note reports that.
    _JOB: lambda response: str(response.text),
}
_PARTS: Mapping[str, Callable[[Any, int], str]] = {"frame": _frame, "series": _series}


# -- in a line, without running code --------------------------------------------------------------


def describe(name: str, value: object, mask: Mask = str) -> str:
    """Return a value in at most `LONGEST` characters, without running its code.

    A value whose name is one of a secret is masked. `mask` masks secrets in texts before they are
    cut, because it would not recognize half of one.
    """
    try:
        text = mask(_Describer(mask).named(name, value, _DEPTH))
    except Exception:  # noqa: BLE001 - a class can make even its name raise
        text = "a value that cannot be described"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


@dataclass(frozen=True, slots=True)
class _Describer:
    """Describes values down to some depth; `isinstance` would run their code."""

    mask: Mask

    def named(self, name: str, value: object, depth: int) -> str:
        # Names of classes and functions may be those of secrets: `Token`, `getpass`.
        harmless = value is None or issubclass(type(value), _NO_SECRETS)
        return MASK if is_secret_name(name) and not harmless else self.text(value, depth)

    def text(self, value: Any, depth: int) -> str:
        base: Any
        kind, base = trusted_type(value)
        if kind in TEXTS and type(value) is base:
            return self._cut(value)
        if depth and type(value) in _BRACKETS:
            left, right = _BRACKETS[type(value)]
            return f"{left}{_first(value, lambda item: self.text(item, depth - 1))}{right}"
        if issubclass(type(value), dict):
            return self._mapping(value, depth)
        if kind == "scalar":
            return (
                f"{type(value).__name__} {value.item()!r}" if value.dtype.kind in "biufc" else kind
            )
        if bits(value) > 1000:
            return f"int of {bits(value)} bits"
        if kind in SCALARS | {"range"}:
            return str(base.__repr__(value))  # not that of a subclass
        return _table(value, kind) or _code(value) or self._object(value, depth)

    def _cut(self, value: str | bytes) -> str:
        if len(value) <= _TEXT:
            return self.mask(repr(value))
        text = repr(value[: _TEXT + _SECRET])
        return f"{self.mask(text)[: _TEXT + 1]}{text[-1]}… ({len(value):,} in all)"

    def _mapping(self, value: dict[Any, Any], depth: int) -> str:
        title = "" if type(value) is dict else f"{type(value).__qualname__} "
        if not depth:
            return f"{title}{{{'…' if dict.__len__(value) else ''}}}"

        def pair(item: tuple[Any, Any]) -> str:
            name = item[0] if type(item[0]) is str else ""
            return f"{self.text(item[0], 0)}: {self.named(name, item[1], depth - 1)}"

        return f"{title}{{{_first(dict.items(value), pair)}}}"

    def _object(self, value: object, depth: int) -> str:
        kind = type(value)
        title = kind.__qualname__ if kind.__module__ == "builtins" else _name(kind)
        attributes: Any = {}
        with suppress(AttributeError):  # of an object with slots
            attributes = object.__getattribute__(value, "__dict__")
        if not depth or type(attributes) is not dict:
            return f"{title} object"
        shown = [(name, one) for name, one in list(attributes.items()) if str(name)[:2] != "__"]
        text = _first(shown, lambda item: f"{item[0]}={self.named(item[0], item[1], depth - 1)}")
        return f"{title} object{' with ' if shown else ''}{text}"


def _first(values: Any, text: Callable[[Any], str]) -> str:
    more = f", … ({len(values):,} in all)" if len(values) > _ITEMS else ""
    return f"{', '.join(map(text, islice(values, _ITEMS)))}{more}"


def _table(value: Any, kind: str) -> str:
    """Return the shape and the types of an array, a column or a table, else ``""``.

    The types are what goes wrong, and the rows may be private.
    """
    if kind not in ARRAYS:
        return ""
    title = _title(value, kind)
    if kind in {"frame", "pl_frame"}:
        pairs = islice(zip(value.columns, value.dtypes, strict=True), _COLUMNS)
        shown = ", ".join(f"{describe('', name)} {dtype}" for name, dtype in pairs)
        return f"{title}: {shown}{', …' if value.shape[1] > _COLUMNS else ''}"
    if kind == "tensor":
        # Without numbers: after an error on a GPU, reading one raises the error again.
        return f"{title} on {value.device}{', requires grad' if value.requires_grad else ''}"
    if kind == "array" and value.size <= _NUMBERS and getattr(value.dtype, "kind", "") in "biufc":
        return f"{title}: {value.tolist()}"
    return title


def _code(value: Any) -> str:
    """Return the name of a module, a class or a function, else ``""``."""
    kind = type(value)
    if issubclass(kind, types.ModuleType):
        names = types.ModuleType.__getattribute__(value, "__dict__")
        version = names.get("__version__")
        return f"module {names.get('__name__')}{f' {version}' if type(version) is str else ''}"
    if issubclass(kind, type):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        return f"class {_name(value)}({bases})"
    if kind is types.BuiltinFunctionType:
        return f"built-in {value.__name__}"
    function = value.__func__ if kind is types.MethodType else value
    if type(function) is not types.FunctionType:
        return ""
    code = function.__code__
    names = ", ".join(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    return f"{kind.__name__} {function.__qualname__}({names})"


def _name(kind: type) -> str:
    module = str(kind.__module__)
    return str(kind.__qualname__) if module == "__main__" else f"{module}.{kind.__qualname__}"


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
            count = visited + len(pending) + len(one)
            require_length(count, _MAX_SHOWN, "elements in its text", PART)
            for part in parts(one):
                pending += part
        require_length(length, 20 * MAX_TEXT, advice=PART)
    budget.spend(work + length / 50)


def _require_no_environment(value: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if the text of a value would contain the environment variables."""
    if type(value) in _METHODS or (
        type(value) is types.BuiltinFunctionType
        and not isinstance(value.__self__, (types.ModuleType, type(None)))
    ):
        raise NotAllowed("is a method; call it")
    held = [value, *_objects(value, budget)]
    held += gc.get_referents(value) if family(value) == "unknown" else ()
    for one in held:  # which grows
        if is_environment(one):
            raise NotAllowed("contains all environment variables")
        if type(one) in _SHOWN_WITHIN and len(held) < 10_000:
            held += gc.get_referents(one)
    budget.spend(len(held))


def _objects(value: Any, budget: Budget) -> Iterable[Any]:
    """Yield the Python objects in an array or a table."""
    for column in columns(value) if family(value) in ARRAYS else ():
        if "object" in str(column.dtype).lower():
            budget.spend(len(column))
            is_array = family(column) in {"array", "tensor"}
            cells = column.reshape(-1) if is_array else column.to_list()
            yield from (cell for cell in cells if type(cell) not in {str, int, float})


def is_entry(spec: str) -> bool:
    """Return whether a format spec may be the value of an entry of a dict."""
    return _ENTRY.fullmatch(spec) is not None


def is_word(spec: str) -> bool:
    """Return whether a format spec is a word, which Python does not support: ``{color:red}``."""
    return _WORD.fullmatch(spec) is not None


def format_value(value: Any, spec: str, budget: Budget) -> str:
    """Return a value by a format spec, as in an f-string; raises `NotAllowed` if it is unsafe."""
    if is_entry(spec):
        reason = "may be an entry of a dict or CSS; for a format spec put > after the colon"
        raise NotAllowed(reason, advice="")
    kind = family(value)
    if kind in MOMENTS - {"timedelta", "interval"}:
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
    if max(int(match["width"] or 0), int(match["precision"] or 0)) > 1000:
        raise NotAllowed("has a format spec with a width or precision over 1,000", advice="")
    require_small_exponent(value)
    require_printable(value, budget)
    return format(value, spec)
