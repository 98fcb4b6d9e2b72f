"""Linear layers whose weights are stored in 8 or 4 bits, multiplied on a CPU by the kernels of torch.

A product of few rows takes as long as reading the weight, and the kernels multiply with it as it is
stored. For many rows the weight is converted piece by piece, which takes a small part of the time of
their product.

Beside `cpu_linear` this is the only module that uses operators of torch that are not public API:
`quantized_class` checks that they exist and are correct.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, ClassVar, cast

import torch
from torch import nn

from llm_magic.backends.local.cpu_linear import has_kernel
from llm_magic.backends.local.fused_linear import ConvertedLinear

# The numbers that are converted at a time: smaller pieces keep two threads less busy than they save.
_PIECE = 1 << 22
# The kernel for 4 bits stores so many rows together.
_ROW_FACTOR = 64
# The numbers of a row that have a scale in common, in 4 bits.
_GROUP = 32
# So that a row of zeros can be divided by its scale, in float16, too.
_SMALLEST_SCALE = 1e-7


class QuantizedLinear(ConvertedLinear):
    """A linear layer whose weight is stored in few bits; its state has the usual, rounded weight.

    A subclass defines what `codes` and `scales` are.
    """

    # The kernels read memory beyond matrices of other sizes.
    OUT_FACTOR: ClassVar[int] = 16
    IN_FACTOR: ClassVar[int] = 32
    # Up to so many rows, the kernel is faster than converting the weight.
    KERNEL_ROWS: ClassVar[int]
    # The dimension of `scales` that is out_features.
    SCALES_DIM: ClassVar[int] = 0

    codes: nn.Parameter
    scales: nn.Parameter
    # Shared by the layers of a model; without it, each product allocates one.
    buffer: torch.Tensor | None = None

    @classmethod
    def fits(cls, out_features: int, in_features: int) -> bool:
        """Return whether a weight of this shape can be stored like this."""
        return out_features % cls.OUT_FACTOR == 0 and in_features % cls.IN_FACTOR == 0

    @classmethod
    def quantize(
        cls, layer: nn.Module, weight: torch.Tensor, buffer: torch.Tensor | None = None
    ) -> None:
        """Change a layer into a quantized one; its present weight may be empty, or be shared.

        With a buffer of `new_buffer`, little other memory is used.
        """
        codes, scales = cls.encode(weight.detach(), new_buffer() if buffer is None else buffer)
        layer.out_features, layer.in_features = weight.shape  # type: ignore[assignment]
        layer.__class__ = cls
        del layer.weight
        layer.codes = nn.Parameter(codes, requires_grad=False)
        layer.scales = nn.Parameter(scales, requires_grad=False)

    @staticmethod
    def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
        """Return a layer with the rows of several quantized ones of the same class."""
        first, parts = layers[0], [m for m in layers if isinstance(m, QuantizedLinear)]
        assert isinstance(first, QuantizedLinear)
        whole: Any = nn.Linear(first.in_features, 1, bias=False, device="meta")
        whole.out_features, whole.__class__ = sum(m.out_features for m in parts), type(first)
        del whole.weight
        whole.codes = nn.Parameter(torch.cat([m.codes for m in parts]), False)
        scales = torch.cat([m.scales for m in parts], first.SCALES_DIM)
        whole.scales = nn.Parameter(scales, False)
        if first.bias is not None:
            whole.bias = nn.Parameter(torch.cat([m.bias for m in parts]), False)
        share_buffer([whole], first.buffer)
        return cast("nn.Linear", whole)

    @staticmethod
    def encode(weight: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales of a weight."""
        raise NotImplementedError

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T`` by the kernel of torch."""
        raise NotImplementedError

    def multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T`` by converting the weight."""
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        """Return the usual weight."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The usual weight, for models that read it themselves. Each access converts it."""
        return self.dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ weight.T + bias``; `input` is of shape (…, in_features)."""
        if input.dtype != self.scales.dtype or (torch.is_grad_enabled() and input.requires_grad):
            # The kernels have no gradient.
            return nn.functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        few = len(rows) <= self.KERNEL_ROWS
        out = self.multiply(rows) if few else self.multiply_many(rows)
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], self.out_features)

    def restore(self) -> None:
        """Change it into a usual layer with the rounded weight."""
        weight = self.dense()
        del self.codes, self.scales
        self.__dict__.pop("buffer", None)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[misc]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "codes"], destination[prefix + "scales"]
        destination[prefix + "weight"] = self.dense()


class Int8Linear(QuantizedLinear):
    """A weight in 8 bits: `codes` of int8, of the usual shape, and a scale for each row."""

    KERNEL_ROWS = 16

    @staticmethod
    def encode(weight: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales of a weight."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
        scales = torch.empty(len(weight), dtype=weight.dtype, device="cpu")
        for part in _pieces(weight):
            exact = _memory(buffer, weight[part].shape, torch.float32).copy_(weight[part])
            low, high = exact.aminmax(dim=1, keepdim=True)
            # Rounded before it is used: the codes make up for it.
            scale = torch.maximum(high, low.neg_()).div_(127).clamp_(_SMALLEST_SCALE)
            scale = scale.to(weight.dtype)
            codes[part] = exact.div_(scale).round_().clamp_(-127, 127)
            scales[part] = scale[:, 0]
        return codes, scales

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T`` by the kernel of torch."""
        return torch._weight_int8pack_mm(rows, self.codes, self.scales)

    def multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T`` by converting the weight."""
        dtype = torch.float32 if has_kernel(rows.dtype) is False else rows.dtype
        rows, out = rows.to(dtype), rows.new_empty((len(rows), self.out_features))
        for part in _pieces(self.codes):
            codes = self.codes[part]
            converted = _memory(self.buffer, codes.shape, dtype).copy_(codes)
            out[:, part] = nn.functional.linear(rows, converted).mul_(self.scales[part])
        return out

    def dense(self) -> torch.Tensor:
        """Return the usual weight."""
        return self.codes.to(self.scales.dtype).mul_(self.scales[:, None])


class Int4Linear(QuantizedLinear):
    """A weight in 4 bits, in groups of 32 in a row, each with a scale and the value of code 8.

    `codes` is packed as the kernel of torch needs it: on each kind of CPU in an order of its own.
    `scales` is of shape (in_features / 32, out_features, 2).
    """

    OUT_FACTOR = 64
    KERNEL_ROWS = 64
    SCALES_DIM = 1

    @staticmethod
    def encode(weight: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales of a weight."""
        rows, columns = weight.shape
        codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device="cpu")
        scales = torch.empty((columns // _GROUP, rows, 2), dtype=weight.dtype, device="cpu")
        # One half of the buffer for the weight, the other one for codes.
        halves = buffer.view(2, -1)
        for part in _pieces(weight, 2 * columns):
            source = weight[part]
            code = _memory(halves[0], source.shape, torch.float32).copy_(source)
            exact = code.view(-1, columns // _GROUP, _GROUP)
            low, high = exact.aminmax(dim=2, keepdim=True)
            scale = (high - low).div_(15).clamp_(_SMALLEST_SCALE).to(weight.dtype)
            middle = low.add_(scale, alpha=8).to(weight.dtype)
            exact.sub_(middle).div_(scale).add_(8).round_().clamp_(0, 15)
            codes[part] = _pack_4bit(_memory(halves[1], source.shape, torch.int32).copy_(code))
            scales[:, part] = torch.cat((scale, middle), 2).transpose(0, 1)
        return codes, scales

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T`` by the kernel of torch."""
        multiply: Callable[..., torch.Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(rows, self.codes, _GROUP, self.scales)

    def multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T`` by converting the weight."""
        dtype = torch.float32 if has_kernel(rows.dtype) is False else rows.dtype
        if _half_block() is None:
            return self.multiply(rows)
        rows, out = rows.to(dtype), rows.new_empty((len(rows), self.out_features))
        for part in _pieces(self.codes, self.in_features):
            out[:, part] = rows @ self._converted(part, dtype)
        return out

    def dense(self) -> torch.Tensor:
        """Return the usual weight."""
        dtype = self.scales.dtype
        if _half_block() is None:
            return self.multiply(torch.eye(self.in_features, dtype=dtype, device="cpu")).T
        weight = torch.empty((self.out_features, self.in_features), dtype=dtype, device="cpu")
        for part in _pieces(self.codes, self.in_features):
            weight[part] = self._converted(part, dtype).T
        return weight

    def _converted(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight as columns, in the buffer."""
        half = _half_block()
        assert half is not None
        codes, height = self.codes[part].view(-1, self.in_features, half), part.stop - part.start
        weight = _memory(self.buffer, (self.in_features, height), dtype)
        halves = weight.view(self.in_features, -1, 2, half)
        for index, bits in enumerate((codes & 15, codes >> 4)):
            halves[:, :, index].copy_(bits.view(torch.int8).sub_(8).transpose(0, 1))
        # Not as views: with a step of 2, these operations take ten times as long.
        scale, middle = self.scales[:, None, part].to(dtype).movedim(-1, 0).contiguous()
        groups = weight.view(-1, _GROUP, height)
        torch.addcmul(middle, groups, scale, out=groups)
        return weight


def _pack_4bit(codes: torch.Tensor) -> torch.Tensor:
    pack: Callable[..., torch.Tensor] = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return pack(codes, 1)


@functools.cache
def _half_block() -> int | None:
    """Return how many rows have their packed codes side by side: the next as many are in the high bits.

    32 with AVX512, 16 with AVX2; None for orders that are not known.
    """
    codes = _noise(128, 32).add_(1).mul_(7.5).round_().int()
    packed = _pack_4bit(codes)
    for half in (32, 16):
        blocks = packed.view(-1, 32, half)
        unpacked = torch.stack((blocks & 15, blocks >> 4), 1).transpose(2, 3).reshape(128, 32)
        if torch.equal(unpacked.int(), codes):
            return half
    return None


@functools.cache
def quantized_class(quantization: str) -> type[QuantizedLinear] | None:
    """Return the class for ``8bit`` or ``4bit``; None where torch has no correct kernel for it.

    Both need that of 8 bits, for the output head.
    """
    kinds: list[type[QuantizedLinear]] = (
        [Int8Linear] if quantization == "8bit" else [Int8Linear, Int4Linear]
    )
    return kinds[-1] if all(map(_is_correct, kinds)) else None


def _is_correct(kind: type[QuantizedLinear]) -> bool:
    """Return whether torch has the operators of a class on this CPU, and they are correct."""
    shape = (3 * kind.OUT_FACTOR, 5 * kind.IN_FACTOR)
    weight, rows = _noise(*shape), _noise(3, shape[1])
    layer = nn.Linear(1, 1, bias=False, device="meta")
    try:
        with torch.inference_mode():
            kind.quantize(layer, weight)
            assert isinstance(layer, kind)
            exact = rows.float() @ weight.float().T
            results = (layer.multiply(rows), layer.multiply_many(rows), rows @ layer.dense().T)
            # Codes of 4 bits are wrong by 1/30 of the range of a group at most.
            return all(torch.allclose(r.float(), exact, rtol=0.03, atol=0.8) for r in results)
    except (AttributeError, TypeError, RuntimeError):
        return False


def _noise(*shape: int) -> torch.Tensor:
    """Return numbers from -1 to 1 without an order; the seed of a notebook stays as it is."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.rand(shape, generator=generator, device="cpu").mul_(2).sub_(1).bfloat16()


def _pieces(matrix: torch.Tensor, columns: int | None = None) -> Iterator[slice]:
    """Yield the rows of a matrix in pieces of about `_PIECE` numbers."""
    columns = columns or matrix.shape[1]
    height = max(_ROW_FACTOR, _PIECE // columns // _ROW_FACTOR * _ROW_FACTOR)
    for start in range(0, len(matrix), height):
        yield slice(start, min(start + height, len(matrix)))


def new_buffer() -> torch.Tensor:
    """Return memory for a piece of a weight."""
    return torch.empty(_PIECE, dtype=torch.float32, device="cpu")


def _memory(buffer: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of a type of at most 4 bytes: in `buffer`, if it fits."""
    count = prod(shape)
    if buffer is None or 4 * buffer.numel() < dtype.itemsize * count:
        return torch.empty(*shape, dtype=dtype, device="cpu")
    return buffer.view(dtype)[:count].view(*shape)


def share_buffer(layers: Iterable[QuantizedLinear], buffer: torch.Tensor | None) -> None:
    """Give all layers of a model the same memory for converted weights."""
    for layer in layers:
        layer.__dict__["buffer"] = buffer
