"""The attributes and methods that an expression in a prompt may use, by type.

A method is listed when it changes nothing, reads and writes no file, calls no function that it is
given, and returns no more than its input, or when a check below bounds what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_magic.prompts.known_types import (
    ARRAYS,
    MAX_ITEMS,
    MAX_TEXT,
    PANDAS,
    SEQUENCES,
    Budget,
    Refused,
    classes_of,
    family,
    known,
    own_names,
    require_plain,
    require_plain_cells,
    require_plain_keys,
    size,
    whole,
)

Arguments = Sequence[Any]
Keywords = Mapping[str, Any]
Check = Callable[[Any, Arguments, Keywords, Budget], None]


def _words(text: str) -> frozenset[str]:
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
    "int": _words("real imag numerator denominator"),
    "float": _words("real imag"),
    "complex": _words("real imag"),
    "decimal": _words("real imag"),
    "fraction": _words("numerator denominator real imag"),
    "uuid": _words("hex int urn version variant"),
    "slice": _words("start stop step"),
    "range": _words("start stop step"),
    "list": _words("maxlen"),
    "date": _words("year month day"),
    "datetime": _words(f"{_DATE_FIELDS} tzinfo fold tz value"),
    "time": _words("hour minute second microsecond tzinfo fold"),
    "timedelta": _words("days seconds microseconds nanoseconds components unit value"),
    "period": _words(f"{_DATE_FIELDS} start_time end_time freqstr ordinal"),
    "interval": _words("left right mid length closed closed_left closed_right is_empty"),
    "path": _words("name stem suffix suffixes parent parts root anchor drive"),
    "dtype": _words("name kind itemsize char str names shape ndim type index categories ordered"),
    "array": _words("shape size ndim dtype T real imag nbytes itemsize"),
    "scalar": _words("shape size ndim dtype T real imag nbytes itemsize"),
    "tensor": _words("shape ndim dtype device requires_grad T mT real is_cuda"),
    "frame": _words("shape size columns index dtypes ndim empty T values axes loc iloc at iat"),
    "series": _words(
        """shape size index dtype name ndim empty values T loc iloc at iat str dt is_unique hasnans
        is_monotonic_increasing is_monotonic_decreasing nbytes"""
    ),
    "index": _words(
        f"""shape size dtype name names nlevels ndim empty values is_unique hasnans T str nbytes
        is_monotonic_increasing is_monotonic_decreasing inferred_type start stop step
        {_DATE_FIELDS}"""
    ),
    "groups": _words("ngroups ndim"),
    "dates": _words(f"{_DATE_FIELDS} date time days seconds microseconds nanoseconds components"),
    "pl_frame": _words("shape height width columns dtypes schema"),
    "pl_series": _words("shape name dtype str dt"),
}  # fmt: skip

METHODS: dict[str, frozenset[str]] = {
    "int": _words("bit_length bit_count conjugate is_integer as_integer_ratio"),
    "float": _words("is_integer hex conjugate as_integer_ratio"),
    "complex": _words("conjugate"),
    "decimal": _words(
        """is_nan is_infinite is_finite is_signed is_zero adjusted copy_abs copy_negate normalize
        sqrt quantize to_eng_string"""
    ),
    "fraction": _words("limit_denominator is_integer as_integer_ratio"),
    "str": _words(
        """capitalize casefold center count encode endswith expandtabs find index isalnum isalpha
        isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper
        join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
        rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"""
    ),
    "bytes": _words(
        """count decode endswith find hex index isalnum isalpha isascii isdigit lower lstrip
        partition removeprefix removesuffix rfind rstrip split splitlines startswith strip title
        upper"""
    ),
    "list": _words("index count copy"),
    "tuple": _words("index count numel"),
    "range": _words("index count"),
    "dict": _words("get keys values items copy"),
    "counter": _words("get keys values items copy most_common total"),
    "set": _words(
        """copy union intersection difference symmetric_difference issubset issuperset
        isdisjoint"""
    ),
    "view": _words("isdisjoint"),
    "date": _words("isoformat strftime weekday isoweekday isocalendar toordinal ctime replace"),
    "datetime": _words(
        """isoformat strftime weekday isoweekday isocalendar toordinal ctime replace date time
        timestamp utcoffset tzname timetz day_name month_name normalize to_pydatetime"""
    ),
    "time": _words("isoformat strftime replace utcoffset tzname"),
    "timedelta": _words("total_seconds isoformat to_pytimedelta"),
    "period": _words("strftime to_timestamp"),
    "path": _words(
        """as_posix is_absolute with_suffix with_name with_stem joinpath relative_to
        is_relative_to"""
    ),
    "array": _words(
        f"""{_STATISTICS} argmin argmax round all any cumsum cumprod prod tolist item copy flatten
        ravel reshape transpose squeeze astype nonzero clip diagonal argsort conj swapaxes"""
    ),
    "scalar": _words("item round conj tolist all any min max mean sum std is_integer astype"),
    "tensor": _words(
        f"{_STATISTICS} argmin argmax item tolist numel dim size all any abs round prod norm"
    ),
    "frame": _words(
        f"""{_IN_COLUMNS} {_AS_TEXT} head tail copy keys get isna isnull notna notnull dropna drop
        reset_index set_index select_dtypes memory_usage transpose groupby rolling expanding corr
        cov astype"""
    ),
    "series": _words(
        f"""{_IN_COLUMNS} {_AS_TEXT} head tail copy keys get isna isnull notna notnull dropna
        unique prod argmin argmax tolist to_list to_frame reset_index item groupby rolling expanding
        astype memory_usage drop"""
    ),
    "index": _words(
        """tolist to_list unique nunique min max isin value_counts copy get_level_values
        sort_values argmin argmax isna notna duplicated drop_duplicates day_name month_name
        strftime to_series to_frame"""
    ),
    "groups": _words(
        f"{_STATISTICS} count size nunique first last head tail prod quantile idxmin idxmax describe"
    ),
    "window": _words(f"{_STATISTICS} count"),
    "texts": _words(
        """len lower upper strip lstrip rstrip title capitalize swapcase casefold contains
        startswith endswith replace split get slice count find isdigit isalpha isalnum isnumeric
        isdecimal isspace islower isupper istitle removeprefix removesuffix"""
    ),
    "dates": _words("strftime day_name month_name total_seconds normalize isocalendar"),
    "pl_frame": _words(
        f"""head tail limit slice describe {_STATISTICS} null_count n_unique sort unique is_empty
        get_column item row rows to_dicts select drop filter group_by is_duplicated drop_nulls
        quantile get_columns get_column_index top_k bottom_k reverse transpose write_csv
        write_json"""
    ),
    "pl_series": _words(
        f"""{_STATISTICS} len head tail limit n_unique unique value_counts sort to_list is_null
        is_not_null null_count round abs product arg_min arg_max item is_empty describe quantile
        drop_nulls is_in is_between all any cum_sum cum_max cum_min diff rank reverse mode slice
        top_k bottom_k to_frame filter is_unique is_duplicated"""
    ),
    "pl_groups": _words(f"{_STATISTICS} len count first last n_unique head tail all quantile"),
    "pl_texts": _words(
        """len_chars len_bytes to_uppercase to_lowercase contains starts_with ends_with
        strip_chars head tail slice"""
    ),
    "pl_dates": _words(
        """year month day hour minute second weekday week quarter ordinal_day date time
        total_seconds total_minutes total_hours total_days to_string strftime"""
    ),
}  # fmt: skip

KEYWORDS = _words(
    """axis ddof decimals keepdims n ascending by numeric_only skipna dropna level sort as_index
    observed normalize columns subset keep q periods index orient indent header lines sep drop
    default reverse start end step maxsplit keepends encoding errors old new count prefix suffix
    include exclude percentiles lower upper min max inclusive method pct pat case regex repl na stop
    value values descending nulls_last named offset length literal timespec dim keepdim window
    min_periods center maintain_order column row labels fold tzinfo year month day hour minute
    second microsecond left right"""
)
# What a method takes for a size or a function, whatever its type.
_ENCODINGS = _words("utf-8 utf8 ascii latin-1 latin1 utf-16 utf-32 cp1252 utf-8-sig")
_ON_ERROR = _words("strict ignore replace")
_DTYPE = re.compile(r"(u?int|float|complex)(8|16|32|64|128)?|bool|str|string|category")
_REGEX = re.compile(r"[.^$*+?{}\[\]\\|()]")
# glibc takes a width between the percent sign and the letter.
_STRFTIME = re.compile(r"(?:[^%]|%[-_0^#]?[a-zA-Z%:])*")
_SHAPE_ONLY = _words(
    """head tail copy keys get isna isnull notna notnull transpose reset_index drop tolist
    to_list to_frame memory_usage size ngroups item to_series get_level_values select_dtypes"""
)
_HEAVY = _words(
    """describe nunique unique value_counts sort_values sort_index sort argsort rank mode duplicated
    drop_duplicates isin groupby group_by first last head tail size count median quantile n_unique
    astype tolist to_list to_dict to_csv to_json to_string rows to_dicts strftime day_name"""
)
_PANDAS_CALL = 5000  # what pandas does for a small table takes about as long as so many elements
_TAKES_ARRAYS = _words("isin is_in groupby filter")
_ADDS = _words("sum cumsum prod cumprod")
_SLOW = _words("to_string to_csv to_json to_markdown to_html to_dict tolist to_list rows to_dicts")


def call(value: Any, name: str, args: Arguments, keywords: Keywords, budget: Budget) -> Any:
    """Call a listed method of a value of a known type; raises `Refused` for any other."""
    kind, base = known(value)
    if name not in METHODS.get(kind, ()):
        raise Refused(f"calls .{name}() of a {type(value).__name__}, which is not on the list")
    require_own(value, base, name)
    if extra := sorted(set(keywords) - KEYWORDS):
        raise not_an_argument(extra[0], f".{name}()")
    for given in (*args, *keywords.values()):
        if family(given) in ARRAYS and name not in _TAKES_ARRAYS:
            raise Refused(f"passes an array or a table to .{name}()")
        require_plain(given, budget)
    for check in (_BY_FAMILY.get(kind), _CHECKS.get((kind, name))):
        if check is not None:
            check(value, args, {**keywords, "": name}, budget)
    return getattr(base, name)(value, *args, **keywords)


def not_an_argument(keyword: str, called: str) -> Refused:
    """Return the refusal of an argument by name that is not on the list."""
    return Refused(f"passes {keyword}= to {called}, and {keyword}= is not an allowed argument")


def require_own(value: Any, base: type, name: str) -> None:
    """Raise `Refused` if a subclass of a known type overrides an attribute of it."""
    classes = classes_of(value)
    for kind in classes[: classes.index(base)]:
        if name in own_names(kind):
            raise Refused(f"would run .{name} of your class {kind.__name__}")


def argument(args: Arguments, keywords: Keywords, place: int, name: str, default: Any) -> Any:
    """Return an argument that may be given by position or by name."""
    return args[place] if len(args) > place else keywords.get(name, default)


def require_length(length: float, most: int = MAX_TEXT, unit: str = "characters") -> None:
    """Raise `Refused` if a result would have more than `most` elements."""
    if length > most:
        raise Refused(f"would make more than {most:,} {unit}", advice="")


def require_strftime(template: object) -> None:
    """Raise `Refused` unless a date format is short and without widths."""
    if type(template) is not str or len(template) > 200 or not _STRFTIME.fullmatch(template):
        raise Refused("has a date format with widths or over 200 characters")


# -- checks: str and bytes ------------------------------------------------------------------------


def _texts(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    """Searching takes, at worst, the length of the text times that of what is searched."""
    given = sum(len(arg) for arg in (*args, *keywords.values()) if isinstance(arg, (str, bytes)))
    budget.spend(len(value) * (given + 10) / 1000)


def _padded(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    require_length(whole(argument(args, keywords, 0, "width", 0)))


def _expanded(value: str, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    width = whole(argument(args, keywords, 0, "tabsize", 8))
    require_length(len(value) + value.count("\t") * width)


def _replaced(value: str, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    old, new = argument(args, keywords, 0, "old", ""), argument(args, keywords, 1, "new", "")
    if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        require_length(len(value) + value.count(old) * (len(new) - len(old)))


def _joined(value: str, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    parts = args[0] if args else ()
    if family(parts) in ARRAYS:
        raise Refused("joins a table or an array, which is not on the list")
    if family(parts) == "str":
        require_length(len(parts) * (1 + len(value)))
    if family(parts) in {"list", "tuple", "set", "dict", "counter", "view"}:
        length = sum(len(part) for part in parts if isinstance(part, str))
        require_length(length + len(value) * len(parts))


def _encoded(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    encoding = argument(args, keywords, 0, "encoding", "utf-8")
    errors = argument(args, keywords, 1, "errors", "strict")
    if encoding not in _ENCODINGS or errors not in _ON_ERROR:
        raise Refused("names an encoding or an error handler that is not on the list")


def _separated(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    require_length(len(value), 10 * MAX_TEXT)


# -- checks: numbers and dates --------------------------------------------------------------------


def _small_decimal(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    for number in (value, *args):
        if family(number) == "decimal" and abs(number.adjusted()) > 1000:
            raise Refused("has a number with an exponent over 1,000")


def _no_arguments(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    if args or set(keywords) > {""}:
        raise Refused("passes arguments to a method that is allowed without them")


def _strftime(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    require_strftime(args[0] if args else None)
    if len(args) > 1:
        raise Refused("passes more than a format to a date")


# -- checks: containers ---------------------------------------------------------------------------


def _plain_elements(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    """Methods that compare the elements run their code; the others only pass them on."""
    if keywords[""] == "get":
        require_plain_keys(value, budget)
    if keywords[""] not in {"get", "keys", "values", "items", "copy", "numel"}:
        require_plain(value, budget)
    elif keywords[""] == "copy":
        require_length(len(value), MAX_ITEMS, "elements")


def _range(value: range, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    """Of anything but an int, a range looks at each of its numbers."""
    if any(type(arg) is not int for arg in args):
        raise Refused("looks for something that is not an int in a range")


# -- checks: arrays -------------------------------------------------------------------------------


def _cells(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    name, cells = keywords[""], size(value)
    if name in _SLOW:
        require_length(cells, MAX_ITEMS, "elements")
    if name not in _SHAPE_ONLY or name in _SLOW:
        require_plain_cells(value, budget)
        budget.spend(cells / (2 if name in _HEAVY else 20))


def _frames(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    _cells(value, args, keywords, budget)
    budget.spend(_PANDAS_CALL * (10 if keywords[""] == "describe" else 1))
    if keywords[""] in _ADDS and keywords.get("numeric_only") is not True:
        require_numbers(value)
    if keywords[""] in {"groupby", "value_counts"}:
        _require_few_groups(value, args, keywords)


def _grouped(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    table = value.obj
    _cells(table, args, keywords, budget)
    budget.spend(_PANDAS_CALL)
    if keywords[""] in _ADDS and keywords.get("numeric_only") is not True:
        require_numbers(table)
    if keywords[""] == "describe":
        budget.spend(value.ngroups * 5000)


def require_numbers(value: Any) -> None:
    """Raise `Refused` if a long column has texts: adding those up takes quadratic time."""
    if family(value) == "index" or len(value) <= 1000:
        return
    types = list(value.dtypes) if family(value) == "frame" else [value.dtype]
    if any(str(dtype) == "object" or "str" in str(dtype) for dtype in types):
        raise Refused("adds up texts or objects of over 1,000 rows (numeric_only=True leaves them)")


def _require_few_groups(value: Any, args: Arguments, keywords: Keywords) -> None:
    """Raise `Refused` where a group for each combination of categories would be made."""
    if keywords[""] == "groupby":
        if len(args) > 1 or keywords.get("axis", 0) != 0:
            raise Refused("groups by more than one positional argument or along an axis")
        if keywords.get("observed") is True:
            return
        by, level = argument(args, keywords, 0, "by", None), keywords.get("level")
        keys = _key_columns(value, by, False) + _key_columns(value, level, True)
    elif family(value) == "frame":
        keys = _key_columns(
            value, argument(args, keywords, 0, "subset", list(value.columns)), False
        )
    else:
        return
    if any(str(getattr(key, "dtype", "")) == "category" for key in keys):
        groups = 1
        for key in keys:
            groups *= _distinct(key, len(value))
        require_length(groups, MAX_ITEMS, "groups")


def _key_columns(value: Any, keys: Any, levels_only: bool) -> list[Any]:
    """Return what a table is grouped by: columns, levels of its labels, or arrays that are given."""
    columns = []
    index = value.index
    for key in keys if family(keys) in SEQUENCES else [keys]:
        if family(key) in ARRAYS:
            columns.append(key)
        elif family(value) == "frame" and not levels_only and key in value.columns:
            columns.append(value[key])
        elif key in index.names or (levels_only and type(key) is int):
            columns.append(index.get_level_values(key))
        else:
            columns.append(None)
    return [] if keys is None else columns


def _distinct(key: Any, rows: int) -> int:
    """Return how many groups one key makes at most."""
    if str(getattr(key, "dtype", "")) == "category":
        return max(1, len(key.dtype.categories))
    return int(key.nunique(dropna=False)) if family(key) in {"series", "index"} else rows


def _text_only(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    """The first positional argument of these methods is a file."""
    if args and keywords[""] != "to_dict":
        raise Refused(f"may write a file: .{keywords['']}() takes no positional arguments here")
    if type(separator := keywords.get("sep", ",")) is not str or len(separator) != 1:
        raise Refused("has a separator that is not one character")
    if whole(keywords.get("indent", 0)) > 16:
        raise Refused("indents by more than 16 spaces")


def _spread(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    """A transposed table has a column for each row, which is slow to make."""
    budget.spend(value.shape[0] * 200)


def _correlated(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    budget.spend(value.shape[0] * value.shape[1] ** 2 / 10)


def _few(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    given = argument(args, keywords, 0, "q", ())
    require_length(size(given) if given is not None else 0, 100, "quantiles")


def _dtype(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    given = argument(args, keywords, 0, "dtype", None)
    if not isinstance(given, str) or not _DTYPE.fullmatch(given):
        raise Refused("converts to a type that is not on the list")
    if given in {"str", "string", "category"} and family(value) not in PANDAS:
        raise Refused("converts to a type that is not on the list")


def _series_texts(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    """Only patterns that are plain texts: a regular expression may take forever."""
    name = keywords[""]
    pattern = argument(args, keywords, 0, "pat", "")
    if name in {"contains", "replace", "split", "count"} and (
        not isinstance(pattern, str) or not pattern or _REGEX.search(pattern)
    ):
        plain = keywords.get("regex") is False and isinstance(pattern, str) and pattern
        if not plain and not (name == "split" and pattern == ""):
            raise Refused("searches with a regular expression")
    new = argument(args, keywords, 1, "repl", "")
    if name == "replace" and (not isinstance(new, str) or len(new) > 8 * len(pattern)):
        raise Refused("makes the texts of a column much longer")


def _polars_file(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    _no_arguments(value, args, keywords, budget)
    require_length(size(value), MAX_ITEMS, "elements")


def _polars_pattern(value: Any, args: Arguments, keywords: Keywords, budget: Budget) -> None:
    pattern = argument(args, keywords, 0, "pattern", "")
    if keywords.get("literal") is not True and _REGEX.search(str(pattern)):
        raise Refused("searches with a regular expression")


_BY_FAMILY: dict[str, Check] = {
    "str": _texts, "bytes": _texts, "decimal": _small_decimal, "range": _range,
    "list": _plain_elements, "tuple": _plain_elements, "set": _plain_elements,
    "dict": _plain_elements, "counter": _plain_elements, "view": _plain_elements,
    "array": _cells, "tensor": _cells, "pl_frame": _cells, "pl_series": _cells,
    "index": _cells, "frame": _frames, "series": _frames, "groups": _grouped, "window": _grouped,
    "texts": _series_texts,
}  # fmt: skip
_CHECKS: dict[tuple[str, str], Check] = {
    ("str", "center"): _padded, ("str", "ljust"): _padded, ("str", "rjust"): _padded,
    ("str", "zfill"): _padded, ("str", "expandtabs"): _expanded, ("str", "replace"): _replaced,
    ("str", "join"): _joined, ("str", "encode"): _encoded, ("bytes", "decode"): _encoded,
    ("str", "split"): _separated, ("str", "rsplit"): _separated,
    ("str", "splitlines"): _separated, ("bytes", "split"): _separated,
    **{(kind, "strftime"): _strftime
       for kind in ("date", "datetime", "time", "period", "index", "dates", "pl_dates")},
    ("pl_dates", "to_string"): _strftime,
    **{(kind, name): _no_arguments for kind in ("datetime", "index", "dates")
       for name in ("day_name", "month_name")},
    **{(kind, name): _text_only for kind in ("frame", "series") for name in _AS_TEXT.split()},
    **{("pl_frame", name): _polars_file for name in ("write_csv", "write_json")},
    ("frame", "transpose"): _spread, ("pl_frame", "transpose"): _spread,
    ("frame", "corr"): _correlated, ("frame", "cov"): _correlated,
    **{(kind, "quantile"): _few for kind in ("frame", "series", "groups", "pl_frame", "pl_groups")},
    **{(kind, "astype"): _dtype for kind in ("array", "scalar", "frame", "series")},
    ("pl_texts", "contains"): _polars_pattern,
}  # fmt: skip
