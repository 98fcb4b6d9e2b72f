"""Layers that read many tokens in float32: when they do, and that they say the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llm_magic.backends.local import cpu_linear
from llm_magic.backends.local.cpu_linear import WideLinear, widen
from tests.tiny_models import Architecture, tiny

TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine can, it shall be one that multiplies no type but float32."""
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)


def pair(layer: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Return a layer as it was, and as one that widens."""
    box = nn.Sequential(copy.deepcopy(layer))
    assert widen(box) == 1  # type: ignore[arg-type]
    wide = box[0]
    assert type(wide) is WideLinear
    return layer, wide


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (8,), (1, 9), (2, 3, 4), (2, 20), (64,), (300,)])
@pytest.mark.parametrize("piece", [16, 1000, 1 << 20])
def test_it_multiplies_as_float32_does_and_rounds_once(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bias: bool,
    shape: tuple[int, ...],
    piece: int,
) -> None:
    monkeypatch.setattr(cpu_linear, "_PIECE", piece)
    torch.manual_seed(0)
    usual, wide = pair(nn.Linear(40, 50, bias=bias).to(dtype))
    given = torch.randn(*shape, 40).to(dtype)
    with torch.inference_mode():
        got, known = wide(given), nn.Linear.forward(usual.float(), given.float())
    assert got.dtype == dtype
    assert got.shape == known.shape
    torch.testing.assert_close(got.float(), known.to(dtype).float(), rtol=0.02, atol=0.02)


def test_the_same_input_gives_the_same_output() -> None:
    _, wide = pair(nn.Linear(64, 96).to(torch.bfloat16))
    given = torch.randn(20, 64).to(torch.bfloat16)
    with torch.inference_mode():
        first = wide(given)
        wide(torch.randn(9, 64).to(torch.bfloat16))
        assert torch.equal(first, wide(given))
        # Each row by itself: what else is asked changes nothing but the rounding of sums.
        torch.testing.assert_close(first[:10], wide(given[:10]))


def test_a_gradient_can_still_be_taken() -> None:
    usual, wide = pair(nn.Linear(16, 16).to(torch.bfloat16))
    given = torch.randn(20, 16).to(torch.bfloat16)
    wide(given).sum().backward()
    usual(given).sum().backward()
    assert wide.weight.grad is not None
    assert usual.weight.grad is not None
    assert torch.equal(wide.weight.grad, usual.weight.grad)


def test_only_layers_of_a_slow_type_are_changed() -> None:
    class Other(nn.Linear):
        """What a quantisation puts there."""

    model = nn.ModuleList([nn.Linear(8, 8), Other(8, 8).to(torch.bfloat16), nn.Embedding(8, 8)])
    assert widen(model) == 0  # type: ignore[arg-type]
    assert [type(m) for m in model] == [nn.Linear, Other, nn.Embedding]


def test_a_cpu_that_can_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    model = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16), nn.Linear(8, 8).to(torch.float16))
    assert widen(model) == 1  # type: ignore[arg-type]
    assert [type(m) for m in model] == [nn.Linear, WideLinear]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_a_whole_model_says_what_it_says_in_float32(tmp_path: Path, name: Architecture) -> None:
    folder = tiny(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    ids = torch.arange(40).view(1, 40) % model.config.vocab_size
    state = set(model.state_dict())
    assert widen(model) > 0
    assert set(model.state_dict()) == state
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits.float(), exact(ids).logits, rtol=0.1, atol=0.1)


def test_without_onednn_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    box = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert widen(box) == 0  # type: ignore[arg-type]
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    monkeypatch.setattr(type(torch.ops.mkldnn), "__getattr__", object.__getattribute__)
    assert widen(box) == 0  # type: ignore[arg-type]


def test_the_defaults_of_a_notebook_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _, wide = pair(nn.Linear(8, 8).to(torch.bfloat16))
        with torch.inference_mode():
            assert wide(torch.ones(20, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
