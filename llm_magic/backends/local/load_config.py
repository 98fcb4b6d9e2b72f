"""The options of a load that only the local backend has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from llm_magic.config.option_spec import OptionSpec
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
        OptionSpec(
            "Number format of the weights: auto, float32, bfloat16 or float16.",
            ("--dtype",),
            "DTYPE",
        ),
    ] = "auto"
    revision: Annotated[
        str | None, OptionSpec("Branch, tag or commit on the hub.", ("--revision",), "REV")
    ] = None
    trust_remote_code: Annotated[
        bool,
        OptionSpec(
            "Run the Python code of the model. Use it only for models that you trust.",
            ("--trust-remote-code",),
        ),
    ] = False
    attn: Annotated[
        str | None,
        OptionSpec(
            "Attention implementation, as in Transformers (eager, sdpa, …).",
            ("--attn",),
            "NAME",
            examples=("eager", "sdpa", "flash_attention_2"),
        ),
    ] = None
    assistant: Annotated[
        str | None,
        OptionSpec(
            "A smaller model with the same vocabulary that proposes tokens for speculative decoding.",
            ("--assistant",),
            "MODEL",
        ),
    ] = None
    special_tokens: Annotated[
        bool,
        OptionSpec(
            "Read special tokens in prompts as control tokens, not as text.", ("--special-tokens",)
        ),
    ] = False
    compile: Annotated[
        bool,
        OptionSpec(
            "Compile the model, and use the compiled version where it is measured to be faster."
            " The load takes longer.",
            ("--compile",),
        ),
    ] = False
