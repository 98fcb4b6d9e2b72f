"""The prompt of each row: references, missing values, errors before the first row."""

from __future__ import annotations

import types
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from llm_magic.errors import OptionError, PromptError
from llm_magic.session.map.prompts import FirstRows, prompt_maker
from llm_magic.session.map.rows import rows_of

FRAME = pd.DataFrame({
    "text": ["Good tea", " ", None, "Bad"], "price": [1.5, 2.0, 3.0, float("nan")],
    "when": [pd.Timestamp("2026-01-31"), pd.NaT, pd.NaT, pd.Timestamp("2026-02-01")], "my name": list("abcd"),
}, index=list("wxyz"))  # fmt: skip


def prompts(
    prompt: object, data: Any, names: Mapping[str, Any] | None = None
) -> tuple[list[Any], tuple[str, ...]]:
    """Return the prompt of each row, and the notes."""
    rows = rows_of(data)
    first = FirstRows(rows)
    make, notes = prompt_maker(prompt, rows, first, names or {})
    return [make(row) for row in first.all()], notes


def test_references_are_columns_the_row_its_label_and_variables() -> None:
    template = (
        '{index}/{text[:4]}/{price * 2:.2f}/{item.text!r}/{item["my name"].upper()}/{kind}/{{text}}/'
        '{{nothing}}/{"a": 1}'
    )
    found, notes = prompts(template, FRAME, {"kind": "K", "price": 7, "unused": object()})
    assert found[0] == "w/Good/3.00/'Good tea'/A/K/{text}/{nothing}/{\"a\": 1}"
    assert notes == ("{price} is the column, not the variable of the notebook.",)
    person = types.SimpleNamespace(name="Ada", age=36)
    assert prompts("{item.name}, {item.age}", [person])[0] == ["Ada, 36"]
    assert prompts("{item}", [{"a": 1}])[0] == ["{'a': 1}"]
    assert prompts("{item} {index}", {"k": 5})[0] == ["5 k"]
    # What is inserted is not read again.
    assert prompts("{item}", ["{item} {{x}}"])[0] == ["{item} {{x}}"]


def test_missing_values_have_no_prompt() -> None:
    assert prompts("{text}", FRAME)[0] == ["Good tea", None, None, "Bad"]
    assert prompts("{price}", FRAME)[0] == ["1.5", "2.0", "3.0", None]
    assert prompts("{when:%Y}", FRAME)[0] == ["2026", None, None, "2026"]
    assert prompts('{item.text} {item["my name"]}', FRAME)[0] == ["Good tea a", None, None, "Bad d"]
    # Only the columns that the template has count.
    assert prompts("{index}: {price}", FRAME[:2])[0] == ["w: 1.5", "x: 2.0"]
    items: list[Any] = ["a", "", None, float("nan"), pd.NA, pd.NaT, 0, False, [], "\n"]
    assert [text for text in prompts("{item}", items)[0] if text] == ["a", "0", "False", "[]"]
    missing = [
        np.float32("nan"),
        np.datetime64("NaT"),
        Decimal("NaN"),
        complex("nan"),
        np.str_(" "),
    ]
    assert prompts("{item}", [*missing, np.float32(1.5), Decimal("1.50"), np.str_("a")])[0] == [
        *[None] * len(missing), "1.5", "1.50", "a",
    ]  # fmt: skip
    assert prompts("{a}", [{"a": 1}, {"b": 2}, {}])[0] == ["1", None, None]
    assert prompts(lambda item: item and f"<{item}>", ["a", None])[0] == ["<a>", None]


def test_column_whose_name_is_no_name_is_its_text_in_braces() -> None:
    odd = pd.DataFrame({"my text": ["a", None], "class": [1, 2], "n-m": [3, 4], "it's": [5, 6]})
    found, notes = prompts("{my text} {class} {n-m} {it's} { my text }", odd, {"n": 1, "m": 2})
    assert (found, notes) == (["a 1 3 {it's} { my text }", None], ())
    found, notes = prompts(
        "{n-m:.1f}|{class:>3}|{my text!r}|{my text!s:_^3}|{class: 5}|{class:d}", odd
    )
    assert found == ["3.0|  1|'a'|_a_|{class: 5}|{class:d}", None]
    assert prompts("{my text}!", odd["my text"]) == (["a!", None], ())
    assert prompts("{a key}!", [{"a key": "x"}, {"a key": ""}]) == (["x!", None], ())


def test_column_with_the_name_of_the_row_does_not_hide_the_others() -> None:
    one = pd.DataFrame({"my city": ["Lima", None], "item": ["x", "y"]})
    assert prompts("{my city} {item} item_", one) == (["Lima x item_", None], ())
    assert prompts("{my city}", one[["my city"]].assign(item=1)) == (["Lima", None], ())
    assert prompts("{item}", one["item"]) == (["x", "y"], ())
    with pytest.raises(PromptError, match=r'Did you mean "my city"[?] .* are my city, item, index'):
        prompts("{my_city}", one)


