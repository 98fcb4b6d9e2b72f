"""JSON schemas of all kinds: random ones by a seed, some by hand, and some as real programs have them."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = (
    "id", "name", "tags", "size", "born on", "größe", "a/b", "kind", "$price", 'the "one"', "it's",
    "back\\slash", "emoji 🐳", "", "next", "items", "type", "properties", "UPPER", "x-y_z.0",
)  # fmt: skip
_LABELS = (
    "red",
    "green",
    "Blue",
    "a b",
    "ab",
    "a",
    'say "hi"',
    "tab\t",
    "line\nbreak",
    "ß",
    "🐳",
    "",
)
_PATTERNS = (
    "^[A-Z]{2}-[0-9]{3}$", "^(yes|no)$", "^[a-z]{1,8}$", r"^\+?[0-9]{3,9}$", "^.{2,5}$",
    r"^\d{4}-Q[1-4]$", "^#[0-9a-f]{6}$", "^[^ ]{1,6}$", "^v[0-9]+(\\.[0-9]+){2}$", "ab",
)  # fmt: skip
_FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "uri", "hostname")


def generated(count: int, seed: int) -> list[Schema]:
    """Return `count` random schemas."""
    source = random.Random(seed)
    return [_Generator(source).root() for _ in range(count)]


class _Generator:
    """Makes one schema, with definitions that it refers to."""

    def __init__(self, source: random.Random) -> None:
        self._random = source
        self._definitions: dict[str, Schema] = {}

    def root(self) -> Schema:
        for number in range(self._random.randint(0, 2)):
            self._definitions[f"d{number}"] = self._schema(0)
        make = self._schema if self._random.random() < 0.2 else self._object
        schema = make(1)
        return schema | ({"$defs": self._definitions} if self._definitions else {})

    def _schema(self, depth: int) -> Schema:
        simple = [self._string, self._number, self._enum, self._plain]
        nested = [self._object, self._array, self._union, self._tuple, self._map]
        if self._definitions:
            simple.append(self._reference)
        choices = simple if depth <= 0 else simple + nested
        return self._random.choice(choices)(depth - 1)

    def _string(self, _depth: int) -> Schema:
        r = self._random
        kinds: list[Schema] = [
            {"minLength": r.randint(0, 3), "maxLength": r.randint(3, 20)},
            {"maxLength": r.randint(0, 9)},
            {"pattern": r.choice(_PATTERNS)},
            {"format": r.choice(_FORMATS)},
        ]
        # Most answers with an open string are cut off.
        return {"type": "string", **(r.choice(kinds) if r.random() < 0.9 else {})}

    def _number(self, _depth: int) -> Schema:
        r = self._random
        kinds: list[Schema] = [
            {},
            {"minimum": r.randint(-1000, 0), "maximum": r.randint(0, 10**6)},
            {"exclusiveMinimum": 0},
            {"exclusiveMaximum": r.randint(1, 99), "minimum": -5},
            {"minimum": 0.25, "maximum": 7.5},
        ]
        schema: Schema = {"type": r.choice(["integer", "number"]), **r.choice(kinds)}
        if r.random() < 0.2:
            schema["multipleOf"] = r.choice([2, 5, 10]) if schema["type"] == "integer" else 0.5
        return schema

    def _enum(self, _depth: int) -> Schema:
        r = self._random
        if r.random() < 0.3:
            return {"const": r.choice([*_LABELS, 1, 2.5, None, True, [1, "a"], {"a": [None]}])}
        return {"enum": r.sample([*_LABELS, 0, -7, 2.5, None, False], r.randint(1, 5))}

    def _plain(self, _depth: int) -> Schema:
        r = self._random
        return {"type": r.choice(["boolean", "null", ["integer", "null"], ["boolean", "string"]])}

    def _reference(self, _depth: int) -> Schema:
        return {"$ref": f"#/$defs/{self._random.choice(list(self._definitions))}"}

    def _array(self, depth: int) -> Schema:
        least = self._random.randint(0, 2)
        limits = {"minItems": least, "maxItems": least + self._random.randint(0, 2)}
        limits = limits if self._random.random() < 0.9 else {}
        return {"type": "array", "items": self._schema(depth), **limits}

    def _tuple(self, depth: int) -> Schema:
        items = [self._schema(depth) for _ in range(self._random.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _object(self, depth: int) -> Schema:
        r = self._random
        names = r.sample(_NAMES, r.randint(1, 4))
        required = [name for name in names if r.random() < 0.7]
        schema: Schema = {
            "type": "object",
            "properties": {name: self._schema(depth) for name in names},
            "required": required,
        }
        if r.random() < 0.3:
            schema["additionalProperties"] = r.choice([False, {"type": "integer"}])
        return schema

    def _map(self, depth: int) -> Schema:
        labels = self._random.sample(_NAMES, 3)
        return {
            "type": "object",
            "additionalProperties": self._schema(depth),
            **self._random.choice(
                [
                    {"maxProperties": 2},
                    {"minProperties": 1, "maxProperties": 2},
                    {},
                    {"propertyNames": {"enum": labels}},
                    {"propertyNames": {"pattern": "^[a-z]{1,8}$"}},
                ]
            ),
        }

    def _union(self, depth: int) -> Schema:
        parts = [self._schema(depth) for _ in range(self._random.randint(1, 3))]
        return {"anyOf": parts}


def _object(_open: bool = False, /, **properties: Schema) -> Schema:
    """Return the schema of an object that requires all of its properties."""
    closed = {} if _open else {"additionalProperties": False}
    return {"type": "object", "properties": properties, "required": list(properties), **closed}


_TEXT: Schema = {"type": "string", "maxLength": 20}
_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_NULL: Schema = {"type": "null"}


def _list(items: Schema, least: int = 0, most: int = 2) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_FORMATTED: list[Schema] = [_object(value={"type": "string", "format": name}) for name in _FORMATS]
_PATTERNED: list[Schema] = [
    _object(code={"type": "string", "pattern": pattern}) for pattern in _PATTERNS
]
_NESTED: list[Schema] = [
    _object(a=_object(b=_object(c=_object(d=_object(e=_FLAG))))),
    _list(_list(_list(_INTEGER, 1, 2), 1, 2), 1, 2),
    _object(rows=_list(_object(x=_NUMBER, y=_NUMBER), 1, 2)),
    _object(person=_object(name=_TEXT, address=_object(street=_TEXT, city=_TEXT))),
    _object(matrix=_list(_list({"enum": [0, 1]}, 3, 3), 3, 3)),
    {"type": "object", "additionalProperties": _object(on=_FLAG), "maxProperties": 2},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "array", "prefixItems": [_TEXT, _INTEGER, _FLAG], "minItems": 3, "items": False},
    {"type": "array", "maxItems": 0},
    _object(pair={"type": "array", "prefixItems": [_INTEGER], "items": _TEXT, "maxItems": 2}),
]
_NODE = _object(value=_FLAG, next={"anyOf": [{"$ref": "#/$defs/node"}, _NULL]})
_TREE = _object(label={"enum": ["a", "b"]}, children=_list({"$ref": "#/$defs/tree"}))
_REFERENCES: list[Schema] = [
    {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"},
    {"$defs": {"tree": _TREE}, "$ref": "#/$defs/tree"},
    {"$defs": {"p": _object(x=_INTEGER)}, **_object(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"})},
    {"definitions": {"t": _TEXT}, **_object(old={"$ref": "#/definitions/t"})},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": _FLAG}, "$ref": "#/$defs/a"},
    _object(first=_TEXT, second={"$ref": "#/properties/first"}),
    {"$defs": {"a b/c": _INTEGER}, **_object(x={"$ref": "#/$defs/a%20b~1c"})},
    {
        "$defs": {"json": {"anyOf": [_NULL, _FLAG, _INTEGER, _list({"$ref": "#/$defs/json"})]}},
        "$ref": "#/$defs/json",
    },
]  # fmt: skip
_CIRCLE, _SQUARE = (
    _object(kind={"const": "circle"}, radius=_NUMBER),
    _object(kind={"const": "square"}, side=_NUMBER),
)
_UNIONS: list[Schema] = [
    {"oneOf": [_CIRCLE, _SQUARE]},
    {"anyOf": [_CIRCLE, _SQUARE, _NULL]},
    _object(shape={"oneOf": [_CIRCLE, _SQUARE], "discriminator": {"propertyName": "kind"}}),
    {"type": ["string", "integer", "null"], "maxLength": 9},
    {"type": ["object", "null"], "properties": {"a": _FLAG}, "required": ["a"]},
    _object(value={"anyOf": [_INTEGER, _list(_INTEGER), _object(of=_INTEGER)]}),
    {"anyOf": [_object(a=_INTEGER), _object(a=_INTEGER, b=_INTEGER)]},
    {"allOf": [_object(True, a=_FLAG), _object(True, b=_FLAG)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    _object(n={"anyOf": [{"const": 1}, {"const": "1"}, {"const": None}]}),
]
_ENUMS: list[Schema] = [
    {"enum": ["red", "green", 3, None, 2.5, True]},
    {"enum": [{"a": 1}, [1, 2], "x"]},
    {"const": {"deep": [{"er": "ü"}]}},
    _object(unit={"enum": ["µm", "mm", "m/s²", "°C", "\u2028", "\\n"]}),
    _object(level={"type": "integer", "enum": [1, 10, 100]}),
    _list({"enum": [f"label {n}" for n in range(60)]}, 1, 2),
]
_LIMITS: list[Schema] = [
    _object(age={"type": "integer", "minimum": 0, "maximum": 120}),
    _object(p={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    _object(even={"type": "integer", "multipleOf": 2, "minimum": -9, "maximum": 99}),
    _object(price={"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1000}),
    _object(exact={"type": "string", "minLength": 4, "maxLength": 4}),
    _object(negative={"type": "integer", "exclusiveMaximum": 0}),
    _object(step={"type": "integer", "minimum": 10**9, "maximum": 10**12}),
]
BY_HAND: list[Schema] = [
    *_FORMATTED, *_PATTERNED, *_NESTED, *_REFERENCES, *_UNIONS, *_ENUMS, *_LIMITS,
]  # fmt: skip

_PLACE = {"type": "array", "prefixItems": [_NUMBER, _NUMBER], "items": False, "minItems": 2}
_MONEY = _object(
    amount={"type": "number", "minimum": 0, "maximum": 10**6}, currency={"enum": ["EUR", "USD"]}
)
_VERSION: Schema = {"type": "string", "pattern": r"^\d{1,3}\.\d{1,3}\.\d{1,3}$"}
_DAY: Schema = {"type": "string", "format": "date"}
_ADDRESS = _object(street=_TEXT, city=_TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"})
_LINE = _object(item=_TEXT, count={"type": "integer", "minimum": 1, "maximum": 99}, price=_MONEY)
FROM_LIFE: dict[str, Schema] = {
    "package.json": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9-]{1,20}$"},
            "version": _VERSION,
            "license": {"enum": ["MIT", "Apache-2.0"]},
            "scripts": {"type": "object", "additionalProperties": _TEXT, "maxProperties": 2},
            "dependencies": {"type": "object", "additionalProperties": _VERSION, "maxProperties": 2},
            "private": _FLAG,
        },
        "required": ["name", "version"],
    },
    "GeoJSON point": _object(type={"const": "Point"}, coordinates=_PLACE),
    "GeoJSON line": _object(type={"const": "LineString"}, coordinates=_list(_PLACE, 2, 2)),
    "GeoJSON feature": _object(
        type={"const": "Feature"},
        geometry={"anyOf": [_object(type={"const": "Point"}, coordinates=_PLACE), _NULL]},
        properties={"type": ["object", "null"], "additionalProperties": _TEXT, "maxProperties": 1},
    ),
    "invoice": _object(number=_TEXT, day=_DAY, lines=_list(_LINE, 1, 1), total=_MONEY),
    "order": _object(id={"type": "string", "format": "uuid"}, to=_ADDRESS, paid=_FLAG),
    "contact": _object(name=_TEXT, email={"type": "string", "format": "email"}, phones=_list(_TEXT)),
    "event": _object(
        title=_TEXT, starts={"type": "string", "format": "date-time"}, guests=_list(_TEXT)
    ),
    "recipe": _object(
        title=_TEXT, minutes=_INTEGER, ingredients=_list(_object(what=_TEXT, grams=_NUMBER), 1, 2)
    ),
    "tool call": _object(
        tool={"const": "search"}, arguments=_object(query=_TEXT, limit={"enum": [5, 10, 50]})
    ),
    "tool calls": _list(
        {
            "anyOf": [
                _object(tool={"const": "add"}, a=_NUMBER, b=_NUMBER),
                _object(tool={"const": "time"}, zone={"enum": ["UTC", "Europe/Paris"]}),
            ]
        },
        1,
    ),
    "openapi parameter": _object(
        name=_TEXT, schema=_object(type={"enum": ["string", "integer"]}), required=_FLAG,
        **{"in": {"enum": ["query", "path"]}},
    ),
    "log record": _object(
        time={"type": "string", "format": "date-time"}, level={"enum": ["INFO", "ERROR"]}, text=_TEXT
    ),
    "review": _object(
        stars={"type": "integer", "minimum": 1, "maximum": 5}, summary=_TEXT, pros=_list(_TEXT)
    ),
    "server": _object(
        host={"type": "string", "format": "hostname"}, ip={"type": "string", "format": "ipv4"},
        port={"type": "integer", "minimum": 1, "maximum": 65535},
    ),
    "compose file": _object(
        services={"type": "object", "maxProperties": 1, "additionalProperties": _object(image=_TEXT)}
    ),
    "color theme": _object(
        dark=_FLAG, colors=_list({"type": "string", "pattern": "^#[0-9A-F]{6}$"}, 1, 3)
    ),
    "comment thread": {
        "$defs": {"comment": _object(by=_TEXT, replies=_list({"$ref": "#/$defs/comment"}, 0, 1))},
        "$ref": "#/$defs/comment",
    },
    "pydantic optional": {
        "title": "Person",
        "type": "object",
        "properties": {
            "name": {"title": "Name", "type": "string"},
            "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
            "tags": {"items": {"type": "string"}, "type": "array", "default": []},
        },
        "required": ["name"],
    },
    "measurements": _object(
        unit={"enum": ["°C", "K"]}, values=_list({"type": "number", "minimum": -99, "maximum": 99}, 2, 3)
    ),
}  # fmt: skip


def sample(count: int, seed: int) -> list[Schema]:
    """Return `count` schemas: two of five are not random, as long as these suffice, in random order."""
    source = random.Random(seed)
    fixed = [*BY_HAND, *FROM_LIFE.values()]
    chosen = source.sample(fixed, min(len(fixed), count * 2 // 5))
    chosen += generated(count - len(chosen), seed)
    source.shuffle(chosen)
    return chosen
