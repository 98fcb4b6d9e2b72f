"""Loads a model folder into memory with Transformers, and unloads it; runs on the inference thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llm_magic.backends.base import LoadPlan, Report
from llm_magic.backends.local import cpu_linear, cpu_quantizer, memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.cpu_quantized import QuantizedLinear
from llm_magic.backends.local.files import sources
from llm_magic.backends.local.files.download_progress import CountingBar
from llm_magic.backends.local.generation.chat_template import PromptEncoder
from llm_magic.backends.local.generation.constraint import Grammars
from llm_magic.backends.local.generation.cuda_graph import StaticDecoder
from llm_magic.backends.local.generation.model_runner import PrefillChunkSize
from llm_magic.backends.local.generation.parameters import eos_token_ids
from llm_magic.backends.local.generation.prefix_cache import PrefixCache
from llm_magic.backends.local.generation.token_streamer import ReasoningTokens
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.local.load_plan import (
    LocalPlan,
    ModelFiles,
    packs_weights,
    used_dtype,
    used_quantization,
)
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.memory_holders import ReferenceSearch
from llm_magic.backends.local.worker import Cancelled, process_lock
from llm_magic.errors import LoadFailed, OptionError
from llm_magic.types import ModelInfo, Progress, Unloaded

# Settings of a model that a stream of single tokens cannot honor. `max_length` is a second limit
# besides `max_new_tokens`, about which Transformers warns in every call.
_NOT_STREAMED = (
    "max_length", "num_beams", "num_return_sequences", "prompt_lookup_num_tokens",
    "assistant_early_exit", "return_dict_in_generate", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states",
)  # fmt: skip
_REPORT_INTERVAL_S = 0.05
# The tokens of a prompt that take two to three times as long as one, with the kernels for bfloat16 and
# with weights that are converted for it.
_SMALLEST_READ, _SMALLEST_CONVERTED = cpu_linear.MANY_ROWS, 256


def load(
    plan: LoadPlan,
    local: LocalPlan,
    report: Report,
    cancel: threading.Event,
    *,
    keep_prefixes: bool,
) -> LocalModel:
    """Load a checked model and its assistant; raises `Cancelled` soon after `cancel` is set."""
    config, device = local.config, local.device
    model, tokenizer = _load_files(local.main, config, device, report, cancel)
    traits = _checked_traits(plan, local, model)
    assistant = _load_assistant(plan, local, tokenizer, report, cancel)
    static_decoder = StaticDecoder(model, compiled=config.compile)
    if traits.fallback_reason is None:
        static_decoder.warm_up(report, cancel)
    info, free = _model_info(model, plan, local), memory.free_bytes(device)
    return LocalModel(
        model,
        tokenizer,
        info,
        local.main.source,
        PrefixCache(
            memory.prefix_budget(model.config.to_dict(), info.dtype, free) if keep_prefixes else 0
        ),
        _chunk_size(model, device),
        static_decoder,
        PromptEncoder(tokenizer, control_tokens=config.special_tokens),
        ReasoningTokens.find(tokenizer),
        traits,
        Grammars(
            tokenizer, model.config.get_text_config().vocab_size, sorted(eos_token_ids(model, {}))
        ),
        assistant,
    )


def verify(plan: LoadPlan, local: LocalPlan, report: Report, cancel: threading.Event) -> LocalPlan:
    """Return the plan with its tokenizers; raises what a load would raise, except that memory ran out.

    The models are built on torch's meta device: their weights have names and shapes, which are compared
    with the files, and no memory.
    """
    report(Progress("checking the model"))
    config, assistant = local.config, local.assistant
    tokenizer, model = _without_weights(local.main, config, report, cancel)
    main = replace(local.main, tokenizer=tokenizer)
    if model is not None:
        _checked_traits(plan, local, model)
    if assistant is None:
        return replace(local, main=main)
    own_tokenizer, model = _without_weights(assistant, config, report, cancel)
    _check_vocabulary(plan, local, tokenizer, own_tokenizer)
    if model is not None:
        _check_assistant(local, model)
    return replace(local, main=main, assistant=replace(assistant, tokenizer=own_tokenizer))


def _without_weights(
    files: ModelFiles, config: LocalLoadConfig, report: Report, cancel: threading.Event
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | None]:
    """Return the tokenizer of files, and their model on the meta device.

    The model is None if its files are quantized: packages of their own read these.
    """
    tokenizer = _read_tokenizer(files, config, report)
    if "quantization_config" in sources.model_config(files.folder):
        return tokenizer, None
    options = {"dtype": config.dtype, "device_map": {"": "meta"}, **_attention_option(config)}
    with process_lock(cancel), _progress_hook(lambda _progress: None, cancel):
        return tokenizer, _read_model(files.folder, config, options)


def _checked_traits(plan: LoadPlan, local: LocalPlan, model: PreTrainedModel) -> compat.ModelTraits:
    """Return the traits of a model; raises `OptionError` for options that need the fast path without it."""
    traits = compat.traits(model)
    reason = traits.fallback_reason
    if reason is not None and (local.assistant is not None or local.config.compile):
        option = "--compile" if local.assistant is None else "--assistant"
        raise OptionError(
            f"{option} needs the fast path, which {plan.name} cannot use: {reason}."
            f" Load it without {option}."
        )
    return traits


def _chunk_size(model: PreTrainedModel, device: str) -> PrefillChunkSize:
    """Return how many tokens of a prompt a forward pass reads.

    In shorter chunks, it takes longer to read or to convert all weights than to multiply with them.
    """
    count: int = model.num_parameters(exclude_embeddings=True)
    modules = list(model.modules())
    has_kernel = device == "cpu" and cpu_linear.has_kernel(torch.bfloat16)
    if any(isinstance(m, QuantizedLinear) for m in modules):
        options = {"smallest": _SMALLEST_CONVERTED} if has_kernel else {}
        return PrefillChunkSize.for_model(count // 4, device, **options)
    is_fast = has_kernel and any(isinstance(m, cpu_linear.Bfloat16Linear) for m in modules)
    options = {"smallest": _SMALLEST_READ} if is_fast else {}
    return PrefillChunkSize.for_model(count, device, **options)


def unload(box: list[LocalModel]) -> Unloaded:
    """Free the model in `box` and measure the process before and after.

    The caller passes a list because a reference in its frame would keep the model in memory.
    """
    local_model = box.pop()
    info, before = local_model.info, memory.memory_use()
    models = local_model.modules
    for model in models:
        # The hooks of accelerate wrap `forward` and refer to the model.
        remove_hook_from_module(model, recurse=True)
    search = ReferenceSearch(models)
    del local_model, models, model
    holders = search.holders()
    # Collecting takes long and is needed only where a cycle of garbage holds weights.
    memory.release_memory(collect=bool(holders))
    if holders:
        holders = search.holders()
    return Unloaded(info.name, info.size or 0, before, memory.memory_use(), holders)


def _load_assistant(
    plan: LoadPlan,
    local: LocalPlan,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    cancel: threading.Event,
) -> PreTrainedModel | None:
    if local.assistant is None:
        return None
    model, own_tokenizer = _load_files(local.assistant, local.config, local.device, report, cancel)
    _check_vocabulary(plan, local, tokenizer, own_tokenizer)
    _check_assistant(local, model)
    return model


def _check_vocabulary(
    plan: LoadPlan,
    local: LocalPlan,
    tokenizer: PreTrainedTokenizerBase,
    own: PreTrainedTokenizerBase,
) -> None:
    """Raise `OptionError` if the assistant has another vocabulary than the model."""
    if own.get_vocab() != tokenizer.get_vocab():
        raise OptionError(
            f"--assistant {local.config.assistant} has a different vocabulary from {plan.name}."
            " Choose a smaller model of the same family."
        )


def _check_assistant(local: LocalPlan, model: PreTrainedModel) -> None:
    """Raise `OptionError` if the model cannot be an assistant."""
    has_loop = compat.traits(model).fallback_reason is None
    if not (has_loop and compat.can_roll_back(compat.new_cache(model))):
        raise OptionError(
            f"--assistant {local.config.assistant} cannot discard rejected tokens. Choose a model"
            " without recurrent states."
        )


def _read_tokenizer(
    files: ModelFiles, config: LocalLoadConfig, report: Report
) -> PreTrainedTokenizerBase:
    report(Progress("reading the tokenizer"))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        files.folder, trust_remote_code=config.trust_remote_code, local_files_only=True
    )
    return tokenizer


def _read_model(folder: Path, config: LocalLoadConfig, options: dict[str, Any]) -> PreTrainedModel:
    """Read the weights; raises `LoadFailed` if some are missing."""
    # With `output_loading_info` it returns a pair, unlike its annotation.
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    model: PreTrainedModel = pair[0]
    _check_missing_weights(pair[1])
    return model


def _load_files(
    files: ModelFiles, config: LocalLoadConfig, device: str, report: Report, cancel: threading.Event
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load tokenizer and weights; raises `Cancelled` soon after the flag is set."""
    tokenizer = files.tokenizer
    if tokenizer is None:
        tokenizer = _read_tokenizer(files, config, report)
    report(Progress("reading the weights", 0.0))
    with process_lock(cancel), _progress_hook(report, cancel):
        model = _read_model(files.folder, config, _load_options(config, device))
    if cancel.is_set():
        raise Cancelled
    model.eval()
    for name in _NOT_STREAMED:
        setattr(model.generation_config, name, None)
    if used_quantization(config, device) in memory.QUANTIZED_HEADS:
        # `torch.compile` fuses by itself.
        cpu_quantizer.complete(model, is_fused=not config.compile)
    cpu_linear.optimize(model, pack=packs_weights(config, device))
    # The memory of the weights that were replaced.
    memory.release_memory(collect=False)
    return model, tokenizer


