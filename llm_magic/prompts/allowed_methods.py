"""The attributes and methods that an expression in a prompt may use, by family of types.

A method is listed when it changes nothing, reads and writes no file, calls no function that it is
given, and returns no more than its input, or when a check below bounds what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from llm_magic.prompts.trusted_types import (
    ARRAYS,
    ASSIGN,
    MAX_ITEMS,
    MAX_TEXT,
    PANDAS,
    SEQUENCES,
    Budget,
    NotAllowed,
    columns,
    family,
    require_length,
    require_own,
    require_plain,
    require_plain_cells,
    require_plain_keys,
    require_small_exponent,
    size,
    trusted_type,
    whole,
)


def _table(text: str) -> Mapping[str, frozenset[str]]:
    """Return the names of each family; a line without families continues the one before."""
    table: dict[str, frozenset[str]] = {}
    families: list[str] = []
    for line in text.splitlines():
        heading, _, names = line.rpartition(":")
        families = heading.split() or families
        for kind in families:
            table[kind] = table.get(kind, frozenset()) | set(names.split())
    return table


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ATTRIBUTES = _table("""
int decimal fraction: real imag
float complex: real imag
int fraction: numerator denominator
uuid: hex int urn version variant
slice range: start stop step
list: maxlen
date: year month day
datetime period index dates: year month day hour minute second microsecond nanosecond dayofweek
    day_of_week dayofyear day_of_year quarter is_leap_year is_month_end is_month_start
    is_quarter_end is_quarter_start is_year_end is_year_start days_in_month unit
datetime: tzinfo fold tz value
time: hour minute second microsecond tzinfo fold
timedelta dates: days seconds microseconds nanoseconds components
timedelta: unit value
period: start_time end_time freqstr ordinal
interval: left right mid length closed closed_left closed_right is_empty
path: name stem suffix suffixes parent parts root anchor drive
dtype: name kind itemsize char str names shape ndim type index categories ordered
array scalar: shape size ndim dtype T real imag nbytes itemsize
tensor: shape ndim dtype device requires_grad T mT real is_cuda
frame: shape size columns index dtypes ndim empty T values axes loc iloc at iat
series index: shape size dtype name ndim empty values T str is_unique hasnans nbytes
    is_monotonic_increasing is_monotonic_decreasing
series: index loc iloc at iat dt
index: names nlevels inferred_type start stop step
groups: ngroups ndim
dates: date time
pl_frame: shape height width columns dtypes schema
pl_series: shape name dtype str dt
""")

_TO_TEXT = "to_string to_csv to_json to_markdown to_html to_dict"
METHODS = _table(f"""
int: bit_length bit_count conjugate is_integer as_integer_ratio
float: is_integer hex conjugate as_integer_ratio
complex: conjugate
decimal: is_nan is_infinite is_finite is_signed is_zero adjusted copy_abs copy_negate normalize sqrt
    quantize to_eng_string
fraction: limit_denominator is_integer as_integer_ratio
str bytes: count endswith find index isalnum isalpha isascii isdigit lower lstrip partition removeprefix
    removesuffix rfind rstrip split splitlines startswith strip title upper
str: capitalize casefold center encode expandtabs isdecimal isidentifier islower isnumeric
    isprintable isspace istitle isupper join ljust replace rindex rjust rpartition rsplit swapcase
    zfill
bytes: decode hex
list: index count copy
tuple: index count numel
range: index count
dict counter: get keys values items copy
counter: most_common total
set: copy union intersection difference symmetric_difference issubset issuperset isdisjoint
view: isdisjoint
date datetime: isoformat strftime weekday isoweekday isocalendar toordinal ctime replace
datetime: date time timestamp utcoffset tzname timetz day_name month_name normalize to_pydatetime
time: isoformat strftime replace utcoffset tzname
timedelta: total_seconds isoformat to_pytimedelta
period: strftime to_timestamp
path: as_posix is_absolute with_suffix with_name with_stem joinpath relative_to is_relative_to
array tensor frame series groups window pl_frame pl_series pl_groups: mean sum min max std var median
array: argmin argmax round all any cumsum cumprod prod tolist item copy flatten ravel reshape
    transpose squeeze astype nonzero clip diagonal argsort conj swapaxes
