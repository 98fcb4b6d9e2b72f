"""Linear layers in the form that a CPU multiplies fastest.

With AVX512 or AMX, oneDNN has a kernel for bfloat16. It reads a weight in blocks of its own layout, and
reorders a usual matrix in every product. `PackedLinear` stores the weight in that layout: the numbers
are the same, and the product of one row takes 0.65 to 0.9 of the time.

Without them (most laptops), oneDNN has no kernel for bfloat16 and float16: torch has a good one of its
own for single rows, but for several rows a loop that takes 4 to 8 times as long as converting the
weights piece by piece and multiplying in float32, as `Float32Linear` does. The stored weights stay as
they are, and results are rounded to their type, as other CPUs do it.

No other module uses the operators of torch that are not public API. `can_pack` checks those that
pack; without them, layers stay as they are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)
# The number of rows from which on it is faster (AVX2, matrices from 192 x 576 to 4096 x 4096).
_MIN_ROWS = 8
# With so many rows, MKL is 10 to 25 % faster with the transposed product (measured with 16 and 32
# rows); it is as much slower below, and no faster above.
_TRANSPOSED_ROWS = range(16, 65)
# The numbers that are converted at a time: 4 MB, which stay in a core's cache and one allocation.
_PIECE = 1 << 20


def optimize(model: nn.Module, *, pack: bool = True) -> int:
    """Change the linear layers of a model that a CPU multiplies faster; returns how many.

    Without `pack`, no weight is packed. A head that is tied to the embedding needs a second copy.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    packed = [m for m in layers if m.weight.dtype == torch.bfloat16] if pack and can_pack() else []
    for layer in packed:
        PackedLinear.pack(layer)
    if packed and not _runs(model):
        for layer in packed:
            assert isinstance(layer, PackedLinear)
            layer.unpack()
        packed = []
    slow = [m for m in layers if type(m) is nn.Linear and _has_kernel(m.weight.dtype) is False]
    return len(packed) + _use_float32_matmul(slow)


@functools.cache
def can_pack() -> bool:
    """Return whether torch has the operators of `PackedLinear` on this CPU, and they are correct.

    Uses `mkldnn._reorder_linear_weight` and `mkldnn._linear_pointwise`, which Inductor uses.
    """
    if not _has_kernel(torch.bfloat16):
        return False
    layer = nn.Linear(32, 16, dtype=torch.bfloat16, device="cpu")
    rows = torch.linspace(-1, 1, 3 * 32, dtype=torch.bfloat16, device="cpu").view(3, 32)
    try:
        with torch.inference_mode():
            expected, state = layer(rows), {k: v.clone() for k, v in layer.state_dict().items()}
            PackedLinear.pack(layer)
            same = all(
                torch.equal(layer.state_dict()[name], value) for name, value in state.items()
            )
            return same and torch.allclose(layer(rows), expected, rtol=0.02, atol=0.02)
    except (AttributeError, TypeError, RuntimeError):
        return False


def _runs(model: nn.Module) -> bool:
    """Return whether a model computes with packed layers; one that reads a weight itself does not."""
    token = torch.zeros((1, 2), dtype=torch.long, device="cpu")
    try:
        with torch.inference_mode():
            model(input_ids=token)
    except Exception:  # noqa: BLE001 - whatever it raises, it runs without them
        _log.info("%s does not run with packed weights", type(model).__name__, exc_info=True)
        return False
    return True


def _has_kernel(dtype: torch.dtype) -> bool | None:
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


class PackedLinear(nn.Linear):
    """A linear layer whose weight is stored in the layout of oneDNN; its state has the usual one."""

    multiply: Callable[..., torch.Tensor]

    @staticmethod
    def pack(layer: nn.Linear) -> None:
        """Change a layer into a packed one; a weight that it shares with others stays there."""
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.__class__ = PackedLinear
        # Set like this it is not in the state of the model.
        layer.__dict__["multiply"] = torch.ops.mkldnn._linear_pointwise.default

    def unpack(self) -> None:
        """Change it back into a usual layer."""
        self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        del self.__dict__["multiply"]
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ weight.T + bias``; `input` is of shape (…, in_features)."""
        weight = self.weight
        if input.dtype != weight.dtype or (torch.is_grad_enabled() and input.requires_grad):
            # The operator has no gradient, and no check of types.
            return nn.functional.linear(input, weight.to_dense(), self.bias)
        return self.multiply(input, weight, self.bias, "none", [], "")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.to_dense()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        self._load_from_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # Another type or device: what `model.float()` and `model.to("cuda")` do with each weight.
        self.unpack()
        return self._apply(fn, recurse)


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
