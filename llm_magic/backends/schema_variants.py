"""JSON schemas as values: closed, compact, and as strict servers require them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

# The keywords with schemas by name, with lists of schemas, and with one schema.
BY_NAME = frozenset({"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"})
LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
SINGLE = frozenset(
    {
        "items", "additionalProperties", "unevaluatedProperties", "contains", "propertyNames", "not", "if",
        "then", "else",
    }
)  # fmt: skip
# Beside these, an object may have fields that its own `properties` do not name.
_OPEN = frozenset(
    {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "if"}
)
# Beside these, `propertyNames` is not the only keyword that names fields.
_NAMING = (_OPEN - {"additionalProperties"}) | LISTS | {"properties"}
# What only people read.
_ANNOTATIONS = frozenset({"title", "$schema", "$id", "examples", "default"})
Change = Callable[[dict[str, Any]], dict[str, Any]]


class NotStrict(ValueError):
    """A schema that strict servers do not accept; the message names the part."""


def mapped(schema: Any, change: Change) -> Any:
    """Return a schema in which `change` replaced each schema, the inner ones first."""
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in BY_NAME and isinstance(value, dict):
            found[keyword] = {name: mapped(inner, change) for name, inner in value.items()}
        elif keyword in LISTS and isinstance(value, list):
            found[keyword] = [mapped(inner, change) for inner in value]
        elif keyword in SINGLE:
            found[keyword] = mapped(value, change)
        else:
            found[keyword] = value
    return change(found)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects have only the fields that it names.

    A JSON schema allows any other field, and a model would add some. Where other keywords can name
    fields, an object stays as it is.
    """
    found: dict[str, Any] = mapped({**schema}, partial(_close, schema.get("$defs")))
    return found


def _close(definitions: object, schema: dict[str, Any]) -> dict[str, Any]:
    if "propertyNames" in schema and not _NAMING & schema.keys():
        return _with_names(schema, definitions)
    combined = [keyword for keyword in ("allOf", "anyOf", "oneOf") if keyword in schema]
    if "allOf" in schema or (combined and "properties" in schema):
        # Each part would forbid the fields of the others, and those beside it.
        return {**schema, **{key: [_opened(part) for part in schema[key]] for key in combined}}
    if "properties" in schema and not _OPEN & schema.keys():
        return {**schema, "additionalProperties": False}
    return schema


def _with_names(schema: dict[str, Any], definitions: object) -> dict[str, Any]:
    """Return a schema of a dict whose keys are labels or match a pattern, without ``propertyNames``.

    Most engines and servers do not support that keyword. Other keys stay as they are.
    """
    names, value = schema["propertyNames"], schema.get("additionalProperties", {})
    if isinstance(names, dict) and isinstance(definitions, dict) and "$ref" in names:
        names = definitions.get(str(names["$ref"]).removeprefix("#/$defs/"))
    if not isinstance(names, dict):
        return schema
    others = {
        keyword: inner
        for keyword, inner in schema.items()
        if keyword not in {"propertyNames", "additionalProperties"}
    }
    labels = names.get("enum", [names.get("const")])
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        return {**others, "properties": dict.fromkeys(labels, value), "additionalProperties": False}
    if names.keys() - {"type", *_ANNOTATIONS} == {"pattern"}:
        keys = {names["pattern"]: value}
        return {**others, "patternProperties": keys, "additionalProperties": False}
    return schema


def _opened(schema: Any) -> Any:
    if not isinstance(schema, dict) or schema.get("additionalProperties") is not False:
        return schema
    return {name: value for name, value in schema.items() if name != "additionalProperties"}


def compact(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without what a model need not read."""

    def change(one: dict[str, Any]) -> dict[str, Any]:
        shown = {name: value for name, value in one.items() if name not in _ANNOTATIONS}
        if shown.get("additionalProperties") is False:
            del shown["additionalProperties"]
        return shown

    found: dict[str, Any] = mapped({**schema}, change)
    return found


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema as servers with ``"strict": true`` require it: every field is required.

    Raises `NotStrict` for an object whose fields it does not name.
    """
    found: dict[str, Any] = mapped({**schema}, _strict)
    return found


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") == "object" or "properties" in schema:
        if schema.get("additionalProperties", False) is not False or "properties" not in schema:
            raise NotStrict("an object with any fields, such as a dict")
        schema = {
            **schema,
            "additionalProperties": False,
            "required": list(schema["properties"]),
        }
    if "oneOf" in schema:
        # Of several classes, each with a constant field that names it.
        schema["anyOf"] = schema.pop("oneOf")
        schema.pop("discriminator", None)
    # A default would allow to omit the field. Beside a reference nothing else may stand.
    schema.pop("default", None)
    if "$ref" in schema and len(schema) > 1:
        described = {name: text for name, text in schema.items() if name == "description"}
        return {"anyOf": [{"$ref": schema["$ref"]}], **described}
    return schema


def is_object(schema: Mapping[str, Any]) -> bool:
    """Return whether all values of a schema are objects, as its own keywords show."""
    return schema.get("type") == "object"


def wrapped(schema: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return the schema of an object with one field, which has a value of `schema`."""
    inner = dict(schema)
    definitions: dict[str, Any] = {
        name: inner.pop(name) for name in ("$defs", "definitions") if name in inner
    }
    return {
        "type": "object",
        "properties": {field: inner},
        "required": [field],
        "additionalProperties": False,
        **definitions,
    }
