"""Answers with a structure for many schemas: each is valid, was cut off, or is refused with a reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any

from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]
from jsonschema.validators import validator_for  # type: ignore[import-untyped]

from llm_magic.backends.schema_variants import closed
from llm_magic.errors import OptionError
from llm_magic.session import Session
from llm_magic.session.requests import Request
from llm_magic.types import Structure
from tests.soak.schemas import Schema

TEMPERATURES = (0.0, 0.7, 1.5)
_PROMPT = "Invent an example of the data that this schema describes:\n"
_MAX_PROMPT = 600
_MAX_NEW_TOKENS, _AT_ONCE = 96, 16


@dataclass(frozen=True)
class Answer:
    """What came of one schema at one temperature: ``valid``, ``cut``, ``refused`` or ``invalid``."""

    schema: Schema
    temperature: float
    outcome: str
    text: str

    def __str__(self) -> str:
        schema = json.dumps(self.schema, ensure_ascii=False)
        return f"{self.outcome} at {self.temperature}: {self.text!r}\n    {schema}"


def answers(
    session: Session, schemas: Sequence[Schema], *, seed: int, at_once: int = _AT_ONCE
) -> Iterator[Answer]:
    """Yield an answer to each schema at each temperature; `at_once` are generated at the same time."""

    def answer(schema: Schema, temperature: float) -> Answer:
        about: dict[str, Any] = {
            "temperature": temperature, "seed": seed, "max_new_tokens": _MAX_NEW_TOKENS,
            "repetition_penalty": 1,
        }  # fmt: skip
        outcome, text = _answer(session, schema, about)
        return Answer(schema, temperature, outcome, text)

    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda pair: answer(*pair), product(schemas, TEMPERATURES))


def report(found: Sequence[Answer]) -> str:
    """Return how many answers had each outcome, and those that are invalid or refused."""
    counts = Counter(answer.outcome for answer in found)
    refused = [answer for answer in found if answer.outcome == "refused"]
    return "\n".join(
        [
            f"schemas: {len(found) // len(TEMPERATURES)}, answers: "
            + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())),
            *map(str, refused[:: len(TEMPERATURES)]),
            *map(str, problems(found)),
        ]
    )


def problems(found: Sequence[Answer]) -> list[Answer]:
    """Return the answers that are not what their schema describes."""
    return [answer for answer in found if answer.outcome == "invalid"]


def _answer(session: Session, schema: Schema, about: dict[str, Any]) -> tuple[str, str]:
    text = json.dumps(schema, ensure_ascii=False)
    prompt = _PROMPT + text[:_MAX_PROMPT]
    structure = Structure("json_schema", json.dumps(closed(schema)))
    try:
        reply = session.ask(Request(prompt, options={**about, "structure": structure})).result()
    except OptionError as error:
        return "refused", str(error)
    if reply.finish_reason != "stop":
        return ("cut" if reply.finish_reason == "length" else "invalid"), str(reply)
    wrong = _wrong(schema, str(reply))
    return ("valid", str(reply)) if wrong is None else ("invalid", f"{reply} ({wrong})")


def _wrong(schema: Schema, text: str) -> str | None:
    """Return why a text is not what a schema describes; None if it is."""
    kind = validator_for(schema, Draft202012Validator)
    try:
        kind(_exact(json.dumps(schema)), format_checker=kind.FORMAT_CHECKER).validate(_exact(text))
    except ValueError as error:
        return str(error)
    except ValidationError as error:
        return str(error.message)
    return None


def _exact(text: str) -> Any:
    """Return a JSON value; as a float, 1.15 is no multiple of 0.01."""
    return json.loads(text, parse_float=Decimal)
