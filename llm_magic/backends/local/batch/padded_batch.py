"""Sequences that are decoded together, one token each in every step; they may join and leave.

All tensors of a batch have a row for each sequence and end with the same step, so that shorter
sequences are padded on the left: ids, attention mask, positions, keys and values. A prefix that all
sequences share is read once. It is copied, and the padding then follows it; or the batch has the
tokens after it only, and refers to the keys and values of the prefix, see `shared_prefix`.
"""

from __future__ import annotations

from collections import abc
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.batch import shared_prefix
from llm_magic.backends.local.batch.shared_prefix import SharedPrefix
from llm_magic.backends.local.generation.sequence import Sequence, common_length


class PaddedBatch:
    """Sequences with their ids, attention mask and cache, of shape (sequences, width).

    `shared` is the prefix that all start with and that is not in them; None without one.
    """

    def __init__(
        self, sequences: abc.Sequence[Sequence], prefix_length: int, device: torch.device
    ) -> None:
        """`prefix_length` is how many tokens all sequences start with; the cache is added later."""
        self.sequences = list(sequences)
        self.shared: SharedPrefix | None = None
        width = max(len(sequence.ids) for sequence in sequences)
        ids, mask = [], []
        for sequence in sequences:
            prefix, suffix = sequence.ids[:prefix_length], sequence.ids[prefix_length:]
            gap = width - len(sequence.ids)
            # Padding with a token of the sequence does not change its repetition penalty.
            ids.append(prefix + sequence.ids[:1] * gap + suffix)
            mask.append([1] * len(prefix) + [0] * gap + [1] * len(suffix))
        self.ids = torch.tensor(ids, device=device)
        self.mask = torch.tensor(mask, device=device)
        self.cache: Any = None

    @property
    def shared_length(self) -> int:
        """The number of tokens of the shared prefix."""
        return 0 if self.shared is None else len(self.shared.ids)

    @property
    def width(self) -> int:
        """The number of columns."""
        return int(self.ids.shape[1])

    @property
    def read(self) -> int:
        """The number of columns that are in the cache."""
        return int(self.cache.get_seq_length())

    @property
    def is_read(self) -> bool:
        """Whether all but the last column are in the cache: the next step reads that one."""
        return self.read == self.width - 1

    @property
    def is_padded(self) -> bool:
        """Whether any sequence is shorter than the others."""
        width = self.width + self.shared_length
        return any(len(sequence.ids) < width for sequence in self.sequences)

    def position_ids(self) -> torch.Tensor:
        """Return the position of each token in its own sequence, as `generate` counts them."""
        positions = self.mask.cumsum(-1) - 1 + self.shared_length
        return positions.masked_fill(self.mask == 0, 0)

    def all_ids(self) -> torch.Tensor:
        """Return the ids with those of the shared prefix."""
        if self.shared is None:
            return self.ids
        prefix = self.ids.new_tensor(self.shared.ids).expand(len(self.sequences), -1)
        return torch.cat([prefix, self.ids], dim=-1)

    def start_from(self, prefix: DynamicCache) -> None:
        """Start with the cache of the prefix that all sequences share."""
        self.cache = compat.repeated(prefix, len(self.sequences))

    def start_after(self, prefix: SharedPrefix, empty: DynamicCache) -> None:
        """Start with an empty cache for the tokens after a prefix that all sequences share."""
        length = len(prefix.ids)
        self.shared, self.cache = prefix, empty
        self.ids, self.mask = self.ids[:, length:], self.mask[:, length:]

    def start_decoding(self) -> None:
        """Change to a cache to which steps and sequences are added in place."""
        self.cache = compat.in_place(self.cache)

    def append(self, tokens: torch.Tensor) -> None:
        """Append a token to every sequence."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.sequences), 1))], dim=-1)

    def remove_finished(self) -> None:
        """Remove the sequences that are finished, and the padding that only they needed."""
        remaining = self._remaining()
        if len(remaining) == len(self.sequences):
            return
        self.sequences = [self.sequences[row] for row in remaining]
        if not remaining:
            self.cache = None
            return
        # Indices on the CPU select on every device: the layers may be on several.
        rows = torch.tensor(remaining)
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self.cache.batch_select_indices(rows)
        self._remove_padding()

    def _remaining(self) -> list[int]:
        """Return the rows of unfinished sequences; the last ones replace those that leave."""
        unfinished = [row for row, sequence in enumerate(self.sequences) if not sequence.finished]
        last = list(unfinished)
        return [
            last.pop() if self.sequences[row].finished else row for row in range(len(unfinished))
        ]

    def _remove_padding(self) -> None:
        """Remove the columns that are padding in all sequences."""
        start, read = int(self.mask.any(0).int().argmax()), self.read
        if read:
            # Padding that is not read yet follows what is read.
            start = min(start, read)
            compat.drop_columns(self.cache, start)
        self.ids, self.mask = self.ids[:, start:], self.mask[:, start:]

    def join(self, other: PaddedBatch) -> None:
        """Add the sequences of another batch; both have read all but their last column."""
        self._share_prefix_with(other)
        width = max(self.width, other.width)
        pairs = zip(_padded(self, width), _padded(other, width), strict=True)
        self.ids, self.mask = (torch.cat(pair) for pair in pairs)
        compat.join(self.cache, other.cache)
        self.sequences += other.sequences
        other.cache = None

    def _share_prefix_with(self, other: PaddedBatch) -> None:
        """Let both batches share the same prefix, or none."""
        prefixes = [batch.shared for batch in (self, other) if batch.shared is not None]
        if not prefixes:
            return
        longest = max(prefixes, key=lambda prefix: len(prefix.ids))
        length = min(common_length([self._beginning(), other._beginning()]), len(longest.ids))
        rows = len(self.sequences) + len(other.sequences)
        shared = longest.cropped(length) if shared_prefix.is_worth_it(length, rows) else None
        for batch in (self, other):
            batch._change_prefix(shared)

    def _beginning(self) -> list[int]:
        """Return the ids that a shared prefix can have: the columns must have no padding there."""
        if len(self.sequences) == 1 and not self.is_padded:
            return self.sequences[0].ids[: -shared_prefix.MIN_OWN_TOKENS]
        return [] if self.shared is None else self.shared.ids

    def _change_prefix(self, prefix: SharedPrefix | None) -> None:
        """Share another prefix, which is the beginning of the one before, or longer."""
        own, length = self.shared_length, 0 if prefix is None else len(prefix.ids)
        if length > own:
            compat.drop_columns(self.cache, length - own)
            self.ids, self.mask = self.ids[:, length - own :], self.mask[:, length - own :]
        elif self.shared is not None and length < own:
            compat.prepend_columns(self.cache, self.shared.cache, length, own)
            self.ids = self.all_ids()[:, length:]
            self.mask = pad(self.mask, (own - length, 0), value=1)
        self.shared = prefix


def _padded(batch: PaddedBatch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = width - batch.width
    padding = batch.ids[:, :1].expand(-1, missing)
    return torch.cat([padding, batch.ids], dim=-1), pad(batch.mask, (missing, 0))
