"""The rows of every kind of data, and the same shape out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from llm_magic.errors import OptionError
from llm_magic.session import Session
from llm_magic.session.map.rows import rows_of
from tests.scripted import ScriptedBackend, scripted_session, whole_answer

TEXTS = ["one", "two", "three"]
_LEVELS = pd.MultiIndex.from_tuples([("x", 1), ("y", 2)])


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Session, ScriptedBackend]]:
    with scripted_session() as pair:
        yield pair


class HubDataset:
    """A data set with the methods of Hugging Face's that a map uses."""

    column_names: tuple[str, ...] = ("text",)

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["text"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(len(self)):
            yield {name: values[i] for name, values in self.columns.items()}

    def select(self, positions: list[int]) -> HubDataset:
        """Return the rows at some positions."""
        return HubDataset({n: [v[i] for i in positions] for n, v in self.columns.items()})

    def add_column(self, name: str, values: list[Any]) -> HubDataset:
        """Return a data set with one more column."""
        assert name not in self.columns
        return HubDataset({**self.columns, name: values})

    def remove_columns(self, name: str) -> HubDataset:
        """Return a data set without a column."""
        return HubDataset({n: values for n, values in self.columns.items() if n != name})


class StreamedDataset:
    """A data set that is read from its start each time, without a length."""

    column_names = ("text",)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"text": text} for text in TEXTS)


class Splits(dict[str, HubDataset]):
    """Data sets by name, as Hugging Face's."""

    column_names = ("text",)


@pytest.mark.parametrize(
    ("data", "template"),
    [
        (TEXTS, "{item}"),
        (tuple(TEXTS), "{item}"),
        (iter(TEXTS), "{item}"),
        ((text for text in TEXTS), "{item}"),
        (dict(zip("abc", TEXTS, strict=True)), "{item}"),
        (np.array(TEXTS), "{item}"),
        (pd.Index(TEXTS), "{item}"),
        (pd.Series(TEXTS, index=list("xyz")), "{item}"),
        (pd.Series(TEXTS, name="text"), "{text}"),
        (pl.Series("text", TEXTS), "{text}"),
        (pd.DataFrame({"text": TEXTS}, index=list("xyz")), "{text}"),
        (pd.DataFrame({"text": TEXTS}), "{item.text}"),
        (pd.DataFrame({"a text": TEXTS}), '{item["a text"]}'),
        (pl.DataFrame({"text": TEXTS}), "{text}"),
        (HubDataset({"text": TEXTS}), "{text}"),
        ([{"text": text} for text in TEXTS], "{text}"),
        (range(1, 4), '{["", "one", "two", "three"][item]}'),
    ],
)
def test_every_kind_of_data_gives_the_same_answers(
    scripted: tuple[Session, ScriptedBackend], data: Any, template: str
) -> None:
    mapped = scripted[0].map(template, data)
    assert list(mapped) == TEXTS
    assert len(mapped) == 3


def test_rows_of_a_streamed_data_set_can_be_shown_after_they_were_read() -> None:
    rows = rows_of(StreamedDataset())
    assert (rows.total, rows.at(0)) == (None, None)
    assert [row.item["text"] for row in rows] == TEXTS
    shown = [rows.at(position) for position in range(4)]
    assert [row and row.item for row in shown] == [*({"text": one} for one in TEXTS), None]


def test_table_gets_a_column_and_keeps_its_index_and_order(
    scripted: tuple[Session, ScriptedBackend],
) -> None:
    session, backend = scripted
    frame = pd.DataFrame({"text": ["one", None, "two"], "n": [1, 2, 3]}, index=[7, 3, 9])
    before = frame.copy()
    made = session.map("{text}", frame).frame("reply", "error", "finish_reason", "tokens")
    assert list(made.columns) == ["text", "n", "reply", "error", "finish_reason", "tokens"]
    assert list(made.index) == [7, 3, 9]
    assert [None if pd.isna(one) else one for one in made["reply"]] == ["one", None, "two"]
    pd.testing.assert_frame_equal(frame, before)
    polars = session.map(
        "{text}", pl.DataFrame({"text": ["one", None, "two"], "n": [1, 2, 3]})
    ).frame()
    assert polars["answer"].to_list() == ["one", None, "two"]
    assert polars.columns == ["text", "n", "answer"]
    series = session.map("{item}", pd.Series(["a", "b"], index=["x", "y"])).frame()
    assert series.to_dict("index") == {
        "x": {"item": "a", "answer": "a"},
        "y": {"item": "b", "answer": "b"},
    }
    dataset = session.map("{text}", HubDataset({"text": TEXTS})).frame()
    assert dataset.columns == {"text": TEXTS, "answer": TEXTS}
    labeled = HubDataset({"text": TEXTS, "label": ["?"] * 3})
    labeled.column_names = ("text", "label")
    assert session.map("{text}", labeled).frame("label").columns == {"text": TEXTS, "label": TEXTS}
    keyed = session.map("{item} {index}", {"k": "a", "l": "b"})
    assert keyed.to_dict() == {"k": "a k", "l": "b l"}
    assert keyed.frame()["answer"].to_dict() == {"k": "a k", "l": "b l"}
    with pytest.raises(OptionError, match=r"There is no column 'cost'. Use error, finish_reason"):
        keyed.frame("answer", "cost")
    assert backend.requests


