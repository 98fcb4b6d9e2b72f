"""The rows of the data of a map: lists, dicts, iterators, columns, tables and data sets."""

from __future__ import annotations

import collections
import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_magic.errors import OptionError, first_line
from llm_magic.prompts.trusted_types import family

if TYPE_CHECKING:
    import narwhals.stable.v2 as nw

# The first rows of a list or an iterator whose keys are the columns.
_PEEKED = 100
# Of an iterator, so many of the first and the latest rows can be shown again.
_SHOWN, _LATEST = 10, 500


class Row(NamedTuple):
    """One row: its label in the data, its value, and the values of its columns by name."""

    index: Any
    item: Any
    columns: Mapping[str, Any]


class Record(dict[str, Any]):
    """A row of a table for a function: a dict, whose values are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"The row has no column {name!r}.") from None


class Rows(ABC):
    """The rows of some data; they are read once, in order.

    Attributes:
        total: The number of rows; None where only reading them shows it.
        columns: The names of the columns, or the keys of the first rows if these are dicts.
        is_table: Whether the result is a table with one more column.
        repeats_labels: Whether several rows may have the same label.
    """

    total: int | None = None
    columns: tuple[str, ...] = ()
    is_table = False
    repeats_labels = False

    @abstractmethod
    def __iter__(self) -> Iterator[Row]:
        """Yield the rows in order."""

    @abstractmethod
    def sample(self, count: int) -> Rows:
        """Return about `count` rows that are spread over the data; the first ones of an iterator."""

    def at(self, _position: int) -> Row | None:
        """Return a row again, to show it; None where its data is no longer there."""
        return None

    def labels(self) -> Sequence[Any] | None:
        """Return the labels of the rows; None where they are their numbers."""
        return None

    def with_columns(self, columns: Mapping[str, list[Any]]) -> Any:
        """Return a new table with the rows and more columns; raises `OptionError` if there is none."""
        raise OptionError("The data of this map is no table. Use list(mapped) for the answers.")


def rows_of(data: Any) -> Rows:
    """Return the rows of `data`; raises `OptionError` for what has none."""
    if data is None:
        raise OptionError(
            "The data is None. Use a list, a dict, an iterator, a Series, a DataFrame or a data set, as in"
            " llm.map(PROMPT, DATA)."
        )
    if isinstance(data, (str, bytes, bytearray)):
        raise OptionError("The data is a text. To map over one text, put it into a list: [text].")
    if isinstance(data, Mapping) and hasattr(data, "column_names"):
        first = next(iter(data), "")
        raise OptionError(f"The data has splits: {', '.join(data)}. Choose one: data[{first!r}].")
    if isinstance(data, Mapping):
        return _DictRows(data)
    if family(data) == "lazy":
        raise OptionError("The data is a lazy table. Call its collect() first.")
    if type(data).__module__.partition(".")[0] in {"pandas", "polars", "pyarrow", "modin", "cudf"}:
        return _of_table(data)
    names = getattr(data, "column_names", None)
    if names is not None and hasattr(data, "__iter__") and not callable(names):
        return _DatasetRows(data, tuple(names))
    has_rows = getattr(data, "ndim", 1) != 0
    if isinstance(data, Sequence) or (family(data) == "array" and has_rows):
        return _ListRows(data)
    if isinstance(data, Iterable) and has_rows:
        return _IteratorRows(data)
    raise OptionError(
        f"Data of type {type(data).__name__} has no rows. Use a list, a dict, an iterator, a Series, a"
        " DataFrame or a data set."
    )


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` positions from the first to the last of `total`, evenly spread."""
    if count >= total:
        return list(range(total))
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _label_at(index: Any, position: int) -> Any:
    """Return a label as iterating over an index yields it: what `index[position]` returns may be of NumPy."""
    return next(iter(index[position : position + 1]))


def _columns_of(item: Any) -> Mapping[str, Any]:
    """Return the values of an item by name, if it is a dict with names as keys."""
    return item if isinstance(item, dict) else {}


def _names(items: Iterable[Any]) -> tuple[str, ...]:
    """Return the names that are keys of any of some items."""
    names = (name for item in items for name in _columns_of(item) if isinstance(name, str))
    return tuple(dict.fromkeys(names))


