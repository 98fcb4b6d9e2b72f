"""The types whose operations are known not to run the user's code, and the limits on their size.

An expression in a prompt may be pasted text. It is evaluated only as far as the types of its values
are known: operators, subscripts and calls on other objects would run code of their classes.
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
    type({}.keys()): "view", type({}.values()): "view", type({}.items()): "view",
    type(collections.OrderedDict().keys()): "view",
    type(collections.OrderedDict().values()): "view",
    type(collections.OrderedDict().items()): "view",
    datetime.date: "date", datetime.datetime: "datetime", datetime.time: "time",
    datetime.timedelta: "timedelta", datetime.timezone: "none", zoneinfo.ZoneInfo: "none",
    decimal.Decimal: "decimal", fractions.Fraction: "fraction", uuid.UUID: "uuid",
    pathlib.PurePosixPath: "path", pathlib.PureWindowsPath: "path",
    pathlib.PosixPath: "path", pathlib.WindowsPath: "path",
}  # fmt: skip
_PACKAGES: dict[str, str] = {
    "numpy.ndarray": "array", "numpy.str_": "str", "numpy.bytes_": "bytes",
    "numpy.generic": "scalar", "numpy.dtype": "dtype",
    "torch.Tensor": "tensor", "torch.Size": "tuple", "torch.dtype": "dtype",
    "torch.device": "dtype",
    "pandas.ExtensionArray": "array",
    "pandas.DataFrame": "frame", "pandas.Series": "series", "pandas.Index": "index",
    "pandas.DataFrameGroupBy": "groups", "pandas.SeriesGroupBy": "groups",
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
MAPPINGS = frozenset({"dict", "counter"})
CONTAINERS = SEQUENCES | MAPPINGS | {"set", "view"}
PANDAS = frozenset({"frame", "series", "index"})
POLARS = frozenset({"pl_frame", "pl_series"})
ARRAYS = PANDAS | POLARS | {"array", "tensor"}

# The special methods with which a class of the user's stays what its base class is.
_HARMLESS = set(
    """__module__ __qualname__ __doc__ __dict__ __weakref__ __slots__ __annotations__ __init__
    __new__ __repr__ __str__ __getnewargs__ __match_args__ __orig_bases__ __parameters__
    __init_subclass__ __class_getitem__ __set_name__ __static_attributes__ __firstlineno__
    __annotate__ __annotate_func__ __annotations_cache__ __copy__ __deepcopy__ __reduce__
    __reduce_ex__ __getstate__ __setstate__ __replace__ __abstractmethods__ __del__""".split()  # noqa: SIM905 - a list would be 30 lines
)
# A class that has a class of the user's reads these as it likes; the descriptors of `type` do not.
_mro = type.__dict__["__mro__"].__get__
_module = type.__dict__["__module__"].__get__
_name = type.__dict__["__name__"].__get__
_vars = type.__dict__["__dict__"].__get__
_ENVIRONMENT = type(os.environ)
_ZONED = frozenset({"datetime", "time"})
_ZONES = frozenset({"datetime", "zoneinfo", "pytz", "dateutil", "pandas"})


ASSIGN = "Assign it to a variable first, and refer to that"


class Refused(Exception):
    """An expression that is not evaluated; the text is the reason, a clause without a subject.

    `advice` is what to do instead, "" where nothing helps or where the reason contains it.
    """

    def __init__(self, reason: str, advice: str = ASSIGN) -> None:
        super().__init__(reason)
        self.advice = advice


class Budget:
    """Counts the work of the expressions in one prompt; raises `Refused` when it is spent."""

    def __init__(self, work: int = MAX_WORK) -> None:
        self._left = work

    def spend(self, elements: float) -> None:
        """Subtract the elements that an operation is about to visit."""
        self._left -= 1 + int(elements)
        if self.is_spent:
            raise Refused("takes too long for a prompt")

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left for another expression."""
        return self._left < 0


