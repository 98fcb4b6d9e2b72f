"""Linear layers in the form that a CPU multiplies fastest.

With AVX512 or AMX, oneDNN has a kernel for bfloat16. It reads a weight in blocks of its own layout, and
reorders a usual matrix in every product: several rows take 0.6 to 0.9 of the time if the weight is
stored in that layout. For a single row, torch has a kernel of its own for the usual layout. Without AMX,
it takes 0.5 to 0.7 of the time of oneDNN's in either; with AMX, 1.2 times that of oneDNN's for the usual
one. `Bfloat16Linear` stores the weight as the rows need it that it gets; the numbers are the same. Layers
with the same input are fused, see `fused_linear`.

With AMX, oneDNN's product of a single row takes 0.85 to 1 of the time with a packed weight. To pack all at
the load would take three times as long as the rest of it, and later, a long prompt would round differently.

Without them (most laptops), oneDNN has no kernel for bfloat16 and float16: torch's own is good for
single rows, but for several rows it is a loop that takes 4 to 8 times as long as converting the weights
piece by piece and multiplying in float32, as `Float32Linear` does. The stored weights stay as they are,
and results are rounded to their type, as other CPUs do it.

Beside `cpu_quantized` this is the only module that uses operators of torch that are not public API.
`can_pack` checks those that pack; without them, layers stay as they are.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llm_magic.backends.local.fused_linear import ConvertedLinear, FusedLinear, fuse

_log = logging.getLogger(__name__)
# The number of rows from which on it is faster (AVX2, matrices from 192 x 576 to 4096 x 4096).
_MIN_ROWS = 8
# With so many rows, MKL is 10 to 25 % faster with the transposed product (measured with 16 and 32
# rows); it is as much slower below, and no faster above.
_TRANSPOSED_ROWS = range(16, 65)
# The numbers that are converted at a time: 4 MB, which stay in a core's cache and one allocation.
_PIECE = 1 << 20
# From so many rows on, both layouts of a weight take about as long: they are no reason to change it.
MANY_ROWS = 128
# A layer changes its layout after so many products for which the other one would have been faster.
# Their loss is about the time of the change. Layers wait differently long, so that no single step has
# to wait for all of them.
_PATIENCE = 32
_extra_patience = itertools.cycle(range(_PATIENCE))
# Larger weights with one input are not fused: that gains nothing, and copies what is mapped from the file.
_MAX_FUSED_BYTES = 1 << 24
# Up to so many rows, a usual weight is used as it is.
_FEW_ROWS = 2
# torch's own kernel is used for them unless it takes this many times as long as oneDNN's: old versions
# have a slow one. Where it is good, it is faster on idle CPUs only, so that a load beside others must not
# decide. Found out with a matrix of this shape (64 MB, more than a cache).
_TOO_SLOW, _TIMED_SHAPE, _TIMED_ROUNDS = 1.5, (8192, 4096), 3


def optimize(model: nn.Module, *, pack: bool = True) -> int:
    """Change the linear layers of a model that a CPU multiplies faster; returns how many.

    Without `pack`, no weight is packed. While a head that is tied to the embedding is packed, it is a
    second copy.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    changed = [m for m in layers if m.weight.dtype == torch.bfloat16] if pack and can_pack() else []
    if changed and not _convert(model, changed):
        changed = []
    if any(isinstance(m, FusedLinear) for m in changed):
        copy_mapped_weights(
            own_parameters(m for m in model.modules() if type(m) is not FusedLinear)
        )
    slow = [m for m in layers if type(m) is nn.Linear and has_kernel(m.weight.dtype) is False]
    return len(changed) + _use_float32_matmul(slow)


def _convert(model: nn.Module, layers: list[nn.Linear]) -> bool:
    """Fuse and convert layers; returns False, with all as before, if the model does not run so."""
    fuse(model, layers, Bfloat16Linear.joined, _MAX_FUSED_BYTES)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    tied = getattr(embedding, "weight", None)
    left = [layer for layer in layers if type(layer) is nn.Linear]
    weights, others = {layer.weight for layer in left} - {tied}, list[nn.Parameter]()
    if len(left) == len(layers):
        others += [parameter for parameter in model.parameters() if parameter not in weights]
    for layer in left:
        Bfloat16Linear.convert(layer, is_tied=layer.weight is tied, others=others)
    if _runs(model):
        return True
    for layer in layers:
        # Restoring one of a fused group restores all of them.
        if isinstance(layer, ConvertedLinear):
            layer.restore()
    return False


