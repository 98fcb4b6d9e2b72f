"""Settings and options: their names, defaults, ranges and help, each declared once.

Magic flags, checks, help texts and the table of ``%llm_config`` are all made from the fields
below. Precedence: this call > the session > settings > the model's own default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    PlainSerializer,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from llm_magic.config.env_file import read_env_file
from llm_magic.config.option_spec import Flag, Only, OptionModel, Slider, first_problem
from llm_magic.errors import SettingsError
from llm_magic.text.surrogates import has_surrogates

_LOCAL = Only(("local",))
_REMOTE = Only(("ollama", "vllm", "instructlab", "openai"))
_NOT_OPENAI = Only(("local", "ollama", "vllm", "instructlab"))


def _none_word(value: object) -> object:
    """Read the word ``none`` as "leave it to the model"."""
    return None if isinstance(value, str) and value.strip().casefold() == "none" else value


def _as_tuple(value: object) -> object:
    if value is None or (isinstance(value, str) and value.casefold() == "none"):
        return ()
    return (value,) if isinstance(value, str) else value


def _stop_texts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse stop texts that no answer can contain."""
    if any(not text or has_surrogates(text) for text in value):
        raise PydanticCustomError("stop", "a text to stop at is empty, or has half a character")
    return value


def _variable_name(value: object) -> object:
    """Refuse what is no name of a variable, above all a key: it would be saved in the notebook."""
    if value is None or (isinstance(value, str) and _is_name(value)):
        return value
    raise PydanticCustomError(
        "key",
        "--key-env takes the name of an environment variable that holds the key, never the key"
        " itself: what is on the line is saved in the notebook.",
    )


def _is_name(text: str) -> bool:
    from llm_magic.config.redaction import is_key

    # Keys have dashes, or are longer than any name that somebody chose, or look like what they are.
    return bool(_NAME.fullmatch(text)) and not is_key(text)


def _in_home(value: Path | None) -> Path | None:
    """Return a folder with ``~`` replaced."""
    try:
        return value.expanduser() if value is not None else None
    except RuntimeError:
        raise PydanticCustomError("home", "there is no such home folder") from None


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_Or_model = BeforeValidator(_none_word)
MaxNewTokens = Annotated[
    int | None,
    Ge(1),
    _Or_model,
    Flag(("--max-new-tokens",), "N"),
    Slider(4096, 1),
    Field(description="The longest answer, in tokens."),
]
Temperature = Annotated[
    FiniteFloat | None,
    Ge(0),
    Le(2),
    _Or_model,
    Flag(("-t", "--temperature"), "T"),
    Slider(2, 0.05),
    Field(description="0 always takes the likeliest token; higher is more varied."),
]
TopP = Annotated[
    FiniteFloat | None,
    Ge(0),
    Le(1),
    _Or_model,
    Flag(("--top-p",), "P"),
    Slider(1, 0.01),
    Field(description="Sample from the likeliest tokens that make up this share."),
]
TopK = Annotated[
    int | None,
    Ge(1),
    _Or_model,
    Flag(("--top-k",), "K"),
    Slider(200, 1),
    _NOT_OPENAI,
    Field(description="Sample from this many of the likeliest tokens."),
]
RepetitionPenalty = Annotated[
    FiniteFloat | None,
    Ge(1),
    _Or_model,
    Flag(("--repetition-penalty",), "R"),
    Slider(2, 0.05),
    _NOT_OPENAI,
    Field(description="Above 1 makes repeated tokens less likely."),
]
Seed = Annotated[
    int | None,
    Ge(0),
    # On a CPU torch uses 32 bits of a seed: larger ones would repeat the answers of smaller ones.
    Le(2**32 - 1),
    _Or_model,
    Flag(("--seed",), "N"),
    Field(description="The same seed gives the same text."),
]
Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_stop_texts),
    Flag(("--stop",), "TEXT"),
    Field(description="End the answer before this text (repeatable)."),
]
Device = Annotated[
    str,
    Flag(("-d", "--device"), "DEVICE"),
    _LOCAL,
    Field(
        description="auto, cpu, cuda, cuda:N or mps; auto takes the GPU where there is one.",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    ),
]
Quantization = Annotated[
    Literal["none", "8bit", "4bit"],
    Flag(("-q", "--quantization"), "BITS"),
    _LOCAL,
    Field(description="Smaller weights by bitsandbytes: none, 8bit or 4bit."),
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class GenerationConfig(OptionModel):
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
        # A dict could be changed behind the back of whoever has to check it.
        AfterValidator(MappingProxyType),
        PlainSerializer(dict),
        Flag(("-p", "--param"), "KEY=VALUE"),
        Field(description="Anything else the backend accepts (repeatable)."),
    ] = Field(default_factory=lambda: MappingProxyType({}))