def test_answers_have_the_labels_of_a_table(
    scripted: tuple[Session, ScriptedBackend],
) -> None:
    session, _ = scripted
    frame = pd.DataFrame({"text": ["one", "two"]}, index=["x", "y"])
    assert session.map("{text}", frame).to_dict() == {"x": "one", "y": "two"}
    assert session.map("{text}", frame["text"]).to_dict() == {"x": "one", "y": "two"}
    assert session.map("{text}", frame.set_axis(_LEVELS)).to_dict() == {
        ("x", 1): "one",
        ("y", 2): "two",
    }
    assert session.map("{text}", pl.DataFrame({"text": ["one"]})).to_dict() == {0: "one"}
    twice = session.map("{text}", frame.set_axis([5, 5]))
    with pytest.raises(OptionError, match="Several rows have the same label"):
        twice.to_dict()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([[1], [1.5], []], [[1.0], [1.5], []]),
        ([{"a": 1}, {"a": 1.5, "b": 2}], [{"a": 1.0, "b": None}, {"a": 1.5, "b": 2}]),
        ([1, 10**23], [1, 10**23]),
        ([[1, "a"], {"b": 10**40}, None], [[1, "a"], {"b": 10**40}, None]),
        ([], []),
    ],
)
def test_column_of_polars_has_values_of_several_types(
    scripted: tuple[Session, ScriptedBackend], values: list[Any], expected: list[Any]
) -> None:
    session, backend = scripted
    for value in values:
        backend.will(*whole_answer(json.dumps({"n": value})))
    frame = pl.DataFrame({"text": [f"t{i}" for i in range(len(values))]})
    mapped = session.map("{text}", frame, schema={"properties": {"n": {}}}, workers=1)
    assert mapped.frame()["n"].to_list() == expected


def test_field_may_have_any_name(scripted: tuple[Session, ScriptedBackend]) -> None:
    session, backend = scripted
    frame = pd.DataFrame({"text": ["one"]})
    backend.will(*whole_answer('{"self": 1, "index": 2}'))
    found = session.map("{text}", frame, schema="self int, index int").frame()
    assert found.to_dict("list") == {"text": ["one"], "self": [1], "index": [2]}
    assert list(frame.columns) == ["text"]


def test_sample_is_spread_over_the_data() -> None:
    def items(data: Any, count: int) -> list[Any]:
        return [row.item for row in rows_of(data).sample(count)]

    assert items(range(100), 3) == [0, 50, 99]
    assert items([1, 2], 5) == [1, 2]
    assert items({"a": 1, "b": 2, "c": 3}, 2) == [1, 3]
    assert items(iter(range(10)), 3) == [0, 1, 2]
    assert items(pd.Series([5, 6, 7]), 1) == [5]
    assert items(HubDataset({"text": TEXTS}), 2) == [{"text": "one"}, {"text": "three"}]
    frame = pd.DataFrame({"a": range(5)}, index=list("vwxyz"))
    assert [row.index for row in rows_of(frame).sample(3)] == ["v", "x", "z"]
    assert items(pl.DataFrame({"a": range(5)}), 2) == [{"a": 0}, {"a": 4}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "The data is a text. To map over one text, put it into a list"),
        (7, "Data of type int has no rows. Use a list"),
        (np.array(7), "Data of type ndarray has no rows. Use a list"),
        (None, "The data is None."),
        (pl.LazyFrame({"a": [1]}), r"lazy table. Call its collect\(\) first"),
        (Splits(train=HubDataset({"text": TEXTS})), "The data has splits: train. Choose one: data"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"the same name: a\. Rename them, or keep"),
    ],
)
def test_data_without_rows_is_an_error(data: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rows_of(data)


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (["a", "b"], [0, 1]),
        ({"x": "a", "y": "b"}, ["x", "y"]),
        (iter("ab"), [0, 1]),
        (pd.Series(["a", "b"], index=[5, 7]), [5, 7]),
        (pd.DataFrame({"t": ["a", "b"]}, index=[5, 7]), [5, 7]),
        (pd.Series(["a", "b"], index=_LEVELS), [("x", 1), ("y", 2)]),
        (pd.DataFrame({"t": ["a", "b"]}, index=_LEVELS), [("x", 1), ("y", 2)]),
        (pl.DataFrame({"t": ["a", "b"]}), [0, 1]),
    ],
)
def test_row_is_found_again_by_its_position(data: Any, labels: list[Any]) -> None:
    rows = rows_of(data)
    read = list(rows)
    assert [rows.at(0), rows.at(1), rows.at(2)] == [*read, None]
    assert [row.index for row in read] == labels
    # The labels are shown: a number of NumPy would be np.int64(1) there.
    again = [row.index for row in map(rows.at, range(2)) if row is not None]
    assert repr(again) == repr(labels)


def test_latest_and_first_rows_of_an_iterator_are_found_again() -> None:
    rows = rows_of(iter(range(2_000)))
    assert sum(1 for _ in rows) == 2_000
    found = [rows.at(position) for position in (9, 100, 1_999)]
    assert [row and row.item for row in found] == [9, None, 1_999]
