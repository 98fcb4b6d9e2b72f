"""Estimates the memory that a model takes, and measures what is free and what this process uses."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_magic.backends.local.files import safetensors
from llm_magic.config.commands import command, option
from llm_magic.errors import OutOfMemory
from llm_magic.text import human_bytes
from llm_magic.types import MemoryUse

if TYPE_CHECKING:
    import torch

_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Per weight, with the scales. Embeddings, tensors that are no matrices, and experts, which Transformers
# joins to such tensors, are not quantized.
_QUANTIZED_BYTES = {
    "8bit": 1.0 + 2 / 4096, "4bit": 0.5 + 4 / 32, "bnb-8bit": 1.0 + 4 / 4096, "bnb-4bit": 0.5 + 4 / 64,
}  # fmt: skip
_NOT_QUANTIZED = (".experts.",)
# These also quantize the output head, in 8 bits. A head that is the input embedding becomes a copy.
QUANTIZED_HEADS = ("8bit", "4bit")
# The size of a whole model, as a share of its 16-bit size; from the largest to the smallest.
_QUANTIZED_SHARES = {"none": 1.0, "8bit": 0.6, "4bit": 0.4}
_EMBEDDINGS, _HEADS = ("embed", "wte", "wpe"), ("lm_head", "embed_out")
# For activations, the tokenizer, and the overhead of the allocator: bytes, and a share of the weights.
_OVERHEAD, _OVERHEAD_SHARE = 64 << 20, 0.03
# The tokens of prompt and answer for which a loaded model needs memory at least.
_USUAL_CONTEXT = 2048
# Larger numbers in a config mean that there is no limit. The longest known context is 10 million.
_LONGEST_CONTEXT = 2**30
# The prefix cache gets this share of the memory that is free after the load, and at most the size of
# so many full contexts.
_PREFIX_SHARE, _PREFIX_CONTEXTS = 0.25, 2


def weight_bytes(folder: Path, dtype: str, quantization: str) -> int:
    """Return the bytes of the loaded weights of `folder`, as its safetensors headers state them."""
    tensors = _tensors(folder)
    return int(sum(_tensor_bytes(name, info, dtype, quantization) for name, info in tensors))


def _tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each tensor of `folder` with its type and shape, as the headers state them."""
    for file in safetensors.weight_files(folder):
        yield from safetensors.read_header(file).items()


def _tensor_bytes(name: str, info: dict[str, Any], dtype: str, quantization: str) -> float:
    count: int = prod(info["shape"])
    stored = _BYTES.get(info["dtype"], 2)
    is_float = info["dtype"][0] in "FB" and info["dtype"] != "BOOL"
    if any(part in name for part in _HEADS):
        quantization = "8bit" if quantization in QUANTIZED_HEADS else "none"
    elif any(part in name for part in (*_EMBEDDINGS, *_NOT_QUANTIZED)):
        quantization = "none"
    if quantization != "none" and len(info["shape"]) == 2 and is_float:
        return count * _QUANTIZED_BYTES[quantization]
    return float(count * (_DTYPE_BYTES.get(dtype, stored) if is_float else stored))


def head_copy_bytes(folder: Path, dtype: str) -> int:
    """Return the bytes of a quantized copy of the output head, where it is the input embedding.

    Such a model has no tensor for its head. A head of bfloat16 is quantized; the embedding is not.
    """
    tensors = {
        name: info
        for name, info in _tensors(folder)
        if len(info["shape"]) == 2 and any(part in name for part in (*_EMBEDDINGS, *_HEADS))
    }
    is_quantized = dtype == "bfloat16" or (
        dtype == "auto" and any(info["dtype"] == "BF16" for info in tensors.values())
    )
    if not is_quantized or any(part in name for name in tensors for part in _HEADS):
        return 0
    size = max((prod(info["shape"]) for info in tensors.values()), default=0)
    return int(size * _QUANTIZED_BYTES["8bit"])


def scaled(size: int, quantization: str) -> int:
    """Estimate the size of 16-bit weights of `size` bytes once they are quantized."""
    return int(size * _QUANTIZED_SHARES[quantization.removeprefix("bnb-")])


def kv_bytes(config: dict[str, Any], dtype: str) -> int:
    """Return the bytes of the key-value cache of a usual conversation; `config` is a config.json."""
    context = context_length(config) or _USUAL_CONTEXT
    return token_bytes(config, dtype) * min(context, _USUAL_CONTEXT)


def prefix_budget(config: dict[str, Any], dtype: str, free: int) -> int:
    """Return the largest size of the prefix cache, where `free` bytes are free."""
    context = context_length(config) or _USUAL_CONTEXT
    return prefix_limit(token_bytes(config, dtype) * context, free)


