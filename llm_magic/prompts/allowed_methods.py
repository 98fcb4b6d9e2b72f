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
    MAX_ITEMS,
    MAX_TEXT,
    PANDAS,
    SEQUENCES,
    Budget,
    NotAllowed,
    classes_of,
    family,
    own_names,
    require_length,
    require_plain,
    require_plain_cells,
    require_plain_keys,
    require_small_exponent,
    size,
    trusted_type,
    whole,
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STATISTICS = "mean sum min max std var median"
_DATE_FIELDS = """year month day hour minute second microsecond nanosecond dayofweek day_of_week
    dayofyear day_of_year quarter is_leap_year is_month_end is_month_start is_quarter_end
    is_quarter_start is_year_end is_year_start days_in_month unit"""
_IN_COLUMNS = f"""{_STATISTICS} count nunique value_counts describe quantile idxmin idxmax skew kurt
    sem mode cumsum cumprod cummin cummax diff pct_change rank round abs clip isin between
    sort_values sort_index nlargest nsmallest drop_duplicates duplicated fillna all any"""
_AS_TEXT = "to_string to_csv to_json to_markdown to_html to_dict"

ATTRIBUTES: dict[str, frozenset[str]] = {
    "int": _names("real imag numerator denominator"),
    "float": _names("real imag"),
    "complex": _names("real imag"),
    "decimal": _names("real imag"),
    "fraction": _names("numerator denominator real imag"),
    "uuid": _names("hex int urn version variant"),
    "slice": _names("start stop step"),
    "range": _names("start stop step"),
    "list": _names("maxlen"),
    "date": _names("year month day"),
    "datetime": _names(f"{_DATE_FIELDS} tzinfo fold tz value"),
    "time": _names("hour minute second microsecond tzinfo fold"),
    "timedelta": _names("days seconds microseconds nanoseconds components unit value"),
    "period": _names(f"{_DATE_FIELDS} start_time end_time freqstr ordinal"),
    "interval": _names("left right mid length closed closed_left closed_right is_empty"),
    "path": _names("name stem suffix suffixes parent parts root anchor drive"),
    "dtype": _names("name kind itemsize char str names shape ndim type index categories ordered"),
    "array": _names("shape size ndim dtype T real imag nbytes itemsize"),
    "scalar": _names("shape size ndim dtype T real imag nbytes itemsize"),
    "tensor": _names("shape ndim dtype device requires_grad T mT real is_cuda"),
    "frame": _names("shape size columns index dtypes ndim empty T values axes loc iloc at iat"),
    "series": _names(
        """shape size index dtype name ndim empty values T loc iloc at iat str dt is_unique hasnans
        is_monotonic_increasing is_monotonic_decreasing nbytes"""
    ),
    "index": _names(
        f"""shape size dtype name names nlevels ndim empty values is_unique hasnans T str nbytes
        is_monotonic_increasing is_monotonic_decreasing inferred_type start stop step
        {_DATE_FIELDS}"""
    ),
    "groups": _names("ngroups ndim"),
    "dates": _names(f"{_DATE_FIELDS} date time days seconds microseconds nanoseconds components"),
    "pl_frame": _names("shape height width columns dtypes schema"),
    "pl_series": _names("shape name dtype str dt"),
}  # fmt: skip

