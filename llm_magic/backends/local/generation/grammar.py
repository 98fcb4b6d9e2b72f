"""The structure of an answer as a grammar of llguidance, checked without a model."""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llm_magic.backends.json_schema import bounded
from llm_magic.config.commands import option
from llm_magic.errors import MissingDependency, OptionError
from llm_magic.types import Structure

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# As `json.dumps` writes it, on one line: models repeat line breaks and spaces where they may.
_JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_UNKNOWN_KEYS = "Unimplemented keys: "
_LONGEST_REASON = 300
# Rules may refer to each other in a chain, which llguidance follows on the stack of the thread.
_MAX_GRAMMAR = 1 << 14


@functools.lru_cache(maxsize=64)
def checked(structure: Structure) -> str:
    """Return the grammar of a structure as JSON, to be combined by `with_reasoning`.

    Raises `OptionError` for a structure that llguidance cannot express, with the part that it cannot,
    and `MissingDependency` without llguidance.
    """
    if find_spec("llguidance") is None:
        raise MissingDependency(
            f"{option(structure.option)} of a local model needs llguidance. To install, run: pip install"
            " llguidance"
        )
    from llguidance import LLMatcher

    try:
        grammar = json.dumps(_grammar(structure))
        _, found = LLMatcher.validate_grammar_with_warnings(
            json.dumps({"grammars": [json.loads(grammar)]}), limits=limits()
        )
    except ValueError as invalid:
        found = [str(invalid)]
    except RecursionError:
        found = ["it is nested too deeply"]
    if found:
        raise error(structure, found[0])
    return grammar


def lark(structure: Structure) -> str:
    """Return the grammar of a structure in llguidance's notation, which llama.cpp reads, too.

    Raises what `checked` raises.
    """
    grammar = json.loads(checked(structure))
    text: str | None = grammar.get("lark_grammar")
    return f"start: %json {json.dumps(grammar['json_schema'])}" if text is None else text


def error(structure: Structure, found: str) -> OptionError:
    """Return the error for what llguidance has found in a structure."""
    return OptionError(f"{option(structure.option)} cannot be used: {_reason(found)}.")


def limits() -> LLParserLimits:
    """Return the limits that keep a hostile grammar from taking seconds or gigabytes."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_grammar_size=200_000, max_lexer_states=100_000, verbose_errors=False)


def _grammar(structure: Structure) -> dict[str, Any]:
    from llguidance import LLMatcher

    if structure.kind == "json_schema":
        return {"json_schema": bounded(structure.source) | {"x-guidance": _JSON_LAYOUT}}
    if structure.kind == "grammar":
        if len(structure.source) > _MAX_GRAMMAR:
            raise ValueError(f"it has more than {_MAX_GRAMMAR:,} characters")
        return {"lark_grammar": structure.source}
    if structure.kind == "choice":
        return {"lark_grammar": f"start: {' | '.join(map(json.dumps, structure.labels))}"}
    only: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(structure.source))["grammars"][0]
    return only


def _reason(found: str) -> str:
    """Return why llguidance rejects a grammar, in one line."""
    if found.startswith(_UNKNOWN_KEYS):
        keys = json.loads(found.removeprefix(_UNKNOWN_KEYS))
        return f"{', '.join(keys)} cannot be enforced during generation"
    if "recursion limit" in found:
        return "it is nested too deeply"
    # A drawing of the position follows.
    lines = [line.strip() for line in found.splitlines() if line.strip(" ^")]
    last = next(
        (line for line in lines if line.startswith("error: ")), lines[0] if lines else found
    )
    return last.removeprefix("error: ").rstrip(".")[:_LONGEST_REASON]
