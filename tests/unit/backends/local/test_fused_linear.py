"""Fused linear layers have the results, the state and the memory of the usual ones."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llm_magic.backends.local.cpu_linear import Bfloat16Linear, can_pack, optimize
from llm_magic.backends.local.cpu_quantized import Int4Linear, Int8Linear, QuantizedLinear
from llm_magic.backends.local.fused_linear import FusedLinear, fuse
from tests.tiny_models import tiny

Store = Callable[[nn.Linear], None]


def store_int8(layer: nn.Linear) -> None:
    """Store the weight of a layer in 8 bits."""
    Int8Linear.quantize(layer, layer.weight)


def store_int4(layer: nn.Linear) -> None:
    """Store the weight of a layer in 4 bits."""
    Int4Linear.quantize(layer, layer.weight)


def fused(
    *sizes: int, bias: bool = False, store: Store | None = None
) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Return layers of some numbers of outputs, and fused copies of the same weights."""
    dtype = torch.float32 if store is None else torch.bfloat16
    usual = [nn.Linear(64, size, bias=bias, dtype=dtype) for size in sizes]
    if store is not None:
        for layer in usual:
            store(layer)
    changed = copy.deepcopy(usual)
    join = Bfloat16Linear.joined if store is None else QuantizedLinear.joined
    FusedLinear.fuse(changed, join(changed))
    return usual, changed


@pytest.mark.parametrize("store", [None, store_int8, store_int4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (2, 3, 4), (300,)])
def test_fused_layers_give_the_results_of_the_usual_ones(
    store: Store | None, bias: bool, shape: tuple[int, ...]
) -> None:
    usual, fast = fused(192, 64, 64, bias=bias, store=store)
    given = torch.randn(*shape, 64).to(torch.float32 if store is None else torch.bfloat16)
    with torch.inference_mode():
        for exact, layer in zip(usual, fast, strict=True):
            torch.testing.assert_close(layer(given), exact(given))


def test_fused_layers_may_be_called_in_any_order_with_any_input() -> None:
    usual, fast = fused(192, 64, 64)
    first, second = torch.randn(3, 64), torch.randn(3, 64)
    calls = [(2, first), (0, first), (1, second), (0, second), (2, second), (1, second), (0, first)]
    with torch.inference_mode():
        for index, given in calls:
            torch.testing.assert_close(fast[index](given), usual[index](given))
        # Changed in place, and given to the first layer again: it computes again.
        first.mul_(2)
        for index in range(3):
            torch.testing.assert_close(fast[index](first), usual[index](first))


def test_fused_layers_keep_no_input_after_the_last_one() -> None:
    _, fast = fused(192, 64)
    given = torch.randn(3, 64)
    reference = weakref.ref(given)
    with torch.inference_mode():
        fast[0](given)
        fast[1](given)
    del given
    assert reference() is None


def test_fused_layers_are_freed_without_a_garbage_collection() -> None:
    _, fast = fused(192, 64)
    references = [weakref.ref(layer) for layer in fast]
    gc.disable()
    try:
        fast.clear()
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("store", [None, store_int8, store_int4])
@pytest.mark.parametrize("bias", [False, True])
def test_state_of_fused_layers_is_the_usual_one(store: Store | None, bias: bool) -> None:
    usual, fast = map(nn.ModuleList, fused(192, 64, bias=bias, store=store))
    state = fast.state_dict()
    assert list(state) == list(usual.state_dict())
    assert all(torch.equal(state[name], value) for name, value in usual.state_dict().items())
    # No weight is in memory twice.
    assert sum(p.nbytes for p in fast.parameters()) == sum(p.nbytes for p in usual.parameters())


@pytest.mark.parametrize("changed", [0, 1])
def test_fused_layers_that_load_a_state_are_usual_ones_with_it(changed: int) -> None:
    usual, fast = fused(192, 64)
    usual[changed].reset_parameters()
    fast[changed].load_state_dict(usual[changed].state_dict())
    for layer, expected in zip(fast, usual, strict=True):
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, expected.weight)


def test_fused_layers_of_another_type_are_usual_ones() -> None:
    usual, fast = fused(192, 64)
    nn.Sequential(*fast).double()
    for layer, expected in zip(fast, usual, strict=True):
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, expected.weight.double())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("store", [None, store_int8])
def test_weight_and_bias_of_fused_layers_can_be_read(store: Store | None, bias: bool) -> None:
    for exact, layer in zip(*fused(192, 64, bias=bias, store=store), strict=True):
        assert torch.equal(layer.weight, exact.weight)
        assert (layer.bias is None) is not bias
        assert not bias or torch.equal(layer.bias, exact.bias)


# --- which layers are fused ---


def test_layers_of_a_known_architecture_are_fused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path, "llama"), dtype=torch.bfloat16)
    optimize(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    group = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    assert all(isinstance(layer, FusedLinear) for layer in group) is can_pack()
    assert not isinstance(attention.o_proj, FusedLinear)


class Attention(nn.Module):
    """A module of an architecture that is not known, with the names of one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))


def test_layers_of_other_architectures_are_not_fused() -> None:
    model = Attention()
    fuse(model, [model.q_proj, model.k_proj, model.v_proj], Bfloat16Linear.joined)
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