def classes_of(value: object) -> tuple[type, ...]:
    """Return the class of a value and its base classes, in the order in which Python looks."""
    return _mro(type(value))  # type: ignore[no-any-return]


def full_name(kind: type) -> str:
    """Return the package and the name of a class: ``pandas.DataFrame``."""
    return f"{_package(kind)}.{_name(kind)}"


def own_names(kind: type) -> Any:
    """Return what a class itself defines."""
    return _vars(kind)


def is_environment(value: object) -> bool:
    """Return whether a value is the environment variables, or a dict that they are kept in."""
    if _ENVIRONMENT in classes_of(value):
        return True
    if type(value) is not dict:
        return False
    system = sys.modules.get("posix") or sys.modules.get("nt")
    kept = (getattr(one, "_data", None) for one in (os.environ, getattr(os, "environb", None)))
    return value is getattr(system, "environ", None) or any(value is one for one in kept)


def family(value: object) -> str:
    """Return the name of the known type that a value has, else ``"unknown"``."""
    return known(value)[0]


def known(value: object) -> tuple[str, type]:
    """Return the family of a value and the class that its methods are taken from."""
    name, base = _known_class(value)
    if name in _ZONED and not _is_known_zone(base.tzinfo.__get__(value)):  # type: ignore[attr-defined]
        return "unknown", type(value)
    return name, base


def _known_class(value: object) -> tuple[str, type]:
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
            return (name, base) if _faithful(classes[:position]) else ("unknown", kind)
    return "unknown", kind


def _is_known_zone(zone: object) -> bool:
    """Return whether a time zone is one of a library: the methods of others are the user's code."""
    if zone is None or type(zone) in _BUILTINS:
        return True
    classes = classes_of(zone)
    real = (place for place, one in enumerate(classes) if _package(one) in _ZONES and _is_real(one))
    package = next(
        (_package(classes[place]) for place in real if classes[place] is not datetime.tzinfo), ""
    )
    return bool(package) and _package(classes[0]) == package


def _package(kind: type) -> str:
    module = _module(kind)
    return module.partition(".")[0] if type(module) is str else ""


def _is_real(kind: type) -> bool:
    """Return whether the class is the one of that name in its module."""
    module = sys.modules.get(_module(kind))
    return module is not None and vars(module).get(_name(kind)) is kind


def _faithful(classes: Iterable[type]) -> bool:
    """Return whether classes define no special method that an operation would run."""
    return all(
        name in _HARMLESS or not (name.startswith("__") and name.endswith("__"))
        for kind in classes
        for name in _vars(kind)
    )


def size(value: Any) -> int:
    """Return the number of elements of a value of a known type."""
    kind = family(value)
    if kind in {"array", "tensor"}:
        return count(value.shape)
    if kind in {"frame", "pl_frame"}:
        return int(value.shape[0]) * int(value.shape[1])
    if kind in {"groups", "window"}:
        return size(value.obj)
    if kind in {"str", "bytes", "range", "series", "index", "pl_series"} | CONTAINERS:
        return len(value)
    return 1


def count(shape: Iterable[Any]) -> int:
    """Return the number of elements in an array of this shape."""
    product = 1
    for length in shape:
        product *= int(length)
    return product


def whole(value: Any) -> int:
    """Return a whole number of a known type as an int; 0 for other values."""
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


def require_plain(value: object, budget: Budget) -> None:
    """Raise `Refused` unless a value is made of known types, down to its elements.

    Comparing, sorting or hashing such a value runs no code but that of the known types.
    """
    left = [value]
    visited = 0
    while left:
        item = left.pop()
        visited += 1
        kind = family(item)
        if kind in CONTAINERS:
            _bound(visited + len(left) + len(item))  # type: ignore[arg-type]
            for part in parts(item):
                if _are_plain(part):
                    visited += len(part)
                else:
                    left += part
        elif kind == "slice":
            left += (item.start, item.stop, item.step)  # type: ignore[attr-defined]
        elif kind == "range":
            _bound(MAX_ITEMS + bool(item[MAX_ITEMS:]))  # type: ignore[index]
        elif kind in ARRAYS:
            require_plain_cells(item, budget)
            budget.spend(size(item) / 10)
        elif kind not in SCALARS:
            raise Refused(f"would use a {type(item).__name__} in a way that may run its code")
    budget.spend(visited)