def prefix_limit(context_bytes: int, free: int) -> int:
    """Return the largest size of the prefix cache of a model whose full context takes these bytes."""
    return min(_PREFIX_CONTEXTS * context_bytes, int(free * _PREFIX_SHARE))


def token_bytes(config: dict[str, Any], dtype: str) -> int:
    """Return the bytes of one token in the key-value cache."""
    config = config.get("text_config") or config
    heads = _number(config, "num_attention_heads", "n_head", "n_heads") or 1
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    head_dim = _number(config, "head_dim") or hidden // heads
    kv_heads = _number(config, "num_key_value_heads") or heads
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return 2 * layers * kv_heads * head_dim * _DTYPE_BYTES.get(dtype, 2)


def context_length(config: dict[str, Any]) -> int | None:
    """Return how many tokens a model reads, as its config states it; None for no valid number.

    The configs of models without a limit state -1, 0, or a very large number.
    """
    config = config.get("text_config") or config
    names = (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "context_length",
        "model_max_length",
    )
    stated = next((config[name] for name in names if config.get(name)), None)
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return None
    return int(stated) if 1 <= stated <= _LONGEST_CONTEXT else None


def _number(config: dict[str, Any], *names: str) -> int:
    """Return the first of these settings that exists, as older models use other names; else 0."""
    # Transformers reports values that are no numbers.
    found = (config[name] for name in names if config.get(name))
    return next((value for value in found if isinstance(value, int)), 0)


def required_bytes(weights: int, cache: int) -> int:
    """Return the memory that a load needs for weights and a key-value cache of these bytes."""
    return int(weights * (1 + _OVERHEAD_SHARE)) + cache + _OVERHEAD


def free_bytes(device: str) -> int:
    """Return the free bytes of `device`: ``cpu``, ``cuda`` (all GPUs), ``cuda:1`` or ``mps``."""
    import psutil

    if device == "cuda":
        import torch

        return sum(map(_free_on_gpu, range(torch.cuda.device_count())))
    if device.startswith("cuda:"):
        return _free_on_gpu(int(device.removeprefix("cuda:")))
    return int(psutil.virtual_memory().available)


def _free_on_gpu(index: int) -> int:
    import torch

    free, _total = torch.cuda.mem_get_info(index)
    # The next model can use what torch has cached.
    return int(free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))


def check_fit(name: str, required: int, free: int, device: str, quantization: str) -> None:
    """Raise `OutOfMemory`, with both sizes and advice, if `required` is more than `free`."""
    if required <= free:
        return
    advice = []
    unquantized = required / _QUANTIZED_SHARES[quantization.removeprefix("bnb-")]
    sizes = {q: unquantized * share for q, share in _QUANTIZED_SHARES.items()}
    smaller = next((q for q, size in sizes.items() if size <= free), None)
    if smaller is not None:
        advice.append(f"{option('quantization', smaller)} (about {human_bytes(sizes[smaller])})")
    if device.startswith("cuda"):
        advice.append(option("device", "cpu"))
    advice.append(f"a smaller model, or free memory with {command('unload')}")
    raise OutOfMemory(
        f"{name} needs about {human_bytes(required)} on {device}, but only {human_bytes(free)} is free."
    ).advise(f"Try {', '.join(advice)}.")


def memory_use(*, gpus: bool = True) -> MemoryUse:
    """Return the memory that this process uses, as the system and torch report it."""
    import psutil

    process = psutil.Process().memory_info().rss
    if not gpus or not _cuda_in_use():
        return MemoryUse(process)
    import torch

    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = tuple((name, torch.cuda.memory_allocated(name)) for name in names)
    totals = tuple((name, *torch.cuda.mem_get_info(name)) for name in names)
    return MemoryUse(process, devices, totals)


def _cuda_in_use() -> bool:
    # A process that has not imported torch uses no GPU.
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def bytes_by_device(tensors: Iterable[torch.Tensor]) -> Counter[str]:
    """Return the bytes of tensors by their device."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.device)] += tensor.nbytes
    return sizes


def release_memory(*, collect: bool = True) -> None:
    """Return freed memory to the system; `collect` runs the garbage collector before.

    The collector holds the GIL for up to a second, during which nothing can be interrupted.
    """
    if collect:
        # Twice: the hooks of accelerate make cycles through objects with finalizers.
        gc.collect()
        gc.collect()
    if _cuda_in_use():
        import torch

        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # glibc does not return freed small blocks by itself. musl has no malloc_trim.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python or torch raised this error because memory ran out."""
    kind, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or (
        kind == "RuntimeError" and ("can't allocate memory" in text or "out of memory" in text)
    )  # fmt: skip
