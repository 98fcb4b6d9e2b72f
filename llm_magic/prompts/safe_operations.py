"""Operators, subscripts, functions and formats on values of known types, with bounded results."""

from __future__ import annotations

import ast
import functools
import operator
import re
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import suppress
from typing import Any

from llm_magic.prompts.known_types import (
    ARRAYS,
    CONTAINERS,
    MAPPINGS,
    MAX_BITS,
    MAX_CELLS,
    MAX_ITEMS,
    MAX_TEXT,
    MOMENTS,
    NUMBERS,
    PANDAS,
    SEQUENCES,
    Budget,
    Refused,
    bits,
    count,
    family,
    is_environment,
    parts,
    require_plain,
    require_plain_keys,
    require_plain_labels,
    size,
    whole,
)
from llm_magic.prompts.safe_methods import (
    not_an_argument,
    require_length,
    require_numbers,
    require_strftime,
)

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right, ast.NotIn: lambda left, right: left not in right,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
    ast.Not: operator.not_,
}  # fmt: skip
OPERATORS = (*_ARITHMETIC, *_COMPARISONS, *_UNARY)
_MAX_SHOWN = 200_000  # elements of a list or dict that is inserted
_SHOWN_COST, _TABLE_COST = 20, 20_000  # what the text of an element and a table takes, in elements
_TEXTS = frozenset({"str", "bytes"})
_METHODS = frozenset({types.MethodType, types.MethodWrapperType})
_VIEWS = frozenset({ItemsView, KeysView, ValuesView})
_ITERATED = CONTAINERS | PANDAS | {"str", "bytes", "range", "array", "pl_series"}
# The mini-language of numbers and texts.
_SPEC = re.compile(
    r"(?:.?[<>=^])?[-+ ]?z?#?0?(?P<width>\d{0,30})[_,]?(?:\.(?P<precision>\d{1,30}))?[bcdeEfFgGnosxX%]?"
)

# {a:b} and {a:1} are also what a dict is without spaces and quotes.
_ENTRY = re.compile(r"[a-zA-Z]+|\d|[1-9]\d*")


# -- operators ------------------------------------------------------------------------------------


