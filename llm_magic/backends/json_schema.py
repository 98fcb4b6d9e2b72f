"""Checks a JSON schema, and limits what it leaves open: strings, lists and objects without an end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llm_magic.backends.schema_variants import BY_NAME, LISTS, SINGLE
from llm_magic.config.commands import option
from llm_magic.errors import OptionError

# Larger ones are no description of an answer, and take seconds to compile.
_MAX_CHARACTERS, _MAX_PROPERTIES, _MAX_SCHEMAS = 1 << 18, 1000, 10_000
_MAX_COMBINED = 4
# References may form a chain, which llguidance follows on the stack of the thread.
_MAX_REFERENCES = 400
# Small models repeat themselves in a string or a list that has no end.
MAX_LENGTH, MAX_ITEMS, MAX_INTEGER = 1000, 100, 10**18
# Texts of these formats that every parser accepts: no leap seconds, no day that does not exist.
_YEAR, _DAY, _SECOND = "[1-9][0-9]{3}", "(0[1-9]|1[0-9]|2[0-8])", "[0-5][0-9]"
_LEAP_YEAR = "([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-(0[1-9]|1[0-2])-{_DAY}|{_YEAR}-(0[13-9]|1[0-2])-(29|30)"
    rf"|{_YEAR}-(0[13578]|1[02])-31|{_LEAP_YEAR}-02-29)"
)
_CLOCK = rf"([01][0-9]|2[0-3]):{_SECOND}:{_SECOND}(\.[0-9]{{1,6}})?"
_TIME = rf"{_CLOCK}(Z|[+-](0[0-9]|1[0-3]):{_SECOND})"
DATE = f"^{_DATE}$"
# A date with a time, without a time zone: no format of JSON schemas.
NAIVE_DATETIME = f"^{_DATE}T{_CLOCK}$"
_PATTERNS = {"date": DATE, "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
# What limits a string in another way.
_STRING_FORMS = ("enum", "const", "pattern", "format", "maxLength")
# What describes an object in another way.
_OBJECT_FORMS = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")


def bounded(text: str) -> dict[str, Any]:
    """Return a schema in which strings, lists, integers and objects have a limit.

    Every answer to it is one to the schema `text`. Limits of the schema itself stay as they are.

    Raises `OptionError` for a text that is no schema, and for one that is too large.
    """
    schema = _parsed(text)
    schemas = list(_schemas(schema))
    if sum("$ref" in each for each in schemas) > _MAX_REFERENCES:
        raise _error(f"it has more than {_MAX_REFERENCES} references")
    patterns = sum("pattern" in each for each in schemas)
    if patterns > _MAX_COMBINED and any("allOf" in each for each in schemas):
        # Whether a text fits several patterns at once may take hours to find out.
        raise _error(f"it combines more than {_MAX_COMBINED} patterns by allOf")
    for each in schemas:
        types = each.get("type")
        for name in types if isinstance(types, list) else [types]:
            if name == "string":
                _limit_string(each)
            elif name == "array":
                each.setdefault("maxItems", max(MAX_ITEMS, _number(each, "minItems")))
            elif name == "integer":
                _limit_integer(each)
            elif name == "object":
                _limit_object(each)
    return schema


def _parsed(text: str) -> dict[str, Any]:
    if len(text) > _MAX_CHARACTERS:
        raise _error(f"it has {len(text):,} characters, of at most {_MAX_CHARACTERS:,}")
    try:
        schema = json.loads(text)
    except RecursionError:
        raise _error("it is nested too deeply") from None
    except ValueError as error:
        raise _error(f"it is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise _error('it is no JSON object, such as {"type": "object", "properties": {…}}')
    return schema


def _error(reason: str) -> OptionError:
    return OptionError(f"{option('schema')} cannot be used: {reason}.")


def _schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema and those inside it."""
    pending, count = [schema], 0
    while pending:
        each = pending.pop()
        yield each
        count += 1
        if count > _MAX_SCHEMAS:
            raise _error(f"it consists of more than {_MAX_SCHEMAS:,} schemas")
        found = [each.get(name) for name in SINGLE]
        for name in LISTS:
            found += each[name] if isinstance(each.get(name), list) else ()
        for name in BY_NAME:
            children = each.get(name)
            if isinstance(children, dict):
                if len(children) > _MAX_PROPERTIES:
                    raise _error(f"an object has more than {_MAX_PROPERTIES:,} {name}")
                found += children.values()
        pending += [child for child in found if isinstance(child, dict)]


def _number(schema: dict[str, Any], key: str) -> int:
    value = schema.get(key)
    return value if isinstance(value, int) else 0


def _limit_string(schema: dict[str, Any]) -> None:
    known = schema.get("format")
    if isinstance(known, str) and known in _PATTERNS and "pattern" not in schema:
        schema["pattern"] = _PATTERNS[schema.pop("format")]
    elif not any(key in schema for key in _STRING_FORMS):
        schema["maxLength"] = max(MAX_LENGTH, _number(schema, "minLength"))


def _limit_integer(schema: dict[str, Any]) -> None:
    if any(key in schema for key in ("enum", "const")):
        return
    limits = {"minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}
    given = [
        schema[key] for key in (*limits, "exclusiveMinimum", "exclusiveMaximum") if key in schema
    ]
    # Old drafts have flags as limits; anything else is an error of the schema, and reported later.
    if any(type(value) not in (int, float) or abs(value) >= MAX_INTEGER for value in given):
        return
    for key, limit in limits.items():
        if f"exclusive{key.capitalize()}" not in schema:
            schema.setdefault(key, limit)


def _limit_object(schema: dict[str, Any]) -> None:
    """Limit an object without known properties; `schema_variants.closed` has closed the others."""
    is_open = not schema.get("properties") and schema.get("additionalProperties") is not False
    if is_open and not any(key in schema for key in _OBJECT_FORMS):
        schema.setdefault("maxProperties", max(MAX_ITEMS, _number(schema, "minProperties")))
