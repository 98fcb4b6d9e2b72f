"""Settings and options: their names, defaults, ranges and help, each declared once.

Magic flags, checks, help texts and the table of ``%llm_config`` are all made from the fields
below. Precedence: this call > the session > settings > the model's own default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict, TypeVar, get_args

from annotated_types import Ge, Le
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from llm_magic.errors import OptionError, SettingsError, did_you_mean


@dataclass(frozen=True, slots=True)
class Flag:
    """How an option is written on a magic line."""

    names: tuple[str, ...]
    metavar: str = ""


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

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}"
        return f"{self.minimum:g} or more" if self.minimum is not None else ""


def _none_word(value: object) -> object:
    """Read the word ``none`` as "leave it to the model"."""
    return None if isinstance(value, str) and value.strip().casefold() == "none" else value


def _as_tuple(value: object) -> object:
    if value is None or (isinstance(value, str) and value.casefold() == "none"):
        return ()
    return (value,) if isinstance(value, str) else value


_Or_model = BeforeValidator(_none_word)
MaxNewTokens = Annotated[
    int | None,
    Ge(1),
    _Or_model,
    Flag(("--max-new-tokens",), "N"),
    Field(description="The longest answer, in tokens."),
]
Temperature = Annotated[
    FiniteFloat | None,
    Ge(0),
    Le(2),
    _Or_model,
    Flag(("-t", "--temperature"), "T"),
    Field(description="0 always takes the likeliest token; higher is more varied."),
]
TopP = Annotated[
    FiniteFloat | None,
    Ge(0),
    Le(1),
    _Or_model,
    Flag(("--top-p",), "P"),
    Field(description="Sample from the likeliest tokens that make up this share."),
]
TopK = Annotated[
    int | None,
    Ge(1),
    _Or_model,
    Flag(("--top-k",), "K"),
    Field(description="Sample from this many of the likeliest tokens."),
]
RepetitionPenalty = Annotated[
    FiniteFloat | None,
    Ge(1),
    _Or_model,
    Flag(("--repetition-penalty",), "R"),
    Field(description="Above 1 makes repeated tokens less likely."),
]
Seed = Annotated[
    int | None,
    Ge(0),
    _Or_model,
    Flag(("--seed",), "N"),
    Field(description="The same seed gives the same text."),
]
Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    Flag(("--stop",), "TEXT"),
    Field(description="End the answer before this text (repeatable)."),
]
Device = Annotated[
    str,
    Flag(("-d", "--device"), "DEVICE"),
    Field(
        description="auto, cpu, cuda, cuda:N or mps; auto takes the GPU where there is one.",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    ),
]
Quantization = Annotated[
    Literal["none", "8bit", "4bit"],
    Flag(("-q", "--quantization"), "BITS"),
    Field(description="Smaller weights by bitsandbytes: none, 8bit or 4bit."),
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Options(BaseModel):
    """What all option sets share: frozen, no unknown names, errors in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def replace(self, **changes: object) -> Self:
        """Return a checked copy with `changes`; raises `OptionError` and changes nothing."""
        return parse(type(self), {**self.model_dump(), **changes})


class GenerationConfig(_Options):
    """What one answer is generated with; None leaves it to the model."""

    max_new_tokens: MaxNewTokens = 512
    temperature: Temperature = 0.7
    top_p: TopP = 0.9
    top_k: TopK = 50
    repetition_penalty: RepetitionPenalty = 1.15
    seed: Seed = None
    stop: Stop = ()
    extra: Annotated[
        Mapping[str, Any],
        Flag(("-p", "--param"), "KEY=VALUE"),
        Field(description="Anything else the backend accepts (repeatable)."),
    ] = Field(default_factory=dict)


class LoadConfig(_Options):
    """How a model is brought into memory."""

    backend: Annotated[
        str,
        Flag(("-b", "--backend"), "BACKEND"),
        Field(description="Where it runs."),
    ] = "local"
    device: Device = "auto"
    quantization: Quantization = "none"
    dtype: Annotated[
        Dtype,
        BeforeValidator(lambda v: _SHORT_DTYPES.get(v, v) if isinstance(v, str) else v),
        Flag(("--dtype",), "DTYPE"),
        Field(description="Number format of the weights: auto, float32, bfloat16 or float16."),
    ] = "auto"
    revision: Annotated[
        str | None,
        Flag(("--revision",), "REV"),
        Field(description="Branch, tag or commit on the hub."),
    ] = None
    trust_remote_code: Annotated[
        bool,
        Flag(("--trust-remote-code",)),
        Field(description="Run Python code that comes with the model. Only for models you trust."),
    ] = False
    attn: Annotated[
        str | None,
        Flag(("--attn",), "NAME"),
        Field(description="Attention implementation, as in Transformers (eager, sdpa, …)."),
    ] = None


