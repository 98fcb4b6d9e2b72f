"""What a model will take, what is free, and what this process really holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import struct
import sys
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from llm_magic.errors import OutOfMemory
from llm_magic.text.formatting import human_bytes
from llm_magic.types import MemoryUse

if TYPE_CHECKING:
    import torch

_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Packed weights plus their scales, per weight. bitsandbytes keeps embeddings, the output head
# and everything that is not a matrix as they are.
_QUANTIZED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0 + 4 / 4096}
# What a whole model takes then, roughly: from the largest to the smallest.
_SHARES = {"none": 1.0, "8bit": 0.6, "4bit": 0.4}
_NOT_QUANTIZED = ("embed", "lm_head", "wte", "wpe")
# Activations, the tokenizer, the allocator's slack: small models need some room, large a share.
_SLACK, _SLACK_SHARE = 64 << 20, 0.03
# The prompt and answer that a loaded model should at least have room for.
_USUAL_CONTEXT = 2048
# What is above is a way to state that there is no limit: the longest known is 10 million.
_LONGEST_CONTEXT = 2**30
# What is kept of earlier prompts: this share of the memory that is free after the load, and no
# more than so many conversations as long as the model reads.
_PREFIX_SHARE, _LONGEST_KEPT = 0.25, 2


def weight_bytes(folder: Path, dtype: str, quantization: str) -> int:
    """Return the bytes the weights in `folder` take once loaded, read from safetensors headers."""
    return int(sum(
        _tensor_bytes(name, info, dtype, quantization)
        for file in weight_files(folder)
        for name, info in _header(file).items()
    ))  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """Return the files that Transformers reads: one, or those of the index; else all there are."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            return [folder / name for name in sorted(named) if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> dict[str, Any]:
    # The format: 8 bytes little-endian length, then that much JSON.
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return {}
        (length,) = struct.unpack("<Q", prefix)
        if length > file.stat().st_size:
            return {}
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            return {name: info for name, info in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError):
            return {}


def is_whole(file: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    ends: list[int] = [info["data_offsets"][1] for info in _header(file).values()]
    return bool(ends) and 8 + length + max(ends) == file.stat().st_size


def _tensor_bytes(name: str, info: dict[str, Any], dtype: str, quantization: str) -> float:
    count: int = prod(info["shape"])
    stored = _BYTES.get(info["dtype"], 2)
    is_float = info["dtype"][0] in "FB" and info["dtype"] != "BOOL"
    matrix = len(info["shape"]) == 2 and not any(part in name for part in _NOT_QUANTIZED)
    if quantization != "none" and matrix and is_float:
        return count * _QUANTIZED_BYTES[quantization]
    return float(count * (_DTYPE_BYTES.get(dtype, stored) if is_float else stored))


def scaled(size: int, quantization: str) -> int:
    """Guess what 16-bit files of `size` bytes take when quantized, before they are downloaded."""
    return int(size * _SHARES[quantization])


def kv_bytes(config: dict[str, Any], dtype: str) -> int:
    """Return the bytes of the key-value cache of a usual conversation; `config` as config.json."""
    return token_bytes(config, dtype) * min(_context(config), _USUAL_CONTEXT)


def prefix_budget(config: dict[str, Any], dtype: str, free: int) -> int:
    """Return the bytes that the caches of earlier prompts may take, of those that are `free`."""
    longest = _LONGEST_KEPT * token_bytes(config, dtype) * _context(config)
    return min(longest, int(free * _PREFIX_SHARE))


def token_bytes(config: dict[str, Any], dtype: str) -> int:
    """Return the bytes that one token takes in the key-value cache."""
    config = config.get("text_config") or config
    heads = _number(config, "num_attention_heads", "n_head", "n_heads") or 1
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    head_dim = _number(config, "head_dim") or hidden // heads
    kv_heads = _number(config, "num_key_value_heads") or heads
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return 2 * layers * kv_heads * head_dim * _DTYPE_BYTES.get(dtype, 2)


def context_length(stated: object) -> int | None:
    """Return a context length as a config states it; None for what cannot be one.

    Models without a limit state -1, 0, or a number that no text reaches.
    """
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return None
    return int(stated) if 1 <= stated <= _LONGEST_CONTEXT else None


def _context(config: dict[str, Any]) -> int:
    config = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return context_length(_number(config, *names)) or _USUAL_CONTEXT


def _number(config: dict[str, Any], *names: str) -> int:
    """Return the first of some settings that is there: older models have names of their own."""
    # What is no number is for Transformers to complain about.
    found = (config[name] for name in names if config.get(name))
    return next((value for value in found if isinstance(value, int)), 0)


def needed_bytes(weights: int, cache: int) -> int:
    """Return what has to be free for a model with these weights and this cache."""
    return int(weights * (1 + _SLACK_SHARE)) + cache + _SLACK


def free_bytes(device: str) -> int:
    """Return the bytes that can still be taken on `device` (``cpu``, ``cuda``, ``cuda:1``, ``mps``)."""
    if device == "cuda":
        import torch

        # Without an index a model is spread over all of them.
        return sum(map(_free_on_gpu, range(torch.cuda.device_count())))
    if device.startswith("cuda:"):
        return _free_on_gpu(int(device.removeprefix("cuda:")))
    return int(psutil.virtual_memory().available)


def _free_on_gpu(index: int) -> int:
    import torch

    free, _total = torch.cuda.mem_get_info(index)
    # What torch keeps cached is free for the next model too.
    return int(free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))


