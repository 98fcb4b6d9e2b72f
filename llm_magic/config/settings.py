"""The settings and the options that every backend has: name, default, range and help, each declared once.

Flags, checks, help texts, panel controls and the table of ``%llm_config`` are made from the fields
below. A backend declares its own load options in a subclass of `LoadConfig`.
Precedence: this call > session.generation > `Settings` > the model's own default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    PlainSerializer,
    ValidationError,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from llm_magic.config.commands import either, option
from llm_magic.config.env_file import read_env_file
from llm_magic.config.option_spec import (
    OptionModel,
    OptionSpec,
    first_problem,
    none_word,
    specs,
)
from llm_magic.config.providers import PROVIDERS
from llm_magic.errors import SettingsError
from llm_magic.text import has_surrogates, unescape
from llm_magic.types import Structure


def _as_tuple(value: object) -> object:
    """Return one text as a tuple, and ``none`` as an empty one."""
    texts = (value,) if isinstance(value, str) else value
    return () if none_word(value) is None else texts


def _stop_texts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Raise for a stop text that no answer can contain."""
    if "" in value:
        raise PydanticCustomError("stop", "A stop text is empty. For none: %llm_config stop=none.")
    if any(map(has_surrogates, value)):
        raise PydanticCustomError("stop", "A stop text has a lone surrogate, which no answer has.")
    return value


def _variable_name(value: object) -> object:
    """Raise for a value that is not a variable name: a key on the line is saved in the notebook."""
    if value is None or (isinstance(value, str) and _is_name(value)):
        return value
    raise PydanticCustomError(
        "key",
        f"{option('key_env')} takes the name of an environment variable that holds the key, never the key"
        f" itself: {either('what is on the line is saved in the notebook', 'code is not the place for it')}."
        f"{_similar_variable(value)}",
    )


def _similar_variable(value: object) -> str:
    """Return which variable a value spells in another way, or an empty string.

    Only words such as ``my-key`` and the variables of the environment are repeated: any other value may
    be a key.
    """
    if not isinstance(value, str):
        return ""
    name = re.sub(r"\W+", "_", value).strip("_").upper()
    if name in os.environ and _is_name(name):
        return f" Did you mean {name}?"
    if _WORDS_FOR_KEY.fullmatch(value):
        return f" {value} is not the name of a variable; write {option('key_env', name)}."
    return ""


def _is_name(text: str) -> bool:
    from llm_magic.config.redaction import is_key

    # Keys have dashes, are longer than names that people choose, or have a known prefix.
    return bool(_NAME.fullmatch(text)) and not is_key(text)


def _no_text(value: object) -> object:
    """Return None for an empty text, and for the word ``none``."""
    return None if isinstance(value, str) and not value.strip() else none_word(value)


def _no_pairs(value: object) -> object:
    """Return no pairs for the word ``none``."""
    return {} if none_word(value) is None else value


