"""What an option is: its name, range, help, flag and backends, read off the field that declares it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self, TypeVar, cast, get_args

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from llm_magic.errors import OptionError, did_you_mean

_LONGEST_VALUE = 200
_LONGEST_NUMBER = 256


@dataclass(frozen=True, slots=True)
class Flag:
    """How an option is written on a magic line."""

    names: tuple[str, ...]
    metavar: str = ""


@dataclass(frozen=True, slots=True)
class Only:
    """The backends that can honour an option; one without this is for all of them."""

    backends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slider:
    """How far a slider goes, where the range is wider or has no end, and in what steps."""

    maximum: float
    step: float


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option as flags, sliders, checks and help see it."""

    name: str
    help: str
    default: object
    flag: Flag | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    slider: Slider | None = None

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            # All digits of a large whole number: `seed` has one.
            most = f"{self.maximum:.0f}" if self.maximum.is_integer() else f"{self.maximum:g}"
            return f"{self.minimum:g} to {most}"
        return f"{self.minimum:g} or more" if self.minimum is not None else ""

    def works_on(self, backend: str) -> bool:
        """Return whether a backend can honour it."""
        return not self.only or backend in self.only


class OptionModel(BaseModel):
    """What all option sets share: frozen, no unknown names, errors in one line.

    ``model_fields_set`` holds the names that a call or a session set. A default that a backend
    refuses is omitted from the next try; an option that was set is an error there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def replace(self, **changes: object) -> Self:
        """Return a checked copy with `changes`; raises `OptionError` and changes nothing."""
        if not changes:
            return self
        checked = parse(type(self), {**dict(self), **changes})
        asked = self.model_fields_set | changes.keys()
        return type(self).defaults(dict(checked), asked)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show a mapping as what people write."""
        for name, value in super().__repr_args__():
            yield name, dict(value) if isinstance(value, Mapping) else value

    @classmethod
    def defaults(cls, values: Mapping[str, object], asked: set[str]) -> Self:
        """Return a set of checked values, of which only the names in `asked` were asked for."""
        # pydantic's plugin for mypy forgets whose method this is.
        return cast(Self, cls.model_construct(_fields_set=asked, **values))


_Model = TypeVar("_Model", bound=BaseModel)


def parse(cls: type[_Model], values: Mapping[str, object]) -> _Model:
    """Check `values` against an option set; raises `OptionError` in one line."""
    for name in values:
        if name not in cls.model_fields:
            known = cls.model_fields
            raise OptionError(
                f"There is no option {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."
            )
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise OptionError(first_problem(cls, error)) from None


@functools.cache
def specs(cls: type[BaseModel]) -> Mapping[str, OptionSpec]:
    """Return the options of a set by name, in the order they are shown."""
    return MappingProxyType({name: _spec(name, info) for name, info in cls.model_fields.items()})


def refuse_foreign(
    options: OptionModel, names: Collection[str], backend: str, hint: str = ""
) -> None:
    """Raise `OptionError` for an option among `names` that `backend` cannot honor."""
    known = specs(type(options))
    for name in sorted(names):
        spec, value = known[name], getattr(options, name)
        if spec.works_on(backend) or _asks_for_nothing(name, value):
            continue
        label = spec.flag.names[-1] if spec.flag else name
        raise OptionError(
            f"{label} does nothing on {backend}; {_and(spec.only)} can use it."
            f" Leave it away.{hint.format(name=name, value=value)}"
        )


def _asks_for_nothing(name: str, value: object) -> bool:
    # A penalty of 1 is none.
    return value in (None, (), "none", "auto") or value is False or (name, value) == (
        "repetition_penalty", 1,
    )  # fmt: skip


def _and(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _spec(name: str, info: FieldInfo) -> OptionSpec:
    def marked(kind: type[_Mark]) -> _Mark | None:
        return next((m for m in info.metadata if isinstance(m, kind)), None)

    least, most, only = marked(Ge), marked(Le), marked(Only)
    choices = get_args(info.annotation)
    return OptionSpec(
        name=name,
        help=info.description or "",
        default=info.get_default(call_default_factory=True, validated_data={}),
        flag=marked(Flag),
        minimum=None if least is None else float(least.ge),  # type: ignore[arg-type]
        maximum=None if most is None else float(most.le),  # type: ignore[arg-type]
        choices=choices if choices and all(isinstance(c, str) for c in choices) else (),
        only=only.backends if only else (),
        slider=marked(Slider),
    )


_Mark = TypeVar("_Mark")


def first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    """Return what is wrong with the first wrong value: its name, itself and the range."""
    problem = error.errors()[0]
    where = str(problem["loc"][0]) if problem["loc"] else ""
    by_alias = {str(info.validation_alias or name): name for name, info in cls.model_fields.items()}
    field = by_alias.get(where)
    if problem["type"] == "key":
        # What was taken for a key is never repeated.
        return f"{problem['msg']}"
    allowed = specs(cls)[field].range if field else ""
    value = problem["input"]
    reason = f"must be {allowed}" if allowed else f"is wrong: {_reason(problem['msg'])}"
    if problem["type"].endswith(("parsing", "from_float")) and allowed:
        kind = "a whole number" if problem["type"].startswith("int") else "a number"
        reason = f"must be {kind}, {allowed}"
    if field == "device":
        reason = "must be auto, cpu, cuda, cuda:N or mps"
    return f"{where}={_shown(value)} {reason}."


def _shown(value: object) -> str:
    """Return a wrong value, cut: a number may have more digits than Python writes."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _reason(message: str) -> str:
    return message[:1].lower() + message[1:]
