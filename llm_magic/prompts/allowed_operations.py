"""Operators, subscripts and functions on values of trusted types, with bounded results."""

from __future__ import annotations

import ast
import builtins
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from llm_magic.prompts.allowed_methods import not_an_argument, require_numbers
from llm_magic.prompts.trusted_types import (
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
    TEXTS,
    Budget,
    NotAllowed,
    bits,
    family,
    require_length,
    require_plain,
    require_plain_keys,
    require_plain_labels,
    require_small_exponent,
    size,
    whole,
)
from llm_magic.prompts.values_as_text import require_printable

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
_ITERATED = CONTAINERS | PANDAS | {"str", "bytes", "range", "array", "pl_series"}


# -- operators ------------------------------------------------------------------------------------


def arithmetic(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> Any:
    """Return ``left + right`` and the like; raises `NotAllowed` if that is not safe or too large."""
    for value in (left, right):
        if family(value) not in NUMBERS | MOMENTS | ARRAYS | TEXTS | SEQUENCES | {
            "set", "path", "counter", "dict", "missing", "none",
        }:  # fmt: skip
            raise NotAllowed(f"calculates with a {type(value).__name__}")
    families = {family(left), family(right)}
    if families & ARRAYS:
        _require_arrays(kind, left, right, budget)
    else:
        _require_scalars(kind, left, right, budget)
    return _ARITHMETIC[kind](left, right)


def _require_scalars(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> None:
    families = {family(left), family(right)}
    if families & TEXTS and kind is ast.Mod:
        raise NotAllowed("formats with %; use a format spec, {x:.2f}", advice="")
    if kind is ast.Mult:
        for value, times in ((left, right), (right, left)):
            if family(value) in TEXTS | SEQUENCES:
                most = MAX_TEXT if family(value) in TEXTS else MAX_ITEMS
                require_length(len(value) * max(0, whole(times)), most, "elements")
    if kind is ast.Add and families & (TEXTS | SEQUENCES):
        require_length(size(left) + size(right), 10 * MAX_TEXT)
    if families & {"set", "dict", "counter"}:
        require_plain([left, right], budget)
    _require_numbers(kind, left, right, families)


def _require_numbers(kind: type[ast.operator], left: Any, right: Any, families: set[str]) -> None:
    if max(bits(left), bits(right)) > MAX_BITS:
        raise NotAllowed(f"calculates with a number of over {MAX_BITS:,} bits")
    if kind is not ast.Pow:
        return
    if families & {"decimal", "fraction"} or not families <= NUMBERS:
        raise NotAllowed("raises something other than an int or a float to a power")
    if families == {"int"} and right > 0 and (bits(left) or 1) * right > MAX_BITS:
        raise NotAllowed(f"would make a number of over {MAX_BITS:,} bits")


def _require_arrays(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> None:
    _require_no_containers(left, right)
    for value in (left, right):
        require_plain(value, budget)
        if family(value) in TEXTS:
            require_length(len(value) * max(size(left), size(right)), 10 * MAX_TEXT)
    if kind in {ast.Mod, ast.Mult, ast.Pow} and _has_texts(left, right):
        raise NotAllowed("multiplies or formats the texts or objects of a column")
    require_shapes(left, right, budget)


def _require_no_containers(left: Any, right: Any) -> None:
    """Raise `NotAllowed` for an array beside a list, which would be made an array."""
    families = {family(left), family(right)}
    if families & ARRAYS and families & (CONTAINERS | {"range"}):
        raise NotAllowed("combines an array or a table with a list or the like")


def _has_texts(*values: Any) -> bool:
    """Return whether arrays have texts in them, which an operator may lengthen."""
    types: list[Any] = []
    for value in values:
        if family(value) in TEXTS:
            return True
        if family(value) in ARRAYS:
            dtypes = getattr(value, "dtypes", None)
            types += list(dtypes) if family(value) in {"frame", "pl_frame"} else [value.dtype]  # type: ignore[arg-type]
    return any(re.match(r"object|str|[<>|=]?[US]\d|String", str(dtype)) for dtype in types)


def require_shapes(left: Any, right: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if arrays that are combined would give one far larger than they are."""
    cells = max(size(left), size(right))
    shapes = [tuple(value.shape) for value in (left, right) if family(value) in ARRAYS]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        most = max(map(len, shapes))
        first, second = ((1,) * (most - len(shape)) + shape for shape in shapes)
        spread = prod(max(pair) for pair in zip(first, second, strict=True))
        require_length(spread, max(MAX_CELLS, cells), "numbers")
    pandas = [value for value in (left, right) if family(value) in {"frame", "series"}]
    if len(pandas) == 2:
        _require_alignment(*pandas)
    budget.spend(cells / 20)


def _require_alignment(left: Any, right: Any) -> None:
    """Raise `NotAllowed` if rows that pandas matches by their labels could multiply."""
    if family(left) != family(right):  # A column is matched with the column names of a table.
        table, column = (left, right) if family(left) == "frame" else (right, left)
        require_length(table.shape[0] * (table.shape[1] + len(column)), MAX_CELLS, "numbers")
        return
    if left.index is not right.index and not left.index.equals(right.index):
        if not (left.index.is_unique and right.index.is_unique):
            raise NotAllowed("combines columns whose labels differ and repeat")
        widths = [value.shape[1] if family(value) == "frame" else 0 for value in (left, right)]
        require_length((len(left) + len(right)) * max(1, sum(widths)), MAX_CELLS, "numbers")


def comparison(kind: type[ast.cmpop], left: Any, right: Any, budget: Budget) -> Any:
    """Return ``left < right`` and the like; raises `NotAllowed` if that may run the user's code."""
    if kind in {ast.In, ast.NotIn}:
        if family(right) == "range" and type(left) is not int:
            raise NotAllowed("searches a range for something that is not an int")
        if family(right) not in _ITERATED | {"interval", "range"}:
            raise NotAllowed(f"searches a {type(right).__name__}")
        budget.spend(size(left) * size(right) / 1000 if family(left) in TEXTS else 0)
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
        raise NotAllowed(f"calculates with a {type(value).__name__}")
    if family(value) in ARRAYS:
        require_plain(value, budget)
    return _UNARY[kind](value)


def truth(value: Any) -> bool:
    """Return whether the result of a comparison is true."""
    if family(value) not in NUMBERS | {"none", "missing"} | ARRAYS:
        raise NotAllowed(f"takes the truth value of a {type(value).__name__}")
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
    if kind not in TEXTS | SEQUENCES | {"range", "groups", "texts", "window"}:
        raise NotAllowed(f"takes an element of a {type(value).__name__}, which may run its code")
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
        require_length(prod(picked) * row, max(MAX_CELLS, size(table)), "numbers")
        if (
            family(table) in PANDAS
            and family(value) in {"series", "indexer"}
            and not table.index.is_unique
        ):
            require_length(prod(picked) * size(table), MAX_CELLS, "numbers")
    if masked and family(table) in PANDAS:
        for one in keys:
            if family(one) in {"series", "frame"} and not one.index.equals(table.index):
                raise NotAllowed("selects rows by a column whose labels differ")
    budget.spend(size(table) / 20 if picked else 0)
    return value[key]


# -- functions ------------------------------------------------------------------------------------


def call_function(
    name: str, args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget
) -> Any:
    """Call one of the `FUNCTIONS`; the user's functions of these names are not called."""
    for word in keywords:
        if word not in _KEYWORDS.get(name, ()):
            raise not_an_argument(word, f"{name}()")
    FUNCTIONS[name](args, keywords, budget)
    return getattr(builtins, name)(*args, **keywords)


def _check_len(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    for value in args:
        if family(value) not in _ITERATED | {"tensor", "pl_frame", "groups", "interval"}:
            raise NotAllowed(f"takes the length of a {type(value).__name__}")


def _check_elements(args: Sequence[Any], budget: Budget) -> None:
    for value in args:
        if family(value) not in _ITERATED:
            raise NotAllowed(
                f"iterates over a {type(value).__name__}, which may use it up or run code"
            )
        require_plain(value, budget)
        require_length(size(value), MAX_ITEMS, "elements")
        budget.spend(size(value))


def _check_sum(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    _check_elements(args[:1], budget)
    start = args[1] if len(args) > 1 else keywords.get("start", 0)
    if args and family(args[0]) in PANDAS:
        require_numbers(args[0])
    elements = args[0] if args and family(args[0]) not in ARRAYS else ()
    for one in ({type(element): element for element in elements} | {type(start): start}).values():
        if family(one) not in NUMBERS | MOMENTS | {"str"}:
            raise NotAllowed(f"adds up a {type(one).__name__}")


def _check_extreme(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    if len(args) == 1:
        _check_elements(args, budget)
    require_plain(list(args), budget)


def _check_sorted(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    _check_elements(args, budget)
    budget.spend(5 * sum(size(value) for value in args))
    require_plain(dict(keywords), budget)


def _check_round(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    digits = args[1] if len(args) > 1 else keywords.get("ndigits", 0)
    if abs(whole(digits)) > 1000:
        raise NotAllowed("rounds to more than 1,000 digits")
    _check_numbers(args[:1], ARRAYS, budget)


def _check_abs(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    _check_numbers(args, ARRAYS | {"timedelta"}, budget)


def _check_conversion(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    require_plain(list(args), budget)
    if args and family(args[0]) in TEXTS:
        require_length(len(args[0]), 5000)
    else:
        _check_numbers(args[:1], frozenset({"array", "tensor"}), budget)


def _check_numbers(args: Sequence[Any], others: frozenset[str], budget: Budget) -> None:
    for value in args:
        if family(value) not in NUMBERS | others:
            raise NotAllowed(f"calculates with a {type(value).__name__}")
        require_small_exponent(value)
        if family(value) in ARRAYS:
            require_plain(value, budget)


def _check_text(args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget) -> None:
    if len(args) != 1:
        raise NotAllowed("converts to text with more than the value")
    require_printable(args[0], budget)


# The arguments that each may be given by name; a `key` would be called.
_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "sum": ("start",), "min": ("default",), "max": ("default",), "sorted": ("reverse",),
    "round": ("ndigits",), "int": ("base",),
}  # fmt: skip
FUNCTIONS: Mapping[str, Callable[[Sequence[Any], Mapping[str, Any], Budget], None]] = {
    "len": _check_len, "sum": _check_sum, "min": _check_extreme, "max": _check_extreme,
    "round": _check_round, "abs": _check_abs, "sorted": _check_sorted, "str": _check_text,
    "int": _check_conversion, "float": _check_conversion, "repr": _check_text,
}  # fmt: skip
