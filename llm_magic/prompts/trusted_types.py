"""The types whose operations run no code of the user's, and the limits on the work of expressions.

An expression in a prompt may be pasted text. It is evaluated only as far as the types of its values
are trusted: operators, subscripts and calls on other objects would run code of their classes.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import os
import pathlib
import sys
import uuid
import zoneinfo
from collections.abc import Iterable
from math import prod
from typing import Any

MAX_TEXT = 1_000_000  # characters that an operation may produce
MAX_ITEMS = 1_000_000  # elements that an operation may produce or compare one by one
MAX_CELLS = 10_000_000  # numbers that an array operation may produce beyond the size of its input
MAX_BITS = 10_000  # of a whole number; Python itself does not print more than 4,300 digits
MAX_WORK = 10_000_000  # elements that all expressions of one prompt may visit: a few seconds

# What an expression costs beside the elements that it visits, in elements.
BRACE_COST, PARSE_COST, CHARACTER_COST, NODE_COST = 4, 150, 12, 30

_BUILTINS: dict[type, str] = {
    bool: "int", int: "int", float: "float", complex: "complex", str: "str", bytes: "bytes",
    type(None): "none", type(Ellipsis): "none", slice: "slice", range: "range",
    list: "list", tuple: "tuple", set: "set", frozenset: "set", collections.deque: "list",
    dict: "dict", collections.OrderedDict: "dict", collections.defaultdict: "dict",
    collections.Counter: "counter",
    **{type(getattr(made(), view)()): "view" for made in (dict, collections.OrderedDict)
       for view in ("keys", "values", "items")},
    datetime.date: "date", datetime.datetime: "datetime", datetime.time: "time",
    datetime.timedelta: "timedelta", datetime.timezone: "none", zoneinfo.ZoneInfo: "none",
    decimal.Decimal: "decimal", fractions.Fraction: "fraction", uuid.UUID: "uuid",
    **dict.fromkeys((pathlib.PurePosixPath, pathlib.PureWindowsPath), "path"),
    **dict.fromkeys((pathlib.PosixPath, pathlib.WindowsPath), "path"),
}  # fmt: skip
_PACKAGES: dict[str, str] = {
    "numpy.ndarray": "array", "numpy.str_": "str", "numpy.bytes_": "bytes",
    "numpy.void": "unknown", "numpy.generic": "scalar", "numpy.dtype": "dtype",
    "torch.Tensor": "tensor", "torch.Size": "tuple", "torch.dtype": "dtype",
    "torch.device": "dtype",
    "pandas.ExtensionArray": "array",
    "pandas.DataFrame": "frame", "pandas.Series": "series", "pandas.Index": "index",
    "pandas.DataFrameGroupBy": "groups", "pandas.SeriesGroupBy": "groups",
    "pandas.DatetimeIndexResampler": "groups",
    "pandas.Rolling": "window", "pandas.Expanding": "window",
    "pandas._LocIndexer": "indexer", "pandas._iLocIndexer": "indexer",
    "pandas._AtIndexer": "indexer", "pandas._iAtIndexer": "indexer",
    "pandas.StringMethods": "texts", "pandas.Properties": "dates",
    "pandas.Timestamp": "datetime", "pandas.Timedelta": "timedelta", "pandas.NaTType": "missing",
    "pandas.NAType": "missing", "pandas.Period": "period", "pandas.Interval": "interval",
    "pandas.ExtensionDtype": "dtype",
    "polars.DataFrame": "pl_frame", "polars.Series": "pl_series", "polars.GroupBy": "pl_groups",
    "polars.StringNameSpace": "pl_texts", "polars.DateTimeNameSpace": "pl_dates",
    "polars.LazyFrame": "lazy", "polars.Schema": "dict", "polars.DataType": "dtype",
}  # fmt: skip
NUMBERS = frozenset({"int", "float", "complex", "decimal", "fraction", "scalar"})
MOMENTS = frozenset({"date", "datetime", "time", "timedelta", "period", "interval", "missing"})
SCALARS = NUMBERS | MOMENTS | {"str", "bytes", "none", "uuid", "path", "dtype"}
SEQUENCES = frozenset({"list", "tuple"})
TEXTS = frozenset({"str", "bytes"})
MAPPINGS = frozenset({"dict", "counter"})
CONTAINERS = SEQUENCES | MAPPINGS | {"set", "view"}
PANDAS = frozenset({"frame", "series", "index"})
POLARS = frozenset({"pl_frame", "pl_series"})
ARRAYS = PANDAS | POLARS | {"array", "tensor"}

# The special methods with which a class of the user's stays what its base class is.
_HARMLESS = set(
    """__module__ __qualname__ __doc__ __dict__ __weakref__ __slots__ __annotations__ __init__
    __new__ __repr__ __str__ __getnewargs__ __slotnames__ __match_args__ __orig_bases__ __parameters__
    __init_subclass__ __class_getitem__ __set_name__ __static_attributes__ __firstlineno__
    __annotate__ __annotate_func__ __annotations_cache__ __setattr__ __delattr__ __copy__ __deepcopy__
    __reduce__ __reduce_ex__ __getstate__ __setstate__ __replace__ __abstractmethods__ __del__""".split()  # noqa: SIM905 - a list would be 30 lines
)
# Whatever the subclass, their operators and methods return objects of these classes. Those of others
# call the subclass.
_EXACT = frozenset(
    {
        bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, decimal.Decimal,
        fractions.Fraction, datetime.timedelta, uuid.UUID,
    }
)  # fmt: skip
# A metaclass can replace these attributes; the descriptors of `type` cannot be replaced.
_mro = type.__dict__["__mro__"].__get__
_module = type.__dict__["__module__"].__get__
_name = type.__dict__["__name__"].__get__
_vars = type.__dict__["__dict__"].__get__
_ENVIRONMENT = type(os.environ)
_ZONED = frozenset({"datetime", "time"})
_ZONES = frozenset({"datetime", "zoneinfo", "pytz", "dateutil", "pandas"})


ASSIGN = "Assign it to a variable first, and refer to that"
PART = "Insert a part of it, such as [:100] of a list or text, or .head(100) of a table"


class NotAllowed(Exception):
    """An expression that is not evaluated; the text is the reason, a clause without a subject.

    `advice` is what to do instead, "" where nothing helps or where the reason contains it.
    """

    def __init__(self, reason: str, advice: str = ASSIGN) -> None:
        super().__init__(reason)
        self.advice = advice


class Budget:
    """Counts the work of the expressions in one prompt; `left` is negative when it is spent."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, elements: float) -> None:
        """Subtract the elements that an operation is about to visit; raises `NotAllowed` at the end."""
        self.left -= 1 + int(elements)
        if self.left < 0:
            raise NotAllowed("takes too long for a prompt")