class Settings(BaseSettings):
    """Defaults from the environment and from a ``.env`` file in the working folder."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    backend: str = Field("local", validation_alias="LLM_BACKEND_TYPE")
    model: str | None = Field(None, validation_alias="DEFAULT_MODEL_NAME_OR_PATH")
    models_folder: Path | None = Field(None, validation_alias="LOCAL_MODELS_DIR")
    device: Device = Field("auto", validation_alias="LLM_DEVICE")
    quantization: Quantization = Field("none", validation_alias="DEFAULT_LLM_QUANTIZATION")
    max_new_tokens: MaxNewTokens = Field(512, validation_alias="DEFAULT_LLM_MAX_NEW_TOKENS")
    temperature: Temperature = Field(0.7, validation_alias="DEFAULT_LLM_TEMPERATURE")
    top_p: TopP = Field(0.9, validation_alias="DEFAULT_LLM_TOP_P")
    top_k: TopK = Field(50, validation_alias="DEFAULT_LLM_TOP_K")
    repetition_penalty: RepetitionPenalty = Field(
        1.15, validation_alias="DEFAULT_LLM_REPETITION_PENALTY"
    )
    stream: Literal["on", "off"] = Field("on", validation_alias="LLM_MAGIC_STREAM")

    @classmethod
    def read(cls) -> Settings:
        """Read them now; raises `SettingsError` that names the variable, the value and the range."""
        try:
            return cls()
        except ValidationError as error:
            raise SettingsError(_first_problem(cls, error)) from None

    def generation(self) -> GenerationConfig:
        """Return the generation defaults among the settings."""
        shared = GenerationConfig.model_fields.keys() & type(self).model_fields.keys()
        return GenerationConfig(**{name: getattr(self, name) for name in shared})

    def loading(self) -> LoadConfig:
        """Return the loading defaults among the settings."""
        return LoadConfig(backend=self.backend, device=self.device, quantization=self.quantization)


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
        raise OptionError(_first_problem(cls, error)) from None


def specs(cls: type[BaseModel]) -> dict[str, OptionSpec]:
    """Return the options of a set by name, in the order they are shown."""
    return {name: _spec(name, info) for name, info in cls.model_fields.items()}


def _spec(name: str, info: FieldInfo) -> OptionSpec:
    def bound(kind: type) -> float | None:
        found = next((m for m in info.metadata if isinstance(m, kind)), None)
        return None if found is None else float(getattr(found, kind.__name__.lower()))

    choices = get_args(info.annotation)
    return OptionSpec(
        name=name,
        help=info.description or "",
        default=info.get_default(call_default_factory=True),
        flag=next((m for m in info.metadata if isinstance(m, Flag)), None),
        minimum=bound(Ge),
        maximum=bound(Le),
        choices=choices if choices and all(isinstance(c, str) for c in choices) else (),
    )


def _first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    where = str(problem["loc"][0]) if problem["loc"] else ""
    by_alias = {str(info.validation_alias or name): name for name, info in cls.model_fields.items()}
    field = by_alias.get(where)
    allowed = specs(cls)[field].range if field else ""
    value = problem["input"]
    reason = f"must be {allowed}" if allowed else f"is wrong: {_reason(problem['msg'])}"
    if problem["type"].endswith(("parsing", "from_float")) and allowed:
        kind = "a whole number" if problem["type"].startswith("int") else "a number"
        reason = f"must be {kind}, {allowed}"
    if field == "device":
        reason = "must be auto, cpu, cuda, cuda:N or mps"
    return f"{where}={value!s} {reason}."


def _reason(message: str) -> str:
    return message[:1].lower() + message[1:]


class LoadOptions(TypedDict, total=False):
    """The fields of `LoadConfig` as keyword arguments; a test keeps them equal."""

    backend: str
    device: str
    quantization: str
    dtype: str
    revision: str | None
    trust_remote_code: bool
    attn: str | None