@pytest.mark.parametrize("template", ["{city}", "{pop}", "{pop.mean}"])
def test_columns_of_several_levels_have_an_error_that_names_one(template: str) -> None:
    frame = pd.DataFrame({("pop", "mean"): [1, 2], ("pop", "max"): [3, 4]})
    assert prompts('{item[("pop", "mean")]}', frame)[0] == ["1", "2"]
    with pytest.raises(PromptError) as caught:
        prompts(template, frame)
    assert "several levels: write {item[('pop', 'mean')]}, or join them first" in str(caught.value)


def test_columns_that_are_numbers_have_an_error_or_a_note() -> None:
    frame = pd.DataFrame([["a", "b"]])
    assert prompts("{item[0]} {2} {{1}}", frame) == (["a {2} {{1}}"], ())
    note = (
        "{1} was not replaced: a number in braces is not a name. Write {item[1]} for the column 1"
    )
    assert prompts("{item[0]} {1}", frame)[1][0].startswith(note)
    with pytest.raises(PromptError, match=r"Write {item\[0\]} for the column 0, or rename"):
        prompts("{0} and {1}", frame)
    with pytest.raises(PromptError, match=r"The column 0 is {item\[0\]}"):
        prompts("{town}", frame)
    with pytest.raises(PromptError, match="town is not defined"):
        prompts("{town}", [{0: "a"}])


def test_missing_attribute_or_element_has_no_prompt() -> None:
    people = [types.SimpleNamespace(name=name) for name in ("Ada", None, " ")]
    assert prompts("{item.name.upper()}!", people)[0] == ["ADA!", None, None]
    assert prompts("{item[1]:.1f}", [(1, 2.0), (1, float("nan"))])[0] == ["2.0", None]
    assert prompts("{item.upper()}", ["a", ""])[0] == ["A", None]


def test_missing_value_of_an_expression_has_no_prompt() -> None:
    frame = pd.DataFrame({"city": ["Rome", None, "NA"], "price": [1.5, float("nan"), 2.0]})
    assert prompts("{item[1].city}", frame.iterrows())[0] == ["Rome", None, "NA"]
    assert prompts("{item[1].price * 2:.1%}", frame.iterrows())[0] == ["300.0%", None, "400.0%"]
    assert prompts('{item.get("a")}', [{"a": 1}, {"b": 2}])[0] == ["1", None]
    nested = [{"a": {"b": None}}, {"a": {"b": "None"}}]
    assert prompts('{item["a"]["b"]}', nested)[0] == [None, "None"]
    # A variable of the notebook is the same for all rows.
    assert prompts("{item} {limit + 0}", ["x"], {"limit": float("nan")})[0] == ["x nan"]


def test_row_of_an_array_is_a_list() -> None:
    assert prompts("{item} {item.sum()}", np.array([[1, 2], [3, 4]]))[0] == ["[1, 2] 3", "[3, 4] 7"]


def test_column_of_the_whole_table_has_a_note() -> None:
    names = {"df": FRAME}
    note = "{df.text} is the whole column, the same in each prompt. Write {text} for the value of the row."
    assert prompts("{df.text}", FRAME, names)[1][0] == note
    assert prompts('{price} {df["text"]}', FRAME, names)[1] == (note.replace(".text", '["text"]'),)
    assert prompts("{price} {df.text.count()} {df.shape}", FRAME, names)[1] == ()


def test_function_gets_the_row_with_columns_as_attributes() -> None:
    found, notes = prompts(lambda row: f"{row.text} {row['my name']} {len(row)}", FRAME[:1])
    assert (found, notes) == (["Good tea a 4"], ())
    with pytest.raises(AttributeError, match="The row has no column 'txt'"):
        prompts(lambda row: row.txt, FRAME)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{txet}",
            'txet is not defined. Did you mean "text"[?] The names of a row are text, price',
        ),
        ("{text} {nothing}", "nothing is not defined. The names .* To send braces .* double them"),
        ("{text.uper()}", "'str' object has no attribute 'uper'"),
        ("{text.__class__}", "reads __class__, which is private"),
        ("{open(text)}", "calls open"),
        ("{text.foo}", "has no attribute 'foo'"),
        ("{ text }", "has spaces beside the braces; write {text}"),
    ],
)
def test_error_in_a_template_comes_before_the_first_row(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prompts(template, FRAME)


def test_error_of_one_row_is_none_of_the_template() -> None:
    rows = rows_of(iter([3, "x", "y", None]))
    first = FirstRows(rows)
    make, _ = prompt_maker("{item[0]}", rows, first, {})
    bad, *good = first.all()
    with pytest.raises(PromptError, match="item"):
        make(bad)
    assert [make(row) for row in good] == ["x", "y", None]


def test_slow_iterator_is_read_once_before_the_first_row_is_sent() -> None:
    read: list[int] = []
    rows = rows_of(read.append(i) or i for i in range(9))  # type: ignore[func-returns-value]
    prompt_maker("{item}", rows, FirstRows(rows), {})
    assert read == [0]


def test_template_without_a_reference_has_a_note() -> None:
    found, notes = prompts("Tell a joke.", range(2))
    assert found == ["Tell a joke."] * 2
    assert notes[0].startswith("The template has no reference to the rows, such as {item}")
    with pytest.raises(OptionError, match="a template or a function of a row, not a int"):
        prompts(7, range(2))
