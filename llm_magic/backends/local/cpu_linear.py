"""Prompts read in float32 where a CPU multiplies the weights' own type slowly.

Without AVX512 or AMX (most laptops), oneDNN has no kernel for bfloat16 and float16: single tokens go
through a good one of torch's own, but several at once through a loop that is 4 to 8 times slower
than widening the weights piece by piece and multiplying in float32. The weights stay as they are, and
results are rounded to their type, as they are by CPUs that can.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

# From so many tokens on it pays (measured: AVX2, matrices from 192 x 576 to 4096 x 4096).
_FEWEST_ROWS = 8
# With so many rows MKL is 10 to 25 % faster the other way round (16 rows, 32 rows; as much slower
# below, and no faster above).
_BATCH = range(16, 65)
# Numbers that are widened at a time: 4 MB, which stay in a core's cache and in one allocation.
_PIECE = 1 << 20


def widen(model: PreTrainedModel) -> int:
    """Let the layers of a model do so where it pays; returns how many of them."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and _is_slow(m.weight)]
    # A notebook may have set other defaults.
    scratch = torch.empty(_PIECE if layers else 0, dtype=torch.float32, device="cpu")
    for layer in layers:
        layer.__class__ = WideLinear
        # Like this they are no part of the model's state.
        layer.__dict__ |= {"scratch": scratch, "few": _FEWEST_ROWS * layer.in_features}
    return len(layers)


def _is_slow(weight: torch.Tensor) -> bool:
    # Without oneDNN (Apple's processors) nothing was measured.
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # What Inductor asks, too.
    asked = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    is_supported = getattr(torch.ops.mkldnn, asked.get(weight.dtype, ""), None)
    return is_supported is not None and not is_supported()


class WideLinear(nn.Linear):
    """A linear layer that multiplies many rows in float32; takes and returns its weights' type."""

    scratch: torch.Tensor
    few: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ weight.T + bias``; `input` is of shape (…, in_features)."""
        # First of all, and with the least that Python can do: it is asked 200 times a token.
        if input.numel() < self.few or input.dtype != self.weight.dtype:
            return nn.functional.linear(input, self.weight, self.bias)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            # The scratch is overwritten before a gradient could be taken.
            return nn.functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features).float()
        out = input.new_empty((len(rows), self.out_features))
        height = max(1, self.scratch.numel() // self.in_features)
        for start in range(0, self.out_features, height):
            weight = self.weight[start : start + height]
            wide = self._room(weight).copy_(weight)
            bias = None if self.bias is None else self.bias[start : start + height].float()
            out[:, start : start + height] = _product(rows, wide, bias)
        return out.view(*input.shape[:-1], self.out_features)

    def _room(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.numel() > self.scratch.numel():
            return torch.empty_like(weight, dtype=torch.float32)
        return self.scratch[: weight.numel()].view(weight.shape)


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``rows @ weight.T + bias``, in the order that a few rows are multiplied faster in."""
    if len(rows) not in _BATCH:
        return nn.functional.linear(rows, weight, bias)
    product = weight @ rows.T
    return (product if bias is None else product.add_(bias[:, None])).T