class LoadConfig(OptionModel):
    """How a model is brought into memory."""

    backend: Annotated[
        str,
        Flag(("-b", "--backend"), "BACKEND"),
        Field(description="Where it runs: local, ollama, vllm, instructlab or openai."),
    ] = "local"
    base_url: Annotated[
        str | None,
        Flag(("--base-url",), "URL"),
        _REMOTE,
        Field(description="Address of the server; /v1 may be there or not."),
    ] = None
    key_env: Annotated[
        str | None,
        BeforeValidator(_variable_name),
        Flag(("--key-env",), "NAME"),
        _REMOTE,
        Field(
            description="Environment variable with the server's key; asked for if it is not set."
        ),
    ] = None
    pull: Annotated[
        bool,
        Flag(("--pull",)),
        Only(("ollama",)),
        Field(description="Let the server download the model first if it has to."),
    ] = False
    idle_timeout: Annotated[
        FiniteFloat | None,
        Ge(1),
        Flag(("--idle-timeout",), "S"),
        _REMOTE,
        Field(description="Longest silence within an answer, in seconds; 5 times that before it."),
    ] = None
    concurrency: Annotated[
        int | None,
        Ge(1),
        Flag(("--concurrency",), "N"),
        _REMOTE,
        Field(description="Questions that the server gets at once; others wait."),
    ] = None
    device: Device = "auto"
    quantization: Quantization = "none"
    dtype: Annotated[
        Dtype,
        BeforeValidator(lambda v: _SHORT_DTYPES.get(v, v) if isinstance(v, str) else v),
        Flag(("--dtype",), "DTYPE"),
        _LOCAL,
        Field(description="Number format of the weights: auto, float32, bfloat16 or float16."),
    ] = "auto"
    revision: Annotated[
        str | None,
        Flag(("--revision",), "REV"),
        _LOCAL,
        Field(description="Branch, tag or commit on the hub."),
    ] = None
    trust_remote_code: Annotated[
        bool,
        Flag(("--trust-remote-code",)),
        _LOCAL,
        Field(description="Run Python code that comes with the model. Only for models you trust."),
    ] = False
    attn: Annotated[
        str | None,
        Flag(("--attn",), "NAME"),
        _LOCAL,
        Field(description="Attention implementation, as in Transformers (eager, sdpa, …)."),
    ] = None
    assistant: Annotated[
        str | None,
        Flag(("--assistant",), "MODEL"),
        _LOCAL,
        Field(description="A smaller model with the same vocabulary that guesses ahead."),
    ] = None
    special_tokens: Annotated[
        bool,
        Flag(("--special-tokens",)),
        _LOCAL,
        Field(description="Read special tokens in prompts as control tokens, not as text."),
    ] = False
    compile: Annotated[
        bool,
        Flag(("--compile",)),
        _LOCAL,
        Field(
            description="Compile the model first, and use that where it measures faster; a slower load."
        ),
    ] = False


class Settings(BaseSettings):
    """Defaults from the environment; `read` adds those of a ``.env`` file in the working folder."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    backend: str = Field("local", validation_alias="LLM_BACKEND_TYPE")
    model: str | None = Field(None, validation_alias="DEFAULT_MODEL_NAME_OR_PATH")
    models_folder: Annotated[Path | None, AfterValidator(_in_home)] = Field(
        None, validation_alias="LOCAL_MODELS_DIR"
    )
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
    prefix_cache: Literal["on", "off"] = Field("on", validation_alias="LLM_PREFIX_CACHE")
    ollama_base_url: str = Field("http://localhost:11434", validation_alias="OLLAMA_BASE_URL")
    vllm_base_url: str = Field("http://localhost:8000", validation_alias="VLLM_BASE_URL")
    instructlab_base_url: str = Field(
        "http://localhost:8000", validation_alias="INSTRUCTLAB_BASE_URL"
    )
    openai_base_url: str = Field("https://api.openai.com", validation_alias="OPENAI_BASE_URL")
    idle_timeout: Annotated[FiniteFloat, Ge(1)] = Field(120, validation_alias="LLM_IDLE_TIMEOUT")

    @classmethod
    def read(cls) -> Settings:
        """Read them now; raises `SettingsError` that names the variable, the value and the range.

        Where the file itself cannot be read, the error names that.
        """
        try:
            return _SettingsWithFile()
        except ValidationError as error:
            raise SettingsError(first_problem(cls, error)) from None

    @classmethod
    def of_environment(cls) -> Settings | None:
        """Return the settings without those of the file; None where the environment has a wrong one."""
        try:
            return cls()
        except ValidationError:
            return None

    def generation(self) -> GenerationConfig:
        """Return the generation defaults among the settings; nobody asked for them in particular."""
        values = {
            name: getattr(
                self, name, info.get_default(call_default_factory=True, validated_data={})
            )
            for name, info in GenerationConfig.model_fields.items()
        }
        return GenerationConfig.defaults(values, asked=set())

    def loading(self) -> LoadConfig:
        """Return the loading defaults among the settings."""
        values = {**dict(LoadConfig()), "backend": self.backend, "device": self.device}
        return LoadConfig.defaults(values | {"quantization": self.quantization}, asked=set())


class _SettingsWithFile(Settings):
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment first, then the file."""
        return init_settings, env_settings, _EnvFileSource(settings_cls)


class _EnvFileSource(PydanticBaseSettingsSource):
    """The variables of ``.env``, in any case; an empty one is not set.

    The source of pydantic-settings knows one encoding, and raises what the decoder raises.
    """

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self._values = {name.upper(): value for name, value in read_env_file().items() if value}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the value of a field and the variable it is under."""
        variable = str(field.validation_alias)
        return self._values.get(variable), variable, False

    def __call__(self) -> dict[str, Any]:
        found = (self.get_field_value(f, n) for n, f in self.settings_cls.model_fields.items())
        return {variable: value for value, variable, _ in found if value is not None}


ReadSettings = Callable[[], Settings]


class LoadOptions(TypedDict, total=False):
    """The fields of `LoadConfig` as keyword arguments; a test keeps them equal."""

    backend: str
    base_url: str | None
    key_env: str | None
    pull: bool
    idle_timeout: float | None
    concurrency: int | None
    device: str
    quantization: str
    dtype: str
    revision: str | None
    trust_remote_code: bool
    attn: str | None
    assistant: str | None
    special_tokens: bool
    compile: bool