scalar: item round conj tolist all any min max mean sum std is_integer astype
tensor: argmin argmax item tolist numel dim size all any abs round prod norm
frame series: {_TO_TEXT} count nunique value_counts describe quantile idxmin idxmax skew kurt
    sem mode cumsum cumprod cummin cummax diff pct_change rank round abs clip isin between
    sort_values sort_index nlargest nsmallest drop_duplicates duplicated fillna all any head tail
    copy keys get isna isnull notna notnull dropna drop reset_index memory_usage groupby rolling
    expanding astype sample agg
frame: assign set_index select_dtypes transpose corr cov merge pivot pivot_table
frame series: resample
series: unique prod argmin argmax tolist to_list to_frame item
index: tolist to_list unique nunique min max isin value_counts copy get_level_values sort_values
    argmin argmax isna notna duplicated drop_duplicates day_name month_name strftime to_series
    to_frame
groups: agg count size nunique first last head tail prod quantile idxmin idxmax describe
window: count
texts: len lower upper strip lstrip rstrip title capitalize swapcase casefold contains startswith
    endswith replace split get slice count find isdigit isalpha isalnum isnumeric isdecimal isspace
    islower isupper istitle removeprefix removesuffix
dates: strftime day_name month_name total_seconds normalize isocalendar
pl_frame pl_series: head tail limit slice describe null_count n_unique sort unique is_empty item
    filter is_duplicated quantile top_k bottom_k reverse
pl_frame: get_column row rows to_dicts select drop group_by drop_nulls get_columns get_column_index
    transpose write_csv write_json
pl_series: len value_counts to_list is_null is_not_null round abs product arg_min arg_max drop_nulls
    is_in is_between all any cum_sum cum_max cum_min diff rank mode to_frame is_unique
pl_groups: len count first last n_unique head tail all quantile
pl_texts: len_chars len_bytes to_uppercase to_lowercase contains starts_with ends_with strip_chars
    head tail slice
pl_dates: year month day hour minute second weekday week quarter ordinal_day date time total_seconds
    total_minutes total_hours total_days to_string strftime
""")

KEYWORDS = _names("""
    axis ddof decimals keepdims n ascending by numeric_only skipna dropna level sort as_index
    observed normalize columns subset keep q periods index orient indent header lines sep drop
    default reverse start end step maxsplit keepends encoding errors old new count prefix suffix
    include exclude percentiles lower upper min max inclusive method pct pat case regex repl na stop
    value values descending nulls_last named offset length literal timespec dim keepdim window
    min_periods center maintain_order column row labels fold tzinfo year month day hour minute
    second microsecond left right frac random_state
""")
# The arguments by name of methods whose result is bounded by them.
_OWN_KEYWORDS: Mapping[str, frozenset[str]] = {
    "merge": _names("right how on left_on right_on"), "pivot": _names("index columns values"),
    "pivot_table": _names("index columns values aggfunc fill_value observed dropna"),
    "resample": _names("rule on"),
}  # fmt: skip
_ENCODINGS = _names("utf-8 utf8 ascii latin-1 latin1 utf-16 utf-32 cp1252 utf-8-sig")
_ON_ERROR = _names("strict ignore replace")
_DTYPE = re.compile(r"(u?int|float|complex)(8|16|32|64|128)?|bool|str|string|category")
_REGEX = re.compile(r"[.^$*+?{}\[\]\\|()]")
# glibc takes a width between the percent sign and the letter.
_STRFTIME = re.compile(r"(?:[^%]|%[-_0^#]?[a-zA-Z%:])*")
_SLOW = _names(f"{_TO_TEXT} tolist to_list rows to_dicts write_csv write_json")
_HEAVY = _SLOW | _names("""
    describe nunique unique value_counts sort_values sort_index sort argsort rank mode duplicated
    drop_duplicates isin groupby group_by first last head tail size count median quantile n_unique
    astype strftime day_name
