"""Checks a map before its first row is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llm_magic.session.map.keys import Keys
from llm_magic.session.map.options import MapOptions, MapSettings, split_options
from llm_magic.session.map.outcome import MISSING, Outcome, failure, name_row
from llm_magic.session.map.prompts import (
    FirstRows,
    RowTemplate,
    check_prompt,
    is_missing,
    prompt_maker,
)
from llm_magic.session.map.rows import rows_of
from llm_magic.session.map.run import MapPlan
from llm_magic.session.map.saved import SavedRows, UnfinishedMaps
from llm_magic.session.map.sender import PreparedRow
from llm_magic.session.map.throttle import Throttle
from llm_magic.session.requests import messages_of, request
from llm_magic.text import counted

if TYPE_CHECKING:
    from llm_magic.backends.manager import LoadedModel
    from llm_magic.config.settings import Settings
    from llm_magic.session.map.executors import Workers
    from llm_magic.session.map.prompts import MakePrompt
    from llm_magic.session.map.rows import Row
    from llm_magic.session.requests import PreparedRequest, Request
    from llm_magic.types import Message

# The prompt of the request whose model, options and system prompt all rows have.
_ANY_PROMPT = "…"


def make_plan(
    prompt: object,
    data: Any,
    about: MapOptions,
    prepare: Callable[[Request], PreparedRequest],
    unfinished: UnfinishedMaps,
    defaults: Settings,
) -> MapPlan:
    """Return a checked map; raises what is wrong with its options, its data or its template.

    `unfinished` has the rows that need not be sent if no file is given, and gets those of this map.
    `defaults` are the settings of the session.
    """
    settings, options = split_options(about)
    any_request = request(_ANY_PROMPT, options)
    check_prompt(prompt)
    prepared = prepare(any_request)
    rows = rows_of(data)
    total = rows.total
    if settings.sample is not None:
        rows = rows.sample(settings.sample)
    first = FirstRows(rows)
    make, notes = prompt_maker(prompt, rows, first, settings.names)
    stops_at_error = settings.on_error == "stop"
    source = _prepared_rows(first.all(), make, prepared, stops_at_error=stops_at_error)
    workers = _workers(settings, prepared, defaults, rows.total)
    store = _FileStore(settings) if settings.save is not None else _MemoryStore(unfinished)
    return MapPlan(
        rows,
        source,
        prepared,
        _throttle(prepared.loaded_model, settings, workers),
        store,
        stops_at_error,
        (*prepared.notes, *notes, *store.notes),
        sampled_from=total if settings.sample is not None else None,
        prompt=prompt if isinstance(prompt, str) else getattr(prompt, "__name__", "a function"),
        is_sample=settings.sample is not None,
        template=make if isinstance(make, RowTemplate) else None,
        workers=workers,
    )


class _MemoryStore:
    """The rows of maps that ended early, and of this map if it does."""

    notes: tuple[str, ...] = ()

    def __init__(self, unfinished: UnfinishedMaps) -> None:
        self._unfinished, self.finished = unfinished, unfinished.rows()
        self._used: list[bytes] = []

    def note(self, row: PreparedRow, _outcome: Outcome, is_sent: bool) -> None:
        if not is_sent and row.outcome is None:
            self._used.append(row.key)

    def close(self, *, is_whole: bool) -> None:
        if is_whole:
            self._unfinished.discard(self._used)
        else:
            self._unfinished.keep(self.finished)
        self._used.clear()


class _FileStore:
    """The rows in a file."""

    def __init__(self, settings: MapSettings) -> None:
        assert settings.save is not None
        self._file = SavedRows(settings.save)
        self.finished = self._file.read(with_failed=not settings.retry_failed)
        skipped = self._file.skipped
        self.notes = (
            (f"{self._file.path}: {counted(skipped, 'line')} cannot be read.",) if skipped else ()
        )

    def note(self, row: PreparedRow, outcome: Outcome, is_sent: bool) -> None:
        if is_sent:
            self._file.write(row, outcome)

    def close(self, *, is_whole: bool) -> None:
        self._file.flush()


def _prepared_rows(
    rows: Iterator[Row], make: MakePrompt, prepared: PreparedRequest, *, stops_at_error: bool
) -> Iterator[PreparedRow]:
    """Yield the rows with their messages and keys; one that cannot be sent has its outcome."""
    keys = Keys(prepared.loaded_model, prepared.config)
    for position, row in enumerate(rows):
        messages: tuple[Message, ...] = ()
        try:
            prompt = make(row)
            if prompt is not None and not is_missing(prompt):
                messages = messages_of(prepared, prompt)
        except Exception as error:
            if stops_at_error:
                name_row(error, row.index)
                raise
            yield PreparedRow(position, row.index, (), outcome=failure(error))
            continue
        key = keys.key(messages) if messages else b""
        yield PreparedRow(position, row.index, messages, key, None if messages else MISSING)


def _workers(
    settings: MapSettings, prepared: PreparedRequest, defaults: Settings, total: int | None
) -> Workers | None:
    if settings.on is None:
        return None
    from llm_magic.session.map.executors import Workers

    return Workers(settings.on, prepared, defaults, total)


def _throttle(
    loaded_model: LoadedModel, settings: MapSettings, workers: Workers | None
) -> Throttle:
    backend = loaded_model.backend
    most = settings.workers or (
        backend.concurrency_of(loaded_model.name) if workers is None else workers.rows_at_once
    )
    adapts = settings.workers is None and not backend.capabilities.in_process
    return Throttle(most, adapts=adapts, rate=settings.rate)
