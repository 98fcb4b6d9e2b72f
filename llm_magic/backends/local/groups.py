"""Rows that are decoded together, a token each at every step; they may come and go in between.

All tensors of a group have a line for each row and end with the same step, so that shorter rows
have padding before them: ids, attention mask, positions, keys and values. Where rows begin alike,
that part is read once and copied; the padding then stands between it and the rest.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from llm_magic.backends.local.prefixes import new_cache, short_length
from llm_magic.backends.local.rows import Row

# Columns that no row uses any more cost time in every step, and a little to get rid of.
_WASTE = 1 / 8
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


def takes_rows(model: PreTrainedModel) -> bool:
    """Whether lines can be taken out of the model's cache, and put into it."""
    if not _takes_a_cache(model) or short_length(model) is not None:
        return False
    layers = new_cache(model).layers
    # States of another kind than keys and values have no place for padding; chunked attention
    # counts its chunks from the first column.
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return "chunked_attention" not in kinds and all(
        type(layer) in _PLAIN_LAYERS for layer in layers
    )


def _takes_a_cache(model: PreTrainedModel) -> bool:
    """Whether the model keeps its cache as most do, and takes one that is made outside."""
    # Transformers has no public way to ask for these, nor a typed one.
    kind: Any = type(model)
    if kind._is_stateful or not kind._supports_default_dynamic_cache():
        return False
    if model.generation_config.cache_implementation not in {None, "dynamic", "hybrid"}:
        return False
    taken = inspect.signature(kind.forward).parameters.keys()
    return {"past_key_values", "logits_to_keep"} <= taken


def shortest_window(model: PreTrainedModel) -> int | None:
    """Return how far back the layer sees that sees least, in tokens; None for all the way."""
    layers = new_cache(model).layers
    windows = [x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)]
    return min(windows, default=None)


class Group:
    """Rows on their way, with what the model needs of them."""

    def __init__(self, rows: Sequence[Row], prefix: int, device: torch.device) -> None:
        self.rows = list(rows)
        rest = max(len(row.ids) for row in rows) - prefix
        ids, mask = [], []
        for row in rows:
            gap = prefix + rest - len(row.ids)
            # Padded with a token that the row has anyway: it changes no repetition penalty.
            ids.append(row.ids[:prefix] + row.ids[:1] * gap + row.ids[prefix:])
            mask.append([1] * prefix + [0] * gap + [1] * (len(row.ids) - prefix))
        self.ids = torch.tensor(ids, device=device)
        self.mask = torch.tensor(mask, device=device)
        self.cache: Any = None

    @property
    def width(self) -> int:
        """The columns there are."""
        return int(self.ids.shape[1])

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the others."""
        return any(len(row.ids) < self.width for row in self.rows)

    def positions(self) -> torch.Tensor:
        """Return the position of each token in its own row, as `generate` counts them."""
        return (self.mask.cumsum(-1) - 1).masked_fill(self.mask == 0, 0)

    def share(self, prefix: DynamicCache) -> None:
        """Begin with what is common to all rows, which was read before."""
        self.cache = copy.copy(prefix)
        self.cache.layers = [copy.copy(layer) for layer in prefix.layers]
        self.cache.batch_repeat_interleave(len(self.rows))

    def extend(self, tokens: torch.Tensor) -> None:
        """Add a token to every row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.rows), 1))], dim=-1)

    def drop(self) -> None:
        """Take the rows out that are over."""
        keep = [line for line, row in enumerate(self.rows) if not row.over]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[line] for line in keep]
        if not keep:
            self.cache = None
            return
        # On the CPU, from where it selects on every device: the layers may be on several.
        lines = torch.tensor(keep)
        self.ids, self.mask = self.ids[lines], self.mask[lines]
        self.cache.batch_select_indices(lines)
        self._narrow()

    def _narrow(self) -> None:
        """Take away the padding that all rows begin with."""
        start = int(self.mask.any(0).int().argmax())
        if start <= self.width * _WASTE:
            return
        self.ids, self.mask = self.ids[:, start:], self.mask[:, start:]
        for layer in self.cache.layers:
            _cut(layer, start)

    def join(self, others: Group) -> None:
        """Take the rows of another group in; both have read all but their last column."""
        width = max(self.width, others.width)
        first, second = (_widened(group, width) for group in (self, others))
        self.ids, self.mask = (torch.cat(pair) for pair in zip(first, second, strict=True))
        for layer, other in zip(self.cache.layers, others.cache.layers, strict=True):
            _join(layer, other)
        self.rows += others.rows
        others.cache = None


def _widened(group: Group, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = width - group.width
    filler = group.ids[:, :1].expand(-1, missing)
    return torch.cat([filler, group.ids], dim=-1), pad(group.mask, (missing, 0))


def _cut(layer: Any, columns: int) -> None:
    """Forget the first of all columns that there were; some layers have only the last ones."""
    if not _keeps(layer):
        return
    forgotten = layer.get_seq_length() - layer.keys.shape[-2]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= columns
    start = max(0, columns - forgotten)
    layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]


def _join(layer: Any, other: Any) -> None:
    if not _keeps(layer):
        return
    stored = max(layer.keys.shape[-2], other.keys.shape[-2])
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)
    layer.keys = torch.cat([_padded(layer.keys, stored), _padded(other.keys, stored)])
    layer.values = torch.cat([_padded(layer.values, stored), _padded(other.values, stored)])
    other.keys = other.values = None


def _keeps(layer: Any) -> bool:
    """Whether a layer has states: some take those of another one."""
    return isinstance(layer, DynamicLayer) and layer.keys is not None


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    return pad(states, (0, 0, length - states.shape[-2], 0))