def _expand_home(value: Path | None) -> Path | None:
    """Return a folder with ``~`` replaced."""
    try:
        return value.expanduser() if value is not None else None
    except RuntimeError:
        raise PydanticCustomError("home", "the home folder does not exist") from None


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
# Such as my-key: no key ends with this word.
_WORDS_FOR_KEY = re.compile(r"([a-z]{2,12}[-. ]){1,4}(key|token)", re.IGNORECASE)
_OrModel = BeforeValidator(none_word)
MaxNewTokens = Annotated[
    int | None,
    OptionSpec(
        "Maximum length of the answer, in tokens.",
        ("--max-new-tokens",),
        "N",
        slider=(4096, 1),
        minimum=1,
    ),
    _OrModel,
]
Temperature = Annotated[
    FiniteFloat | None,
    OptionSpec(
        "0 always takes the likeliest token; higher values give more varied answers.",
        ("-t", "--temperature"),
        "T",
        slider=(2, 0.05),
        minimum=0,
        maximum=2,
    ),
    _OrModel,
]
TopP = Annotated[
    FiniteFloat | None,
    OptionSpec(
        "Sample only from the likeliest tokens whose probabilities add up to this.",
        ("--top-p",),
        "P",
        slider=(1, 0.01),
        minimum=0,
        maximum=1,
    ),
    _OrModel,
]
TopK = Annotated[
    int | None,
    OptionSpec(
        "Sample only from this many of the likeliest tokens.",
        ("--top-k",),
        "K",
        slider=(200, 1),
        minimum=1,
    ),
    _OrModel,
]
RepetitionPenalty = Annotated[
    FiniteFloat | None,
    OptionSpec(
        "Values above 1 make repetition less likely.",
        ("--repetition-penalty",),
        "R",
        slider=(2, 0.05),
        minimum=1,
        neutral=1,
    ),
    _OrModel,
]
Seed = Annotated[
    int | None,
    OptionSpec(
        "The same seed gives the same text on the same kind of machine.",
        ("--seed",),
        "N",
        none_label="random",
        minimum=0,
        # On a CPU torch uses 32 bits of a seed: larger ones would repeat the answers of smaller ones.
        maximum=2**32 - 1,
    ),
    _OrModel,
]
Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_stop_texts),
    OptionSpec(
        "End the answer before this text; none removes all stop texts.",
        ("--stop",),
        "TEXT",
        unescape,
        label="Stop texts",
    ),
]
Logprobs = Annotated[
    int | None,
    OptionSpec(
        "Report the probability of each token, with so many of the likeliest tokens in its place.",
        ("--logprobs",),
        "K",
        none_label="off",
        minimum=0,
        # As most servers limit it.
        maximum=20,
    ),
    _OrModel,
]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"),
    OptionSpec(
        "auto, cpu, cuda, cuda:N or mps; auto takes the GPU if there is one.",
        ("-d", "--device"),
        "DEVICE",
        label="Device",
        examples=("auto", "cpu", "cuda", "mps"),
        allowed="auto, cpu, cuda, cuda:N or mps",
    ),
]
Quantization = Annotated[
    Literal["none", "8bit", "4bit", "bnb-8bit", "bnb-4bit"],
    OptionSpec(
        "Store the weights in fewer bits: none, 8bit, 4bit, or bnb-8bit and bnb-4bit (bitsandbytes).",
        ("-q", "--quantization"),
        "BITS",
        label="Quantization",
    ),
]
_IDLE_TIMEOUT = OptionSpec(
    "End an answer after this many seconds without data; before its first data, after five times as long.",
    ("--idle-timeout",),
    "S",
    minimum=1,
)


class GenerationOptions(OptionModel):
    """The options of answers that a session can set; None leaves an option to the model."""

    max_new_tokens: MaxNewTokens = 512
    temperature: Temperature = 0.7
    top_p: TopP = 0.9
    top_k: TopK = 50
    repetition_penalty: RepetitionPenalty = 1.15
    seed: Seed = None
    stop: Stop = ()
    logprobs: Logprobs = None
    extra: Annotated[
        Mapping[str, Any],
        BeforeValidator(_no_pairs),
        # A dict could be changed after it was checked.
        AfterValidator(MappingProxyType),
        PlainSerializer(dict),
        OptionSpec("Any other parameter of the backend.", ("-p", "--param"), "KEY=VALUE"),
    ] = Field(default_factory=partial(MappingProxyType, {}))


class GenerationConfig(GenerationOptions):
    """The options of one answer, as a backend gets them; `structure` is what it must conform to."""

    structure: Structure | None = None


class SessionConfig(GenerationOptions):
    """What a session sets for its calls: the options of their answers, and a system prompt."""

    system: Annotated[
        str | None,
        BeforeValidator(_no_text),
        OptionSpec(
            "System prompt for prompts sent without -s.",
            ("-s", "--system"),
            "TEXT",
            unescape,
            none_label="none",
        ),
    ] = None

    @property
    def generation(self) -> GenerationConfig:
        """The options of an answer, as a backend gets them."""
        values = {name: getattr(self, name) for name in GenerationOptions.model_fields}
        given = self.model_fields_set & values.keys()
        return GenerationConfig.model_construct(_fields_set=given, **values)


class LoadConfig(OptionModel):
    """The options of a load that every backend has; a backend adds its own in a subclass."""

    backend: Annotated[str, OptionSpec("Where the model runs.", ("-b", "--backend"), "BACKEND")] = (
        "local"
    )


class ServerLoadConfig(LoadConfig):
    """The options of a load from a server."""

    base_url: Annotated[
        str | None,
        OptionSpec(
            "Address of the server, with or without /v1.",
            ("--base-url",),
            "URL",
            label="Server address",
        ),
    ] = None
    key_env: Annotated[
        str | None,
        BeforeValidator(_variable_name),
        OptionSpec(
            "Environment variable with the API key of the server. If it is not set, you are prompted"
            " for the key.",
            ("--key-env",),
            "NAME",
            label="API key variable",
        ),
    ] = None
    idle_timeout: Annotated[FiniteFloat | None, _IDLE_TIMEOUT] = None
    concurrency: Annotated[
        int | None,
        OptionSpec(
            "Requests sent to the server at once; others wait.",
            ("--concurrency",),
            "N",
            minimum=1,
        ),
    ] = None


