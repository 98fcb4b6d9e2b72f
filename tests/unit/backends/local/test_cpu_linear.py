"""Linear layers that multiply in float32: which ones do, and that the results are the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llm_magic.backends.local import cpu_linear
from llm_magic.backends.local.cpu_linear import Float32Linear, use_float32_matmul
from tests.tiny_models import Architecture, tiny

TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report a CPU that has no kernel for bfloat16 and float16."""
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)


def pair(layer: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Return a layer, and a copy that multiplies in float32."""
    box = nn.Sequential(copy.deepcopy(layer))
    assert use_float32_matmul(box) == 1  # type: ignore[arg-type]
    changed = box[0]
    assert type(changed) is Float32Linear
    return layer, changed


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (8,), (1, 9), (2, 3, 4), (2, 20), (64,), (300,)])
@pytest.mark.parametrize("piece", [16, 1000, 1 << 20])
def test_result_is_that_of_float32_rounded_once(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bias: bool,
    shape: tuple[int, ...],
    piece: int,
) -> None:
    monkeypatch.setattr(cpu_linear, "_PIECE", piece)
    torch.manual_seed(0)
    usual, float32 = pair(nn.Linear(40, 50, bias=bias).to(dtype))
    given = torch.randn(*shape, 40).to(dtype)
    with torch.inference_mode():
        got, expected = float32(given), nn.Linear.forward(usual.float(), given.float())
    assert got.dtype == dtype
    assert got.shape == expected.shape
    torch.testing.assert_close(got.float(), expected.to(dtype).float(), rtol=0.02, atol=0.02)


def test_same_input_gives_the_same_output() -> None:
    _, float32 = pair(nn.Linear(64, 96).to(torch.bfloat16))
    given = torch.randn(20, 64).to(torch.bfloat16)
    with torch.inference_mode():
        first = float32(given)
        float32(torch.randn(9, 64).to(torch.bfloat16))
        assert torch.equal(first, float32(given))
        # Other rows change only the rounding of sums.
        torch.testing.assert_close(first[:10], float32(given[:10]))


def test_gradient_is_that_of_the_usual_layer() -> None:
    usual, float32 = pair(nn.Linear(16, 16).to(torch.bfloat16))
    given = torch.randn(20, 16).to(torch.bfloat16)
    float32(given).sum().backward()
    usual(given).sum().backward()
    assert float32.weight.grad is not None
    assert usual.weight.grad is not None
    assert torch.equal(float32.weight.grad, usual.weight.grad)


def test_only_layers_of_a_slow_type_are_changed() -> None:
    class Other(nn.Linear):
        """A layer of a quantized model."""

    model = nn.ModuleList([nn.Linear(8, 8), Other(8, 8).to(torch.bfloat16), nn.Embedding(8, 8)])
    assert use_float32_matmul(model) == 0  # type: ignore[arg-type]
    assert [type(m) for m in model] == [nn.Linear, Other, nn.Embedding]


def test_types_with_a_kernel_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    model = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16), nn.Linear(8, 8).to(torch.float16))
    assert use_float32_matmul(model) == 1  # type: ignore[arg-type]
    assert [type(m) for m in model] == [nn.Linear, Float32Linear]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_logits_of_a_model_are_those_of_float32(tmp_path: Path, name: Architecture) -> None:
    folder = tiny(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    ids = torch.arange(40).view(1, 40) % model.config.vocab_size
    state = set(model.state_dict())
    assert use_float32_matmul(model) > 0
    assert set(model.state_dict()) == state
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits.float(), exact(ids).logits, rtol=0.1, atol=0.1)


def test_no_layer_is_changed_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    box = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert use_float32_matmul(box) == 0  # type: ignore[arg-type]
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    monkeypatch.setattr(type(torch.ops.mkldnn), "__getattr__", object.__getattribute__)
    assert use_float32_matmul(box) == 0  # type: ignore[arg-type]


def test_default_dtype_of_a_notebook_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _, float32 = pair(nn.Linear(8, 8).to(torch.bfloat16))
        with torch.inference_mode():
            assert float32(torch.ones(20, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
