"""Typed answers: what the user names as their type, and the values that answers have.

A type is what ``schema=``, ``choice=``, ``regex=`` or ``grammar=`` names. `answer_type` returns it as an
`AnswerType`: the structure that a backend enforces, and the function that makes a value of a text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

from llm_magic.backends.json_schema import DATE, NAIVE_DATETIME
from llm_magic.backends.remote.structures import ANSWER
from llm_magic.backends.schema_variants import closed, compact, is_object, mapped
from llm_magic.config.commands import option
from llm_magic.errors import OptionError, did_you_mean
from llm_magic.text import (
    STRICT_JSON,
    counted,
    depth_of,
    json_problem,
    parse_json,
    visible_line,
)
from llm_magic.types import FinishReason, Reply, Structure

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

    from llm_magic.errors import InvalidReply

By = Literal["backend", "prompt"]
_BY: tuple[By, ...] = get_args(By)
_MOST_CHARACTERS = 100_000  # of a schema, a pattern or a grammar
_MOST_DEPTH = 64  # of a schema
_MOST_LABELS = 1_000
_LONGEST_PROBLEM, _LONGEST_NAME = 300, 60
# A field of the short form: a name, a type, and a description after a colon.
_FIELD = re.compile(
    r"(?P<name>[^\W\d]\w*)(?:\s+(?P<type>[a-z]+(?:\[[a-z]+\])?))?\s*(?::\s*(?P<about>.+))?",
    re.DOTALL,
)
_TYPES: Mapping[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool, "list": list[str],
    "list[str]": list[str], "list[int]": list[int], "list[float]": list[float], "list[bool]": list[bool],
    "string": str, "integer": int, "number": float, "boolean": bool,
}  # fmt: skip
# The formats of texts that backends enforce.
_FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
})  # fmt: skip
# The keys of dicts, by their type in pydantic.
_KEY_PATTERNS = {"int": "^(0|-?[1-9][0-9]{0,17})$", "date": DATE}
_QUOTES = " \t\n\"'`*"
_SHORT_TYPES = "str, int, float, bool, list or list[int]"


class InvalidValue(ValueError):
    """An answer that has no value of its type.

    `is_cut` is whether it may be the start of a valid answer.
    """

    def __init__(self, problem: str, *, is_cut: bool = False) -> None:
        text = visible_line(problem)
        super().__init__(text if len(text) <= _LONGEST_PROBLEM else f"{text[:_LONGEST_PROBLEM]}…")
        self.is_cut = is_cut


@dataclass(frozen=True, slots=True)
class AnswerType:
    """The type of an answer.

    Attributes:
        structure: What a backend enforces.
        name: What messages call it, such as ``Person``.
        parse: Returns the value of a text; raises `InvalidValue`.
        plain: Returns a value in the types of JSON.
        by: ``backend``, or ``prompt`` if only the prompt describes it; then there is a second try.
        is_checked: Whether `parse` checks all of it. Of a JSON schema it checks only that it is JSON.
    """

    structure: Structure
    name: str
    parse: Callable[[str], Any]
    by: By = "backend"
    is_checked: bool = True
    plain: Callable[[Any], Any] = lambda value: value

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of its values, if they are objects; in a table, each one is a column."""
        if self.structure.kind != "json_schema":
            return ()
        schema = _resolved(json.loads(self.structure.source))
        properties = schema.get("properties")
        return tuple(properties) if isinstance(properties, dict) else ()

    @property
    def instruction(self) -> str:
        """The end of a prompt that describes it, "" if the prompt of the user has to do that."""
        structure = self.structure
        match structure.kind:
            case "json_schema":
                return f"Answer only with JSON that fits this schema: {self.compact_source}"
            case "choice":
                return f"Answer only with one of: {', '.join(structure.labels)}"
            case "regex":
                return f"Answer only with a text that matches this regular expression: {structure.source}"
        return ""

    @property
    def compact_source(self) -> str:
        """The schema without what a model need not read; the labels, the pattern or the grammar."""
        structure = self.structure
        if structure.kind == "json_schema":
            return _dumped(compact(json.loads(structure.source)))
        return ", ".join(structure.labels) or structure.source

    def checked(self, text: str, finish_reason: FinishReason) -> tuple[Any, InvalidValue | None]:
        """Return the value of an answer, and why it has none, also where it was cut."""
        kind = self.structure.kind
        found = text.strip() if kind in {"json_schema", "choice"} else text
        is_whole = finish_reason == "stop"
        # The start of a number, of a label or of a match can be one, too.
        if is_whole or (kind == "json_schema" and found[-1:] in {"}", "]", '"', "`"}):
            try:
                is_extracted = self.by == "prompt" and kind == "json_schema"
                return self.parse(_extracted(found) if is_extracted else found), None
            except InvalidValue as error:
                if is_whole:
                    return None, error
        return None, InvalidValue("it is not complete.", is_cut=True)

    def error(self, reply: Reply, problem: InvalidValue) -> InvalidReply:
        """Return the error of an answer without a value."""
        error = reply.invalid(
            f"The answer does not fit {self.name}: {problem}", is_cut=problem.is_cut
        )
        if self.by == "backend" and not problem.is_cut and self.structure.kind != "grammar":
            by_prompt = option("schema_by", "prompt")
            error.advise(f"For a second try after an invalid answer, add {by_prompt}.")
        return error