def require_length(
    length: float, most: int = MAX_TEXT, unit: str = "characters", advice: str = ""
) -> None:
    """Raise `NotAllowed` if a result would have more than `most` elements."""
    if length > most:
        raise NotAllowed(f"would make more than {most:,} {unit}", advice)


# -- families of types ----------------------------------------------------------------------------


def classes_of(value: object) -> tuple[type, ...]:
    """Return the class of a value and its base classes, in the order in which Python searches them."""
    return _mro(type(value))  # type: ignore[no-any-return]


def own_names(kind: type) -> tuple[str, ...]:
    """Return the names of the attributes that a class defines itself."""
    return tuple(_vars(kind))


def full_name(kind: type) -> str:
    """Return the package and the name of a class: ``pandas.DataFrame``."""
    return f"{_package(kind)}.{_name(kind)}"


def is_environment(value: object) -> bool:
    """Return whether a value is the environment variables, or a dict that contains them."""
    if _ENVIRONMENT in classes_of(value):
        return True
    if type(value) is not dict:
        return False
    system = sys.modules.get("posix") or sys.modules.get("nt")
    stored = (getattr(one, "_data", None) for one in (os.environ, getattr(os, "environb", None)))
    return value is getattr(system, "environ", None) or any(value is one for one in stored)


