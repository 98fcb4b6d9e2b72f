"""Estimates from file headers and configs, and the check whether a model fits."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_magic.backends.local import memory
from llm_magic.errors import OutOfMemory
from llm_magic.text import human_bytes


def write_header(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Write a file with a header and without data."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def test_weight_bytes_of_real_files(tmp_path: Path) -> None:
    save_file(
        {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)},
        tmp_path / "model-1.safetensors",
    )
    save_file({"c": np.zeros((2, 2), np.int64)}, tmp_path / "model-2.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    assert memory.weight_bytes(tmp_path, "auto", "none") == 3 * 4 * 4 + 5 * 2 + 4 * 8
    assert memory.weight_bytes(tmp_path, "float32", "none") == 3 * 4 * 4 + 5 * 4 + 4 * 8
    assert memory.weight_bytes(tmp_path, "bfloat16", "none") == 3 * 4 * 2 + 5 * 2 + 4 * 8


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2), ("F8_E4M3", 1), ("I64", 8), ("I32", 4),
     ("I8", 1), ("U8", 1), ("BOOL", 1)],
)  # fmt: skip
def test_weight_bytes_of_each_dtype(tmp_path: Path, dtype: str, size: int) -> None:
    write_header(tmp_path / "x.safetensors", {"t": (dtype, [10, 10]), "scalar": (dtype, [])})
    assert memory.weight_bytes(tmp_path, "auto", "none") == 101 * size
    if dtype[0] in "FB" and dtype != "BOOL":
        assert memory.weight_bytes(tmp_path, "bfloat16", "none") == 101 * 2
    else:
        assert memory.weight_bytes(tmp_path, "bfloat16", "none") == 101 * size


def test_weight_bytes_of_quantized_matrices(tmp_path: Path) -> None:
    write_header(
        tmp_path / "x.safetensors",
        {
            "model.embed_tokens.weight": ("BF16", [100, 64]),
            "lm_head.weight": ("BF16", [100, 64]),
            "layers.0.q_proj.weight": ("BF16", [64, 64]),
            "layers.0.norm.weight": ("BF16", [64]),
            # Transformers joins the experts of a layer to a tensor of three dimensions.
            "layers.0.experts.0.up_proj.weight": ("BF16", [64, 64]),
        },
    )
    unquantized = 2 * 100 * 64 * 2 + 64 * 2 + 4096 * 2
    assert memory.weight_bytes(tmp_path, "auto", "none") == unquantized + 4096 * 2
    for bits, matrix in (("bnb-8bit", 4096 + 4), ("bnb-4bit", 2048 + 256)):
        assert memory.weight_bytes(tmp_path, "auto", bits) == unquantized + matrix
    # The kernels of the CPU also have the head in 8 bits.
    head = 6400 * (1 + 2 / 4096)
    for bits, matrix in (("8bit", 4096 + 2), ("4bit", 2048 + 512)):
        expected = unquantized - 12800 + int(head + matrix)
        assert memory.weight_bytes(tmp_path, "auto", bits) == expected


@pytest.mark.parametrize(
    ("head", "stored", "dtype", "expected"),
    [(False, "BF16", "auto", 6403), (False, "BF16", "float32", 0), (False, "F32", "auto", 0),
     (False, "F32", "bfloat16", 6403), (True, "BF16", "auto", 0)],
)  # fmt: skip
def test_quantized_head_of_a_tied_embedding_takes_memory_of_its_own(
    tmp_path: Path, head: bool, stored: str, dtype: str, expected: int
) -> None:
    tensors = {
        "model.embed_tokens.weight": (stored, [100, 64]),
        "layers.0.q_proj.weight": (stored, [640, 64]),
    }
    if head:
        tensors["lm_head.weight"] = (stored, [100, 64])
    write_header(tmp_path / "x.safetensors", tensors)
    assert memory.head_copy_bytes(tmp_path, dtype) == expected


@pytest.mark.parametrize("content", [b"", b"\x01\x02", struct.pack("<Q", 2**60) + b"{}"])
def test_weight_bytes_of_a_damaged_file_are_zero(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert memory.weight_bytes(tmp_path, "auto", "none") == 0


CONFIG: dict[str, Any] = {
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "hidden_size": 576, "max_position_embeddings": 8192,
}  # fmt: skip


def test_kv_bytes_of_a_usual_conversation() -> None:
    usual = 2 * 30 * 3 * 64 * 2048
    assert memory.kv_bytes(CONFIG, "auto") == usual * 2
    assert memory.kv_bytes(CONFIG, "float32") == usual * 4
    assert memory.kv_bytes({"text_config": CONFIG, "vision_config": {}}, "auto") == usual * 2
    assert memory.kv_bytes({**CONFIG, "head_dim": 128}, "auto") == usual * 4
    assert memory.kv_bytes({**CONFIG, "num_key_value_heads": None}, "auto") == usual * 6
    assert memory.kv_bytes({**CONFIG, "max_position_embeddings": 512}, "auto") == usual // 2
    assert memory.kv_bytes({}, "auto") == 0


def test_required_bytes_include_overhead() -> None:
    assert memory.required_bytes(0, 0) == 64 << 20
    assert memory.required_bytes(10**10, 10**9) == int(1.03e10) + 10**9 + (64 << 20)


def test_check_fit_accepts_an_exact_fit() -> None:
    memory.check_fit("m", 10**9, 10**9, "cpu", "none")


@pytest.mark.parametrize(
    ("device", "quantization", "needed", "free", "message"),
    [
        ("cpu", "none", 14.2e9, 9e9,
         "m needs about 14.2 GB on cpu, but only 9.0 GB is free. Try -q 8bit (about 8.5 GB),"
         " a smaller model, or free memory with %llm_unload."),
        ("cuda:0", "none", 14.2e9, 8e9,
         "m needs about 14.2 GB on cuda:0, but only 8.0 GB is free. Try -q 4bit (about 5.7 GB),"
         " -d cpu, a smaller model, or free memory with %llm_unload."),
        ("cpu", "4bit", 6e9, 4e9,
         "m needs about 6.0 GB on cpu, but only 4.0 GB is free. Try"
         " a smaller model, or free memory with %llm_unload."),
    ],
)  # fmt: skip
def test_check_fit_error_has_sizes_and_advice(
    device: str, quantization: str, needed: float, free: float, message: str
) -> None:
    with pytest.raises(OutOfMemory) as caught:
        memory.check_fit("m", int(needed), int(free), device, quantization)
    assert str(caught.value) == message


def test_memory_use_follows_allocations() -> None:
    before = memory.memory_use().process
    block = bytearray(b"x") * (64 << 20)
    assert memory.memory_use().process - before > 48 << 20
    del block
    memory.release_memory()
    assert memory.memory_use().process - before < 32 << 20
    assert memory.free_bytes("cpu") > 0


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 kB"), (1500, "2 kB"), (269_060_000, "269 MB"), (999_999, "1000 kB"),
     (14.2e9, "14.2 GB"), (-2e6, "-2 MB")],
)  # fmt: skip
def test_sizes_as_text(size: float, text: str) -> None:
    assert human_bytes(size) == text
