"""Exceptions as prompts: where they were raised, the values there, and no longer than a model reads."""

from __future__ import annotations

import linecache
from collections.abc import Iterator

import pytest

from llm_magic.config.redaction import Redactor
from llm_magic.errors import ModelNotLoaded
from llm_magic.prompts.explain_error import (
    CUT,
    Cell,
    Failure,
    failure,
    last_error,
    names_at,
    question,
)

_LABEL = "In[3]"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Take the cells of a test out of Python's cache of sources."""
    yield
    linecache.cache.pop("cell-3", None)


def fail(source: str, **names: object) -> Failure:
    """Run a cell that fails, and describe its exception."""
    linecache.cache["cell-3"] = (len(source), None, source.splitlines(True), "cell-3")

    def find(name: str) -> Cell | None:
        return Cell(_LABEL, source) if name == "cell-3" else None

    try:
        exec(compile(source, "cell-3", "exec"), names)
    except BaseException as error:  # noqa: BLE001 - whatever the cell raises
        return failure(error, find, names, Redactor({}))
    raise AssertionError("the cell did not fail")


def test_traceback_starts_at_the_cell() -> None:
    failed = fail("x = 0\n1 / x")
    assert failed.cell == Cell(_LABEL, "x = 0\n1 / x")
    assert failed.values == (("x", "0"),)
    assert __file__ not in failed.traceback
    assert failed.traceback.startswith(
        'Traceback (most recent call last):\n  File "In[3]", line 2, in'
    )


def test_frames_of_this_package_are_not_shown() -> None:
    source = "from llm_magic.session.chats import check_name\nname = chr(7)\ncheck_name(name)"
    failed = fail(source)
    assert [name for name, _value in failed.values] == ["check_name", "name"]


@pytest.mark.parametrize(
    ("source", "line", "names"),
    [
        ("a = b", 1, ["a", "b"]),
        ("f(a,\n  b,\n  c.d[e])", 2, ["f", "a", "b", "c", "e"]),
        ("for i in items:\n    print(i)", 1, ["i", "items"]),
        ("for i in items:\n    print(i)", 2, ["print", "i"]),
        ("with open(p) as f:\n    x = 1\n    y = f", 3, ["y", "f"]),
        ("def f(a=b):\n    return c", 1, ["b"]),
        ("[x for x in y]", 1, ["x", "y"]),
        ("a = 1\n\nb = 2", 2, []),
        ("a = (", 1, []),
        ("", 1, []),
    ],
)
def test_names_of_a_line_are_those_of_its_statement(
    source: str, line: int, names: list[str]
) -> None:
    assert sorted(names_at(source, line)) == sorted(names)


def test_values_of_uninformative_names_are_omitted() -> None:
    failed = fail("__name__ = 1; y = missing + len(x)", x=[1])
    assert failed.values == (("x", "[1]"),)


def test_long_cell_and_long_message_are_cut_in_the_middle() -> None:
    source = "\n".join(f"x{i} = {i}" for i in range(9000)) + "\nraise ValueError('y' * 10**6)"
    failed = fail(source)
    prompt = question(failed, fix=False)
    assert len(prompt) < 20_000
    assert "x0 = 0\n" in prompt
    assert "raise ValueError('y' * 10**6)" in prompt
    assert CUT in failed.traceback


def test_traceback_of_endless_recursion_is_short() -> None:
    failed = fail("def f(n):\n    return g(n)\ndef g(n):\n    return f(n + 1)\nf(0)")
    assert len(failed.traceback) < 6100
    assert "RecursionError" in failed.traceback


def test_fence_in_a_cell_does_not_end_the_block() -> None:
    prompt = question(fail("x = '```'\n1 / 0"), fix=False)
    assert "````python\nx = '```'\n1 / 0\n````" in prompt


def test_exception_whose_text_raises_is_shown() -> None:
    failed = fail("class Odd(Exception):\n    def __str__(self): raise KeyError\nraise Odd()")
    assert "Odd: <exception str() failed>" in failed.traceback


def test_circular_causes_are_shown_once() -> None:
    failed = fail(
        "a = ValueError('a')\nb = KeyError('b')\na.__cause__ = b\nb.__cause__ = a\nraise a"
    )
    assert "KeyError: 'b'" in failed.traceback


def test_cut_does_not_halve_a_secret() -> None:
    secret = "sk-" + "q7" * 40
    for pad in range(11_700, 12_100, 17):
        failed = fail(f"x = '{'-' * pad}'\nk = '{secret}'\ny = '{'-' * 9000}'\n1 / 0")
        assert failed.cell is not None
        assert "q7q7" not in failed.cell.source + failed.traceback


def test_error_of_an_explanation_leads_to_the_explained_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, first = ModelNotLoaded("No model is loaded."), ZeroDivisionError()
    monkeypatch.setattr("sys.last_value", own, raising=False)
    monkeypatch.delattr("sys.last_exc", raising=False)
    assert last_error() is own
    own.explaining = first
    assert last_error() is first