def own_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters of modules, without those of the modules in them."""
    for module in modules:
        yield from module.parameters(recurse=False)


def copy_mapped_weights(parameters: Iterable[nn.Parameter]) -> None:
    """Copy the weights that are left: one part of a mapped file keeps all of it in memory."""
    with torch.inference_mode(mode=False):
        # Each once: an output head may be the input embedding.
        for parameter in dict.fromkeys(parameters):
            parameter.data = parameter.data.clone()


@functools.cache
def can_pack() -> bool:
    """Return whether torch has the operators of `Bfloat16Linear` on this CPU, and they are correct.

    Uses `mkldnn._reorder_linear_weight` and `mkldnn._linear_pointwise`, which Inductor uses.
    """
    if not has_kernel(torch.bfloat16):
        return False
    layer = nn.Linear(32, 16, dtype=torch.bfloat16, device="cpu")
    rows = torch.linspace(-1, 1, 3 * 32, dtype=torch.bfloat16, device="cpu").view(3, 32)
    try:
        with torch.inference_mode():
            expected, state = layer(rows), {k: v.clone() for k, v in layer.state_dict().items()}
            Bfloat16Linear.convert(layer).pack()
            same = all(
                torch.equal(layer.state_dict()[name], value) for name, value in state.items()
            )
            return same and torch.allclose(layer(rows), expected, rtol=0.02, atol=0.02)
    except (AttributeError, TypeError, RuntimeError):
        return False


@functools.cache
def has_fast_own_kernel() -> bool:
    """Return whether torch's own kernel is used for few rows: not with AMX, nor where it is slow.

    The latter is measured.
    """
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    if capabilities().get("amx_bf16"):
        return False
    weight = torch.ones(_TIMED_SHAPE, dtype=torch.bfloat16, device="cpu")
    row = weight[:1]
    own, onednn = math.inf, math.inf
    try:
        with torch.inference_mode():
            for _ in range(_TIMED_ROUNDS):
                own = min(own, _seconds(_own_product, row, weight))
                onednn = min(onednn, _seconds(nn.functional.linear, row, weight))
    except RuntimeError:  # the flags of torch are frozen
        return False
    return own < _TOO_SLOW * onednn


def _seconds(product: Callable[..., torch.Tensor], *operands: torch.Tensor) -> float:
    began = time.perf_counter()
    product(*operands, None)
    return time.perf_counter() - began


def _own_product(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return ``input @ weight.T + bias`` by torch's own kernel.

    The flag belongs to the process: meanwhile products of other threads are not done by oneDNN either.
    """
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    onednn.enabled = False
    try:
        return nn.functional.linear(input, weight, bias)
    finally:
        onednn.enabled = before


