"""Attention to a prefix that all sequences of a batch share, whose keys are read once for all of them.

The cache of such a batch holds what follows the prefix. The queries of all sequences attend to the
prefix as those of one sequence, and each to its own tokens. The sums of the exponentiated scores are
the weights of the two results, as in https://arxiv.org/abs/2402.05099.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from llm_magic.backends.local import transformers_compat as compat

# A prefix is shared if so many tokens need not be read in each step: the combination of two results
# takes as long as reading about 600.
MIN_SHARED_TOKENS = 1024
# The tokens of each sequence that are not in a shared prefix: the last one is read by the next step,
# and the cache is not empty.
MIN_OWN_TOKENS = 2
_NAME = "llm_magic_shared_prefix"


class PrefixNotRead(Exception):
    """Raised after a forward pass in which a layer computed its attention without the prefix."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """The first tokens of all sequences of a batch, and a cache with their keys and values."""

    ids: list[int]
    cache: DynamicCache

    def cropped(self, length: int) -> SharedPrefix:
        """Return the prefix without the tokens after the first `length`."""
        if length == len(self.ids):
            return self
        cache = compat.fork(self.cache)
        cache.crop(length - len(self.ids))
        return SharedPrefix(self.ids[:length], cache)

    @contextlib.contextmanager
    def attended(self, model: Any) -> Iterator[None]:
        """Let the layers of a model attend to the prefix, too; raises `PrefixNotRead` if some do not."""
        with compat.attention_replaced(model, _NAME, _attend):
            _ACTIVE.layers = layers = _Layers(self.cache)
            try:
                yield
            finally:
                _ACTIVE.layers = None
        if layers.read != set(range(len(self.cache.layers))):
            raise PrefixNotRead


def is_worth_it(length: int, sequences: int) -> bool:
    """Return whether it takes less time to share a prefix of so many tokens than to copy it."""
    return length > 0 and length * sequences >= MIN_SHARED_TOKENS


class _Layers:
    """The prefix in each layer during a forward pass; `read` are those that have attended to it."""

    def __init__(self, cache: DynamicCache) -> None:
        self._cache = cache
        self.read: set[int] = set()
        # The last mask, which all layers get, and what it was converted to.
        self._mask: tuple[torch.Tensor | None, torch.Tensor | None] | None = None

    def prefix(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the prefix in a layer."""
        self.read.add(number)
        layer: Any = self._cache.layers[number]
        return layer.keys, layer.values

    def own_mask(
        self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the mask for the tokens after the prefix, for all queries that share keys."""
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, _converted(mask, query, key)
        return self._mask[1]


class _Active(threading.local):
    """What the layers attend to on a thread; None for models that other threads run meanwhile."""

    layers: _Layers | None = None


_ACTIVE = _Active()


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of a layer, of shape (sequences, columns, heads, size).

    Queries have the shape (sequences, heads, columns, size), keys fewer heads.
    """
    layers = _ACTIVE.layers
    if layers is None:
        result: tuple[torch.Tensor, None] = compat.attention_of_torch()(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return result
    rows, heads, columns, size = query.shape
    mask = layers.own_mask(attention_mask, query, key)
    packed = query.reshape(rows, key.shape[1], -1, size)
    own, own_sums = compat.attention_with_sums(packed, key, value, mask, scaling)
    together = packed.transpose(0, 1).reshape(1, key.shape[1], -1, size)
    prefix = layers.prefix(module.layer_idx)
    shared, shared_sums = compat.attention_with_sums(together, *prefix, None, scaling)
    shared = shared.view(key.shape[1], rows, -1, size).transpose(0, 1)
    shared_sums = shared_sums.view(key.shape[1], rows, -1).transpose(0, 1)
    weights = torch.sigmoid(shared_sums - own_sums)[..., None]
    combined = torch.lerp(own.float(), shared.float(), weights).to(query.dtype)
    return combined.reshape(rows, heads, columns, size).transpose(1, 2).contiguous(), None


def _converted(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """Return a mask of numbers, for each head of the queries that share keys."""
    columns, width = query.shape[2], key.shape[2]
    if mask is None:
        if columns == 1:
            return None
        mask = query.new_ones((1, 1, columns, width), dtype=torch.bool).tril(width - columns)
    if mask.dtype == torch.bool:
        # Not the infinity: padding attends to nothing, and must stay a number.
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    heads = query.shape[1] // key.shape[1]
    return mask if columns == 1 else mask.repeat(1, 1, heads, 1)
