"""Operators, subscripts and functions on values of trusted types, with bounded results."""

from __future__ import annotations

import ast
import builtins
import operator
import re
from collections.abc import Callable, Mapping
from itertools import zip_longest
from math import prod
from typing import Any

from llm_magic.prompts.allowed_methods import AllowedCall, not_an_argument, require_numbers
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
    columns,
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
_TEXT_TYPE = re.compile(r"object|str|[<>|=]?[US]\d|String")
_ITERATED = CONTAINERS | PANDAS | {"str", "bytes", "range", "array", "pl_series"}
_MISSING = object()
_OPERANDS = NUMBERS | MOMENTS | ARRAYS | TEXTS | SEQUENCES | MAPPINGS | {"set", "path", "none"}


# -- operators ------------------------------------------------------------------------------------


def arithmetic(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> Any:
    """Return ``left + right`` and the like; raises `NotAllowed` if that is not safe or too large."""
    families = {family(left), family(right)}
    for value in (left, right):
        if family(value) not in _OPERANDS:
            raise NotAllowed(f"calculates with a {type(value).__name__}")
    if families & ARRAYS:
        _require_comparable(left, right, budget)
        for value in (left, right):
            if family(value) in TEXTS:
                require_length(len(value) * max(size(left), size(right)), 10 * MAX_TEXT)
            if kind in {ast.Mod, ast.Mult, ast.Pow} and _has_texts(value):
                raise NotAllowed("multiplies or formats the texts or objects of a column")
    else:
        _require_scalars(kind, left, right, budget)
    return _ARITHMETIC[kind](left, right)


def _require_scalars(kind: type[ast.operator], left: Any, right: Any, budget: Budget) -> None:
    families = {family(left), family(right)}
    if families & {"set", *MAPPINGS}:
        require_plain([left, right], budget)
    if max(bits(left), bits(right)) > MAX_BITS:
        raise NotAllowed(f"calculates with a number of over {MAX_BITS:,} bits")
    if kind is ast.Mod and families & TEXTS:
        raise NotAllowed("formats with %; use a format spec, {x:.2f}", advice="")
    if kind is ast.Add and families & (TEXTS | SEQUENCES):
        require_length(size(left) + size(right), 10 * MAX_TEXT)
    for value, times in ((left, right), (right, left)) if kind is ast.Mult else ():
        if family(value) in TEXTS | SEQUENCES:
            most = MAX_TEXT if family(value) in TEXTS else MAX_ITEMS
            require_length(len(value) * max(0, whole(times)), most, "elements")
    if kind is ast.Pow:
        _require_small_power(left, right, families)


def _require_small_power(left: Any, right: Any, families: set[str]) -> None:
    if not families <= NUMBERS - {"decimal", "fraction"}:
        raise NotAllowed("raises something other than an int or a float to a power")
    if families == {"int"} and right > 0 and (bits(left) or 1) * right > MAX_BITS:
        raise NotAllowed(f"would make a number of over {MAX_BITS:,} bits")


def comparison(kind: type[ast.cmpop], left: Any, right: Any, budget: Budget) -> Any:
    """Return ``left < right`` and the like; raises `NotAllowed` if that may run the user's code."""
    if kind in {ast.In, ast.NotIn}:
        if family(right) == "range" and type(left) is not int:
            raise NotAllowed("searches a range for something that is not an int")
        if family(right) not in _ITERATED | {"interval"}:
            raise NotAllowed(f"searches a {type(right).__name__}")
        budget.spend(size(left) * size(right) / 1000 if family(left) in TEXTS else 0)
    if kind not in {ast.Is, ast.IsNot}:
        _require_comparable(left, right, budget)
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


def _require_comparable(left: Any, right: Any, budget: Budget) -> None:
    """Raise `NotAllowed` unless two values are plain, and arrays give one that is not far larger."""
    arrays = [value for value in (left, right) if family(value) in ARRAYS]
    if arrays and {family(left), family(right)} & (CONTAINERS | {"range"}):
        raise NotAllowed("combines an array or a table with a list or the like")
    for value in (left, right):
        if family(value) != "range":
            require_plain(value, budget)
    if len(arrays) == 2:
        if {family(left), family(right)} <= {"frame", "series"}:
            cells = _aligned_cells(left, right)
        else:
            shapes = (reversed(value.shape) for value in arrays)
            width = max(size(value) // max(1, prod(value.shape)) for value in arrays)
            cells = prod(map(max, zip_longest(*shapes, fillvalue=1))) * width
        require_length(cells, max(MAX_CELLS, size(left), size(right)), "numbers")
    budget.spend(max(map(size, arrays), default=0) / 20)


def _aligned_cells(left: Any, right: Any) -> int:
    """Return the most cells of two tables whose rows and columns pandas matches by their labels."""
    # A column is matched with the column names of a table.
    axes = zip(left.axes[-len(right.axes) :], right.axes[-len(left.axes) :], strict=True)
    cells = 1 if len(left.axes) == len(right.axes) else max(left.shape[0], right.shape[0])
    for one, other in axes:
        if one is other or one.equals(other):
            cells *= len(one)
        elif one.is_unique and other.is_unique:
            cells *= len(one) + len(other)
        else:
            raise NotAllowed("combines columns whose labels differ and repeat")
    return cells


def _has_texts(value: Any) -> bool:
    """Return whether a value is a text or has texts in it, which an operator may lengthen."""
    dtypes = [column.dtype for column in columns(value)] if family(value) in ARRAYS else []
    return family(value) in TEXTS or any(_TEXT_TYPE.match(str(dtype)) for dtype in dtypes)


# -- subscripts -----------------------------------------------------------------------------------


def item(value: Any, key: Any, budget: Budget) -> Any:
    """Return ``value[key]``; a missing key of a defaultdict is not added."""
    kind = family(value)
    require_plain(key, budget)
    if kind in MAPPINGS:
        require_plain_keys(value, budget)
        found = dict.get(value, key, 0 if kind == "counter" else _MISSING)
        if found is _MISSING:
            raise KeyError(key)
        return found
    if kind in ARRAYS | {"indexer"}:
        _require_few_picked(value, key, budget)
    elif kind not in TEXTS | SEQUENCES | {"range", "groups", "texts", "window"}:
        raise NotAllowed(f"takes an element of a {type(value).__name__}, which may run its code")
    return value[key]


def _require_few_picked(value: Any, key: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if the elements that a key picks are far more than there are."""
    table = value.obj if family(value) == "indexer" else value
    require_plain_labels(value, budget)
    keys = key if isinstance(key, tuple) else (key,)
    masks = [one for one in keys if "bool" in str(getattr(one, "dtype", "")).lower()]
    for mask in masks if family(table) in PANDAS else ():
        if family(mask) in {"series", "frame"} and not mask.index.equals(table.index):
            raise NotAllowed("selects rows by a column whose labels differ")
    lists = [
        (number, size(one))
        for number, one in enumerate(keys)
        if family(one) in ARRAYS | SEQUENCES and not any(one is mask for mask in masks)
    ]
    # These shift the axes that the other keys pick from.
    shifts = any(one is None or one is Ellipsis or type(one) is bool for one in keys)
    shifts = shifts or any(mask.ndim != 1 for mask in masks)
    cells = float(size(table))
    for number, picked in lists:
        cells *= picked / _axis_length(value, table, None if shifts else number, len(keys))
    if lists:
        require_length(cells, max(MAX_CELLS, size(table)), "numbers")
        budget.spend(size(table) / 20)


def _axis_length(value: Any, table: Any, number: int | None, keys: int) -> int:
    """Return the length of the axis that a list picks from, or 1 if its labels repeat.

    Of an axis that is not known, the length is that of the shortest.
    """
    kind = family(value)
    if kind == "frame" and keys == 1:  # of one key, a table takes columns
        number = 1
    if number is None or number >= len(table.shape) or kind == "pl_frame":
        return max(1, min(table.shape, default=1))
    if kind in {"frame", "series"} or type(value).__name__ == "_LocIndexer":
        labels = table.axes[number]
        if not labels.is_unique or labels.nlevels > 1:
            return 1
    return max(1, int(table.shape[number]))


# -- functions ------------------------------------------------------------------------------------


def call_function(call: AllowedCall) -> Any:
    """Call one of the `FUNCTIONS`; the user's functions of these names are not called."""
    for word in call.keywords:
        if word not in _KEYWORDS.get(call.name, ()):
            raise not_an_argument(word, f"{call.name}()")
    FUNCTIONS[call.name](call)
    return getattr(builtins, call.name)(*call.args, **call.keywords)


def _check_len(call: AllowedCall) -> None:
    for value in call.args:
        if family(value) not in _ITERATED | {"tensor", "pl_frame", "groups", "interval"}:
            raise NotAllowed(f"takes the length of a {type(value).__name__}")


def _check_elements(call: AllowedCall) -> None:
    """Check that what is iterated over is plain and short, and so are the other arguments."""
    require_plain([*call.args, *call.keywords.values()], call.budget)
    several = call.name in {"min", "max"} and len(call.args) > 1
    for value in call.args[: 0 if several else 1]:
        if family(value) not in _ITERATED:
            raise NotAllowed(
                f"iterates over a {type(value).__name__}, which may use it up or run code"
            )
        require_length(size(value), MAX_ITEMS, "elements")
        call.budget.spend(size(value) * (6 if call.name in {"sorted", "set"} else 1))


def _check_sum(call: AllowedCall) -> None:
    _check_elements(call)
    start, elements = call.argument(1, "start", 0), call.argument(0, "", ())
    if family(elements) in PANDAS:
        require_numbers(elements)
    if family(elements) in ARRAYS:
        elements = ()
    for one in ({type(element): element for element in elements} | {type(start): start}).values():
        if family(one) not in NUMBERS | MOMENTS | {"str"}:
            raise NotAllowed(f"adds up a {type(one).__name__}")


def _check_number(call: AllowedCall) -> None:
    others = {"abs": ARRAYS | {"timedelta"}, "round": ARRAYS}.get(call.name, {"array", "tensor"})
    if call.name == "round" and abs(whole(call.argument(1, "ndigits", 0))) > 1000:
        raise NotAllowed("rounds to more than 1,000 digits")
    require_plain(list(call.args), call.budget)
    for value in call.args[:1]:
        if family(value) in TEXTS and call.name in {"int", "float"}:
            require_length(len(value), 5000)
        elif family(value) not in NUMBERS | others:
            raise NotAllowed(f"calculates with a {type(value).__name__}")
        require_small_exponent(value)


def _check_text(call: AllowedCall) -> None:
    if len(call.args) != 1:
        raise NotAllowed("converts to text with more than the value")
    require_printable(call.args[0], call.budget)


# The arguments that each may be given by name; a `key` would be called.
_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "sum": ("start",), "min": ("default",), "max": ("default",), "sorted": ("reverse",),
    "round": ("ndigits",), "int": ("base",),
}  # fmt: skip
FUNCTIONS: Mapping[str, Callable[[AllowedCall], None]] = {
    "len": _check_len, "sum": _check_sum, "min": _check_elements, "max": _check_elements,
    "round": _check_number, "abs": _check_number, "sorted": _check_elements, "str": _check_text,
    "int": _check_number, "float": _check_number, "repr": _check_text,
    **dict.fromkeys(("list", "tuple", "set", "any", "all"), _check_elements),
}  # fmt: skip