def answer_type(given: Mapping[str, Any]) -> AnswerType:
    """Return the type that the options of a call name; the names are those of `TypeOptions`.

    Raises `OptionError` for more than one, and for what is no type.
    """
    named = [name for name in _MAKERS if given.get(name) is not None]
    by = given.get("schema_by") or "backend"
    if by not in _BY:
        raise OptionError(f"{by!r} is invalid. Use {' or '.join(_BY)}.", option="schema_by")
    if not named:
        raise OptionError(f"{option('schema_by')} needs {option('schema', 'TYPE')}.")
    if len(named) > 1:
        first, second = (option(name) for name in named[:2])
        raise OptionError(f"An answer has one type. Remove {first} or {second}.")
    name = named[0]
    if name == "grammar" and by == "prompt":
        raise OptionError(
            f"{option('schema_by', 'prompt')} cannot check {option('grammar')}. Remove one of them."
        )
    return _MAKERS[name](given.get(name), by)


# -- schemas ----------------------------------------------------------------------------------


def _of_schema(named: Any, by: By) -> AnswerType:
    if isinstance(named, Path) or (isinstance(named, str) and _is_file(named)):
        named = _read_schema(Path(named))
    if isinstance(named, str):
        return _of_adapter(_short_form(named), "the schema", by)
    if isinstance(named, Mapping):
        parse = partial(_unwrapped, is_wrapped=_may_be_wrapped(named))
        return AnswerType(_json_structure(named), "the schema", parse, by, is_checked=False)
    name = getattr(named, "__name__", "") if isinstance(named, type) and not get_args(named) else ""
    shown = visible_line(str(named).replace("__main__.", ""))[:_LONGEST_NAME]
    return _of_adapter(named, name or shown, by)


def _of_adapter(named: Any, name: str, by: By) -> AnswerType:
    """Return the answer type of anything that pydantic has a schema for."""
    from pydantic import PydanticUserError, TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError

    is_notation = type(named).__module__ in {"typing", "types", "typing_extensions"}
    if not (isinstance(named, type) or get_origin(named) is not None or is_notation):
        is_labels = isinstance(named, (list, tuple)) and all(isinstance(one, str) for one in named)
        advice = f" For one of several labels, use {option('choice')}." if is_labels else ""
        raise OptionError(
            f"A value of type {type(named).__name__} is not a type of answers. Use a class, such as a"
            f" pydantic model, a JSON schema, or 'name, age int'.{advice}",
        )
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(named)
        schema = mapped(_schema_of(adapter), _without_checks)
    except (PydanticUserError, PydanticSchemaGenerationError, NameError, TypeError) as error:
        # The message of pydantic ends with an address, after advice that does not apply to answers.
        reason, advice = str(error).partition("\n")[0], ""
        if isinstance(error, PydanticSchemaGenerationError):
            reason = reason.partition(". Set `")[0]
            advice = ". Use a pydantic model, a dataclass or a TypedDict instead."
        reason = visible_line(reason)[:_LONGEST_PROBLEM]
        raise OptionError(f"{name} has no JSON schema: {reason}{advice}") from None
    plain = partial(adapter.dump_python, mode="json", by_alias=True)
    parse = partial(_validated, adapter, is_wrapped=_may_be_wrapped(schema))
    return AnswerType(_json_structure(schema), name, parse, by, plain=plain)