""")
_VISITS_NO_CELLS = _names("""
    head tail copy keys get isna isnull notna notnull transpose reset_index drop to_frame
    memory_usage size ngroups item to_series get_level_values select_dtypes
""")
# The names of methods that `agg` may call.
_AGGREGATIONS = _names("mean sum min max std var median count nunique size prod first last")
_MAX_AGGREGATIONS = 20
_MAX_ASSIGNED = 20
_ASSIGNED = _names("int float scalar")
_ADDS = _names("sum cumsum prod cumprod")
_CONDITION = 'It evaluates text as code. Write a condition instead, such as df[df["price"] > 10]'
_ADVICE: Mapping[str, str] = {
    "info": "It prints, and returns None. Insert .dtypes or .describe() instead",
    "query": _CONDITION, "eval": _CONDITION,
}  # fmt: skip
_TAKES_ARRAYS = _names("assign isin is_in groupby filter join merge")
_JOINED = frozenset({"series", "index", "array", "pl_series"})
_MAX_BINS = 100_000
_DAY = 86_400.0
# The shortest time of a unit, in seconds.
_UNITS: Mapping[str, float] = {
    "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "D": _DAY, "B": _DAY, "W": 7 * _DAY,
    **dict.fromkeys(("M", "ME", "MS"), 28 * _DAY), **dict.fromkeys(("Q", "QE", "QS"), 90 * _DAY),
    **dict.fromkeys(("A", "Y", "YE", "YS"), 365 * _DAY),
}  # fmt: skip
_FREQUENCY = re.compile(rf"(?P<count>[1-9]\d{{0,5}})?(?P<unit>{'|'.join(_UNITS)})(?:-[A-Z]{{3}})?")
_PANDAS_CALL = 5000  # pandas takes as long for a small table as for so many elements


@dataclass(frozen=True, slots=True)
class AllowedCall:
    """A call of a listed function or method, with arguments of trusted types."""

    owner: Any
    name: str
    args: Sequence[Any]
    keywords: Mapping[str, Any]
    budget: Budget

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name."""
        given = len(self.args) > position
        return self.args[position] if given else self.keywords.get(name, default)


def call_method(call: AllowedCall) -> Any:
    """AllowedCall a listed method of a value of a trusted type; raises `NotAllowed` for any other."""
    owner, name = call.owner, call.name
    kind, base = trusted_type(owner)
    if name not in METHODS.get(kind, ()):
        advice = ASSIGN
        if kind in PANDAS:
            advice = f"Assign it first, result = ….{name}(…), and write {{result}}"
        raise NotAllowed(
            f"calls .{name}() of a {type(owner).__name__}, which is not supported",
            _ADVICE.get(name, advice) if kind == "frame" else advice,
        )
    require_own(owner, base, name)
    allowed = _OWN_KEYWORDS.get(name, KEYWORDS)
    # The names of new columns are free.
    if name != "assign" and (extra := sorted(set(call.keywords) - allowed)):
        raise not_an_argument(extra[0], f".{name}()")
    for given in (*call.args, *call.keywords.values()):
        if family(given) in ARRAYS and name not in _TAKES_ARRAYS:
            raise NotAllowed(f"passes an array or a table to .{name}()")
        require_plain(given, call.budget)
    for check in map(_CHECKS.get, (kind, f".{name}", f"{kind}.{name}")):
        if check:
            check(call)
    return getattr(base, name)(owner, *call.args, **call.keywords)


def not_an_argument(keyword: str, called: str) -> NotAllowed:
    """Return the error for an argument by name that is not allowed."""
    return NotAllowed(f"passes {keyword}= to {called}, and {keyword}= is not an allowed argument")


def require_strftime(template: object) -> None:
    """Raise `NotAllowed` unless a date format is short and without widths."""
    if type(template) is not str or len(template) > 200 or not _STRFTIME.fullmatch(template):
        raise NotAllowed("has a date format with widths or over 200 characters")


