"""Linear layers in 8 and 4 bits: how exactly they store a weight, and that they multiply with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from llm_magic.backends.local import cpu_quantized
from llm_magic.backends.local.cpu_quantized import (
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    new_buffer,
    quantized_class,
    share_buffer,
)

TYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
# A model's sizes, the smallest, and several pieces with a rest.
SHAPES = [(192, 576), (64, 32), (320, 96)]


def quantized(
    kind: type[QuantizedLinear], layer: nn.Linear, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Linear, QuantizedLinear]:
    """Return a layer with the rounded weight, and the quantized layer."""
    changed = copy.deepcopy(layer).to(dtype)
    kind.quantize(changed, changed.weight)
    assert isinstance(changed, kind)
    changed.requires_grad_(False)
    usual = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    usual.load_state_dict(changed.state_dict())
    return usual, changed


@KINDS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_quantized_layer_multiplies_with_its_rounded_weight(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[QuantizedLinear],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(cpu_quantized, "_PIECE", 128 * 96)
    torch.manual_seed(0)
    usual, fast = quantized(kind, nn.Linear(shape[1], shape[0]), dtype)
    share_buffer([fast], new_buffer())
    for rows in ((), (1,), (1, 1), (2,), (3, 5, 2), (8,), (64,), (300,)):
        given = torch.randn(*rows, shape[1]).to(dtype)
        with torch.inference_mode():
            got, expected = fast(given), usual(given.float())
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.03)


@KINDS
def test_quantized_layer_on_a_cpu_without_bfloat16(
    monkeypatch: pytest.MonkeyPatch, kind: type[QuantizedLinear]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    usual, fast = quantized(kind, nn.Linear(64, 64))
    given = torch.randn(64, 64).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(fast(given).float(), usual(given.float()), rtol=0.02, atol=0.03)


@KINDS
def test_codes_are_the_nearest(kind: type[QuantizedLinear]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[0] = 0
    weight[1] *= 1000
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(weight.bfloat16())
    usual, _ = quantized(kind, layer)
    if kind is Int8Linear:
        step = weight.abs().amax(1, keepdim=True) / 127
    else:
        groups = weight.view(64, 2, 32)
        step = ((groups.amax(2) - groups.amin(2)) / 15).repeat_interleave(32, 1)
    # Half a step, and what bfloat16 rounds.
    assert bool(((usual.weight - weight).abs() <= 0.55 * step + weight.abs() / 128).all())
    assert not usual.weight[0].any()


@KINDS
def test_state_of_a_quantized_layer_is_the_usual_one(kind: type[QuantizedLinear]) -> None:
    usual, fast = quantized(kind, nn.Linear(64, 128))
    assert list(fast.state_dict()) == ["bias", "weight"]
    assert torch.equal(fast.weight.float(), usual.weight)
    size = 64 * 128 * (1 if kind is Int8Linear else 0.625) + (256 if kind is Int8Linear else 0)
    assert sum(p.nbytes for p in fast.parameters()) == size + 256
    other = nn.Linear(64, 128)
    fast.load_state_dict(other.state_dict())
    assert type(fast) is nn.Linear
    assert torch.equal(fast.weight, other.weight.bfloat16())


@KINDS
def test_quantized_layer_of_another_type_is_a_usual_one(kind: type[QuantizedLinear]) -> None:
    usual, fast = quantized(kind, nn.Linear(64, 64))
    assert type(nn.Sequential(fast).float()[0]) is nn.Linear
    assert torch.equal(fast.weight, usual.weight)


@KINDS
def test_gradient_of_the_input_of_a_quantized_layer_is_the_usual_one(
    kind: type[QuantizedLinear],
) -> None:
    usual, fast = quantized(kind, nn.Linear(64, 64))
    given = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
    fast(given).sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad[0].float(), usual.weight.sum(0), rtol=0.02, atol=0.02)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
        fast(torch.zeros(1, 64, dtype=torch.float16))


@KINDS
@pytest.mark.parametrize(
    ("shape", "fits"),
    [((64, 32), True), ((50, 64), False), ((64, 40), False)],
)
def test_shapes_that_the_kernels_multiply(
    kind: type[QuantizedLinear], shape: tuple[int, int], fits: bool
) -> None:
    assert kind.fits(*shape) is fits


@pytest.fixture
def other_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Check the operators of torch anew, before and after a test that replaces them."""
    with monkeypatch.context() as patch:
        quantized_class.cache_clear()
        yield patch
    quantized_class.cache_clear()


@pytest.mark.parametrize("missing", [True, False])
def test_nothing_is_quantized_where_a_kernel_is_missing_or_wrong(
    other_kernels: pytest.MonkeyPatch, missing: bool
) -> None:
    assert (quantized_class("8bit"), quantized_class("4bit")) == (Int8Linear, Int4Linear)
    quantized_class.cache_clear()
    if missing:
        other_kernels.delattr(torch, "_weight_int8pack_mm")
    else:
        other_kernels.setattr(
            torch, "_weight_int8pack_mm", lambda rows, codes, _: rows @ codes.to(rows.dtype).T
        )
    assert (quantized_class("8bit"), quantized_class("4bit")) == (None, None)


def test_4_bits_in_an_unknown_order_are_multiplied_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_quantized, "_half_block", lambda: None)
    usual, fast = quantized(Int4Linear, nn.Linear(64, 128))
    given = torch.randn(70, 64).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(fast(given).float(), usual(given.float()), rtol=0.02, atol=0.03)
    monkeypatch.undo()
    # The kernel rounds in another order.
    torch.testing.assert_close(fast.weight.float(), usual.weight, rtol=0.01, atol=0.001)
