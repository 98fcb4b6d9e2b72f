"""Expressions of prompts on polars, which is known by the names of its types."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llm_magic.prompts.template import Filled, fill
from llm_magic.prompts.values_as_text import to_text


@pytest.fixture
def notebook() -> dict[str, Any]:
    frame = pl.DataFrame({"a": [1, 2, 3], "k": ["x", "y", "x"], "v": [1.5, 2.5, 4.0]})
    dated = pl.DataFrame({"w": pl.date_range(pl.date(2026, 1, 1), pl.date(2026, 1, 3), eager=True)})
    objects = frame.with_columns(pl.Series("o", [{1}, {2}, {3}], dtype=pl.Object))
    environment = pl.Series("e", [os.environ], dtype=pl.Object)
    return {
        "objects": objects, "environment": environment, "df": frame, "dated": dated,
        "lazy": frame.lazy(), "pl": pl, "mask": frame["a"] > 1,
    }  # fmt: skip


FILLED = """
df
df.shape
df.height
df.columns
", ".join(df.columns)
len(df)
df.head(2)
df.tail(1)
df.limit(1)
df.describe()
df["a"]
df["a"].mean()
df["a"].mean():.2f
df["a"].max() + 1
df["a"].to_list()
df["a"].to_list()[0]
df["a"][0]
df["a", "k"]
df[["a", "v"]]
df[0, "a"]
df[:2]
df.select("a", "v").mean()
df.drop("k").sum()
df.sort("v", descending=True)
df.filter(mask)
df.filter(df["a"] > 1)
df.filter((df["a"] > 1) & (df["k"] == "x")).height
df.group_by("k", maintain_order=True).mean()
df.group_by("k", maintain_order=True).len()
df["a"] * 2
df["a"] + df["v"]
df["v"].round(1)
df["k"].n_unique()
df["k"].unique().sort().to_list()
df["k"].value_counts(sort=True)
df["k"].str.to_uppercase()
df["k"].str.contains("x").sum()
df["k"].str.len_chars().max()
df.null_count()
df.item(0, "a")
df.row(0)
df.to_dicts()
df.write_csv()
df.schema
max(df["a"])
sum(df["a"])
objects
objects["o"][0]
objects.head(1)
dated["w"].dt.year().to_list()
dated["w"].dt.strftime("%d.%m.")
dated["w"].max():%d.%m.%Y
"""

REFUSED = """
df.write_csv("canary")
df.write_parquet("canary")
df.write_json("canary")
df.map_rows(print)
df.sample(2)
df.pipe(print)
df.insert_column(0, mask)
df.replace_column(0, mask)
df.drop_in_place("a")
df.extend(df)
df.vstack(df, in_place=True)
df.clear()
df.lazy()
df.with_columns(mask)
df.join(df, how="cross")
df.group_by("k").agg("a")
df.group_by("k").map_groups(print)
df["a"].map_elements(print)
df["a"].append(mask)
df["a"].set(mask, 1)
df["a"].extend_constant(1, 10**10)
df["a"].scatter(0, 9)
df["a"].sort(in_place=True)
df["a"].repeat_by(10**10)
df["k"] * 10**10
df["k"].str.contains("(a+)+$")
df["k"].str.extract("(a+)+$")
df["k"].str.pad_start(10**10)
df["k"].str.zfill(10**10)
df["k"].str.replace("a", "b")
df["k"].str.to_integer()
df.sql("SELECT 1")
objects.unique()
objects["o"].unique()
environment
environment[0]
lazy.collect()
lazy.head()
lazy.columns
pl.read_csv("canary")
pl.col("a")
df.filter(pl.col("a") > 1)
df._df
df["a"]._s
"""


@pytest.mark.parametrize("expression", FILLED.split("\n")[1:-1])
def test_polars_expression_has_the_value_that_python_gives(
    notebook: dict[str, Any], expression: str
) -> None:
    code = f'f"""{{{expression}}}"""' if ":." in expression or ":%" in expression else expression
    expected = to_text(eval(code, {}, notebook))
    assert fill(f"<\n{{{expression}}}\n>", notebook) == Filled(f"<\n{expected}\n>", (expression,))


@pytest.mark.parametrize("expression", REFUSED.split("\n")[1:-1])
def test_polars_method_that_changes_or_writes_stays(
    notebook: dict[str, Any], expression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = notebook["df"].clone()
    filled = fill(f"<{{{expression}}}>", notebook)
    assert filled.text == f"<{{{expression}}}>"
    assert " was not replaced: it " in filled.notes[0]
    assert notebook["df"].equals(before)
    assert not list(tmp_path.iterdir())