# -- numbers, texts, dates and containers ---------------------------------------------------------


def _check_text(call: AllowedCall) -> None:
    text = call.owner
    # A search takes, at worst, the length of the text times that of what is searched.
    given = (*call.args, *call.keywords.values())
    searched = sum(len(one) for one in given if isinstance(one, (str, bytes)))
    call.budget.spend(len(text) * (searched + 10) / 1000)
    match call.name:
        case "center" | "ljust" | "rjust" | "zfill":
            require_length(whole(call.argument(0, "width", 0)))
        case "expandtabs":
            require_length(len(text) + text.count("\t") * whole(call.argument(0, "tabsize", 8)))
        case "replace":
            old, new = call.argument(0, "old"), call.argument(1, "new")
            if isinstance(old, str) and isinstance(new, str):
                require_length(len(text) + text.count(old) * max(0, len(new) - len(old)))
        case "join":
            _check_join(text, call.argument(0, "", ()), call.budget)
        case "encode" | "decode":
            encoding = call.argument(0, "encoding", "utf-8")
            errors = call.argument(1, "errors", "strict")
            if encoding not in _ENCODINGS or errors not in _ON_ERROR:
                raise NotAllowed("names an encoding or an error handler that is not allowed")
        case "split" | "rsplit" | "splitlines":
            require_length(len(text), 10 * MAX_TEXT)


def _check_join(separator: str, parts: Any, budget: Budget) -> None:
    kind = family(parts)
    if kind in ARRAYS:
        if kind not in _JOINED or len(parts.shape) != 1:
            raise NotAllowed(f"joins a {type(parts).__name__}, which is not a column or a list")
        require_length(size(parts), MAX_ITEMS, "elements")
        budget.spend(size(parts))
        parts, kind = parts.to_list() if kind == "pl_series" else parts.tolist(), "list"
    if kind in {"str", "list", "tuple", "set", "dict", "counter", "view"}:
        length = sum(len(part) for part in parts if isinstance(part, str))
        require_length(length + len(separator) * len(parts))


def _check_decimal(call: AllowedCall) -> None:
    for number in (call.owner, *call.args):
        require_small_exponent(number)


def _check_container(call: AllowedCall) -> None:
    """Check the elements, whose code runs in the methods that compare them."""
    if call.name == "copy":
        require_length(len(call.owner), MAX_ITEMS, "elements")
    elif call.name == "get":
        require_plain_keys(call.owner, call.budget)
    elif call.name not in {"keys", "values", "items", "numel"}:
        require_plain(call.owner, call.budget)


def _check_range(call: AllowedCall) -> None:
    # For anything but an int, Python compares each number of a range.
    if any(type(arg) is not int for arg in call.args):
        raise NotAllowed("searches a range for something that is not an int")


def _check_strftime(call: AllowedCall) -> None:
    require_strftime(call.argument(0, ""))
    if len(call.args) > 1:
        raise NotAllowed("passes more than a format to a date")


def _require_no_arguments(call: AllowedCall) -> None:
    if call.args or call.keywords:
        raise NotAllowed("passes arguments to a method that is allowed without them")


# -- arrays and tables ----------------------------------------------------------------------------


def _check_cells(call: AllowedCall) -> None:
    """Check an array or a table, or the one that is grouped."""
    table = call.owner.obj if family(call.owner) in {"groups", "window"} else call.owner
    if call.name in _SLOW:
        require_length(size(table), MAX_ITEMS, "elements")
    if call.name not in _VISITS_NO_CELLS:
        require_plain_cells(table, call.budget)
        call.budget.spend(size(table) / (2 if call.name in _HEAVY else 20))
    if family(table) in {"frame", "series"}:
        groups = call.owner.ngroups if call.name == "describe" and table is not call.owner else 9
        call.budget.spend(_PANDAS_CALL * (groups + 1 if call.name == "describe" else 1))
        called = [call.name, *filter(_is_name, _aggregations(call))]
        adds = not _ADDS.isdisjoint(called)
        if adds and call.keywords.get("numeric_only") is not True:
            require_numbers(table)


