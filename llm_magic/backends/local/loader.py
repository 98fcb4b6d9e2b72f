"""Bring a model folder into memory with Transformers; runs on the inference thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llm_magic.backends.base import Report
from llm_magic.backends.local import memory
from llm_magic.backends.local.cpu_linear import widen
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.local.process_lock import turn
from llm_magic.backends.local.worker import Cancelled
from llm_magic.errors import (
    DeviceUnavailable,
    LLMMagicError,
    LoadFailed,
    MissingDependency,
    OptionError,
)
from llm_magic.types import ModelInfo, Progress

# LLM.int8 computes in float16 and warns at every matrix of any other type.
_INT8_DTYPE = "float16"
# Several answers at once, several tokens at once, and a second limit besides `max_new_tokens`,
# about which Transformers warns in every call.
_NOT_STREAMED = (
    "max_length", "num_beams", "num_return_sequences", "prompt_lookup_num_tokens",
    "assistant_early_exit", "return_dict_in_generate", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states",
)  # fmt: skip


def resolve_device(device: str) -> str:
    """Return where a model will go; raises `DeviceUnavailable` in one line.

    ``cuda`` without an index comes only of ``auto``, and stands for all GPUs together.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            build = "this torch is a CPU build" if torch.version.cuda is None else "no GPU answers"
            raise DeviceUnavailable(f"CUDA was asked for, but {build}. Use -d cpu.")
        index, count = torch.device(device).index, torch.cuda.device_count()
        if index is None:
            return f"cuda:{torch.cuda.current_device()}"
        if index >= count:
            raise DeviceUnavailable(f"There is no {device}: this machine has {count} GPU(s).")
    if device == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailable("There is no Apple GPU (mps) here. Use -d cpu.")
    return device


def check_quantization(config: LocalLoadConfig, device: str) -> None:
    """Raise in one line where the quantization asked for cannot be had."""
    if config.quantization == "none":
        return
    if device == "mps":
        raise OptionError("bitsandbytes has no mps backend. Use -d cpu, or -q none.")
    if find_spec("bitsandbytes") is None:
        raise MissingDependency(
            f"-q {config.quantization} needs bitsandbytes. Type: pip install bitsandbytes"
        )


def load(
    folder: Path, config: LocalLoadConfig, device: str, report: Report, cancel: threading.Event
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load tokenizer and weights; raises `Cancelled` soon after the flag is set."""
    report(Progress("reading the tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=config.trust_remote_code, local_files_only=True
    )
    report(Progress("reading the weights", 0.0))
    with turn(cancel), _progress(report, cancel):
        # With `output_loading_info` it returns a pair, which its annotation does not know.
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_dtype(config),
            device_map=_device_map(config.device, device),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **_optional(config),
        )
    model, problems = pair
    _check_complete(problems)
    if cancel.is_set():
        raise Cancelled
    model.eval()
    _make_streamable(model)
    widen(model)
    return model, tokenizer


def _make_streamable(model: PreTrainedModel) -> None:
    """Take back what a model's own settings ask for and a stream of single tokens cannot give."""
    for name in _NOT_STREAMED:
        setattr(model.generation_config, name, None)


def _dtype(config: LocalLoadConfig) -> str:
    if config.quantization == "8bit" and config.dtype == "auto":
        return _INT8_DTYPE
    return config.dtype


def _device_map(asked: str, device: str) -> str | dict[str, str]:
    # accelerate spreads a model over several GPUs, and over the CPU when they are too small.
    return "auto" if asked == "auto" and device == "cuda" else {"": device}


def _optional(config: LocalLoadConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.attn is not None:
        options["attn_implementation"] = config.attn
    if config.quantization == "8bit":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if config.quantization == "4bit":
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    return options


def _check_complete(problems: dict[str, Any]) -> None:
    # Transformers fills missing weights with random numbers and a warning: an answer from those
    # looks like a bad model, not like a bad file.
    missing = sorted(problems.get("missing_keys", ()))
    if missing:
        raise LoadFailed(
            f"{len(missing)} weights are missing ({missing[0]}, …): this is not a whole"
            " text-generation model."
        )


def describe(model: PreTrainedModel, base: ModelInfo, config: LocalLoadConfig) -> ModelInfo:
    """Return what is known about a model once it is loaded."""
    text_config = model.config.get_text_config()
    devices = {str(parameter.device) for parameter in model.parameters()}
    return ModelInfo(
        name=base.name,
        backend="local",
        where=base.where,
        source=base.source,
        folder=base.folder,
        device="+".join(sorted(devices)),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=config.quantization,
        size=int(model.get_memory_footprint()),
        context_length=memory.context_length(getattr(text_config, "max_position_embeddings", None)),
        revision=base.revision,
    )


class _Bar:
    """Stands in for Transformers' progress bar: reports, and stops the load when asked to."""

    def __init__(
        self, report: Report, cancel: threading.Event, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._report, self._cancel = report, cancel
        self._items: Any = args[0] if args else kwargs.get("iterable")
        self._total = kwargs.get("total") or (len(self._items) if self._items is not None else 0)
        self._done = 0
        self._last = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        if self._cancel.is_set():
            raise Cancelled
        self._done += count
        # Thousands of small tensors: a report for each would cost more than loading them.
        if self._total and time.monotonic() - self._last > 0.05:
            self._last = time.monotonic()
            self._report(Progress("reading the weights", min(self._done / self._total, 1.0)))

    def close(self) -> None:
        """Nothing is held."""

    def set_description(self, *_args: object, **_kwargs: object) -> None:
        """The stage is named by us."""

    set_postfix = set_postfix_str = refresh = set_description


@contextlib.contextmanager
def _progress(report: Report, cancel: threading.Event) -> Iterator[None]:
    previous = transformers_logging.set_tqdm_hook(
        lambda _factory, args, kwargs: _Bar(report, cancel, args, kwargs)
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def explain(error: BaseException, name: str, details: str) -> LLMMagicError:
    """Translate what Transformers raised while it loaded a model."""
    text = str(error).strip()
    line = " ".join(text.split())[:300]
    if "trust_remote_code" in text:
        return LoadFailed(
            f"{name} comes with Python code of its own. If you trust it, add --trust-remote-code.",
            details=details,
        )
    if "`tiktoken` is required" in text:
        return MissingDependency(
            f"{name} has no tokenizer.json, and to make one of what it has takes another package."
            " Type: pip install sentencepiece tiktoken",
            details=details,
        )
    if "backend tokenizer" in text:
        return LoadFailed(
            f"{name} has no tokenizer that can be read. Get its tokenizer.json and load again.",
            details=details,
        )
    if "ignore_mismatched_sizes" in text:
        return LoadFailed(
            f"The weights of {name} do not fit its config.json. Choose a model whose files"
            " belong together.",
            details=details,
        )
    if type(error).__name__ == "SafetensorError":
        return LoadFailed(
            f"The weights of {name} are damaged ({line}). Delete them and load again.",
            details=details,
        )
    return LoadFailed(
        f"{name} could not be loaded: {type(error).__name__}: {line}", details=details
    )
