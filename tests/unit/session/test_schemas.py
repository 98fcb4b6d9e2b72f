"""The types of answers in Python: what is a type, what a backend gets, which values answers have."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import pickle
import re
import time
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pytest
from pydantic import (
    UUID4,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    NaiveDatetime,
    field_validator,
)
from typing_extensions import TypedDict

from llm_magic.backends.json_schema import DATE, NAIVE_DATETIME
from llm_magic.errors import InvalidReply, OptionError
from llm_magic.session import Session
from llm_magic.types import Structure
from tests.scripted import ScriptedBackend, scripted_session, whole_answer


class Address(BaseModel):
    town: str


class Person(BaseModel):
    name: str = Field(alias="fullName", description="first and last name")
    born: date
    address: Address | None = None


class Picky(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def _look_up(cls, name: str) -> str:
        return {"Ada": "Lovelace"}[name]


class Node(BaseModel):
    children: list[Node] = []


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Movie(TypedDict):
    title: str
    year: int


class Plain:
    """No type of answers: pydantic has no schema for it."""


class Mood(enum.Enum):
    JOY = "joy"
    FEAR = "fear"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


Made = tuple[Session, ScriptedBackend]


@pytest.fixture
def made() -> Iterator[Made]:
    with scripted_session() as found:
        yield found


def value(made: Made, text: str, **options: Any) -> object:
    """Return the value of an answer with this text."""
    session, backend = made
    backend.will(*whole_answer(text))
    return session.generate("?", **options).value


def structure(made: Made, **options: Any) -> Structure:
    """Return what the backend gets."""
    session, backend = made
    backend.will(*whole_answer("{}"))
    with contextlib.suppress(InvalidReply):
        session.generate("?", **options)
    found = backend.requests[-1].config.structure
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"schema": Person}, '{"fullName": "Ada", "born": "1815-12-10", "address": {"town": "London"}}',
         Person(fullName="Ada", born=date(1815, 12, 10), address=Address(town="London"))),
        ({"schema": Point}, '{"x": 1, "y": 2}', Point(1, 2)),
        ({"schema": Movie}, '{"title": "M", "year": 1931}', Movie(title="M", year=1931)),
        ({"schema": Level}, "2", Level.HIGH),
        ({"schema": Literal["a", "b"]}, '"b"', "b"),
        ({"schema": tuple[int, str]}, '[1, "a"]', (1, "a")),
        ({"schema": set[int]}, "[1, 1, 2]", {1, 2}),
        ({"schema": bool}, "true", True),
        ({"schema": "a: the first\nb float: a number, such as 1.5"}, '{"a": "x", "b": 2}',
         {"a": "x", "b": 2.0}),
        ({"schema": "ok boolean, n integer, xs list[float]"}, '{"ok": true, "n": 1, "xs": [1]}',
         {"ok": True, "n": 1, "xs": [1.0]}),
        ({"choice": Level}, "HIGH", Level.HIGH),
        ({"choice": (1, 2.5, True)}, "2.5", 2.5),
        ({"choice": (label for label in "ab")}, "b", "b"),
        ({"choice": Literal["x", "y"]}, "y", "y"),
        # A server that requires an object gets the schema of one with the field `answer`.
        ({"schema": {"type": "array"}}, '{"answer": [1, 2]}', [1, 2]),
        ({"schema": {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"n": {}}}}}},
         '{"answer": {"n": 1}}', {"n": 1}),
        ({"schema": {"type": "object", "properties": {"answer": {}}}}, '{"answer": 1}', {"answer": 1}),
        ({"schema": Any}, '{"answer": 1}', 1),
        ({"choice": ["U.S.", "U.K."], "schema_by": "prompt"}, "U.S.", "U.S."),
        ({"choice": ["U.S.", "U.K."], "schema_by": "prompt"}, '"U.K."', "U.K."),
        ({"choice": ["*", "**"], "schema_by": "prompt"}, "**", "**"),
        ({"regex": '"[a-z]+"', "schema_by": "prompt"}, '"abc"', '"abc"'),
        ({"regex": "[a-z]+", "schema_by": "prompt"}, '"abc"', "abc"),
        ({"regex": re.compile(r"[a-c]+")}, "abc", "abc"),
        ({"regex": r"\s+x"}, "  x", "  x"),
    ],
)  # fmt: skip
def test_type_gives_value(made: Made, options: dict[str, Any], text: str, expected: object) -> None:
    found = value(made, text, **options)
    assert (found, type(found)) == (expected, type(expected))


def test_backend_gets_a_picklable_structure_whose_objects_are_closed(made: Made) -> None:
    found = structure(made, schema=Person)
    assert pickle.loads(pickle.dumps(found)) == found
    schema = json.loads(found.source)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Address"]["additionalProperties"] is False
    assert schema["properties"]["fullName"]["description"] == "first and last name"
    named: dict[str, Any] = {"properties": {"a": {}}}
    empty: dict[str, Any] = {"properties": {}}
    for keyword in ("allOf", "anyOf", "oneOf"):
        composed = {keyword: [named, named], "required": ["a"], "properties": {"c": empty}}
        schema = json.loads(structure(made, schema=composed).source)
        closed = {"c": {**empty, "additionalProperties": False}}
        assert schema == {**composed, "properties": closed}
    schema = json.loads(structure(made, schema={"anyOf": [named]}).source)
    assert schema == {"anyOf": [{**named, "additionalProperties": False}]}
    found = structure(made, choice=["é", 'say "x"'])
    assert (found.kind, found.labels) == ("choice", ("é", 'say "x"'))


def test_backend_gets_no_constraint_that_only_pydantic_checks(made: Made) -> None:
    class Found(BaseModel):
        tags: set[str]
        file: Path
        host: IPvAnyAddress
        day: date
        unique: UUID4 = Field(alias="uniqueItems")
        price: Decimal
        start: NaiveDatetime
        end: AwareDatetime

    properties = json.loads(structure(made, schema=Found).source)["properties"]
    assert [{k: v for k, v in one.items() if k != "title"} for one in properties.values()] == [
        {"type": "array", "items": {"type": "string"}},
        {"type": "string"},
        {"type": "string"},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "uuid"},
        {"type": "number"},
        {"type": "string", "pattern": NAIVE_DATETIME},
        {"type": "string", "format": "date-time"},
    ]
    names = ["tags", "file", "host", "day", "uniqueItems", "price", "start", "end"]
    assert list(properties) == names
    # A JSON schema stays as it is.
    given = {"type": "array", "uniqueItems": True}
    assert json.loads(structure(made, schema=given).source) == given


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (int, {"patternProperties": {"^(0|-?[1-9][0-9]{0,17})$": {"type": "number"}}}),
        (date, {"patternProperties": {DATE: {"type": "number"}}}),
        (
            Annotated[str, Field(pattern="^a+$")],
            {"patternProperties": {"^a+$": {"type": "number"}}},
        ),
        (Literal["a", "b"], {"properties": {"a": {"type": "number"}, "b": {"type": "number"}}}),
        (Literal["a"], {"properties": {"a": {"type": "number"}}}),
        (Mood, {"properties": {"joy": {"type": "number"}, "fear": {"type": "number"}}}),
    ],
)
def test_keys_of_a_dict_are_those_of_its_type(made: Made, keys: Any, expected: object) -> None:
    schema = json.loads(structure(made, schema=dict[keys, float]).source)
    schema.pop("$defs", None)
    assert schema == {"type": "object", **expected, "additionalProperties": False}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "schema",
    [
        {"propertyNames": {"maxLength": 3}},
        {"propertyNames": {"pattern": "^a", "maxLength": 3}},
        {"propertyNames": {"enum": ["a"]}, "properties": {"a": {}}},
        {"propertyNames": {"$ref": "#/$defs/B"}, "$defs": {"A": {}}},
        {"propertyNames": {"enum": ["a", 1]}},
        {"propertyNames": False},
    ],
)
def test_other_names_of_fields_stay_as_they_are(made: Made, schema: dict[str, Any]) -> None:
    found = json.loads(structure(made, schema=schema).source)
    assert found.items() >= schema.items()


def test_file_names_a_schema(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    path.write_text('{"type": "object", "properties": {"n": {"type": "integer"}}}', "utf-8")
    assert value(made, '{"n": 1}', schema=path) == {"n": 1}
    assert value(made, '{"n": 1}', schema=str(path)) == {"n": 1}
    path.write_text("[1]", "utf-8")
    with pytest.raises(OptionError, match="is not a JSON schema: it is no object"):
        made[0].generate("?", schema=path)
    path.write_text("{", "utf-8")
    with pytest.raises(OptionError, match="is not JSON"):
        made[0].generate("?", schema=path)
    grammar = tmp_path / "g.lark"
    grammar.write_text("start: /a+/\n", "utf-8")
    assert value(made, "aa", grammar=grammar) == "aa"


def test_answer_that_is_not_json_has_an_error_with_the_position(made: Made) -> None:
    problem = r"it is not JSON: a comma or the end is missing \(line 1, character 8\)\."
    with pytest.raises(InvalidReply, match=problem):
        value(made, '{"x": 1', schema=Point)


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def _circular() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": _deep(10_000)}, "nested too deeply"),
        ({"schema": _deep(100)}, "nested more than 64 levels deep"),
        ({"schema": _circular()}, "The schema is not JSON: Circular reference"),
        ({"schema": {"enum": ["x" * 1_000_000]}}, "at most 100,000 are sent"),
        ({"schema": {"a": object()}}, "The schema is not JSON"),
        ({"schema": {"a": float("nan")}}, "The schema is not JSON"),
        ({"schema": Point(1, 2)}, "A value of type Point is not a type of answers."),
        ({"schema": 3}, "A value of type int is not a type of answers."),
        (
            {"schema": Plain},
            "Use a pydantic model, a dataclass or a TypedDict instead.",
        ),
        (
            {"schema": list[Plain]},
            "Use a pydantic model, a dataclass or a TypedDict instead.",
        ),
        ({"schema": ""}, "The schema is empty."),
        ({"schema": "name, name"}, "The field name is named twice."),
        ({"schema": "2nd str"}, "'2nd str' is no field."),
        ({"choice": ["a"]}, "A choice needs two labels or more."),
        ({"choice": range(2000)}, "more than 1,000 labels"),
        ({"choice": ["a\nb", "c"]}, "The label 'a\\nb' has several lines."),
        ({"choice": ["a", ""]}, "A label is empty. Omit it."),
        ({"choice": "a, ,b"}, "A label is empty. Put labels with spaces in quotes."),
        ({"choice": ["a", "b", "a"]}, "The label a is named twice. Name each label once."),
        ({"choice": pd.Series(["a", "a"])}, "The label a is named twice. Add .unique()."),
        ({"choice": ["a", float("nan")]}, "A label is nan, a missing value."),
        ({"choice": 5}, "A value of type int has no labels. Use a list, an Enum"),
        ({"regex": "(" * 1000}, "The pattern is invalid"),
        ({"regex": 5}, "The pattern is no text."),
        ({"regex": "a" * 200_000}, "at most 100,000 are sent"),
        ({"grammar": " \n "}, "The grammar is empty"),
        ({"schema": int, "choice": "a,b"}, "An answer has one type."),
        ({"schema": int, "schema_by": "magic"}, "Use backend or prompt."),
        ({"schema_by": "prompt"}, "needs"),
    ],
)
def test_what_is_no_type_is_an_error_at_once(
    made: Made, options: dict[str, Any], message: str
) -> None:
    session, backend = made
    began = time.process_time()
    with pytest.raises(OptionError) as caught:
        session.generate("?", **options)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert backend.requests == []
    assert time.process_time() - began < 30, "it did not end by itself"


def test_recursive_type_has_values(made: Made) -> None:
    found = value(made, '{"children": [{"children": []}]}', schema=Node)
    assert found == Node(children=[Node()])


def test_error_of_a_validator_is_the_error_of_the_answer(made: Made) -> None:
    assert value(made, '{"name": "Ada"}', schema=Picky) == Picky.model_construct(name="Lovelace")
    with pytest.raises(InvalidReply, match="does not fit Picky: KeyError: 'Bo'"):
        value(made, '{"name": "Bo"}', schema=Picky)


def test_instruction_follows_the_last_question(made: Made) -> None:
    session, backend = made
    prompt = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "{"}]
    backend.will(*whole_answer("12"))
    session.generate(prompt, schema=int)
    assert [message.content for message in backend.requests[-1].messages] == [
        'Who?\n\nAnswer only with JSON that fits this schema: {"type":"integer"}', "{",
    ]  # fmt: skip


def test_reply_without_a_type_has_no_value(made: Made) -> None:
    session, _backend = made
    assert session.generate("?").value is None


def test_map_has_plain_columns_and_values(made: Made) -> None:
    session, backend = made
    for text in ('{"fullName": "Ada", "born": "1815-12-10"}', "no"):
        backend.will(*whole_answer(text))
    mapped = session.map("{item}?", ["a", "b"], schema=Person, workers=1)
    assert mapped.frame().fillna("-").values.tolist() == [["Ada", "1815-12-10", "-"], ["-"] * 3]
    assert list(mapped.frame().columns) == ["fullName", "born", "address"]
    first = mapped[0]
    assert first is not None
    assert first.value.born == date(1815, 12, 10)
    assert list(mapped.errors.values()) == [[1]]
    outcome = mapped.outcome(1)
    assert outcome is not None
    assert (outcome.text, outcome.usage.completion_tokens) == ("no", 1)
    backend.will(*whole_answer('{"fullName": "Bo", "born": "1900-01-01"}'))
    assert mapped.retry().frame()["fullName"].tolist() == ["Ada", "Bo"]
    backend.will(*whole_answer("no"))
    with pytest.raises(InvalidReply, match="This is the error of row 0"):
        session.map("{item}?", ["c"], schema=Person, on_error="stop")


def test_columns_of_a_map_replace_none_of_the_data(made: Made) -> None:
    session, backend = made
    data = pd.DataFrame({"t": ["a"], "n": [5], "n_answer": [6], "tokens": [7]})
    backend.will(*whole_answer('{"n": 1, "error": 2, "tokens": 3}'))
    mapped = session.map("{t}?", data, schema="n int, error int, tokens int")
    assert mapped.frame(None, "error").to_dict("records") == [{
        "t": "a", "n": 5, "n_answer": 6, "tokens": 7, "n_answer_2": 1, "error": 2, "tokens_answer": 3,
        "error_answer": None,
    }]  # fmt: skip
    assert mapped.answer_columns() == ("n_answer_2", "error", "tokens_answer")


def _without_maximum(schema: dict[str, Any]) -> None:
    schema.pop("maximum", None)


def test_known_row_that_no_longer_fits_is_sent_again(made: Made, tmp_path: Path) -> None:
    session, backend = made

    class Loose(BaseModel):
        n: int

    class Strict(Loose):
        model_config = ConfigDict(title="Loose")
        n: int = Field(json_schema_extra=_without_maximum, le=5)

    path = tmp_path / "rows.jsonl"
    backend.will(*whole_answer('{"n": 9}'))
    session.map("{item}?", ["a"], schema=Loose, save=path)
    assert session.map("{item}?", ["a"], schema=Loose, save=path).progress.cached == 1
    backend.will(*whole_answer('{"n": 3}'))
    again = session.map("{item}?", ["a"], schema=Strict, save=path)
    assert (again.progress.cached, again.frame()["n"].tolist()) == (0, [3])