class _WithoutProducts(TorchFunctionMode):
    """Replaces the results of linear layers with zeros: nothing reads their weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replaced = _no_product if func is nn.functional.linear else func
        return replaced(*args, **(kwargs or {}))


def _no_product(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return input.new_zeros((*input.shape[:-1], len(weight)))


def _runs(model: nn.Module) -> bool:
    """Return whether a model computes with converted layers; one that changes a weight does not."""
    token = torch.zeros((1, 1), dtype=torch.long, device="cpu")
    try:
        with torch.inference_mode(), _WithoutProducts():
            model(input_ids=token)
    except Exception:  # noqa: BLE001 - whatever it raises, it runs without them
        _log.info("%s does not run with packed weights", type(model).__name__, exc_info=True)
        return False
    return True


def has_kernel(dtype: torch.dtype) -> bool | None:
    """Return whether oneDNN has a kernel for a type on this CPU; None where it cannot be asked."""
    # The same operators as in Inductor.
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    is_supported = getattr(torch.ops.mkldnn, names.get(dtype, ""), None)
    # Not measured without oneDNN (Apple's processors).
    if is_supported is None or not torch.backends.mkldnn.is_available():
        return None
    return bool(is_supported())


class Bfloat16Linear(ConvertedLinear):
    """A linear layer whose weight is packed while it multiplies several rows; its state is the usual one.

    Attributes:
        multiply: The operator for a packed weight.
        tied: The weight that it shares with the embedding, which stays as it is.
        patience: After how many products for which the other layout would have been faster it changes.
        misses: How many there were lately.
        others: What is still to be copied when a layer is packed: the parameters of the model that are
            not. Its layers share the list.
    """

    multiply: Callable[..., torch.Tensor]
    tied: nn.Parameter | None
    patience: int
    misses: int
    others: list[nn.Parameter]

    @staticmethod
    def convert(
        layer: nn.Linear, *, is_tied: bool = False, others: list[nn.Parameter] | None = None
    ) -> Bfloat16Linear:
        """Change a usual layer into one of these; returns it."""
        # Set like this they are not in the state of the model.
        layer.__dict__ |= {
            "multiply": torch.ops.mkldnn._linear_pointwise.default,
            "tied": layer.weight if is_tied else None,
            "patience": _PATIENCE + next(_extra_patience),
            "misses": 0,
            "others": [] if others is None else others,
        }
        layer.__class__ = Bfloat16Linear
        return cast("Bfloat16Linear", layer)

    @staticmethod
    def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
        """Return a layer with the rows of several usual ones."""
        first, count = layers[0], sum(layer.out_features for layer in layers)
        whole = nn.Linear(first.in_features, count, bias=False, device="meta")
        whole.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), False)
        if first.bias is not None:
            whole.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), False)
        Bfloat16Linear.convert(whole)
        return whole

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The usual weight. Each access to a packed one converts it."""
        stored = self._stored
        return stored.to_dense() if stored.is_mkldnn else stored

    @property
    def _stored(self) -> nn.Parameter:
        stored = self._parameters["weight"]
        assert stored is not None
        return stored

    def pack(self) -> None:
        """Store the weight in the layout of oneDNN."""
        # Here, so that no load waits for it.
        copy_mapped_weights(self.others)
        self.others.clear()
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 1)
        self._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
        self.__dict__["misses"] = 0

    def unpack(self) -> None:
        """Store the weight in the usual layout."""
        usual = nn.Parameter(self.weight, requires_grad=False) if self.tied is None else self.tied
        self._parameters["weight"] = usual
        self.__dict__["misses"] = 0

    def restore(self) -> None:
        """Change it back into a usual layer."""
        self.unpack()
        for name in ("multiply", "tied", "patience", "misses", "others"):
            del self.__dict__[name]
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ weight.T + bias``; `input` is of shape (…, in_features)."""
        weight = self._parameters["weight"]
        assert weight is not None
        if input.dtype != weight.dtype or (torch.is_grad_enabled() and input.requires_grad):
            # The operator has no gradient, and no check of types.
            return nn.functional.linear(input, self.weight, self.bias)
        rows = input.numel() // self.in_features
        if rows < MANY_ROWS:
            weight = self._adapted(weight, rows)
        if weight.is_mkldnn:
            return self.multiply(input, weight, self.bias, "none", [], "")
        is_own = rows <= _FEW_ROWS and has_fast_own_kernel()
        product = _own_product if is_own else nn.functional.linear
        return product(input, weight, self.bias)

    def _adapted(self, weight: nn.Parameter, rows: int) -> nn.Parameter:
        """Change the layout of the weight if it is time; returns the weight that is stored then."""
        is_packed = weight.is_mkldnn
        if (rows > _FEW_ROWS) is is_packed:
            if self.misses:
                self.__dict__["misses"] -= 1
            return weight
        self.__dict__["misses"] += 1
        if self.misses >= self.patience:
            if is_packed:
                self.unpack()
            else:
                self.pack()
        return self._stored

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()


def _use_float32_matmul(layers: list[nn.Linear]) -> int:
    # Device and type explicitly: a notebook may have set other defaults.
    buffer = torch.empty(_PIECE if layers else 0, dtype=torch.float32, device="cpu")
    for layer in layers:
        layer.__class__ = Float32Linear
        # Set like this they are not in the state of the model.
        layer.__dict__ |= {"buffer": buffer, "min_numel": _MIN_ROWS * layer.in_features}
    return len(layers)


class Float32Linear(nn.Linear):
    """A linear layer that multiplies several rows in float32; its output has its weights' type."""

    buffer: torch.Tensor
    min_numel: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ weight.T + bias``; `input` is of shape (…, in_features)."""
        # The cheapest test comes first: a model calls this 200 times a token.
        if input.numel() < self.min_numel or input.dtype != self.weight.dtype:
            return nn.functional.linear(input, self.weight, self.bias)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            # A gradient would need the buffer, which the next layer overwrites.
            return nn.functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features).float()
        out = input.new_empty((len(rows), self.out_features))
        height = max(1, self.buffer.numel() // self.in_features)
        for start in range(0, self.out_features, height):
            weight = self.weight[start : start + height]
            converted = self._buffer_for(weight).copy_(weight)
            bias = None if self.bias is None else self.bias[start : start + height].float()
            out[:, start : start + height] = _product(rows, converted, bias)
        return out.view(*input.shape[:-1], self.out_features)

    def _buffer_for(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.numel() > self.buffer.numel():
            return torch.empty_like(weight, dtype=torch.float32)
        return self.buffer[: weight.numel()].view(weight.shape)


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``rows @ weight.T + bias``, in the order that is faster for this number of rows."""
    if len(rows) not in _TRANSPOSED_ROWS:
        return nn.functional.linear(rows, weight, bias)
    product = weight @ rows.T
    return (product if bias is None else product.add_(bias[:, None])).T