def arithmetic(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> Any:
    """Return ``left + right`` and the like; raises `Refused` if that is not safe or too large."""
    for value in (left, right):
        if family(value) not in NUMBERS | MOMENTS | ARRAYS | _TEXTS | SEQUENCES | {
            "set", "path", "counter", "dict", "missing", "none",
        }:  # fmt: skip
            raise Refused(f"calculates with a {type(value).__name__}")
    families = {family(left), family(right)}
    if families & ARRAYS:
        _require_arrays(kind, left, right, budget)
    else:
        _require_scalars(kind, left, right, budget)
    return _ARITHMETIC[kind](left, right)


def _require_scalars(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> None:
    families = {family(left), family(right)}
    if families & _TEXTS and kind is ast.Mod:
        raise Refused("formats with %; use a format spec, {x:.2f}", advice="")
    if kind is ast.Mult:
        for value, times in ((left, right), (right, left)):
            if family(value) in _TEXTS | SEQUENCES:
                most = MAX_TEXT if family(value) in _TEXTS else MAX_ITEMS
                require_length(len(value) * max(0, whole(times)), most, "elements")
    if kind is ast.Add and families & (_TEXTS | SEQUENCES):
        require_length(size(left) + size(right), 10 * MAX_TEXT)
    if families & {"set", "dict", "counter"}:
        require_plain([left, right], budget)
    _require_numbers(kind, left, right, families)


def _require_numbers(kind: type[ast.operator], left: Any, right: Any, families: set[str]) -> None:
    if max(bits(left), bits(right)) > MAX_BITS:
        raise Refused(f"calculates with a number of over {MAX_BITS:,} bits")
    if kind is not ast.Pow:
        return
    if families & {"decimal", "fraction"} or not families <= NUMBERS:
        raise Refused("raises something other than an int or a float to a power")
    if families == {"int"} and right > 0 and (bits(left) or 1) * right > MAX_BITS:
        raise Refused(f"would make a number of over {MAX_BITS:,} bits")


def _require_arrays(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> None:
    _require_no_containers(left, right)
    for value in (left, right):
        require_plain(value, budget)
        if family(value) in _TEXTS:
            require_length(len(value) * max(size(left), size(right)), 10 * MAX_TEXT)
    if kind in {ast.Mod, ast.Mult, ast.Pow} and _has_texts(left, right):
        raise Refused("multiplies or formats the texts or objects of a column")
    require_shapes(left, right, budget)


def _require_no_containers(left: Any, right: Any) -> None:
    """Raise `Refused` for an array beside a list, which would be made an array."""
    families = {family(left), family(right)}
    if families & ARRAYS and families & (CONTAINERS | {"range"}):
        raise Refused("combines an array or a table with a list or the like")


def _has_texts(*values: Any) -> bool:
    """Return whether arrays have texts in them, which an operator may lengthen."""
    types: list[Any] = []
    for value in values:
        if family(value) in _TEXTS:
            return True
        if family(value) in ARRAYS:
            dtypes = getattr(value, "dtypes", None)
            types += list(dtypes) if family(value) in {"frame", "pl_frame"} else [value.dtype]  # type: ignore[arg-type]
    return any(re.match(r"object|str|[<>|=]?[US]\d|String", str(dtype)) for dtype in types)


def require_shapes(left: Any, right: Any, budget: Budget) -> None:
    """Raise `Refused` if arrays that are combined would give one far larger than they are."""
    cells = max(size(left), size(right))
    shapes = [tuple(value.shape) for value in (left, right) if family(value) in ARRAYS]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        most = max(map(len, shapes))
        first, second = ((1,) * (most - len(shape)) + shape for shape in shapes)
        spread = count(max(pair) for pair in zip(first, second, strict=True))
        require_length(spread, max(MAX_CELLS, cells), "numbers")
    pandas = [value for value in (left, right) if family(value) in {"frame", "series"}]
    if len(pandas) == 2:
        _require_alignment(*pandas)
    budget.spend(cells / 20)


def _require_alignment(left: Any, right: Any) -> None:
    """Raise `Refused` if rows that pandas matches by their labels could multiply."""
    if family(left) != family(right):  # A column is matched with the column names of a table.
        table, column = (left, right) if family(left) == "frame" else (right, left)
        require_length(table.shape[0] * (table.shape[1] + len(column)), MAX_CELLS, "numbers")
        return
    if left.index is not right.index and not left.index.equals(right.index):
        if not (left.index.is_unique and right.index.is_unique):
            raise Refused("combines columns whose labels differ and repeat")
        widths = [value.shape[1] if family(value) == "frame" else 0 for value in (left, right)]
        require_length((len(left) + len(right)) * max(1, sum(widths)), MAX_CELLS, "numbers")


def comparison(kind: type[ast.cmpop], left: Any, right: Any, budget: Budget) -> Any:
    """Return ``left < right`` and the like; raises `Refused` if that may run the user's code."""
    if kind in {ast.In, ast.NotIn}:
        if family(right) == "range" and type(left) is not int:
            raise Refused("looks for something that is not an int in a range")
        if family(right) not in _ITERATED | {"interval", "range"}:
            raise Refused(f"looks into a {type(right).__name__}")
        budget.spend(size(left) * size(right) / 1000 if family(left) in _TEXTS else 0)
    if kind not in {ast.Is, ast.IsNot}:
        _require_no_containers(left, right)
        for value in (left, right):
            if family(value) != "range":
                require_plain(value, budget)
        if family(left) in ARRAYS and family(right) in ARRAYS:
            require_shapes(left, right, budget)
    return _COMPARISONS[kind](left, right)


def unary(kind: type[ast.unaryop], value: Any, budget: Budget) -> Any:
    """Return ``-value`` and the like."""
    kinds = NUMBERS | ARRAYS | MOMENTS if kind is not ast.Not else _ITERATED | NUMBERS | {"none"}
    if family(value) not in kinds or bits(value) > 10 * MAX_BITS:
        raise Refused(f"calculates with a {type(value).__name__}")
    if family(value) in ARRAYS:
        require_plain(value, budget)
    return _UNARY[kind](value)


def truth(value: Any) -> bool:
    """Return whether the result of a comparison is true."""
    if family(value) not in NUMBERS | {"none", "missing"} | ARRAYS:
        raise Refused(f"asks whether a {type(value).__name__} is true")
    return bool(value)


# -- subscripts -----------------------------------------------------------------------------------


def item(value: Any, key: Any, budget: Budget) -> Any:
    """Return ``value[key]``; a missing key of a defaultdict is not added."""
    kind = family(value)
    require_plain(key, budget)
    if kind in MAPPINGS:
        require_plain_keys(value, budget)
        return _mapping_item(value, key)
    if kind in {"frame", "series", "index", "indexer", "pl_frame", "pl_series", "array", "tensor"}:
        return _array_item(value, key, budget)
    if kind not in _TEXTS | SEQUENCES | {"range", "groups", "texts", "window"}:
        raise Refused(f"takes an element of a {type(value).__name__}, which may run its code")
    return value[key]


def _mapping_item(value: Any, key: Any) -> Any:
    missing = object()
    found = dict.get(value, key, missing)
    if found is missing and family(value) == "counter":
        return 0
    if found is missing:
        raise KeyError(key)
    return found


def _array_item(value: Any, key: Any, budget: Budget) -> Any:
    table = value.obj if family(value) == "indexer" else value
    require_plain_labels(table, budget)
    shape = tuple(table.shape)
    keys = key if isinstance(key, tuple) else (key,)
    picked = [size(one) for one in keys if family(one) in ARRAYS or family(one) in SEQUENCES]
    row = size(table) / max(1, shape[0]) if shape else 1
    masked = any(str(getattr(one, "dtype", "")).lower() == "bool" or str(
        getattr(one, "dtype", "")) == "Boolean" for one in keys)  # fmt: skip
    if picked and not masked:
        require_length(count(picked) * row, max(MAX_CELLS, size(table)), "numbers")
        if (
            family(table) in PANDAS
            and family(value) in {"series", "indexer"}
            and not table.index.is_unique
        ):
            require_length(count(picked) * size(table), MAX_CELLS, "numbers")
    if masked and family(table) in PANDAS:
        for one in keys:
            if family(one) in {"series", "frame"} and not one.index.equals(table.index):
                raise Refused("selects rows by a column whose labels differ")
    budget.spend(size(table) / 20 if picked else 0)
    return value[key]


# -- functions ------------------------------------------------------------------------------------


def function(name: str, args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
    """Call one of the `FUNCTIONS`; the user's functions of these names are not called."""
    allowed = _KEYWORDS.get(name, ())
    if extra := [word for word in keywords if word not in allowed]:
        raise not_an_argument(extra[0], f"{name}()")
    return FUNCTIONS[name](args, keywords, budget)


def _len(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
    for value in args:
        if family(value) not in _ITERATED | {"tensor", "pl_frame", "groups", "interval"}:
            raise Refused(f"asks a {type(value).__name__} for its length")
    return len(*args)


def _elements(values: Sequence[Any], budget: Budget) -> None:
    for value in values:
        if family(value) not in _ITERATED:
            raise Refused(f"goes through a {type(value).__name__}, which may use it up or run code")
        require_plain(value, budget)
        require_length(size(value), MAX_ITEMS, "elements")
        budget.spend(size(value))


def _sum(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
    _elements(args[:1], budget)
    start = args[1] if len(args) > 1 else keywords.get("start", 0)
    if args and family(args[0]) in PANDAS:
        require_numbers(args[0])
    elements = args[0] if args and family(args[0]) not in ARRAYS else ()
    for one in ({type(element): element for element in elements} | {type(start): start}).values():
        if family(one) not in NUMBERS | MOMENTS | {"str"}:
            raise Refused(f"adds up a {type(one).__name__}")
    return sum(*args, **keywords)


def _extreme(best: Callable[..., Any]) -> Callable[..., Any]:
    def run(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
        if len(args) == 1:
            _elements(args, budget)
        require_plain(list(args), budget)
        return best(*args, **keywords)

    return run


def _sorted(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
    _elements(args, budget)
    budget.spend(5 * sum(size(value) for value in args))
    require_plain(dict(keywords), budget)
    return sorted(*args, **keywords)


def _round(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
    digits = args[1] if len(args) > 1 else keywords.get("ndigits", 0)
    if abs(whole(digits)) > 1000:
        raise Refused("rounds to more than 1,000 digits")
    _require_number(args[:1], budget, ARRAYS)
    return round(*args, **keywords)


def _abs(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
    _require_number(args, budget, ARRAYS | {"timedelta"})
    return abs(*args)


def _number(convert: Callable[..., Any]) -> Callable[..., Any]:
    def run(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
        require_plain(list(args), budget)
        if args and family(args[0]) in _TEXTS:
            require_length(len(args[0]), 5000)
        else:
            _require_number(args[:1], budget, frozenset({"array", "tensor"}))
        return convert(*args, **keywords)

    return run


def _require_number(args: Sequence[Any], budget: Budget, others: frozenset[str]) -> None:
    for value in args:
        kind = family(value)
        if kind not in NUMBERS | others:
            raise Refused(f"calculates with a {type(value).__name__}")
        if kind == "decimal" and value.is_finite() and abs(value.adjusted()) > 1000:
            raise Refused("has a number with an exponent over 1,000")
        if kind in ARRAYS:
            require_plain(value, budget)


def _text(convert: Callable[[Any], str]) -> Callable[..., Any]:
    def run(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> Any:
        if len(args) != 1:
            raise Refused("converts to text with more than the value")
        require_printable(args[0], budget)
        return convert(args[0])

    return run


# What each may be given by name; a `key` would be called.
_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "sum": ("start",), "min": ("default",), "max": ("default",), "sorted": ("reverse",),
    "round": ("ndigits",), "int": ("base",),
}  # fmt: skip
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "len": _len, "sum": _sum, "min": _extreme(min), "max": _extreme(max), "round": _round,
    "abs": _abs, "sorted": _sorted, "str": _text(str), "int": _number(int),
    "float": _number(float), "repr": _text(repr),
}  # fmt: skip


# -- text -----------------------------------------------------------------------------------------


def require_printable(value: Any, budget: Budget) -> None:
    """Raise `Refused` if the text of a value would be very long."""
    left, length, visited, work = [value], 0, 0, 0.0
    while left:
        one = left.pop()
        kind = family(one)
        visited += 1
        length += len(one) if kind in _TEXTS else 1
        work += _TABLE_COST if kind in ARRAYS else _SHOWN_COST
        if bits(one) > 10 * MAX_BITS:
            raise Refused(f"has a number of over {10 * MAX_BITS:,} bits", advice="")
        if kind in {"unknown", *ARRAYS}:
            _require_no_environment(one, budget)
        if kind in CONTAINERS:
            require_length(visited + len(left) + len(one), _MAX_SHOWN, "elements in its text")
            for part in parts(one):
                left += part
        require_length(length, 20 * MAX_TEXT)
    budget.spend(work + length / 50)


def _require_no_environment(value: Any, budget: Budget) -> None:
    """Raise `Refused` if the text of a value would have the environment variables in it."""
    if _is_bound(value):
        raise Refused("is a method; call it")
    held = list(_held(value, budget))
    for one in held:
        if type(one) in {list, tuple} and len(one) <= 1000:  # the dicts of a chain of dicts
            held += one
        if is_environment(getattr(one, "__self__", None) if _is_bound(one) else one):
            raise Refused("has all environment variables in it")


def _is_bound(value: object) -> bool:
    """Return whether the text of a method would have that of its object in it."""
    if isinstance(value, types.BuiltinFunctionType) and type(value) is types.BuiltinFunctionType:
        return not isinstance(value.__self__, (types.ModuleType, type(None)))
    return type(value) in _METHODS


def _held(value: Any, budget: Budget) -> Iterator[Any]:
    """Yield what an object of an unknown class or an array of objects has in it, one level deep."""
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
        columns = [value.iloc[:, place] for place in range(min(1000, value.shape[1]))]
    for column in columns if family(value) in {"frame", "series", "index"} else ():
        if str(column.dtype) == "object":
            budget.spend(len(column))
            yield from (cell for cell in column.array if type(cell) not in {str, int, float})


def formatted(value: Any, spec: str, budget: Budget) -> str:
    """Return a value by a format spec, as in an f-string; raises `Refused` if it is unsafe."""
    if _ENTRY.fullmatch(spec):
        reason = "may be an entry of a dict or CSS; for a format spec put > after the colon"
        raise Refused(reason, advice="")
    kind = family(value)
    if kind in {"date", "datetime", "time", "period", "missing"}:
        require_strftime(spec)
        if "%" not in spec:
            raise Refused(f'has the date format "{spec}", which has no %', advice="")
        return format(value, spec)
    if kind not in NUMBERS | _TEXTS | {"timedelta", "none", "uuid", "path"} | CONTAINERS | ARRAYS:
        raise Refused(f"has a format spec, which the class {type(value).__name__} would read")
    if kind == "scalar" and value.dtype.kind not in "iufcbU":
        raise Refused(f"has a format spec for a {type(value).__name__}")
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise Refused(f'has the format spec "{spec}", which Python does not know', advice="")
    digits = max(int(match["width"] or 0), int(match["precision"] or 0))
    if digits > 1000:
        raise Refused("has a format spec with a width or precision over 1,000", advice="")
    if kind in NUMBERS:
        _require_number([value], budget, frozenset())
    require_printable(value, budget)
    return format(value, spec)