METHODS: dict[str, frozenset[str]] = {
    "int": _names("bit_length bit_count conjugate is_integer as_integer_ratio"),
    "float": _names("is_integer hex conjugate as_integer_ratio"),
    "complex": _names("conjugate"),
    "decimal": _names(
        """is_nan is_infinite is_finite is_signed is_zero adjusted copy_abs copy_negate normalize
        sqrt quantize to_eng_string"""
    ),
    "fraction": _names("limit_denominator is_integer as_integer_ratio"),
    "str": _names(
        """capitalize casefold center count encode endswith expandtabs find index isalnum isalpha
        isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper
        join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
        rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"""
    ),
    "bytes": _names(
        """count decode endswith find hex index isalnum isalpha isascii isdigit lower lstrip
        partition removeprefix removesuffix rfind rstrip split splitlines startswith strip title
        upper"""
    ),
    "list": _names("index count copy"),
    "tuple": _names("index count numel"),
    "range": _names("index count"),
    "dict": _names("get keys values items copy"),
    "counter": _names("get keys values items copy most_common total"),
    "set": _names(
        """copy union intersection difference symmetric_difference issubset issuperset
        isdisjoint"""
    ),
    "view": _names("isdisjoint"),
    "date": _names("isoformat strftime weekday isoweekday isocalendar toordinal ctime replace"),
    "datetime": _names(
        """isoformat strftime weekday isoweekday isocalendar toordinal ctime replace date time
        timestamp utcoffset tzname timetz day_name month_name normalize to_pydatetime"""
    ),
    "time": _names("isoformat strftime replace utcoffset tzname"),
    "timedelta": _names("total_seconds isoformat to_pytimedelta"),
    "period": _names("strftime to_timestamp"),
    "path": _names(
        """as_posix is_absolute with_suffix with_name with_stem joinpath relative_to
        is_relative_to"""
    ),
    "array": _names(
        f"""{_STATISTICS} argmin argmax round all any cumsum cumprod prod tolist item copy flatten
        ravel reshape transpose squeeze astype nonzero clip diagonal argsort conj swapaxes"""
    ),
    "scalar": _names("item round conj tolist all any min max mean sum std is_integer astype"),
    "tensor": _names(
        f"{_STATISTICS} argmin argmax item tolist numel dim size all any abs round prod norm"
    ),
    "frame": _names(
        f"""{_IN_COLUMNS} {_AS_TEXT} head tail copy keys get isna isnull notna notnull dropna drop
        reset_index set_index select_dtypes memory_usage transpose groupby rolling expanding corr
        cov astype"""
    ),
    "series": _names(
        f"""{_IN_COLUMNS} {_AS_TEXT} head tail copy keys get isna isnull notna notnull dropna
        unique prod argmin argmax tolist to_list to_frame reset_index item groupby rolling expanding
        astype memory_usage drop"""
    ),
    "index": _names(
        """tolist to_list unique nunique min max isin value_counts copy get_level_values
        sort_values argmin argmax isna notna duplicated drop_duplicates day_name month_name
        strftime to_series to_frame"""
    ),
    "groups": _names(
        f"{_STATISTICS} count size nunique first last head tail prod quantile idxmin idxmax describe"
    ),
    "window": _names(f"{_STATISTICS} count"),
    "texts": _names(
        """len lower upper strip lstrip rstrip title capitalize swapcase casefold contains
        startswith endswith replace split get slice count find isdigit isalpha isalnum isnumeric
        isdecimal isspace islower isupper istitle removeprefix removesuffix"""
    ),
    "dates": _names("strftime day_name month_name total_seconds normalize isocalendar"),
    "pl_frame": _names(
        f"""head tail limit slice describe {_STATISTICS} null_count n_unique sort unique is_empty
        get_column item row rows to_dicts select drop filter group_by is_duplicated drop_nulls
        quantile get_columns get_column_index top_k bottom_k reverse transpose write_csv
        write_json"""
    ),
    "pl_series": _names(
        f"""{_STATISTICS} len head tail limit n_unique unique value_counts sort to_list is_null
        is_not_null null_count round abs product arg_min arg_max item is_empty describe quantile
        drop_nulls is_in is_between all any cum_sum cum_max cum_min diff rank reverse mode slice
        top_k bottom_k to_frame filter is_unique is_duplicated"""
    ),
    "pl_groups": _names(f"{_STATISTICS} len count first last n_unique head tail all quantile"),
    "pl_texts": _names(
        """len_chars len_bytes to_uppercase to_lowercase contains starts_with ends_with
        strip_chars head tail slice"""
    ),
    "pl_dates": _names(
        """year month day hour minute second weekday week quarter ordinal_day date time
        total_seconds total_minutes total_hours total_days to_string strftime"""
    ),
}  # fmt: skip