def check_fit(name: str, needed: int, free: int, device: str, quantization: str) -> None:
    """Raise `OutOfMemory` with what is needed, what is free and what to try."""
    if needed <= free:
        return
    advice = []
    sizes = {q: needed * share / _SHARES[quantization] for q, share in _SHARES.items()}
    smaller = next((q for q, size in sizes.items() if size <= free), None)
    if smaller is not None:
        advice.append(f"-q {smaller} (about {human_bytes(sizes[smaller])})")
    if device.startswith("cuda"):
        advice.append("-d cpu")
    advice.append("a smaller model, or free memory with %llm_unload")
    raise OutOfMemory(
        f"{name} needs about {human_bytes(needed)} on {device}, {human_bytes(free)} are free."
        f" Try {', '.join(advice)}."
    )


def memory_use(*, gpus: bool = True) -> MemoryUse:
    """Return what this process holds now, by the system's and by torch's own count."""
    process = psutil.Process().memory_info().rss
    if not gpus or not _cuda_in_use():
        return MemoryUse(process)
    import torch

    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = tuple((name, torch.cuda.memory_allocated(name)) for name in names)
    room = tuple((name, *torch.cuda.mem_get_info(name)) for name in names)
    return MemoryUse(process, devices, room)


def _cuda_in_use() -> bool:
    # Looking must not import torch: a process without it holds nothing on a GPU.
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def by_device(tensors: Iterable[torch.Tensor]) -> Counter[str]:
    """Return the bytes of some tensors by the device that they are on."""
    held: Counter[str] = Counter()
    for tensor in tensors:
        held[str(tensor.device)] += tensor.nbytes
    return held


def give_back(*, collect: bool = True) -> None:
    """Return freed memory to the system; `collect` first frees what only cycles refer to.

    The garbage collector holds the GIL for up to a second, in which nothing can be interrupted.
    """
    if collect:
        # Twice: accelerate's hooks make cycles through objects with finalizers.
        gc.collect()
        gc.collect()
    if _cuda_in_use():
        import torch

        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # glibc keeps freed memory of small blocks for itself; musl has no malloc_trim.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def ran_out(error: BaseException) -> bool:
    """Whether this is what Python or torch raise when memory runs out."""
    kind, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or (
        kind == "RuntimeError" and ("can't allocate memory" in text or "out of memory" in text)
    )  # fmt: skip