def _load_options(config: LocalLoadConfig, device: str) -> dict[str, Any]:
    # "auto": accelerate distributes the layers over the GPUs, and over the CPU if those are full.
    distribute = config.device == "auto" and device == "cuda"
    quantization = used_quantization(config, device)
    dtype = used_dtype(config, quantization)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": "auto" if distribute else {"": device},
        **_attention_option(config),
    }
    if quantization == "bnb-8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "bnb-4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif quantization != "none":
        options["quantization_config"] = cpu_quantizer.CpuQuantizationConfig(quantization)
    return options


def _attention_option(config: LocalLoadConfig) -> dict[str, str]:
    return {} if config.attn is None else {"attn_implementation": config.attn}


def _check_missing_weights(loading_info: dict[str, Any]) -> None:
    # Transformers fills missing weights with random numbers and logs a warning.
    missing = sorted(loading_info.get("missing_keys", ()))
    if missing:
        raise LoadFailed(
            f"{len(missing)} weights are missing ({missing[0]}, …). Choose a complete"
            " text-generation model."
        )


def _model_info(model: PreTrainedModel, plan: LoadPlan, local: LocalPlan) -> ModelInfo:
    source, folder = local.main.source, local.main.folder
    return ModelInfo(
        name=plan.name,
        backend="local",
        where=source.where,
        source=str(source.path or folder),
        folder=str(folder),
        device="+".join(sorted({str(parameter.device) for parameter in model.parameters()})),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=used_quantization(local.config, local.device),
        size=int(model.get_memory_footprint()),
        context_length=memory.context_length(vars(model.config.get_text_config())),
        revision=local.config.revision,
    )


@contextlib.contextmanager
def _progress_hook(report: Report, cancel: threading.Event) -> Iterator[None]:
    """Replace the progress bars of Transformers; `process_lock` must be held."""
    reported_at = 0.0

    class LoadingBar(CountingBar):
        def on_update(self) -> None:
            nonlocal reported_at
            if cancel.is_set():
                raise Cancelled
            # A report for each of thousands of small tensors would take longer than loading them.
            if self.total and time.monotonic() - reported_at > _REPORT_INTERVAL_S:
                reported_at = time.monotonic()
                report(Progress("reading the weights", min(self.n / self.total, 1.0)))

    previous = transformers_logging.set_tqdm_hook(
        lambda _factory, args, kwargs: LoadingBar(*args, **kwargs)
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