def _aggregations(call: AllowedCall) -> Sequence[Any]:
    """Return the names of the methods that `agg` and `pivot_table` call, one or a list."""
    if call.name == "pivot_table":
        return _listed(call.keywords.get("aggfunc", "mean"))
    return _listed(call.argument(0, "func")) if call.name == "agg" else ()


def _is_name(value: object) -> bool:
    return type(value) is str


def _check_agg(call: AllowedCall) -> None:
    """Allow only names of methods that change nothing: pandas calls whatever is named."""
    if len(call.args) != 1 or call.keywords:
        raise NotAllowed("passes more than the names of the methods to .agg()")
    names = _require_aggregations(call)
    table = call.owner.obj if family(call.owner) == "groups" else call.owner
    width = len(columns(table))
    call.budget.spend(len(names) * (width * _PANDAS_CALL + size(table) / 2))


def _require_aggregations(call: AllowedCall) -> Sequence[str]:
    """Return the names of the methods that a call calls; raises `NotAllowed` for any other."""
    names = _aggregations(call)
    if not names or not all(_is_name(name) and name in _AGGREGATIONS for name in names):
        raise NotAllowed(
            f"calls .{call.name}() with something other than {', '.join(sorted(_AGGREGATIONS))}"
        )
    require_length(len(names), _MAX_AGGREGATIONS, f"results of .{call.name}()")
    return names


def _check_merge(call: AllowedCall) -> None:
    """Bound the rows of a merge by how often a key occurs in each table."""
    left, right, how = call.owner, call.argument(0, "right"), call.argument(1, "how", "inner")
    if family(right) != "frame" or len(call.args) > 3:
        raise NotAllowed(
            "merges with something other than a table, or by more than names of columns"
        )
    on = _listed(call.argument(2, "on"))
    keys = [on or _listed(call.keywords.get(name)) for name in ("left_on", "right_on")]
    if not any(keys):
        keys = [[name for name in left.columns if name in right.columns]] * 2
    tables = list(zip((left, right), keys, strict=True))
    if how == "cross" or not all(keys):  # pandas rejects keys of one table alone
        rows = len(left) * len(right)
    else:
        columns_of = [[_column(table, key) for key in names] for table, names in tables]
        same = [str(one.dtype) for one in columns_of[0]] == [
            str(one.dtype) for one in columns_of[1]
        ]
        times = [_most_frequent(table, names) for table, names in tables]
        products = len(left) * times[1], len(right) * times[0]
        # Keys of one type may become equal where they are converted into the other.
        rows = (min if same else max)(products) + len(left) + len(right)
    cells = rows * (left.shape[1] + right.shape[1])
    require_length(cells, max(MAX_ITEMS, size(left) + size(right)), "cells", ASSIGN)
    call.budget.spend(5 * _PANDAS_CALL + (cells + size(right)) / 2)


def _most_frequent(table: Any, keys: Sequence[Any]) -> int:
    """Return how many rows have the same keys at most."""
    if not len(table):
        return 0
    return int(table.groupby(list(keys), dropna=False, observed=True, sort=False).size().max())


def _column(table: Any, key: Any) -> Any:
    """Return a column by its name; raises `NotAllowed` for a key that is not a name."""
    if family(key) not in {"str", "int"}:
        raise NotAllowed("uses something other than a name of a column")
    if (found := _grouping_key(table, key)) is None:
        raise KeyError(key)
    return found


def _check_pivot(call: AllowedCall) -> None:
    """Bound the cells by the number of different values of the keys."""
    table, calls = call.owner, 1
    if call.args:
        raise NotAllowed(
            f"passes positional arguments to .{call.name}()",
            f'Write .{call.name}(index="…", columns="…", values="…")',
        )
    names = {part: _listed(call.keywords.get(part)) for part in ("index", "columns", "values")}
    if call.name == "pivot_table":
        calls = len(_require_aggregations(call))
    # Without names, `pivot` keeps the labels of the rows.
    rows = 1 if names["index"] or call.name == "pivot_table" else len(table)
    cells = calls * rows * (len(names["values"]) or table.shape[1])
    for key in (*names["index"], *names["columns"]):
        cells *= _groups(_column(table, key), len(table))
    for key in names["values"]:
        _column(table, key)
    require_length(cells, MAX_ITEMS, "cells", ASSIGN)
    call.budget.spend(calls * 5 * _PANDAS_CALL + size(table) + cells)


