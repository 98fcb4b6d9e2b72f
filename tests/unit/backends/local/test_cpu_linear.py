"""Linear layers on a CPU: which ones are changed, and that the results are the same."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from llm_magic.backends.local import cpu_linear
from llm_magic.backends.local.cpu_linear import Bfloat16Linear, Float32Linear, optimize
from llm_magic.backends.local.fused_linear import FusedLinear
from tests.tiny_models import Architecture, tiny

TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Report a CPU that has no kernel for bfloat16 and float16."""
    with monkeypatch.context() as patch:
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            patch.setattr(torch.ops.mkldnn, name, lambda: False)
        cpu_linear.can_pack.cache_clear()
        yield
    cpu_linear.can_pack.cache_clear()


def pair(layer: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Return a layer, and a copy that multiplies in float32."""
    box = nn.Sequential(copy.deepcopy(layer))
    assert optimize(box) == 1
    changed = box[0]
    assert type(changed) is Float32Linear
    return layer, changed


@pytest.mark.usefixtures("old_cpu")
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


@pytest.mark.usefixtures("old_cpu")
def test_same_input_gives_the_same_output() -> None:
    _, float32 = pair(nn.Linear(64, 96).to(torch.bfloat16))
    given = torch.randn(20, 64).to(torch.bfloat16)
    with torch.inference_mode():
        first = float32(given)
        float32(torch.randn(9, 64).to(torch.bfloat16))
        assert torch.equal(first, float32(given))
        # Other rows change only the rounding of sums.
        torch.testing.assert_close(first[:10], float32(given[:10]))


@pytest.mark.usefixtures("old_cpu")
def test_gradient_is_that_of_the_usual_layer() -> None:
    usual, float32 = pair(nn.Linear(16, 16).to(torch.bfloat16))
    given = torch.randn(20, 16).to(torch.bfloat16)
    float32(given).sum().backward()
    usual(given).sum().backward()
    assert float32.weight.grad is not None
    assert usual.weight.grad is not None
    assert torch.equal(float32.weight.grad, usual.weight.grad)


@pytest.mark.usefixtures("old_cpu")
def test_only_layers_of_a_slow_type_are_changed() -> None:
    class Other(nn.Linear):
        """A layer of a quantized model."""

    model = nn.ModuleList([nn.Linear(8, 8), Other(8, 8).to(torch.bfloat16), nn.Embedding(8, 8)])
    assert optimize(model) == 0
    assert [type(m) for m in model] == [nn.Linear, Other, nn.Embedding]


def test_types_with_a_kernel_are_not_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    monkeypatch.setattr(cpu_linear, "can_pack", lambda: False)
    model = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16), nn.Linear(8, 8).to(torch.float16))
    assert optimize(model) == 1
    assert [type(m) for m in model] == [nn.Linear, Float32Linear]


@pytest.mark.usefixtures("old_cpu")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_logits_of_a_model_are_those_of_float32(tmp_path: Path, name: Architecture) -> None:
    folder = tiny(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    ids = torch.arange(40).view(1, 40) % model.config.vocab_size
    state = set(model.state_dict())
    assert optimize(model) > 0
    assert set(model.state_dict()) == state
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits.float(), exact(ids).logits, rtol=0.1, atol=0.1)


def test_no_layer_is_changed_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    box = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert optimize(box) == 0
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    monkeypatch.setattr(type(torch.ops.mkldnn), "__getattr__", object.__getattribute__)
    assert optimize(box) == 0


@pytest.mark.usefixtures("old_cpu")
def test_default_dtype_of_a_notebook_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _, float32 = pair(nn.Linear(8, 8).to(torch.bfloat16))
        with torch.inference_mode():
            assert float32(torch.ones(20, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


# --- packed layers: in float32, whose operators every CPU with oneDNN has ---


def packed(layer: nn.Linear) -> tuple[nn.Linear, Bfloat16Linear]:
    """Return a layer, and a packed copy."""
    changed = Bfloat16Linear.convert(copy.deepcopy(layer))
    changed.pack()
    return layer, changed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 1), (7,), (1, 9), (2, 3, 4), (64,), (300,)])
def test_packed_layer_gives_the_result_of_the_usual_one(bias: bool, shape: tuple[int, ...]) -> None:
    usual, fast = packed(nn.Linear(40, 50, bias=bias))
    given = torch.randn(*shape, 40)
    with torch.inference_mode():
        torch.testing.assert_close(fast(given), usual(given))


def test_state_of_a_packed_layer_is_the_usual_one() -> None:
    usual, fast = packed(nn.Linear(40, 50))
    state = fast.state_dict()
    assert list(state) == ["weight", "bias"]
    assert all(torch.equal(state[name], value) for name, value in usual.state_dict().items())
    assert [p.numel() for p in fast.parameters()] == [2000, 50]
    assert sum(p.nbytes for p in fast.parameters()) == 4 * 2050


def test_packed_layer_that_loads_a_state_is_a_usual_one_with_it() -> None:
    usual, fast = packed(nn.Linear(8, 8))
    other = nn.Linear(8, 8)
    fast.load_state_dict(other.state_dict())
    assert type(fast) is nn.Linear
    assert torch.equal(fast.weight, other.weight)
    assert not torch.equal(fast.weight, usual.weight)


def test_packed_layer_of_another_type_is_a_usual_one() -> None:
    usual, fast = packed(nn.Linear(8, 8))
    assert type(nn.Sequential(fast).double()[0]) is nn.Linear
    assert torch.equal(fast.weight, usual.double().weight)


def test_input_of_another_type_is_the_error_of_the_usual_layer() -> None:
    _, fast = packed(nn.Linear(8, 8))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
        fast(torch.zeros(1, 8, dtype=torch.float16))


def test_gradient_of_the_input_of_a_packed_layer_is_the_usual_one() -> None:
    usual, fast = packed(nn.Linear(8, 8))
    first, second = (torch.ones(3, 8, requires_grad=True) for _ in range(2))
    usual(first).sum().backward()
    fast(second).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert torch.equal(first.grad, second.grad)


# --- which layers are packed ---


class ReadsAWeight(nn.Module):
    """A model that reads the weight of a layer, as some attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.embedding = nn.Embedding(10, 8, dtype=torch.bfloat16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.embedding(input_ids)) @ self.layer.weight
        return out


def test_model_that_reads_a_weight_itself_has_the_same_results_in_both_layouts() -> None:
    model, token = ReadsAWeight(), torch.zeros((1, 1), dtype=torch.long)
    with torch.inference_mode():
        expected = model(token)
        fast = Bfloat16Linear.convert(model.layer)
        for change in (fast.pack, fast.unpack):
            change()
            torch.testing.assert_close(model(token), expected)


# --- when the layout of a weight changes ---


def multiply(layer: nn.Module, rows: int, times: int = 1) -> torch.Tensor:
    with torch.inference_mode():
        for _ in range(times):
            out: torch.Tensor = layer(torch.ones(rows, 8))
    return out


def test_weight_is_packed_while_several_rows_are_multiplied() -> None:
    usual = nn.Linear(8, 8)
    fast = Bfloat16Linear.convert(copy.deepcopy(usual))
    # A long prompt is as fast in both layouts, and a short one alone is no reason.
    for rows, times, is_packed in [
        *((1, 200, False), (300, 200, False), (40, 1, False), (1, 2, False)),
        *((32, 70, True), (300, 200, True), (1, 5, True), (32, 5, True), (2, 70, False)),
    ]:
        torch.testing.assert_close(multiply(fast, rows, times), multiply(usual, rows))
        assert next(fast.parameters()).is_mkldnn is is_packed, (rows, times)
        assert torch.equal(fast.state_dict()["weight"], usual.weight)


def test_layers_of_a_model_do_not_all_change_in_the_same_step() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))
    for layer in model:
        Bfloat16Linear.convert(cast("nn.Linear", layer))
    counts: list[int] = []
    while not counts or counts[-1] < len(model):
        multiply(model, 4)
        counts.append(sum(weight.is_mkldnn for weight in model.parameters()))
        assert len(counts) < 100
    assert max(after - before for before, after in itertools.pairwise(counts)) <= 2