OptionModelT = TypeVar("OptionModelT", bound=OptionModel)
_GENERATION = GenerationConfig()
# The options whose default is a setting.
_OPTIONS_WITH_SETTING = frozenset(
    {"backend", "device", "quantization", *GenerationOptions.model_fields}
)


def _address(provider: str) -> Any:
    """Return the field of a provider's address."""
    entry = PROVIDERS[provider]
    return Field(entry.url, validation_alias=entry.url_variable)


class Settings(BaseSettings):
    """The defaults of the environment; `read` adds those of a ``.env`` file in the working folder."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    backend: str = Field(LoadConfig().backend, validation_alias="LLM_BACKEND_TYPE")
    model: str | None = Field(None, validation_alias="DEFAULT_MODEL_NAME_OR_PATH")
    models_folder: Annotated[Path | None, AfterValidator(_expand_home)] = Field(
        None, validation_alias="LOCAL_MODELS_DIR"
    )
    device: Device = Field("auto", validation_alias="LLM_DEVICE")
    quantization: Quantization = Field("none", validation_alias="DEFAULT_LLM_QUANTIZATION")
    max_new_tokens: MaxNewTokens = Field(
        _GENERATION.max_new_tokens, validation_alias="DEFAULT_LLM_MAX_NEW_TOKENS"
    )
    temperature: Temperature = Field(
        _GENERATION.temperature, validation_alias="DEFAULT_LLM_TEMPERATURE"
    )
    top_p: TopP = Field(_GENERATION.top_p, validation_alias="DEFAULT_LLM_TOP_P")
    top_k: TopK = Field(_GENERATION.top_k, validation_alias="DEFAULT_LLM_TOP_K")
    repetition_penalty: RepetitionPenalty = Field(
        _GENERATION.repetition_penalty, validation_alias="DEFAULT_LLM_REPETITION_PENALTY"
    )
    stream: Literal["on", "off"] = Field("on", validation_alias="LLM_MAGIC_STREAM")
    prefix_cache: Literal["on", "off"] = Field("on", validation_alias="LLM_PREFIX_CACHE")
    ollama_base_url: str = Field("http://localhost:11434", validation_alias="OLLAMA_BASE_URL")
    vllm_base_url: str = Field("http://localhost:8000", validation_alias="VLLM_BASE_URL")
    instructlab_base_url: str = Field(
        "http://localhost:8000", validation_alias="INSTRUCTLAB_BASE_URL"
    )
    openai_base_url: str = _address("openai")
    anthropic_base_url: str = _address("anthropic")
    gemini_base_url: str = _address("gemini")
    mistral_base_url: str = _address("mistral")
    groq_base_url: str = _address("groq")
    openrouter_base_url: str = _address("openrouter")
    together_base_url: str = _address("together")
    deepseek_base_url: str = _address("deepseek")
    xai_base_url: str = _address("xai")
    lmstudio_base_url: str = _address("lmstudio")
    llamacpp_server_base_url: str = _address("llamacpp-server")
    idle_timeout: Annotated[FiniteFloat, _IDLE_TIMEOUT] = Field(
        120, validation_alias="LLM_IDLE_TIMEOUT"
    )

    @classmethod
    def read(cls) -> Settings:
        """Read the environment and ``.env``; raises `SettingsError` with variable, value and range."""
        # pydantic-settings reads files of one encoding only.
        in_environment = {name.upper() for name, value in os.environ.items() if value}
        of_file = {name.upper(): value for name, value in read_env_file().items() if value}
        try:
            return cls(**{n: v for n, v in of_file.items() if n not in in_environment})  # type: ignore[arg-type]
        except ValidationError as error:
            raise first_problem(cls, error, SettingsError) from None

    @classmethod
    def of_environment(cls) -> Settings | None:
        """Return the settings of the environment alone; None if one of them is wrong."""
        try:
            return cls()
        except ValidationError:
            return None

    def defaults(self, cls: type[OptionModelT]) -> OptionModelT:
        """Return the defaults of a call or of a load; none of them counts as set."""
        values = {name: self.default_of(spec) for name, spec in specs(cls).items()}
        # pydantic's plugin for mypy loses the type of the class.
        return cast(OptionModelT, cls.model_construct(_fields_set=set(), **values))

    def default_of(self, spec: OptionSpec) -> object:
        """Return the default of an option: the setting of that name, else the option's own."""
        is_setting = spec.name in _OPTIONS_WITH_SETTING
        return getattr(self, spec.name, spec.default) if is_setting else spec.default


ReadSettings = Callable[[], Settings]