class _ListRows(Rows):
    """A sequence; the positions are those of a sample."""

    def __init__(self, data: Sequence[Any], positions: Sequence[int] | None = None) -> None:
        self._data = data
        self._positions: Sequence[int] = range(len(data)) if positions is None else positions
        self.total = len(self._positions)
        self.columns = _names(itertools.islice(data, _PEEKED))

    def __iter__(self) -> Iterator[Row]:
        data = self._data
        for position in self._positions:
            item = data[position]
            yield Row(position, item, _columns_of(item))

    def at(self, position: int) -> Row | None:
        if position >= min(self.total or 0, len(self._data)):
            return None
        position = self._positions[position]
        item = self._data[position]
        return Row(position, item, _columns_of(item))

    def sample(self, count: int) -> Rows:
        return _ListRows(self._data, spread(len(self._data), count))

    def labels(self) -> Sequence[Any] | None:
        return None if isinstance(self._positions, range) else self._positions


class _DictRows(Rows):
    """The values of a dict, labeled by their keys."""

    def __init__(self, data: Mapping[Any, Any]) -> None:
        self._data = data
        self.total = len(data)
        self.columns = _names(itertools.islice(data.values(), _PEEKED))

    def __iter__(self) -> Iterator[Row]:
        for key, item in self._data.items():
            yield Row(key, item, _columns_of(item))

    def at(self, position: int) -> Row | None:
        for key, item in itertools.islice(self._data.items(), position, position + 1):
            return Row(key, item, _columns_of(item))
        return None

    def sample(self, count: int) -> Rows:
        chosen, keys = spread(len(self._data), count), list(self._data)
        return _DictRows({keys[i]: self._data[keys[i]] for i in chosen})

    def labels(self) -> Sequence[Any]:
        return tuple(self._data)


class _ReadRows:
    """The first rows that were read, and the latest ones: they can be shown again."""

    def __init__(self) -> None:
        self._first: list[Row] = []
        self._latest: collections.deque[Row] = collections.deque(maxlen=_LATEST)

    def add(self, row: Row) -> Row:
        """Add a row and return it."""
        self._latest.append(row)
        if row.index < _SHOWN:
            self._first.append(row)
        return row

    def at(self, position: int) -> Row | None:
        """Return a row; None if it is neither one of the first nor of the latest."""
        rows = tuple(self._first if position < _SHOWN else self._latest)
        return next((row for row in rows if row.index == position), None)


class _IteratorRows(Rows):
    """An iterator or a generator, which is read as the answers need it."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._items = iter(data)
        self.total = len(data) if isinstance(data, Sized) else None
        # Read before the template is checked, so that the names in it are known.
        self._first = list(itertools.islice(self._items, 1))
        self._read = _ReadRows()
        self.columns = _names(self._first)

    def __iter__(self) -> Iterator[Row]:
        first, self._first = self._first, []
        for index, item in enumerate(itertools.chain(first, self._items)):
            yield self._read.add(Row(index, item, _columns_of(item)))

    def at(self, position: int) -> Row | None:
        return self._read.at(position)

    def sample(self, count: int) -> Rows:
        return _ListRows(list(itertools.islice(itertools.chain(self._first, self._items), count)))


class _TableRows(Rows):
    """A DataFrame of any library that narwhals reads: pandas, polars, pyarrow and others."""

    is_table = True

    def __init__(self, frame: nw.DataFrame[Any]) -> None:
        self._frame = frame
        self.total = len(frame)
        self.columns = tuple(frame.columns)
        self.repeats_labels = _repeats_labels(frame.to_native())

    def __iter__(self) -> Iterator[Row]:
        records = self._frame.iter_rows(named=True, buffer_size=1_000)
        for index, record in zip(self._index(), records, strict=True):
            row = Record(record)
            yield Row(index, row, row)

    def _index(self) -> Any:
        native = self._frame.to_native()
        return native.index if family(native) == "frame" else range(len(self._frame))

    def labels(self) -> Sequence[Any] | None:
        return _labels_of(self._frame.to_native())

    def at(self, position: int) -> Row | None:
        if position >= len(self._frame):
            return None
        found = self._frame[position : position + 1].iter_rows(named=True)
        row = Record(next(iter(found)))
        return Row(_label_at(self._index(), position), row, row)

    def sample(self, count: int) -> Rows:
        return _TableRows(self._frame[spread(len(self._frame), count)])

    def with_columns(self, columns: Mapping[str, list[Any]]) -> Any:
        return with_columns(self._frame, columns)


class _SeriesRows(Rows):
    """A Series; its name is the name of its only column."""

    is_table = True

    def __init__(self, series: nw.Series[Any]) -> None:
        self._series = series
        self.total = len(series)
        name = series.name
        self.columns = (name,) if isinstance(name, str) and name else ()
        self.repeats_labels = _repeats_labels(series.to_native())

    def __iter__(self) -> Iterator[Row]:
        native = self._series.to_native()
        index = native.index if family(native) == "series" else range(len(self._series))
        # As a list: an iterator over a Series converts each value for itself.
        for label, item in zip(index, self._series.to_list(), strict=True):
            yield Row(label, item, {self.columns[0]: item} if self.columns else {})

    def labels(self) -> Sequence[Any] | None:
        return _labels_of(self._series.to_native())

    def at(self, position: int) -> Row | None:
        if position >= len(self._series):
            return None
        native, item = self._series.to_native(), self._series[position]
        label = _label_at(native.index, position) if family(native) == "series" else position
        return Row(label, item, {self.columns[0]: item} if self.columns else {})

    def sample(self, count: int) -> Rows:
        return _SeriesRows(self._series[spread(len(self._series), count)])

    def with_columns(self, columns: Mapping[str, list[Any]]) -> Any:
        series = self._series if self.columns else self._series.alias("item")
        return with_columns(series.to_frame(), columns)


class _DatasetRows(Rows):
    """A data set of Hugging Face's ``datasets``, or what iterates over dicts like one."""

    is_table = True

    def __init__(self, data: Any, names: tuple[str, ...]) -> None:
        self._data, self._read = data, _ReadRows()
        self.total = len(data) if isinstance(data, Sized) else None
        self.columns = names

    def __iter__(self) -> Iterator[Row]:
        for index, item in enumerate(self._data):
            row = Record(item)
            found = Row(index, row, row)
            yield self._read.add(found) if self.total is None else found

    def at(self, position: int) -> Row | None:
        if self.total is None:
            return self._read.at(position)
        if position >= self.total:
            return None
        row = Record(self._data[position])
        return Row(position, row, row)

    def sample(self, count: int) -> Rows:
        if self.total is None:
            return _ListRows([Record(item) for item in itertools.islice(self._data, count)])
        return _DatasetRows(self._data.select(spread(self.total, count)), self.columns)

    def with_columns(self, columns: Mapping[str, list[Any]]) -> Any:
        data = self._data
        if not hasattr(data, "add_column"):
            raise OptionError("This data set has no add_column. Use list(mapped) for the answers.")
        for name, values in columns.items():
            if name in self.columns:
                data = data.remove_columns(name)
            data = data.add_column(name, values)
        return data


