"""An option: its range, help, flags and control, declared by one annotation of its field."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from annotated_types import Ge, GroupedMetadata, Le
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from llm_magic.errors import OptionError, did_you_mean

_LONGEST_VALUE = 200
_LONGEST_NUMBER = 256


OptionKind = Literal["value", "switch", "repeated", "pairs"]


@dataclass(frozen=True, slots=True)
class OptionSpec(GroupedMetadata):
    """One option, as an annotation of its field: the checks, flags, help and controls come from it.

    Attributes:
        flags: Its names on the line of a magic; `parse` reads one value of it there.
        minimum, maximum: The range of a number.
        allowed: The allowed values in words, where no range and no list of choices describes them.
        neutral: The value that changes nothing: a backend without the option accepts it.
        examples: Values that completion and the panel offer; others may be allowed.
        label: The text at its control in the panel, where a load option without one has no control.
        slider: The maximum and the step of the control, where the range is wider or has no end.
        none_label: What None stands for.

    `specs` adds the other attributes from the field; no `backends` means all of them.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str = ""
    parse: Callable[[str], object] = str
    minimum: float | None = None
    maximum: float | None = None
    allowed: str = ""
    neutral: object = None
    examples: tuple[str, ...] = ()
    label: str = ""
    slider: tuple[float, float] | None = None
    none_label: str = "model's own"
    name: str = ""
    default: object = None
    kind: OptionKind = "value"
    choices: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[object]:
        """Yield what pydantic checks."""
        if self.minimum is not None:
            yield Ge(self.minimum)
        if self.maximum is not None:
            yield Le(self.maximum)

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.allowed or self.choices:
            return self.allowed or alternatives(self.choices)
        if self.minimum is not None and self.maximum is not None:
            # All digits of a large whole number, as `seed` has one.
            most = f"{self.maximum:.0f}" if self.maximum % 1 == 0 else f"{self.maximum:g}"
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
            raise first_problem(type(self), error) from None
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
    declared = (mark for mark in info.metadata if isinstance(mark, OptionSpec))
    default = info.get_default(call_default_factory=True, validated_data={})
    choices = get_args(info.annotation)
    return dataclasses.replace(
        next(declared, OptionSpec(info.description or "")),
        name=name,
        default=default,
        kind=_kind(default),
        choices=choices if choices and all(isinstance(c, str) for c in choices) else (),
    )


def _kind(default: object) -> OptionKind:
    if isinstance(default, bool):
        return "switch"
    if isinstance(default, tuple):
        return "repeated"
    return "pairs" if isinstance(default, Mapping) else "value"


def first_problem(
    cls: type[BaseModel], error: ValidationError, kind: type[OptionError] = OptionError
) -> OptionError:
    """Return the error with the name, the value and the allowed range of the first wrong value."""
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return kind(unknown_option(name, cls.model_fields))
    by_alias = {str(info.validation_alias or name): name for name, info in cls.model_fields.items()}
    field = by_alias.get(name)
    if problem["type"] in {"key", "stop"}:
        # These are whole messages: a value that may be a key is never repeated.
        return kind(str(problem["msg"]))
    shown, spec = _shown(problem["input"]), specs(cls)[field] if field else None
    if spec is None or not spec.range:
        text = f"{shown} is invalid: {problem['msg'][:1].lower()}{problem['msg'][1:]}."
    elif not spec.is_number:
        text = f"{shown} is invalid. Use {spec.range}."
    elif problem["type"].endswith(("parsing", "type", "from_float")):
        number = "whole number" if problem["type"].startswith("int") else "number"
        text = f"{shown} is not a {number}. It must be {spec.range}."
    else:
        text = f"{shown} is out of range. It must be {spec.range}."
    return kind(text, option=name)


def alternatives(names: Sequence[str]) -> str:
    """Return names in a list that ends with *or*."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def unknown_option(name: str, known: Collection[str], kind: str = "an option") -> str:
    """Return the message about a name that no option has."""
    advice = did_you_mean(name, known) or f" Available: {', '.join(known)}."
    return f"{name!r} is not {kind}.{advice}"


def _shown(value: object) -> str:
    """Return a wrong value, shortened: a number may have more digits than Python writes."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
