"""The specification of an option: name, range, help and flag, read from the field that declares it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self, TypeVar, get_args

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from llm_magic.errors import OptionError, did_you_mean

_LONGEST_VALUE = 200
_LONGEST_NUMBER = 256


OptionKind = Literal["value", "switch", "repeated", "pairs"]


@dataclass(frozen=True, slots=True)
class Flag:
    """How an option is written on a magic line; `parse` reads one value of it."""

    names: tuple[str, ...]
    metavar: str = ""
    parse: Callable[[str], object] = str


@dataclass(frozen=True, slots=True)
class Control:
    """The control of an option in the panel; a load option without one has no control.

    `slider` is its maximum and step, where the option's own range is wider or has no end; `none` is
    what None stands for; `examples` are offered by completion too, other values may be allowed.
    """

    label: str = ""
    slider: tuple[float, float] | None = None
    none: str = "model's own"
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Allowed:
    """The allowed values in words, where no range and no list of choices describes them."""

    text: str


@dataclass(frozen=True, slots=True)
class Neutral:
    """The value that changes nothing: a backend without the option accepts it."""

    value: object


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option as flags, sliders, checks and help see it; no `backends` means all of them."""

    name: str
    help: str
    default: object
    kind: OptionKind = "value"
    flag: Flag | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    allowed: str = ""
    neutral: object = None
    control: Control | None = None
    backends: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.allowed or self.choices:
            return self.allowed or ", ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            # All digits of a large whole number, as `seed` has one.
            most = f"{self.maximum:.0f}" if self.maximum.is_integer() else f"{self.maximum:g}"
            return f"{self.minimum:g} to {most}"
        return f"{self.minimum:g} or more" if self.minimum is not None else ""

    @property
    def is_number(self) -> bool:
        """Whether the values are numbers."""
        return self.minimum is not None

    def works_on(self, backend: str) -> bool:
        """Return whether a backend supports the option."""
        return not self.backends or backend in self.backends

    def is_neutral(self, value: object) -> bool:
        """Return whether a value requests nothing, so that any backend can accept it."""
        return value is None or value in ((), {}, self.neutral)


class OptionModel(BaseModel):
    """The base of all option sets: frozen, without unknown names, with errors in one line.

    `model_fields_set` holds the names that a call or the session set. A default that a backend
    rejects is omitted from the next try; an option that was set is an error there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self, **changes: object) -> Self:
        """Return a copy with checked `changes`; raises `OptionError` and changes nothing."""
        try:
            checked = type(self).model_validate(changes)
        except ValidationError as error:
            raise OptionError(first_problem(type(self), error)) from None
        return self.model_copy(update={name: getattr(checked, name) for name in changes})

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show a mapping as the dict that the user wrote."""
        for name, value in super().__repr_args__():
            yield name, dict(value) if isinstance(value, Mapping) else value

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle mappings as dicts: a `MappingProxyType` cannot be pickled."""
        return _restore, (type(self), self.model_dump(), set(self.model_fields_set))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return the option set itself: it is immutable."""
        return self


def none_word(value: object) -> object:
    """Return None for the word ``none``, which leaves an option to the model."""
    return None if isinstance(value, str) and value.strip().casefold() == "none" else value


def _restore(
    cls: type[OptionModel], values: dict[str, object], fields_set: set[str]
) -> OptionModel:
    return cls.model_construct(_fields_set=fields_set, **dict(cls.model_validate(values)))


@functools.cache
def specs(cls: type[BaseModel]) -> Mapping[str, OptionSpec]:
    """Return the options of a set by name, in the order they are shown."""
    return MappingProxyType({name: _spec(name, info) for name, info in cls.model_fields.items()})


def _spec(name: str, info: FieldInfo) -> OptionSpec:
    def mark(kind: type[_Mark]) -> _Mark | None:
        return next((m for m in info.metadata if isinstance(m, kind)), None)

    least, most, allowed, neutral = mark(Ge), mark(Le), mark(Allowed), mark(Neutral)
    choices = get_args(info.annotation)
    default = info.get_default(call_default_factory=True, validated_data={})
    return OptionSpec(
        name=name,
        help=info.description or "",
        default=default,
        kind=_kind(default),
        flag=mark(Flag),
        minimum=None if least is None else float(least.ge),  # type: ignore[arg-type]
        maximum=None if most is None else float(most.le),  # type: ignore[arg-type]
        choices=choices if choices and all(isinstance(c, str) for c in choices) else (),
        allowed=allowed.text if allowed else "",
        neutral=neutral.value if neutral else None,
        control=mark(Control),
    )


def _kind(default: object) -> OptionKind:
    if isinstance(default, bool):
        return "switch"
    if isinstance(default, tuple):
        return "repeated"
    return "pairs" if isinstance(default, Mapping) else "value"


_Mark = TypeVar("_Mark")


def first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    """Return the name, the value and the allowed range of the first wrong value."""
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        known = cls.model_fields
        suggestion = did_you_mean(name, known)
        return f"There is no option {name!r}.{suggestion} Known: {', '.join(known)}."
    by_alias = {str(info.validation_alias or name): name for name, info in cls.model_fields.items()}
    field = by_alias.get(name)
    if problem["type"] == "key":
        # A value that may be a key is never repeated.
        return str(problem["msg"])
    allowed = specs(cls)[field].range if field else ""
    value = problem["input"]
    message = problem["msg"]
    reason = f"must be {allowed}" if allowed else f"is wrong: {message[:1].lower()}{message[1:]}"
    if problem["type"].endswith(("parsing", "from_float")) and allowed:
        kind = "a whole number" if problem["type"].startswith("int") else "a number"
        reason = f"must be {kind}, {allowed}"
    return f"{name}={_shown(value)} {reason}."


def _shown(value: object) -> str:
    """Return a wrong value, shortened: a number may have more digits than Python writes."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