KEYWORDS = _names(
    """axis ddof decimals keepdims n ascending by numeric_only skipna dropna level sort as_index
    observed normalize columns subset keep q periods index orient indent header lines sep drop
    default reverse start end step maxsplit keepends encoding errors old new count prefix suffix
    include exclude percentiles lower upper min max inclusive method pct pat case regex repl na stop
    value values descending nulls_last named offset length literal timespec dim keepdim window
    min_periods center maintain_order column row labels fold tzinfo year month day hour minute
    second microsecond left right"""
)
# What a method takes for a size or a function, whatever its type.
_ENCODINGS = _names("utf-8 utf8 ascii latin-1 latin1 utf-16 utf-32 cp1252 utf-8-sig")
_ON_ERROR = _names("strict ignore replace")
_DTYPE = re.compile(r"(u?int|float|complex)(8|16|32|64|128)?|bool|str|string|category")
_REGEX = re.compile(r"[.^$*+?{}\[\]\\|()]")
# glibc takes a width between the percent sign and the letter.
_STRFTIME = re.compile(r"(?:[^%]|%[-_0^#]?[a-zA-Z%:])*")
_SHAPE_ONLY = _names(
    """head tail copy keys get isna isnull notna notnull transpose reset_index drop tolist
    to_list to_frame memory_usage size ngroups item to_series get_level_values select_dtypes"""
)
_HEAVY = _names(
    """describe nunique unique value_counts sort_values sort_index sort argsort rank mode duplicated
    drop_duplicates isin groupby group_by first last head tail size count median quantile n_unique
    astype tolist to_list to_dict to_csv to_json to_string rows to_dicts strftime day_name"""
)
_PANDAS_CALL = 5000  # pandas takes as long for a small table as for so many elements
_TAKES_ARRAYS = _names("isin is_in groupby filter")
_ADDS = _names("sum cumsum prod cumprod")
_SLOW = _names(f"{_AS_TEXT} tolist to_list rows to_dicts")
_ALLOWED_WITHOUT_CHECK = _names("get keys values items copy numel")


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A call of a listed method of a value, with arguments of trusted types."""

    owner: Any
    name: str
    args: Sequence[Any]
    keywords: Mapping[str, Any]
    budget: Budget

    @property
    def table(self) -> Any:
        """The array or the table: of groups the one that is grouped."""
        return self.owner.obj if family(self.owner) in {"groups", "window"} else self.owner

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name."""
        return (
            self.args[position] if len(self.args) > position else self.keywords.get(name, default)
        )


def call_method(
    owner: Any, name: str, args: Sequence[Any], keywords: Mapping[str, Any], budget: Budget
) -> Any:
    """Call a listed method of a value of a trusted type; raises `NotAllowed` for any other."""
    kind, base = trusted_type(owner)
    if name not in METHODS.get(kind, ()):
        raise NotAllowed(f"calls .{name}() of a {type(owner).__name__}, which is not on the list")
    require_own(owner, base, name)
    if extra := sorted(set(keywords) - KEYWORDS):
        raise not_an_argument(extra[0], f".{name}()")
    for given in (*args, *keywords.values()):
        if family(given) in ARRAYS and name not in _TAKES_ARRAYS:
            raise NotAllowed(f"passes an array or a table to .{name}()")
        require_plain(given, budget)
    call = MethodCall(owner, name, args, keywords, budget)
    for check in (_BY_FAMILY.get(kind), _BY_NAME.get(name), _BY_NAME.get(f"{kind}.{name}")):
        if check:
            check(call)
    return getattr(base, name)(owner, *args, **keywords)


def not_an_argument(keyword: str, called: str) -> NotAllowed:
    """Return the error for an argument by name that is not on the list."""
    return NotAllowed(f"passes {keyword}= to {called}, and {keyword}= is not an allowed argument")


def require_own(value: Any, base: type, name: str) -> None:
    """Raise `NotAllowed` if a subclass of a trusted type overrides an attribute of it."""
    classes = classes_of(value)
    for kind in classes[: classes.index(base)]:
        if name in own_names(kind):
            raise NotAllowed(f"would run .{name} of your class {kind.__name__}")


def require_strftime(template: object) -> None:
    """Raise `NotAllowed` unless a date format is short and without widths."""
    if type(template) is not str or len(template) > 200 or not _STRFTIME.fullmatch(template):
        raise NotAllowed("has a date format with widths or over 200 characters")


# -- numbers, texts, dates and containers ---------------------------------------------------------


def _check_text(call: MethodCall) -> None:
    text, given = call.owner, (*call.args, *call.keywords.values())
    # A search takes, at worst, the length of the text times that of what is searched.
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
            _check_join(text, call.argument(0, "", ()))
        case "encode" | "decode":
            _check_encoding(call)
        case "split" | "rsplit" | "splitlines":
            require_length(len(text), 10 * MAX_TEXT)