def _check_resample(call: AllowedCall) -> None:
    """Bound the intervals by the first and the last date."""
    table, rule, on = call.owner, call.argument(0, "rule"), call.keywords.get("on")
    frequency = _FREQUENCY.fullmatch(rule) if type(rule) is str else None
    if frequency is None or len(call.args) > 1:
        raise NotAllowed('resamples by something other than a unit of time, such as "D" or "15min"')
    dates = table.index if on is None else _column(table, on)
    kind = getattr(dates.dtype, "kind", "")
    if kind == "m" or str(dates.dtype).startswith("period"):
        raise NotAllowed("resamples by something other than dates")
    # For other labels, pandas raises an error that explains itself.
    if kind == "M" and len(dates):
        seconds = (dates.max() - dates.min()).total_seconds()
        intervals = seconds / (int(frequency["count"] or 1) * _UNITS[frequency["unit"]]) + 2
        cells = intervals * len(columns(table))
        require_length(cells, max(_MAX_BINS, size(table)), "cells", ASSIGN)
        call.budget.spend(
            _PANDAS_CALL + (cells if cells > 0 else 0)
        )  # no number if no date is known


def _check_assign(call: AllowedCall) -> None:
    """Allow only new columns that are a number, or a column with the labels of the table."""
    if call.args:
        raise NotAllowed("passes positional arguments to .assign()")
    require_length(len(call.keywords), _MAX_ASSIGNED, "columns with .assign()")
    for value in call.keywords.values():
        is_column = family(value) == "series" and value.index.equals(call.owner.index)
        if not is_column and family(value) not in _ASSIGNED:
            raise NotAllowed(
                "adds a column with .assign() that is neither a number nor made of a column of the table"
            )
    call.budget.spend(len(call.keywords) * (_PANDAS_CALL + len(call.owner) / 20))


def _check_sample(call: AllowedCall) -> None:
    if len(call.args) > 1 or type(call.keywords.get("random_state")) is not int:
        advice = "Write random_state=0, so that a run sends the rows that its dry run shows"
        raise NotAllowed("takes rows at random", advice)


def _check_dtype(call: AllowedCall) -> None:
    given = call.argument(0, "dtype")
    only_in_pandas = {"str", "string", "category"} if family(call.owner) not in PANDAS else ()
    if type(given) is not str or not _DTYPE.fullmatch(given) or given in only_in_pandas:
        raise NotAllowed("converts to a type that is not allowed")


def _check_quantiles(call: AllowedCall) -> None:
    given = call.argument(0, "percentiles" if call.name == "describe" else "q", ())
    require_length(size(given), 100, "quantiles")


def require_numbers(table: Any) -> None:
    """Raise `NotAllowed` if a column has many or long texts: adding those up takes quadratic time."""
    for column in columns(table) if family(table) != "index" else ():
        if str(column.dtype) == "object" or "str" in str(column.dtype):
            texts = [cell for cell in column.array[:1000] if type(cell) is str]
            if len(column) > 1000 or len(column) * sum(map(len, texts)) > 200 * MAX_TEXT:
                raise NotAllowed(
                    "adds up long texts, or objects of over 1,000 rows (numeric_only=True omits them)"
                )


def _check_output(call: AllowedCall) -> None:
    if call.args and call.name != "to_dict":  # The first positional argument is a file.
        raise NotAllowed(f"may write a file: .{call.name}() takes no positional arguments here")
    if type(separator := call.keywords.get("sep", ",")) is not str or len(separator) != 1:
        raise NotAllowed("has a separator that is not one character")
    if whole(call.keywords.get("indent", 0)) > 16:
        raise NotAllowed("indents by more than 16 spaces")