def family(value: object) -> str:
    """Return the name of the family of types that a value belongs to, else ``"unknown"``."""
    return trusted_type(value)[0]


def trusted_type(value: object) -> tuple[str, type]:
    """Return the family of a value and the class that its methods are taken from."""
    name, base = _trusted_class(value)
    if name in _ZONED and not _is_trusted_zone(base.tzinfo.__get__(value)):  # type: ignore[attr-defined]
        return "unknown", type(value)
    return name, base


def _trusted_class(value: object) -> tuple[str, type]:
    kind = type(value)
    if kind in _BUILTINS:
        return _BUILTINS[kind], kind
    classes = classes_of(value)
    for position, base in enumerate(classes):
        package = _package(base)
        if (name := _PACKAGES.get(f"{package}.{_name(base)}", "")) and _is_real(base):
            own = all(_package(one) == package for one in classes[:position])
            return (name, kind) if own else ("unknown", kind)
    for position, base in enumerate(classes):
        if name := _BUILTINS.get(base, ""):
            return (name, base) if _is_trusted(classes[:position], base) else ("unknown", kind)
    return "unknown", kind


def require_own(value: Any, base: type, name: str) -> None:
    """Raise `NotAllowed` if a subclass of a trusted type overrides an attribute of it."""
    classes = classes_of(value)
    for kind in classes[: classes.index(base)]:
        if name in _vars(kind):
            raise NotAllowed(f"would run .{name} of your class {kind.__name__}")


def _is_trusted_zone(zone: object) -> bool:
    """Return whether a time zone is one of a library; methods of others are the user's code."""
    if type(zone) in _BUILTINS:
        return True
    for one in classes_of(zone):
        if one is not datetime.tzinfo and _package(one) in _ZONES and _is_real(one):
            return _package(type(zone)) == _package(one)
    return False


def _package(kind: type) -> str:
    module = _module(kind)
    return module.partition(".")[0] if type(module) is str else ""


def _is_real(kind: type) -> bool:
    """Return whether the class is the one of that name in its module."""
    module = sys.modules.get(_module(kind))
    return module is not None and vars(module).get(_name(kind)) is kind


def _is_trusted(subclasses: Iterable[type], base: type) -> bool:
    """Return whether subclasses define no special method that an operation would run."""
    harmless = _HARMLESS if base in _EXACT else _HARMLESS - {"__init__", "__new__"}
    return all(
        name in harmless or not (name.startswith("__") and name.endswith("__"))
        for kind in subclasses
        # The special methods of a reply run no code of the user's.
        if not (full_name(kind) == "llm_magic.Reply" and _is_real(kind))
        for name in _vars(kind)
    )


# -- sizes ----------------------------------------------------------------------------------------