def test_tied_weight_stays_the_one_of_the_embedding() -> None:
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embedding.weight
    fast = Bfloat16Linear.convert(head, is_tied=True)
    fast.pack()
    assert not embedding.weight.is_mkldnn
    multiply(fast, 1, 70)
    assert next(fast.parameters()) is embedding.weight


def test_fused_layers_have_one_copy_of_their_weights_in_both_layouts() -> None:
    layers = [nn.Linear(8, count, bias=False) for count in (8, 4, 4)]
    model = nn.ModuleList(copy.deepcopy(layers))
    whole = Bfloat16Linear.joined([cast("nn.Linear", layer) for layer in model])
    FusedLinear.fuse([cast("nn.Linear", layer) for layer in model], whole)
    for rows, is_packed in [(1, False), (4, True), (1, False)]:
        given = torch.ones(rows, 8)
        with torch.inference_mode():
            for _ in range(70):
                results = [layer(given) for layer in model]
            for result, usual in zip(results, layers, strict=True):
                torch.testing.assert_close(result, usual(given))
        (weight,) = model.parameters()
        assert weight.is_mkldnn is is_packed
        assert weight.numel() == 8 * 16


@pytest.mark.parametrize(
    ("own", "has_amx", "is_used"),
    [(0.5, False, True), (1.2, False, True), (2.0, False, False), (0.5, True, False)],
)
def test_own_kernel_is_used_without_amx_unless_it_is_much_slower(
    monkeypatch: pytest.MonkeyPatch, own: float, has_amx: bool, is_used: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    clock = itertools.accumulate(itertools.cycle((0, own, 0, 1)))  # by turns
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    cpu_linear.has_fast_own_kernel.cache_clear()
    try:
        assert cpu_linear.has_fast_own_kernel() is is_used
    finally:
        cpu_linear.has_fast_own_kernel.cache_clear()


def test_own_kernel_leaves_the_flag_of_onednn_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    try:
        for state in (False, True):
            onednn.enabled = state
            cpu_linear.has_fast_own_kernel.cache_clear()
            cpu_linear.has_fast_own_kernel()
            assert onednn.enabled is state
    finally:
        onednn.enabled = before
        cpu_linear.has_fast_own_kernel.cache_clear()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_changed_model_has_the_logits_and_the_state_of_the_usual_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: Architecture, own: bool
) -> None:
    monkeypatch.setattr(cpu_linear, "has_fast_own_kernel", lambda: own)
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path, name), dtype=torch.bfloat16)
    usual = copy.deepcopy(model)
    ids = torch.arange(40).view(1, 40) % model.config.vocab_size
    optimize(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds == ({Bfloat16Linear, FusedLinear} if cpu_linear.can_pack() else {Float32Linear})
    embedding = model.get_input_embeddings().weight
    assert embedding.layout is torch.strided
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in usual.state_dict().items())
    with torch.inference_mode():
        for rows in (ids, ids[:, :1]):
            torch.testing.assert_close(model(rows).logits, usual(rows).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("max_bytes", [0, 1 << 24])
def test_large_weights_stay_in_the_memory_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, max_bytes: int
) -> None:
    monkeypatch.setattr(cpu_linear, "_MAX_FUSED_BYTES", max_bytes)
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path, "llama"), dtype=torch.bfloat16)
    before = {parameter.data_ptr() for parameter in model.parameters()}
    optimize(model)
    after = {parameter.data_ptr() for parameter in model.parameters()}
    if max_bytes and cpu_linear.can_pack():
        assert not before & after
    else:
        assert before == after


