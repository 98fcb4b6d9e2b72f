"""Values described in a line: known types are shown, and no code of the value's class runs."""

from __future__ import annotations

import datetime
import time
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from llm_magic.config.redaction import MASK, Redactor
from llm_magic.prompts.values_as_text import LONGEST, describe, to_text
from tests.reference_attacks import Zone


@dataclass
class Town:
    name: str
    size: int = 2


class Model(BaseModel):
    town: str = "Paris"
    api_key: SecretStr = SecretStr("hunter2")


class Hostile:
    """Fails or hangs, whatever is called."""

    def __init__(self) -> None:
        self.size = 7

    def __repr__(self) -> str:
        time.sleep(1000)
        return ""

    __str__ = __len__ = __iter__ = __eq__ = __hash__ = __repr__  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise SystemExit

    @property
    def shape(self) -> Any:
        raise SystemExit


def function(a: int, *, b: int = 2) -> int:
    return a + b


_HERE = "tests.unit.prompts.test_values_as_text"
SHOWN: list[tuple[object, str]] = [
    (7, "7"), (1.5, "1.5"), (None, "None"), (True, "True"), ("Paris", "'Paris'"), (b"x", "b'x'"),
    ("x" * 1000, f"'{'x' * 200}'… (1,000 in all)"), (10**400, "int of 1329 bits"),
    ([1, "a"], "[1, 'a']"),
    ((1,), "(1)"),
    (set(), "{}"),
    (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, … (100 in all)]"),
    ({"town": "Paris"}, "{'town': 'Paris'}"), ({"api_key": "x"}, f"{{'api_key': {MASK}}}"),
    (Counter("aab"), "Counter {'a': 2, 'b': 1}"), (OrderedDict(a=1), "OrderedDict {'a': 1}"),
    (defaultdict(list, a=[1]), "defaultdict {'a': [1]}"),
    (datetime.date(2026, 11, 22), "datetime.date(2026, 11, 22)"),
    (Path("a/b"), "PosixPath('a/b')"), (Town("Paris"), f"{_HERE}.Town object with name='Paris', size=2"),
    (SimpleNamespace(password="x", a=1), f"types.SimpleNamespace object with password={MASK}, a=1"),
    (Model(), f"{_HERE}.Model object with town='Paris', api_key={MASK}"),
    (pd.DataFrame({"town": ["a"], "size": [2]}), "DataFrame, 1 row × 2 columns: 'town' str, 'size' int64"),
    (pd.Series([1, 2], name="size"), "Series 'size', 2 values, int64"),
    (np.arange(3), "ndarray, shape (3,), int64: [0, 1, 2]"),
    (np.zeros((50, 2)), "ndarray, shape (50, 2), float64"),
    (pl.DataFrame({"town": ["a"], "size": [2]}),
     "DataFrame, 1 row × 2 columns: 'town' String, 'size' Int64"),
    (pd.Timestamp("2026-11-22"), "Timestamp('2026-11-22 00:00:00')"),
    (datetime.datetime(2026, 1, 2, tzinfo=Zone()), "datetime.datetime object"),
    (np.float32(1.5), "float32 1.5"), (torch.zeros(2, 3), "Tensor, shape (2, 3), torch.float32 on cpu"),
    (function, "function function(a, b)"),
    (len, "built-in len"),
    (Town, "class tests.unit.prompts.test_values_as_text.Town()"),
    (np, f"module numpy {np.__version__}"),
    (ValueError("x"), "ValueError object"),
    (object(), "object object"),
    (Hostile(), f"{_HERE}.Hostile object with size=7"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), SHOWN, ids=[text[:30] for _, text in SHOWN])
def test_known_value_is_described_by_its_type(value: object, text: str) -> None:
    assert describe("value", value) == text


def test_hostile_value_inside_others_runs_no_code() -> None:
    hostile = Hostile()
    for value in ([hostile], {"a": hostile}, Town(hostile), (hostile,), {1: [hostile]}):  # type: ignore[arg-type]
        assert "Hostile object" in describe("value", value)


def test_name_of_a_secret_masks_its_value_but_no_function() -> None:
    assert describe("password", "hunter2") == MASK
    assert describe("api_key", 12) == MASK
    assert describe("token", None) == "None"
    assert describe("auth", function) == "function function(a, b)"


def test_value_that_contains_itself_is_short() -> None:
    ring: list[Any] = []
    ring.append(ring)
    assert len(describe("ring", ring)) < LONGEST


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.builds(Town, inner),
)


@given(_json)
def test_any_value_is_short(value: object) -> None:
    assert 0 < len(describe("value", value)) <= LONGEST


@given(st.text(min_size=6))
def test_value_under_the_name_of_a_secret_never_shows(secret: str) -> None:
    nested = {
        "password": secret,
        "deep": [{"token": [secret]}],
        "object": SimpleNamespace(pwd=secret),
    }
    assert describe("value", nested).count(MASK) == 3


def test_secret_is_masked_before_a_text_is_cut() -> None:
    redactor = Redactor({}, known=["hunter2-Tulip-Meadow"])
    for text in ("x" * 190 + "hunter2-Tulip-Meadow", "hunter2-Tulip-Meadow" * 20):
        for value in (text, text.encode(), [text], {"body": text}):
            text = describe("value", value, redactor.mask)
            assert "hunter" not in text
            assert len(text) <= LONGEST


@pytest.mark.parametrize("names", [["town"], [None], ["region", "town"], ["region", None]])
@pytest.mark.parametrize(("count", "is_part"), [(20, False), (21, False), (99, True), (150, True)])
def test_each_value_of_a_shortened_column_stands_beside_its_label(
    names: list[str | None], count: int, is_part: bool
) -> None:
    labels = [f"t{number}" for number in range(count)]
    groups = [f"g{number // 7}" for number in range(count)]
    index = pd.MultiIndex.from_arrays([groups, labels][-len(names) :], names=names)
    flat = index if len(names) > 1 else index.get_level_values(0)
    column = pd.Series(range(count), flat, name="price").sort_values(ascending=False)
    lines = to_text(column, is_part=is_part).splitlines()
    pairs = [line.split()[-2:] for line in lines if line.split()[-1].isdigit()]
    assert len(pairs) == min(count, 100 if is_part else 20)
    assert all(label == f"t{value}" for label, value in pairs)