def _check_join(separator: str, parts: Any) -> None:
    kind = family(parts)
    if kind in ARRAYS:
        raise NotAllowed("joins a table or an array, which is not on the list")
    if kind == "str":
        require_length(len(parts) * (1 + len(separator)))
    if kind in {"list", "tuple", "set", "dict", "counter", "view"}:
        length = sum(len(part) for part in parts if isinstance(part, str))
        require_length(length + len(separator) * len(parts))


def _check_encoding(call: MethodCall) -> None:
    encoding, errors = call.argument(0, "encoding", "utf-8"), call.argument(1, "errors", "strict")
    if encoding not in _ENCODINGS or errors not in _ON_ERROR:
        raise NotAllowed("names an encoding or an error handler that is not on the list")


def _check_decimal(call: MethodCall) -> None:
    for number in (call.owner, *call.args):
        require_small_exponent(number)


def _check_container(call: MethodCall) -> None:
    """Check the elements, whose code runs in the methods that compare them."""
    if call.name == "get":
        require_plain_keys(call.owner, call.budget)
    if call.name not in _ALLOWED_WITHOUT_CHECK:
        require_plain(call.owner, call.budget)
    elif call.name == "copy":
        require_length(len(call.owner), MAX_ITEMS, "elements")


def _check_range(call: MethodCall) -> None:
    # For anything but an int, Python compares each number of a range.
    if any(type(arg) is not int for arg in call.args):
        raise NotAllowed("searches a range for something that is not an int")


def _require_no_arguments(call: MethodCall) -> None:
    if call.args or call.keywords:
        raise NotAllowed("passes arguments to a method that is allowed without them")


# -- arrays and tables ----------------------------------------------------------------------------


def _check_cells(call: MethodCall) -> None:
    table, cells = call.table, size(call.table)
    if call.name in _SLOW:
        require_length(cells, MAX_ITEMS, "elements")
    if call.name not in _SHAPE_ONLY or call.name in _SLOW:
        require_plain_cells(table, call.budget)
        call.budget.spend(cells / (2 if call.name in _HEAVY else 20))


def _check_dtype(call: MethodCall) -> None:
    given = call.argument(0, "dtype")
    is_known = isinstance(given, str) and _DTYPE.fullmatch(given)
    if not is_known or (
        given in {"str", "string", "category"} and family(call.owner) not in PANDAS
    ):
        raise NotAllowed("converts to a type that is not on the list")


def _check_quantiles(call: MethodCall) -> None:
    given = call.argument(0, "q", ())
    require_length(size(given) if given is not None else 0, 100, "quantiles")


def _check_pandas(call: MethodCall) -> None:
    _check_cells(call)
    calls = 1
    if call.name == "describe":
        calls = call.owner.ngroups + 1 if family(call.owner) == "groups" else 10
    call.budget.spend(_PANDAS_CALL * calls)
    if call.name in _ADDS and call.keywords.get("numeric_only") is not True:
        require_numbers(call.table)


def require_numbers(table: Any) -> None:
    """Raise `NotAllowed` if a long column has texts: adding those up takes quadratic time."""
    if family(table) == "index" or len(table) <= 1000:
        return
    dtypes = list(table.dtypes) if family(table) == "frame" else [table.dtype]
    if any(str(dtype) == "object" or "str" in str(dtype) for dtype in dtypes):
        raise NotAllowed(
            "adds up texts or objects of over 1,000 rows (numeric_only=True omits them)"
        )


def _check_output(call: MethodCall) -> None:
    if call.args and call.name != "to_dict":  # The first positional argument is a file.
        raise NotAllowed(f"may write a file: .{call.name}() takes no positional arguments here")
    if type(separator := call.keywords.get("sep", ",")) is not str or len(separator) != 1:
        raise NotAllowed("has a separator that is not one character")
    if whole(call.keywords.get("indent", 0)) > 16:
        raise NotAllowed("indents by more than 16 spaces")


def _check_polars_output(call: MethodCall) -> None:
    _require_no_arguments(call)
    require_length(size(call.owner), MAX_ITEMS, "elements")


def _check_transpose(call: MethodCall) -> None:
    call.budget.spend(call.owner.shape[0] * 200)  # A column for each row is slow to make.


def _check_correlation(call: MethodCall) -> None:
    rows, columns = call.owner.shape
    call.budget.spend(rows * columns**2 / 10)


