"""Linear layers that multiply in float32 where a CPU multiplies their own type slowly.

Without AVX512 or AMX (most laptops), oneDNN has no kernel for bfloat16 and float16: torch has a good
one of its own for single rows, but for several rows a loop that takes 4 to 8 times as long as
converting the weights piece by piece and multiplying in float32. The stored weights stay as they are,
and results are rounded to their type, as other CPUs do it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

# The number of rows from which on it is faster (AVX2, matrices from 192 x 576 to 4096 x 4096).
_MIN_ROWS = 8
# With so many rows, MKL is 10 to 25 % faster with the transposed product (measured with 16 and 32
# rows); it is as much slower below, and no faster above.
_TRANSPOSED_ROWS = range(16, 65)
# The numbers that are converted at a time: 4 MB, which stay in a core's cache and one allocation.
_PIECE = 1 << 20


def use_float32_matmul(model: PreTrainedModel) -> int:
    """Change the linear layers of a model where it is faster; returns how many are changed."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and _is_slow(m.weight)]
    # Device and type explicitly: a notebook may have set other defaults.
    buffer = torch.empty(_PIECE if layers else 0, dtype=torch.float32, device="cpu")
    for layer in layers:
        layer.__class__ = Float32Linear
        # Set like this they are not in the state of the model.
        layer.__dict__ |= {"buffer": buffer, "min_numel": _MIN_ROWS * layer.in_features}
    return len(layers)


def _is_slow(weight: torch.Tensor) -> bool:
    # Not measured without oneDNN (Apple's processors).
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # The same operators as in Inductor.
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    is_supported = getattr(torch.ops.mkldnn, names.get(weight.dtype, ""), None)
    return is_supported is not None and not is_supported()


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