def size(value: Any) -> int:
    """Return the number of elements of a value of a trusted type."""
    kind = family(value)
    if kind == "array":  # an element may be a long text
        return int(prod(value.shape) * max(1, getattr(value.dtype, "itemsize", 8) // 8))
    if kind in {"tensor", "frame", "pl_frame"}:
        return prod(map(int, value.shape))
    if kind in {"groups", "window"}:
        return size(value.obj)
    if kind in {"str", "bytes", "range", "series", "index", "pl_series"} | CONTAINERS:
        return len(value)
    return 1


def whole(value: Any) -> int:
    """Return a whole number of a trusted type as an int; 0 for other values."""
    kind = family(value)
    if kind not in {"int", "scalar"} or (kind == "scalar" and value.dtype.kind not in "iub"):
        return 0
    return int(value)


def bits(value: Any) -> int:
    """Return the bits of a whole number or a fraction; 0 for other values."""
    kind = family(value)
    if kind == "fraction":
        return int(value.numerator.bit_length() + value.denominator.bit_length())
    return int(value.bit_length()) if kind == "int" else 0


def require_small_exponent(value: Any) -> None:
    """Raise `NotAllowed` for a decimal number with thousands of digits."""
    if family(value) == "decimal" and value.is_finite() and abs(value.adjusted()) > 1000:
        raise NotAllowed("has a number with an exponent over 1,000")


# -- plain values: those of trusted types, down to their elements ---------------------------------


def require_plain(value: object, budget: Budget) -> None:
    """Raise `NotAllowed` unless a value consists of trusted types, down to its elements.

    Comparing, sorting or hashing such a value runs no code but that of the trusted types.
    """
    left, visited = [value], 0
    while left:
        item: Any = left.pop()
        visited += 1
        kind = family(item)
        if kind in CONTAINERS:
            _require_few(visited + len(left) + len(item))
            for part in parts(item):
                visited += len(part)
                left += _not_plain(part)
        elif kind == "slice":
            left += (item.start, item.stop, item.step)
        elif kind == "range":
            _require_few(MAX_ITEMS + bool(item[MAX_ITEMS:]))
        elif kind in ARRAYS:
            require_plain_cells(item, budget)
            budget.spend(size(item) / 10)
        elif kind not in SCALARS:
            raise NotAllowed(f"would use a {type(item).__name__} in a way that may run its code")
    budget.spend(visited)


def parts(container: Any) -> tuple[Any, ...]:
    """Return the parts of a container: of a mapping the keys and the values."""
    mapping = family(container) in MAPPINGS
    return (dict.keys(container), dict.values(container)) if mapping else (container,)


def _require_few(elements: int) -> None:
    if elements > MAX_ITEMS:
        raise NotAllowed(f"has more than {MAX_ITEMS:,} elements to visit one by one")


def _not_plain(values: Iterable[Any]) -> list[Any]:
    """Return the values that are not numbers, texts or dates by their type alone."""
    samples = {type(value): value for value in values}
    kinds = {kind for kind, value in samples.items() if family(value) not in SCALARS - _ZONED}
    return [value for value in values if type(value) in kinds] if kinds else []


def require_plain_keys(mapping: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if a key of a dict may run its own code while another key is searched."""
    keys = dict.keys(mapping)
    budget.spend(len(keys) / 20)
    # Objects whose class defines no `==`, such as the members of an enum, are compared by identity.
    require_plain([key for key in _not_plain(keys) if not _is_compared_by_identity(key)], budget)


def _is_compared_by_identity(value: object) -> bool:
    return next(one for one in classes_of(value) if "__eq__" in _vars(one)) is object


def columns(table: Any) -> list[Any]:
    """Return the columns of a table, or in a list an array or a column."""
    if family(table) == "frame":
        return [table.iloc[:, number] for number in range(table.shape[1])]
    return list(table.get_columns()) if family(table) == "pl_frame" else [table]


def require_plain_cells(value: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if an array or a table has Python objects in it that are not plain."""
    if family(value) == "frame":
        budget.spend(value.shape[1] * 100)
    for column in columns(value):
        _require_plain_column(column, budget)
    require_plain_labels(value, budget)


def require_plain_labels(value: Any, budget: Budget) -> None:
    """Raise `NotAllowed` if a pandas table has labels that are not plain, because a lookup compares them."""
    table = value.obj if family(value) in {"groups", "window", "indexer"} else value
    for index in table.axes if family(table) in {"frame", "series"} else ():
        _require_plain_column(index, budget)


def _require_plain_column(column: Any, budget: Budget) -> None:
    dtype = column.dtype
    if _package(type(dtype)) not in {"numpy", "pandas", "polars", "torch"}:
        raise NotAllowed(f"would run the code of the data type {_name(type(dtype))}")
    if family(column) == "index" and column.nlevels > 1:
        for level in column.levels:
            _require_plain_column(level, budget)
    elif str(dtype) == "category":
        _require_plain_column(dtype.categories, budget)
    elif str(dtype) == "object" and family(column) in PANDAS:
        budget.spend(len(column))
        require_plain(_not_plain(column.array), budget)
    elif "object" in str(dtype).lower() or getattr(dtype, "hasobject", False):
        raise NotAllowed("would run the code of the objects in an array")