def _check_shape(call: AllowedCall) -> None:
    rows, width = call.owner.shape
    # A column for each row is slow to make.
    call.budget.spend(rows * (200 if call.name == "transpose" else width**2 / 10))


def _require_few_groups(call: AllowedCall) -> None:
    """Raise `NotAllowed` where pandas would make a group for each combination of categories."""
    table, by, levels = call.owner, call.argument(0, "by"), call.keywords.get("level")
    if call.name == "groupby" and (len(call.args) > 1 or call.keywords.get("axis", 0) != 0):
        raise NotAllowed("groups by more than one positional argument or along an axis")
    if call.name == "value_counts":
        by = call.argument(0, "subset", list(table.columns)) if family(table) == "frame" else None
    keys = [_grouping_key(table, key) for key in _listed(by)]
    keys += [table.index.get_level_values(level) for level in _listed(levels)]
    if call.keywords.get("observed") is not True and any(map(_is_category, keys)):
        require_length(prod(_groups(key, len(table)) for key in keys), MAX_ITEMS, "groups")


def _listed(keys: Any) -> Sequence[Any]:
    return keys if family(keys) in SEQUENCES else [key for key in (keys,) if key is not None]


def _grouping_key(table: Any, key: Any) -> Any:
    """Return what a table is grouped by: an array, a column, a level of its labels, or None."""
    if family(key) in ARRAYS:
        return key
    if family(table) == "frame" and key in table.columns:
        return table[key]
    return table.index.get_level_values(key) if key in table.index.names else None


def _is_category(key: Any) -> bool:
    return str(getattr(key, "dtype", "")) == "category"


def _groups(key: Any, rows: int) -> int:
    """Return how many groups one key makes at most."""
    if _is_category(key):
        return max(1, len(key.dtype.categories))
    return int(key.nunique(dropna=False)) if family(key) in {"series", "index"} else rows


def _check_pattern(call: AllowedCall) -> None:
    """Allow only patterns that are plain texts: a regular expression may take forever."""
    if call.name not in {"contains", "replace", "split", "count"}:
        return
    pattern = call.argument(0, "pat", call.keywords.get("pattern", ""))
    is_literal = call.keywords.get("regex") is False or call.keywords.get("literal") is True
    if type(pattern) is not str or not (is_literal or not _REGEX.search(pattern)):
        raise NotAllowed("searches with a regular expression")
    new = call.argument(1, "repl", "")
    if call.name == "replace" and (not isinstance(new, str) or len(new) > 8 * len(pattern)):
        raise NotAllowed("makes the texts of a column much longer")


_CHECKS: Mapping[str, Callable[[AllowedCall], None]] = {
    **dict.fromkeys(("str", "bytes"), _check_text),
    **dict.fromkeys(("list", "tuple", "set", "dict", "counter", "view"), _check_container),
    **dict.fromkeys((*ARRAYS, "groups", "window"), _check_cells),
    **dict.fromkeys(("texts", "pl_texts"), _check_pattern),
    "decimal": _check_decimal, "range": _check_range,
    ".strftime": _check_strftime, "pl_dates.to_string": _check_strftime,
    ".agg": _check_agg, ".assign": _check_assign, ".sample": _check_sample,
    ".astype": _check_dtype, ".quantile": _check_quantiles, ".describe": _check_quantiles,
    **dict.fromkeys((".corr", ".cov", "frame.transpose", "pl_frame.transpose"), _check_shape),
    **dict.fromkeys((".day_name", ".month_name", ".write_csv", ".write_json"), _require_no_arguments),
    **dict.fromkeys((f".{name}" for name in _TO_TEXT.split()), _check_output),
    ".merge": _check_merge, ".pivot": _check_pivot, ".pivot_table": _check_pivot,
    ".resample": _check_resample, ".groupby": _require_few_groups, ".value_counts": _require_few_groups,
}  # fmt: skip