def _of_table(data: Any) -> Rows:
    """Return the rows of a table or a column; raises `OptionError` for what narwhals does not read."""
    import narwhals.stable.v2 as nw

    if family(data) == "frame" and not data.columns.is_unique:
        twice = ", ".join(map(str, data.columns[data.columns.duplicated()].unique()[:5]))
        raise OptionError(
            f"Several columns have the same name: {twice}. Rename them, or keep the first of each name:"
            " df.loc[:, ~df.columns.duplicated()]."
        )
    try:
        native = nw.from_native(data, eager_only=True, allow_series=True)
    except Exception as error:  # noqa: BLE001 - narwhals and the library raise errors of their own
        if family(data) in {"frame", "pl_frame"} or not isinstance(data, Iterable):
            raise OptionError(f"The rows cannot be read: {first_line(error)}") from None
        return _ListRows(data) if isinstance(data, Sequence) else _IteratorRows(data)
    return _SeriesRows(native) if isinstance(native, nw.Series) else _TableRows(native)


def _repeats_labels(data: Any) -> bool:
    """Return whether rows of a table or a column of pandas have the same label."""
    return family(data) in {"frame", "series"} and not data.index.is_unique


def _labels_of(data: Any) -> Sequence[Any] | None:
    """Return the index of a table or a column of pandas; None for those of other libraries."""
    return tuple(data.index) if family(data) in {"frame", "series"} else None


def with_columns(frame: nw.DataFrame[Any], columns: Mapping[str, list[Any]]) -> Any:
    """Return a new table of the same library, with more columns; index and order are kept."""
    native = frame.to_native()
    if family(native) == "frame":
        # Not by `assign`: a column may be called self.
        native = native.copy()
        for name, values in columns.items():
            native[name] = values
        return native
    if family(native) == "pl_frame":
        return native.with_columns(*itertools.starmap(polars_column, columns.items()))
    import narwhals.stable.v2 as nw

    made = [
        nw.new_series(name, values, backend=frame.implementation)
        for name, values in columns.items()
    ]
    return frame.with_columns(*made).to_native()


def polars_column(name: str, values: list[Any]) -> Any:
    """Return a column of polars; values that have no common type stay Python objects."""
    import polars as pl

    if not values:
        return pl.Series(name, values)
    with contextlib.suppress(pl.exceptions.PolarsError, TypeError, OverflowError):
        # A Series would get the type of its first value, and lose a part of others.
        return pl.from_dicts([{name: value} for value in values], infer_schema_length=None)[name]
    return pl.Series(name, values, dtype=pl.Object)