def _check_strftime(call: MethodCall) -> None:
    require_strftime(call.argument(0, ""))
    if len(call.args) > 1:
        raise NotAllowed("passes more than a format to a date")


def _require_few_groups(call: MethodCall) -> None:
    """Raise `NotAllowed` where pandas would make a group for each combination of categories."""
    table = call.owner
    if call.name == "groupby":
        if len(call.args) > 1 or call.keywords.get("axis", 0) != 0:
            raise NotAllowed("groups by more than one positional argument or along an axis")
        if call.keywords.get("observed") is True:
            return
        keys = [_grouping_key(table, one) for one in _listed(call.argument(0, "by"))]
        levels = _listed(call.keywords.get("level"))
        keys += [_grouping_key(table, one, is_level=True) for one in levels]
    elif family(table) == "frame":
        columns = call.argument(0, "subset", list(table.columns))
        keys = [_grouping_key(table, one) for one in _listed(columns)]
    else:
        return
    if any(str(getattr(key, "dtype", "")) == "category" for key in keys):
        require_length(prod(_distinct(key, len(table)) for key in keys), MAX_ITEMS, "groups")


def _listed(keys: Any) -> Sequence[Any]:
    if keys is None:
        return []
    return keys if family(keys) in SEQUENCES else [keys]


def _grouping_key(table: Any, key: Any, *, is_level: bool = False) -> Any:
    """Return what a table is grouped by: an array, a column, a level of its labels, or None."""
    if family(key) in ARRAYS:
        return key
    if family(table) == "frame" and not is_level and key in table.columns:
        return table[key]
    if key in table.index.names or (is_level and type(key) is int):
        return table.index.get_level_values(key)
    return None


def _distinct(key: Any, rows: int) -> int:
    """Return how many groups one key makes at most."""
    if str(getattr(key, "dtype", "")) == "category":
        return max(1, len(key.dtype.categories))
    return int(key.nunique(dropna=False)) if family(key) in {"series", "index"} else rows


def _check_pattern(call: MethodCall) -> None:
    """Allow only patterns that are plain texts: a regular expression may take forever."""
    pattern, new = call.argument(0, "pat", ""), call.argument(1, "repl", "")
    if call.name in {"contains", "replace", "split", "count"}:
        is_text = isinstance(pattern, str) and bool(pattern)
        is_plain = is_text and (call.keywords.get("regex") is False or not _REGEX.search(pattern))
        if not is_plain and not (call.name == "split" and pattern == ""):
            raise NotAllowed("searches with a regular expression")
    if call.name == "replace" and (not isinstance(new, str) or len(new) > 8 * len(pattern)):
        raise NotAllowed("makes the texts of a column much longer")


def _check_polars_pattern(call: MethodCall) -> None:
    pattern = str(call.argument(0, "pattern", ""))
    if (
        call.name == "contains"
        and call.keywords.get("literal") is not True
        and _REGEX.search(pattern)
    ):
        raise NotAllowed("searches with a regular expression")


_BY_FAMILY: Mapping[str, Callable[[MethodCall], None]] = {
    **dict.fromkeys(("str", "bytes"), _check_text),
    **dict.fromkeys(("list", "tuple", "set", "dict", "counter", "view"), _check_container),
    **dict.fromkeys(("array", "tensor", "index", "pl_frame", "pl_series"), _check_cells),
    **dict.fromkeys(("frame", "series", "groups", "window"), _check_pandas),
    "decimal": _check_decimal, "range": _check_range, "texts": _check_pattern,
    "pl_texts": _check_polars_pattern,
}  # fmt: skip
_BY_NAME: Mapping[str, Callable[[MethodCall], None]] = {
    "strftime": _check_strftime, "pl_dates.to_string": _check_strftime,
    "day_name": _require_no_arguments, "month_name": _require_no_arguments,
    "astype": _check_dtype, "quantile": _check_quantiles,
    "corr": _check_correlation, "cov": _check_correlation,
    "frame.transpose": _check_transpose, "pl_frame.transpose": _check_transpose,
    "write_csv": _check_polars_output, "write_json": _check_polars_output,
    **{f"{kind}.{name}": _check_output for kind in ("frame", "series") for name in _AS_TEXT.split()},
    **{f"{kind}.{name}": _require_few_groups for kind in ("frame", "series")
       for name in ("groupby", "value_counts")},
}  # fmt: skip
