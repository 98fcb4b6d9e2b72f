"""Rows that are decoded together, a token each at every step; they may come and go in between.

All tensors of a group have a line for each row and end with the same step, so that shorter rows
have padding before them: ids, attention mask, positions, keys and values. Where rows begin alike,
that part is read once and copied; the padding then stands between it and the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.batch.sequence import Row
from llm_magic.backends.local.generation.prefix_cache import short_length

# Columns that no row uses any more cost time in every step, and a little to get rid of.
_WASTE = 1 / 8


def takes_rows(model: PreTrainedModel) -> bool:
    """Whether lines can be taken out of the model's cache, and put into it."""
    if not _takes_a_cache(model) or short_length(model) is not None:
        return False
    # States of another kind than keys and values have no place for padding; chunked attention
    # counts its chunks from the first column.
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return "chunked_attention" not in kinds and compat.has_plain_layers(compat.new_cache(model))


def _takes_a_cache(model: PreTrainedModel) -> bool:
    """Whether the model keeps its cache as most do, and takes one that is made outside."""
    if compat.why_plain(model) is not None or compat.is_stateful(model):
        return False
    if model.generation_config.cache_implementation not in {None, "dynamic", "hybrid"}:
        return False
    return compat.takes_logits_to_keep(model)


def shortest_window(model: PreTrainedModel) -> int | None:
    """Return how far back the layer sees that sees least, in tokens; None for all the way."""
    windows = map(compat.window, compat.new_cache(model).layers)
    return min((size for size in windows if size is not None), default=None)


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
        self.cache = compat.repeated(prefix, len(self.rows))

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
        compat.drop_columns(self.cache, start)

    def join(self, others: Group) -> None:
        """Take the rows of another group in; both have read all but their last column."""
        width = max(self.width, others.width)
        first, second = (_widened(group, width) for group in (self, others))
        self.ids, self.mask = (torch.cat(pair) for pair in zip(first, second, strict=True))
        compat.join(self.cache, others.cache)
        self.rows += others.rows
        others.cache = None


def _widened(group: Group, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = width - group.width
    filler = group.ids[:, :1].expand(-1, missing)
    return torch.cat([filler, group.ids], dim=-1), pad(group.mask, (missing, 0))