def _schema_of(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    """Return the JSON schema of a type of pydantic, without what it accepts, too, or what it refuses."""
    from pydantic.json_schema import GenerateJsonSchema

    class Generate(GenerateJsonSchema):
        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            """Return the schema without the texts that pydantic accepts, too: a model may write any text."""
            found: dict[str, Any] = super().decimal_schema(schema)
            number: dict[str, Any] = next(iter(found.get("anyOf", ())), found)
            return number

        def dict_schema(self, schema: Any) -> dict[str, Any]:
            """Return the schema, in which every key has the pattern of its type: in JSON, keys are texts."""
            found: dict[str, Any] = super().dict_schema(schema)
            pattern = _KEY_PATTERNS.get(schema.get("keys_schema", {}).get("type"))
            if "patternProperties" in found:
                return {**found, "additionalProperties": False}
            return {**found, "propertyNames": {"pattern": pattern}} if pattern else found

        def datetime_schema(self, schema: Any) -> dict[str, Any]:
            """Return the schema; the format ``date-time`` has a time zone, which pydantic may refuse."""
            if schema.get("tz_constraint") == "naive":
                return {"type": "string", "pattern": NAIVE_DATETIME}
            return super().datetime_schema(schema)

    return adapter.json_schema(schema_generator=Generate)


def _without_checks(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without what backends do not enforce, but pydantic checks."""
    found = {name: value for name, value in schema.items() if name not in {"uniqueItems", "format"}}
    # Pydantic also has uuid4.
    form = re.sub(r"^uuid\d$", "uuid", str(schema.get("format")))
    return found | ({"format": form} if form in _FORMATS else {})


def _json_structure(schema: Mapping[str, Any]) -> Structure:
    """Return the structure of a JSON schema, whose objects have no other fields than it names."""
    try:
        plain = json.loads(json.dumps(schema, allow_nan=False))
    except RecursionError:
        raise OptionError("The schema is nested too deeply.") from None
    except (TypeError, ValueError) as error:
        raise OptionError(f"The schema is not JSON: {error}.") from None
    depth = depth_of(plain, _MOST_DEPTH)
    if depth > _MOST_DEPTH:
        raise OptionError(
            f"The schema is nested more than {_MOST_DEPTH} levels deep. Use $defs and $ref.",
        )
    text = _dumped(closed(plain))
    _check_length(text, "schema")
    return Structure("json_schema", text)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_file(text: str) -> bool:
    return text.endswith(".json") or (
        not re.search(r"[\s,]", text) and bool(text) and Path(text).is_file()
    )


def _read_schema(path: Path) -> Any:
    try:
        schema = json.loads(path.expanduser().read_text("utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"{path} cannot be read: {reason}.") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise OptionError(f"{path} is not a JSON schema: it is no object.")
    return schema


def _short_form(text: str) -> Any:
    """Return the type of ``name, age int, tags list``: a dict with these fields."""
    from pydantic import Field

    # Not `typing`: pydantic needs this one before Python 3.12.
    from typing_extensions import TypedDict

    separator = "\n" if "\n" in text.strip() else ","
    fields: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(separator))):
        found = _FIELD.fullmatch(part)
        kind = (found["type"] or "str") if found is not None else ""
        if found is None or kind not in _TYPES:
            _raise_wrong_field(part, kind)
        if found["name"] in fields:
            raise OptionError(f"The field {found['name']} is named twice.")
        about = (found["about"] or "").strip()
        annotated = Annotated[_TYPES[kind], Field(description=about)] if about else _TYPES[kind]
        fields[found["name"]] = annotated
    if not fields:
        raise OptionError("The schema is empty.")
    make: Callable[[str, Mapping[str, Any]], Any] = TypedDict  # type: ignore[assignment]
    return make("Answer", fields)


def _raise_wrong_field(part: str, kind: str) -> NoReturn:
    shown = visible_line(part)[:_LONGEST_PROBLEM]
    if kind:
        near = did_you_mean(kind, _TYPES, count=1)
        raise OptionError(f"{shown!r}: there is no type {kind!r}.{near} Use {_SHORT_TYPES}.")
    raise OptionError(
        f"{shown!r} is no field. Write NAME or NAME TYPE, as in 'name, age int, tags list'.",
    )


# -- labels, patterns, grammars ---------------------------------------------------------------


def _of_choice(named: Any, by: By) -> AnswerType:
    values = _labelled(named)
    if len(values) < 2:
        raise OptionError("A choice needs two labels or more.")
    structure = Structure.choice(list(values))
    name = named.__name__ if isinstance(named, type) else "the choice"
    parse = partial(_parse_choice, values, by)
    return AnswerType(structure, name, parse, by, plain=_label_of)


def _label_of(member: Any) -> Any:
    return _label(member) if isinstance(member, Enum) else member


def _labelled(named: Any) -> dict[str, Any]:
    """Return the labels of a choice, and the value of each."""
    if isinstance(named, str):
        members: Iterable[Any] = named.split(",")
    elif isinstance(named, type) and issubclass(named, Enum):
        members = list(named)
    elif get_origin(named) is Literal:
        members = get_args(named)
    elif isinstance(named, Iterable) and not isinstance(named, (Mapping, bytes)):
        members = named
    else:
        raise OptionError(
            f"A value of type {type(named).__name__} has no labels. Use a list, an Enum, a Literal or a text"
            " such as red,green,blue."
        )
    from llm_magic.session.map.prompts import is_missing

    values: dict[str, Any] = {}
    for member in members:
        if not isinstance(member, str) and is_missing(member):
            raise OptionError(
                f"A label is {member}, a missing value. Omit it, such as with .dropna()."
            )
        label = _label(member)
        _check_label(label, named, values)
        values[label] = label if isinstance(named, str) else member
        if len(values) > _MOST_LABELS:
            raise OptionError(
                f"There are more than {_MOST_LABELS:,} labels, the most that are sent."
            )
    return values


def _check_label(label: str, named: Any, others: Collection[str]) -> None:
    if not label:
        advice = "Put labels with spaces in quotes." if isinstance(named, str) else "Omit it."
        raise OptionError(f"A label is empty. {advice}")
    if "\n" in label:
        raise OptionError(f"The label {label!r} has several lines. Use one line.")
    if label in others:
        advice = "Add .unique()." if hasattr(named, "unique") else "Name each label once."
        raise OptionError(f"The label {visible_line(label)} is named twice. {advice}")


def _label(member: Any) -> str:
    if isinstance(member, Enum):
        member = member.value if isinstance(member.value, str) else member.name
    return str(member).strip()


def _of_regex(named: Any, by: By) -> AnswerType:
    if not isinstance(named, (str, re.Pattern)):
        raise OptionError("The pattern is no text.")
    pattern = named if isinstance(named, str) else str(named.pattern)
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise OptionError(f"The pattern is invalid: {visible_line(str(error))}.") from None
    _check_length(pattern, "regex")
    return AnswerType(
        Structure("regex", pattern), "the pattern", partial(_parse_match, compiled, by), by
    )


def _of_grammar(named: Any, by: By) -> AnswerType:
    """Return the answer type of a grammar: its text, or the file with it."""
    if isinstance(named, (str, os.PathLike)) and "\n" not in str(named):
        path = Path(named)
        try:
            named = path.expanduser().read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OptionError(f"{path} cannot be read: {reason}.") from None
    if not isinstance(named, str) or not named.strip():
        raise OptionError("The grammar is empty, or no text.")
    _check_length(named, "grammar")
    return AnswerType(Structure("grammar", named), "the grammar", str, by, is_checked=False)


# The options that name a type, of which a call has one.
_MAKERS: Mapping[str, Callable[[Any, By], AnswerType]] = {
    "schema": _of_schema,
    "choice": _of_choice,
    "regex": _of_regex,
    "grammar": _of_grammar,
}


def _check_length(text: str, name: str) -> None:
    if len(text) > _MOST_CHARACTERS:
        raise OptionError(
            f"It has {counted(len(text), 'character')}, and at most {_MOST_CHARACTERS:,} are sent.",
            option=name,
        )


# -- values -----------------------------------------------------------------------------------


def _extracted(text: str) -> str:
    """Return the JSON in an answer without a constraint."""
    try:
        # Pydantic reads some types from JSON alone.
        return json.dumps(parse_json(text))
    except ValueError as error:
        raise InvalidValue(f"it is not JSON: {str(error).rstrip('.')}.") from None


def _may_be_wrapped(schema: Mapping[str, Any]) -> bool:
    """Return whether a server that requires an object gets an object around the values of a schema."""
    properties = _resolved(schema).get("properties")
    return not is_object(schema) and not (isinstance(properties, Mapping) and ANSWER in properties)


def _unwrapped(text: str, *, is_wrapped: bool) -> Any:
    """Return the value of a JSON text, without the object around it."""
    plain = _parse_json_value(text)
    is_object_around = isinstance(plain, dict) and plain.keys() == {ANSWER}
    return plain[ANSWER] if is_wrapped and is_object_around else plain


def _validated(adapter: TypeAdapter[Any], text: str, *, is_wrapped: bool) -> Any:
    """Return the value of a JSON text, checked by pydantic."""
    from pydantic import ValidationError

    plain, texts, problem = _parse_json_value(text), [text], ""
    if isinstance(plain, dict) and plain.keys() == {ANSWER}:
        # Some types, such as Any, accept the object, too.
        texts.insert(0 if is_wrapped else 1, json.dumps(plain[ANSWER]))
    for each in texts:
        try:
            return adapter.validate_json(each)
        except ValidationError as error:
            problem = problem or _first_problem(error)
        except Exception as error:  # noqa: BLE001 - validators are code of the user
            raise InvalidValue(f"{type(error).__name__}: {error}") from None
    raise InvalidValue(problem)


def _first_problem(error: ValidationError) -> str:
    """Return the first problem with the field that has it: ``age: Input should be a valid integer``."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    where = ".".join(str(part)[:40] for part in first["loc"][:8])
    more = f" (and {counted(len(problems) - 1, 'more problem')})" if len(problems) > 1 else ""
    return f"{where}: {first['msg']}{more}" if where else f"{first['msg']}{more}"


def _parse_json_value(text: str) -> Any:
    """Return the value of a text that is JSON and nothing else."""
    try:
        return STRICT_JSON.decode(text)
    except RecursionError:
        raise InvalidValue("it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise InvalidValue(f"it is not JSON: {json_problem(error)}.") from None
    except ValueError as error:
        # Python parses no integer of more than 4,300 digits.
        raise InvalidValue(f"it is not JSON: {str(error).partition(':')[0]}.") from None


def _parse_choice(values: Mapping[str, Any], by: By, text: str) -> Any:
    """Return the value of a label: as it is, as a JSON text, or in an object around it."""
    if text in values:
        return values[text]
    # Models put a label in a sentence of one word.
    folded = {_bare(label): value for label, value in values.items()}
    if by == "prompt" and len(folded) == len(values) and _bare(text) in folded:
        return folded[_bare(text)]
    try:
        found = STRICT_JSON.decode(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and found.keys() == {ANSWER}:
        found = found[ANSWER]
    if isinstance(found, str) and found in values:
        return values[found]
    labels = ", ".join(list(values)[:10]) + (", …" if len(values) > 10 else "")
    raise InvalidValue(f"{text[:40]!r} is none of {labels}.")


def _bare(label: str) -> str:
    return label.strip(f"{_QUOTES}.").casefold()


def _parse_match(pattern: re.Pattern[str], by: By, text: str) -> str:
    # Models put a match in quotes.
    for found in (text, text.strip(_QUOTES)) if by == "prompt" else (text,):
        if pattern.fullmatch(found) is not None:
            return found
    raise InvalidValue(f"{text[:40]!r} does not match {pattern.pattern}.")


def _resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema that the root of a schema refers to."""
    found, seen = schema, 0
    while isinstance(reference := found.get("$ref"), str) and seen < _MOST_DEPTH:
        seen += 1
        target: Any = schema
        for part in reference.removeprefix("#/").split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            break
        found = target
    return found
