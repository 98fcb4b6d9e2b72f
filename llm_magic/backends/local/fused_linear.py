"""Layers that multiply the same input, such as those of queries, keys and values, as one product.

A token of a small model, whose products are short, takes 0.8 of the time; one of a model with 1 billion
parameters gains nothing. The state of the model is the usual one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_magic.backends.local.memory import release_memory

# Architectures whose layers of these names are called with the same tensor, one after the other, and
# do not change it in between.
_MODEL_TYPES = {
    *("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral"),
    *("ministral3", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3", "smollm3"),
}
_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(
    model: nn.Module,
    layers: Collection[nn.Linear],
    join: Callable[[Sequence[nn.Linear]], nn.Linear],
    max_bytes: float = math.inf,
) -> None:
    """Fuse those layers of a known architecture that have the same input.

    `join` returns a layer with the rows of several, in their order. If those with one input have weights
    of more than `max_bytes`, none of the model are fused.
    """
    groups = list(_groups(model, set(layers)))
    if any(sum(layer.weight.nbytes for layer in group) > max_bytes for group in groups):
        return
    for group in groups:
        FusedLinear.fuse(group, join(group))
        # The parts leave gaps that are too small for the next group.
        release_memory(collect=False)


def _groups(model: nn.Module, layers: Collection[nn.Linear]) -> Iterator[list[nn.Linear]]:
    """Yield the layers that can be fused."""
    if getattr(getattr(model, "config", None), "model_type", None) not in _MODEL_TYPES:
        return
    for module in model.modules():
        for names in _NAMES:
            found = [getattr(module, name, None) for name in names]
            group = [m for m in found if isinstance(m, nn.Linear) and m in layers]
            if len(group) == len(names) and len({(type(m), m.bias is None) for m in group}) == 1:
                yield group


class ConvertedLinear(nn.Linear):
    """A linear layer in another form. Its state is the usual one, and replacing that restores it."""

    def restore(self) -> None:
        """Change it back into a usual layer."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any) -> None:
        self.restore()
        self._load_from_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # Another type or device: what `model.float()` and `model.to("cuda")` do with each weight.
        self.restore()
        return self._apply(fn, recurse)


@dataclass(slots=True)
class _Group:
    """Layers with the same input, and the one that has the rows of all of them.

    `outputs` are the products of `input` by each layer, until the last layer has been called. The
    references to the layers are weak: a cycle would keep a model in memory until garbage is collected.
    """

    whole: nn.Linear
    layers: Sequence[weakref.ref[nn.Linear]]
    sizes: list[int]
    input: torch.Tensor | None = None
    outputs: Sequence[torch.Tensor] = ()


class FusedLinear(ConvertedLinear):
    """A linear layer that is computed together with others.

    The first layer of a group has the parameters of all, so that they are counted once. They are in the
    dictionary of `_Group.whole`, which may replace them.
    """

    group: _Group
    index: int

    @staticmethod
    def fuse(layers: Sequence[nn.Linear], whole: nn.Linear) -> None:
        """Change layers into fused ones. They are called with the same tensor, in this order."""
        group = _Group(whole, [weakref.ref(m) for m in layers], [m.out_features for m in layers])
        for index, layer in enumerate(layers):
            layer.__class__ = FusedLinear
            # Set like this they are not in the state of the model.
            layer.__dict__ |= {"group": group, "index": index, "_parameters": {}}
        layers[0].__dict__["_parameters"] = whole._parameters

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The usual weight, for models that read it themselves. Each access converts it."""
        return self._state()["weight"]

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The usual bias."""
        return self._state().get("bias")

    def restore(self) -> None:
        """Change all layers of the group into usual ones."""
        layers = [layer for r in self.group.layers if isinstance(layer := r(), FusedLinear)]
        for layer, state in [(layer, layer._state()) for layer in layers]:
            for name in ("group", "index"):
                del layer.__dict__[name]
            layer.__dict__["_parameters"] = {}
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            for name in ("weight", "bias"):
                value = state.get(name)
                parameter = None if value is None else nn.Parameter(value, requires_grad=False)
                layer.register_parameter(name, parameter)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ weight.T + bias``; `input` is of shape (…, in_features)."""
        group, index = self.group, self.index
        if index == 0 or group.input is not input:
            group.input, group.outputs = input, group.whole(input).split(group.sizes, -1)
        out = group.outputs[index]
        if index == len(group.sizes) - 1:
            group.input, group.outputs = None, ()
        return out

    def _state(self) -> dict[str, torch.Tensor]:
        """Return copies of the weight and the bias of this layer alone."""
        sizes = self.group.sizes
        start = sum(sizes[: self.index])
        rows = slice(start, start + sizes[self.index])
        return {name: value[rows].clone() for name, value in self.group.whole.state_dict().items()}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination |= {prefix + name: value for name, value in self._state().items()}
