"""Limits are added to what a schema leaves open, and nothing else changes."""

from __future__ import annotations

import calendar
import datetime
import json
import re
from typing import Any

import pytest

from llm_magic.backends.json_schema import MAX_INTEGER, MAX_ITEMS, MAX_LENGTH, bounded
from llm_magic.errors import OptionError

INTEGER = {"type": "integer", "minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}
STRING = {"type": "string", "maxLength": MAX_LENGTH}


def limited(schema: dict[str, Any]) -> dict[str, Any]:
    return bounded(json.dumps(schema))


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, STRING),
        ({"type": ["string", "null"]}, {"type": ["string", "null"], "maxLength": MAX_LENGTH}),
        ({"type": "string", "minLength": 5000}, {"type": "string", "minLength": 5000, "maxLength": 5000}),
        (
            {"type": "array", "items": {"type": "string"}},
            {"type": "array", "items": STRING, "maxItems": MAX_ITEMS},
        ),
        ({"type": "array", "minItems": 500}, {"type": "array", "minItems": 500, "maxItems": 500}),
        ({"type": "integer"}, INTEGER),
        ({"type": "integer", "minimum": 3}, {"type": "integer", "minimum": 3, "maximum": MAX_INTEGER}),
        (
            {"type": "integer", "exclusiveMinimum": 3},
            {"type": "integer", "exclusiveMinimum": 3, "maximum": MAX_INTEGER},
        ),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}},
            {"type": "object", "properties": {"a": INTEGER}},
        ),
        ({"type": "object"}, {"type": "object", "maxProperties": MAX_ITEMS}),
        (
            {"$defs": {"a": {"type": "string"}}, "anyOf": [{"type": "integer"}, {"$ref": "#/$defs/a"}]},
            {"$defs": {"a": STRING}, "anyOf": [INTEGER, {"$ref": "#/$defs/a"}]},
        ),
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_has_no_end_gets_a_limit(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert limited(schema) == expected
    assert limited(expected) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "boolean"},
        {"enum": ["a", 1], "default": {"type": "string"}},
        {"const": {"type": "array"}},
        {"type": "string", "pattern": "^a+$"},
        {"type": "string", "enum": ["a"]},
        {"type": "string", "maxLength": 10**6},
        {"type": "integer", "enum": [10**30]},
        {"type": "integer", "minimum": 10**20},
        {"type": "array", "maxItems": 10**6},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^b": {}}},
        {"type": "object", "additionalProperties": False},
        {"properties": {"type": {"type": "null"}, "items": {"type": "null"}}},
        {
            "allOf": [
                {"type": "object", "properties": {"a": {}}},
                {"type": "object", "properties": {"b": {}}},
            ]
        },
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {}]},
    ],
    ids=json.dumps,
)
def test_other_schemas_stay_as_they_are(schema: dict[str, Any]) -> None:
    assert limited(schema) == schema


def test_dates_are_those_that_exist() -> None:
    pattern = limited({"type": "string", "format": "date"})["pattern"]
    for year in (1000, 1900, 2000, 2023, 2024, 2100, 2400, 9996):
        for month in range(1, 13):
            last = calendar.monthrange(year, month)[1]
            for day in range(0, 33):
                text = f"{year}-{month:02}-{day:02}"
                assert bool(re.match(pattern, text)) == (0 < day <= last), text


@pytest.mark.parametrize("text", ["2024-02-29T23:59:59Z", "2023-12-31T00:00:00.123456+13:59"])
def test_times_are_those_that_python_reads(text: str) -> None:
    date_time = limited({"type": "string", "format": "date-time"})["pattern"]
    time = limited({"type": "string", "format": "time"})["pattern"]
    assert datetime.datetime.fromisoformat(text)
    assert re.match(date_time, text)
    assert re.match(time, text.partition("T")[2])
    assert not re.match(time, "23:59:60Z")


@pytest.mark.parametrize("text", ["", "{", "[]", "true", '"string"', "[" * 100_000])
def test_text_that_is_no_schema_is_an_error(text: str) -> None:
    with pytest.raises(OptionError, match=r"^--schema cannot be used: it "):
        bounded(text)
