"""The options of a load that only the local backend has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llm_magic.config.option_spec import Control, Flag
from llm_magic.config.settings import Device, LoadConfig, Quantization, Settings

_DEFAULTS = Settings.model_construct()
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class LocalLoadConfig(LoadConfig):
    """How a model is loaded into the memory of this process."""

    device: Device = _DEFAULTS.device
    quantization: Quantization = _DEFAULTS.quantization
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        BeforeValidator(lambda v: _DTYPES.get(v, v) if isinstance(v, str) else v),
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
        Control(examples=("eager", "sdpa", "flash_attention_2")),
        Field(description="Attention implementation, as in Transformers (eager, sdpa, …)."),
    ] = None
    assistant: Annotated[
        str | None,
        Flag(("--assistant",), "MODEL"),
        Field(description="A smaller model with the same vocabulary that guesses ahead."),
    ] = None
    special_tokens: Annotated[
        bool,
        Flag(("--special-tokens",)),
        Field(description="Read special tokens in prompts as control tokens, not as text."),
    ] = False
    compile: Annotated[
        bool,
        Flag(("--compile",)),
        Field(
            description="Compile the model first, and use that where it measures faster; a slower load."
        ),
    ] = False