def test_mapped_file_is_freed_when_all_weights_are_packed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_linear, "_MAX_FUSED_BYTES", 0)
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path, "llama"), dtype=torch.bfloat16)
    before = {parameter.data_ptr() for parameter in model.parameters()}
    if optimize(model) == 0:
        pytest.skip("this CPU packs no weights")
    ids = torch.ones((1, 4), dtype=torch.long)
    with torch.inference_mode():
        for _ in range(70):
            model(ids)
    left = [p for p in model.parameters() if not p.is_mkldnn]
    assert len(left) < len(before)
    assert not before & {parameter.data_ptr() for parameter in left}


class _Products(TorchDispatchMode):
    """Counts the products of weights."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(func) for name in ("linear", "addmm", "aten.mm."))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("own", [False, True])
def test_load_reads_no_weight_to_check_that_a_model_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: bool
) -> None:
    monkeypatch.setattr(cpu_linear, "has_fast_own_kernel", lambda: own)
    cpu_linear.can_pack()
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path, "llama"), dtype=torch.bfloat16)
    with _Products() as products:  # type: ignore[no-untyped-call]
        optimize(model)
    assert products.count == 0
    with torch.inference_mode(), _Products() as products:  # type: ignore[no-untyped-call]
        model(torch.ones((1, 1), dtype=torch.long))
    assert products.count > 0


def test_weights_that_are_not_packed_are_not_copied(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path, "llama"), dtype=torch.bfloat16)
    before = {parameter.data_ptr() for parameter in model.parameters()}
    optimize(model, pack=False)
    assert {parameter.data_ptr() for parameter in model.parameters()} == before


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_layers_stay_as_they_are_where_torch_cannot_pack(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.delattr(torch.ops.mkldnn, missing)
    monkeypatch.setattr(type(torch.ops.mkldnn), "__getattr__", object.__getattribute__)
    cpu_linear.can_pack.cache_clear()
    box = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16))
    try:
        assert optimize(box) == 0
    finally:
        cpu_linear.can_pack.cache_clear()
    assert type(box[0]) is nn.Linear
