"""The fields of a request that hold the answer of a server to a structure; pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llm_magic.backends.base import by_prompt
from llm_magic.backends.schema_variants import NotStrict, is_object, strict, wrapped
from llm_magic.config.commands import option
from llm_magic.errors import LLMMagicError, OptionError, RequestFailed
from llm_magic.types import Structure, StructureKind

Fields = Callable[[Structure], dict[str, Any]]
# The only field of an object around an answer that is no object.
ANSWER = "answer"
_NAME = "answer"  # of a schema
# The fields of structures, and words of servers about them.
_FIELDS = frozenset({"response_format", "structured_outputs", "grammar", "format"})
_WORDS = re.compile(r"response_format|structured.?outputs?|schema|grammar|regex", re.IGNORECASE)


def schema_of(structure: Structure) -> dict[str, Any]:
    """Return the JSON schema of a structure; that of a choice has the labels as its values."""
    if structure.kind == "choice":
        return {"type": "string", "enum": list(structure.labels)}
    schema: dict[str, Any] = json.loads(structure.source)
    return schema


def response_format(structure: Structure) -> dict[str, Any]:
    """Return the fields of OpenAI: the root of a schema is an object, whose fields are all required."""
    schema = schema_of(structure)
    try:
        schema = strict(schema if is_object(schema) else wrapped(schema, ANSWER))
    except NotStrict as error:
        raise OptionError(
            f"The server cannot enforce {error} in the schema. Name its fields, or add"
            f" {option('schema_by', 'prompt')}."
        ) from None
    return _response_format(schema, is_strict=True)


def loose_response_format(structure: Structure) -> dict[str, Any]:
    """Return the same fields for servers that take any schema of an object."""
    schema = schema_of(structure)
    return _response_format(schema if is_object(schema) else wrapped(schema, ANSWER))


def _response_format(schema: Mapping[str, Any], *, is_strict: bool = False) -> dict[str, Any]:
    named: dict[str, Any] = {"name": _NAME, "schema": schema}
    if is_strict:
        named["strict"] = True
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def structured_outputs(structure: Structure) -> dict[str, Any]:
    """Return the fields of vLLM."""
    values: Mapping[StructureKind, Callable[[], Any]] = {
        "json_schema": lambda: schema_of(structure),
        "choice": lambda: list(structure.labels),
        "regex": lambda: structure.source,
        "grammar": lambda: structure.source,
    }
    name = "json" if structure.kind == "json_schema" else structure.kind
    return {"structured_outputs": {name: values[structure.kind]()}}


def llama_server(structure: Structure) -> dict[str, Any]:
    """Return the fields of llama.cpp's server, whose grammars are in its own notation."""
    if structure.kind == "json_schema":
        return _response_format(schema_of(structure))
    if structure.kind == "grammar":
        return {"grammar": structure.source}
    labels = " | ".join(json.dumps(label, ensure_ascii=False) for label in structure.labels)
    return {"grammar": f"root ::= {labels}"}


def llama_cpp_python(structure: Structure) -> dict[str, Any]:
    """Return the fields of llama-cpp-python."""
    return {"response_format": {"type": "json_object", "schema": schema_of(structure)}}


def ollama_format(structure: Structure) -> dict[str, Any]:
    """Return the fields of Ollama."""
    return {"format": schema_of(structure)}


def advise(error: LLMMagicError, structure: Structure | None) -> None:
    """Add what to do if a server rejects the fields of a structure."""
    if structure is None or not isinstance(error, RequestFailed) or error.status not in {400, 422}:
        return
    if error.parameter in _FIELDS or _WORDS.search(error.problem):
        error.advise(by_prompt(structure).strip())
