"""Typed answers as small tables, also while they are generated: the fields that are complete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display.messages import shortened
from llm_magic.notebook.display.tables import Table
from llm_magic.text import counted, parse_json

if TYPE_CHECKING:
    from llm_magic.session.response import Response

_ROWS, _COLUMNS, _CELL = 50, 12, 1_000
_MAX_TEXT = 200_000  # characters of an answer that becomes a table
# A number at the end of a partial answer may continue.
_LAST_NUMBER = re.compile(r"[-+.\deE]+$")


def value_table(response: Response) -> Table | None:
    """Return the value of a typed answer as a table, or its complete fields so far.

    None where there is nothing to show as a table, such as a label without probabilities.
    """
    answer_type, reply = response.prepared.request.answer_type, response.reply
    if answer_type is None:
        return None
    if answer_type.structure.kind == "choice":
        return _probabilities(reply.probabilities) if reply is not None else None
    if answer_type.structure.kind != "json_schema" or len(response.text) > _MAX_TEXT:
        return None
    if reply is not None and response.error is not None:
        return None
    plain = _parsed(response.text, is_whole=reply is not None)
    if isinstance(plain, dict) and plain.keys() == {"answer"} and answer_type.fields != ("answer",):
        # A server whose answers have to be objects.
        plain = plain["answer"]
    return None if plain is None else _table(plain)


def _parsed(text: str, *, is_whole: bool) -> Any:
    """Return the value of JSON; of a partial one, what is complete of it; None if it has no value."""
    from pydantic_core import from_json

    if not is_whole:
        text = _LAST_NUMBER.sub("", text)
    try:
        return from_json(text, allow_partial=not is_whole)
    except ValueError:
        pass
    try:
        return parse_json(text)
    except ValueError:
        return None


def _table(value: Any) -> Table:
    if isinstance(value, dict):
        cells = [[_line(name), _cell(inner)] for name, inner in list(value.items())[:_ROWS]]
        return Table(("", ""), cells)
    if not isinstance(value, list):
        return Table(("",), [[_cell(value)]])
    rows, more = value[:_ROWS], len(value) - _ROWS
    note = f"… and {counted(more, 'more row')}" if more > 0 else ""
    if not rows or not all(isinstance(row, dict) for row in rows):
        return Table(
            ("",), [[_cell(row)] for row in rows], note or ("" if rows else "an empty list")
        )
    columns = list(dict.fromkeys(name for row in rows for name in row))[:_COLUMNS]
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    return Table([_line(name) for name in columns], cells, note)


def _line(text: str) -> str:
    return shortened(text, 60)


def _cell(value: Any) -> str:
    """Return a value in one cell: a text as it is, a list of scalars with commas, JSON for others."""
    if isinstance(value, str):
        return shortened(value, _CELL) if len(value) > _CELL else value
    if value is None:
        return ""
    if isinstance(value, list) and not any(isinstance(one, (list, dict)) for one in value):
        return shortened(", ".join(map(_cell, value)), _CELL)
    try:
        return shortened(json.dumps(value, ensure_ascii=False), _CELL)
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        return "a number with thousands of digits"


def _probabilities(probabilities: Mapping[str, float]) -> Table | None:
    if not probabilities:
        return None
    listed: Sequence[tuple[str, float]] = list(probabilities.items())[:_ROWS]
    rows = [[_line(label), f"{share:.3f}"] for label, share in listed]
    more = len(probabilities) - len(rows)
    return Table(("", ""), rows, f"… and {counted(more, 'more label')}" if more else "")
