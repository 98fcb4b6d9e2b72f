"""Quantizes the weights of a model for the CPU while Transformers reads them, one after the other.

The model is never in memory with its usual weights. The layers are those of `cpu_quantized`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_magic.backends.local.cpu_linear import copy_mapped_weights, own_parameters
from llm_magic.backends.local.cpu_quantized import (
    Int8Linear,
    QuantizedLinear,
    new_buffer,
    quantized_class,
    share_buffer,
)
from llm_magic.backends.local.fused_linear import fuse

_METHOD = "llm_magic_cpu"


class CpuQuantizationConfig(QuantizationConfigMixin):
    """The argument `quantization_config` of `from_pretrained`."""

    def __init__(self, quantization: str) -> None:
        """`quantization` is ``8bit`` or ``4bit``."""
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.quantization = quantization


class CpuQuantizer(HfQuantizer):
    """What Transformers calls during a load with a `CpuQuantizationConfig`."""

    quantization_config: CpuQuantizationConfig

    def __init__(self, quantization_config: CpuQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.buffer = new_buffer()

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **_kwargs: Any
    ) -> bool:
        """Return whether a parameter is the weight of a layer that can be quantized."""
        path, _, name = param_name.rpartition(".")
        if name != "weight" or param_name in model.all_tied_weights_keys:
            return False
        return self.kind_of(model, model.get_submodule(path)) is not None

    def kind_of(self, model: PreTrainedModel, layer: nn.Module) -> type[QuantizedLinear] | None:
        """Return what a layer is changed into; None where it stays as it is.

        The output head has 8 bits at least: with 4, its errors are ten times those of all others.
        """
        if layer is model.get_output_embeddings():
            kind: type[QuantizedLinear] | None = Int8Linear
        else:
            kind = quantized_class(self.quantization_config.quantization)
        return kind if kind is not None and _shape(layer, kind) is not None else None

    def get_quantize_ops(self) -> ConversionOps:
        """Return what converts such a parameter."""
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """Return False: a quantized model is not saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: its layers have no gradients."""
        return False


class _Quantize(ConversionOps):
    """Quantizes tensors that were read, and puts them into their layers."""

    def __init__(self, quantizer: CpuQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the tensors that are left as they are."""
        model, missing_keys = kwargs["model"], kwargs["missing_keys"]
        left: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if self._put(model, name, weight):
                missing_keys.discard(name)
            else:
                left[name] = value
        return left

    def _put(self, model: PreTrainedModel, name: str, weight: torch.Tensor) -> bool:
        if not self._quantizer.param_needs_quantization(model, name):
            return False
        layer = model.get_submodule(name.rpartition(".")[0])
        kind = self._quantizer.kind_of(model, layer)
        assert kind is not None
        # A tensor that Transformers reads in another type than the model's is to be more precise.
        if weight.shape != layer.weight.shape or weight.dtype != layer.weight.dtype:
            return False
        matrix = weight.T if isinstance(layer, Conv1D) else weight
        kind.quantize(layer, matrix, self._quantizer.buffer)
        # Otherwise Transformers fills it with random numbers.
        for each in (layer, layer.codes, layer.scales):
            each._is_hf_initialized = True  # type: ignore[union-attr]
        return True


def complete(model: PreTrainedModel, *, is_fused: bool = True) -> None:
    """Give a head that is tied to the input embedding a quantized copy; free the file that was read."""
    head, quantizer = model.get_output_embeddings(), model.hf_quantizer
    assert isinstance(quantizer, CpuQuantizer)
    if head is not None and _shape(head, Int8Linear) is not None:
        Int8Linear.quantize(head, head.weight, quantizer.buffer)
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    share_buffer(quantized, quantizer.buffer)
    usual = (m for m in model.modules() if not isinstance(m, QuantizedLinear))
    copy_mapped_weights(own_parameters(usual))
    if is_fused:
        fuse(model, quantized, QuantizedLinear.joined)


def _shape(layer: nn.Module, kind: type[QuantizedLinear]) -> torch.Size | None:
    """Return the shape of the weight of a layer that can be quantized, else None."""
    if type(layer) is nn.Linear:
        shape = layer.weight.shape
    elif isinstance(layer, Conv1D):
        shape = layer.weight.T.shape
    else:
        return None
    return shape if kind.fits(*shape) else None


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(_METHOD)(CpuQuantizationConfig)
    register_quantizer(_METHOD)(CpuQuantizer)