def parts(container: Any) -> tuple[Any, ...]:
    """Return what a container is made of: of a mapping the keys and the values."""
    mapping = family(container) in MAPPINGS
    return (dict.keys(container), dict.values(container)) if mapping else (container,)


def _are_plain(values: Iterable[object]) -> bool:
    """Return whether values are numbers, texts and dates, which is fast to find out."""
    return all(_BUILTINS.get(kind, "") in SCALARS - _ZONED for kind in set(map(type, values)))


def require_plain_keys(mapping: Any, budget: Budget) -> None:
    """Raise `Refused` if a key of a dict may run its own code when another key is looked up."""
    keys = dict.keys(mapping)
    budget.spend(len(keys) / 20)
    kinds = set(map(type, keys))
    if all(
        _BUILTINS.get(kind, "") in SCALARS - _ZONED or _is_compared_by_python(kind)
        for kind in kinds
    ):
        return
    require_plain([key for key in keys if not _is_compared_by_python(type(key))], budget)


def _is_compared_by_python(kind: type) -> bool:
    """Return whether a class of the user's leaves ``==`` as it is for all objects: an enum does."""
    if kind in _BUILTINS:
        return False
    return next(one for one in _mro(kind) if "__eq__" in _vars(one)) is object


def _bound(elements: int) -> None:
    if elements > MAX_ITEMS:
        raise Refused(f"has more than {MAX_ITEMS:,} elements to visit one by one")


def require_plain_cells(value: Any, budget: Budget) -> None:
    """Raise `Refused` if an array or a table has Python objects in it that are not plain."""
    kind = family(value)
    columns = [value]
    if kind == "frame":
        columns = [value.iloc[:, place] for place in range(value.shape[1])]
        budget.spend(value.shape[1] * 100)
    for column in columns:
        _require_plain_column(column, getattr(column, "dtype", None), budget)
    require_plain_labels(value, budget)


def require_plain_labels(value: Any, budget: Budget) -> None:
    """Raise `Refused` if a pandas table has labels that are not plain: a lookup compares them."""
    kind = family(value)
    labels = [value.index] if kind in {"frame", "series"} else []
    labels += [value.columns] if kind == "frame" else []
    for index in labels:
        for level in getattr(index, "levels", None) or [index]:
            _require_plain_column(level, level.dtype, budget)


def _require_plain_column(column: Any, dtype: Any, budget: Budget) -> None:
    name = str(dtype)
    if name == "object" and family(column) in PANDAS:
        _require_plain_objects(column, budget)
    elif name == "category" and family(column) in PANDAS:
        _require_plain_column(dtype.categories, dtype.categories.dtype, budget)
    elif "object" in name.lower() or getattr(dtype, "hasobject", False):
        raise Refused("would run the code of the objects in an array")
    elif _package(type(dtype)) not in {"numpy", "pandas", "polars", "torch", "builtins"}:
        raise Refused(f"would run the code of the data type {name}")


def _require_plain_objects(column: Any, budget: Budget) -> None:
    if hasattr(column, "levels"):  # The labels are in several columns.
        for level in column.levels:
            _require_plain_column(level, level.dtype, budget)
        return
    budget.spend(len(column))
    for kind in set(map(type, column.array)):
        if _BUILTINS.get(kind, "") in CONTAINERS | _ZONED:
            require_plain(list(column.array), budget)
        elif _BUILTINS.get(kind, "") not in SCALARS and _package(kind) not in {"numpy", "pandas"}:
            raise Refused(f"would run the code of the {kind.__name__} objects in a column")
