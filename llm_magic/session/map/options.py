"""The options of a map, besides those of each answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from llm_magic.errors import OptionError
from llm_magic.session.map.throttle import parse_rate
from llm_magic.session.requests import AskOptions, check_names

if TYPE_CHECKING:
    from llm_magic.session.map.executors import DaskClient


class OwnOptions(TypedDict, total=False):
    """What only a map is given; `MapSettings` describes the options."""

    save: str | os.PathLike[str] | None
    retry_failed: bool
    workers: int | None
    rate: str | float | None
    on_error: Literal["keep", "stop"]
    sample: int | None
    names: Mapping[str, Any]
    on: Executor | DaskClient | None


class MapOptions(AskOptions, OwnOptions, total=False):
    """The options of one map: those of a call, and those of `MapSettings`."""


@dataclass(frozen=True, slots=True)
class MapSettings:
    """The checked options of a map.

    Attributes:
        save: The file with the finished rows: they are not sent again.
        retry_failed: Send the rows again that failed according to this file.
        workers: The number of requests at once; None adapts it.
        rate: The most requests that start in a second.
        on_error: ``keep`` keeps the error of a row in its place, ``stop`` raises it.
        sample: How many rows to send, spread over the data; None sends all.
        names: The notebook's variables that a template may use.
        on: The executor or the Dask client whose worker processes answer, each with its own model.
    """

    save: str | os.PathLike[str] | None = None
    retry_failed: bool = False
    workers: int | None = None
    rate: float | None = None
    on_error: Literal["keep", "stop"] = "keep"
    sample: int | None = None
    names: Mapping[str, Any] = field(default_factory=dict)
    on: Executor | DaskClient | None = None


def split_options(about: MapOptions) -> tuple[MapSettings, AskOptions]:
    """Return the checked options of a map, and those of its answers."""
    check_names(about, MapOptions.__annotations__)
    for name in ("chat", "trim"):
        if about.get(name):
            raise OptionError(f"A map has no {name}: its rows are independent of each other.")
    given: dict[str, Any] = dict(about)
    own = {name: given.pop(name) for name in OwnOptions.__annotations__ if name in given}
    for name in ("workers", "sample"):
        value = own.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"{value!r} is not a number of at least 1.", option=name)
    on_error = own.get("on_error", "keep")
    if on_error not in {"keep", "stop"}:
        raise OptionError(f"{on_error!r} is neither keep nor stop.", option="on_error")
    if own.get("retry_failed") and own.get("save") is None:
        raise OptionError(
            "retry_failed needs save=FILE. Of a result in memory, use mapped.retry()."
        )
    own["rate"] = parse_rate(own.get("rate"))
    answers: AskOptions = given  # type: ignore[assignment]
    return MapSettings(**own), answers
