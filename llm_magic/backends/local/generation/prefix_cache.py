"""Key-value caches of earlier prompts, so that the next turn of a chat reads only what is new.

Only equal token ids match, not equal text: templates rewrite earlier turns (dates, reasoning), and
a tokenizer may join the end of an answer with the text that follows.

A cached prefix is reused up to a position at which a forward pass began. A matrix product of
another shape rounds differently: with a prefix that ends elsewhere, the same cell with the same
seed could give another text the second time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from transformers import DynamicCache

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.memory import bytes_by_device

# More conversations than one person goes back and forth between.
_MAX_PREFIXES = 16


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrefix:
    """A cache, the token ids in it, and the positions at which forward passes began.

    `can_be_cropped`: a prompt can start from the beginning of it. Otherwise only from all of it.
    """

    ids: torch.Tensor
    cache: DynamicCache
    boundaries: tuple[int, ...]
    can_be_cropped: bool
    nbytes: int

    def reusable(self, ids: torch.Tensor) -> int:
        """Return how many tokens of a prompt a cache without the others can have."""
        usable = min(common_length(self.ids, ids), len(ids) - 1)
        return usable if self.can_be_cropped or usable == len(self.ids) else 0

    def match(self, ids: torch.Tensor) -> tuple[int, int]:
        """Return how many tokens of a prompt need not be read, and how many are the same."""
        shared = common_length(self.ids, ids)
        # The last token is always read: its logits are needed.
        usable = min(shared, len(ids) - 1)
        if usable < len(self.ids):
            cropped = self.boundaries[bisect_right(self.boundaries, usable) - 1]
            usable = cropped if self.can_be_cropped else 0
        return usable, shared


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """A cache to start from, if any, the tokens in it, and where its forward passes began.

    `next_boundaries` are where the next passes began in the tokens that are the same after it.
    """

    cache: DynamicCache | None
    length: int
    boundaries: tuple[int, ...]
    next_boundaries: tuple[int, ...] = ()


class PrefixCache:
    """The cached prefixes of one model, least recently used first, within `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.prefixes: list[CachedPrefix] = []

    @property
    def nbytes(self) -> int:
        """The bytes of all prefixes."""
        return sum(prefix.nbytes for prefix in self.prefixes)

    def bytes_by_device(self) -> Counter[str]:
        """Return the bytes of all prefixes on each device."""
        caches = (prefix.cache for prefix in self.prefixes)
        return bytes_by_device(tensor for cache in caches for tensor in compat.tensors(cache))

    def beginning(self, ids: torch.Tensor) -> PrefixHit | None:
        """Return the longest beginning of a prompt, wherever it ends; all prefixes stay stored.

        For prompts that are read together, which rounds differently anyway.
        """
        lengths = [prefix.reusable(ids) for prefix in self.prefixes]
        length = max(lengths, default=0)
        if length == 0:
            return None
        best = self.prefixes[lengths.index(length)]
        cache = compat.fork(best.cache)
        if length < len(best.ids):
            cache.crop(length - len(best.ids))
        boundaries = (position for position in best.boundaries if position < length)
        return PrefixHit(cache, length, (*boundaries,))

    def lookup(self, ids: torch.Tensor) -> PrefixHit | None:
        """Return the prefix that saves most of a prompt of shape (length,), on the CPU."""
        if not self.prefixes:
            return None
        matches = [(*prefix.match(ids), prefix) for prefix in self.prefixes]
        length, shared, best = max(matches, key=itemgetter(0, 1))
        boundaries = (*best.boundaries, len(best.ids))
        following = tuple(position for position in boundaries if length < position <= shared)
        if length == 0:
            return PrefixHit(None, 0, (), following)
        self.prefixes.remove(best)
        whole = length == len(best.ids)
        if whole and best.can_be_cropped:
            # The longer prefix that is stored next also serves prompts that match this one.
            return PrefixHit(best.cache, length, best.boundaries)
        self.prefixes.append(best)
        cache = compat.fork(best.cache)
        if not whole:
            cache.crop(length - len(best.ids))
        before = tuple(position for position in best.boundaries if position < length)
        return PrefixHit(cache, length, before, following)

    def store(self, ids: torch.Tensor, cache: DynamicCache, boundaries: Sequence[int]) -> None:
        """Store the cache of `ids` (on the CPU); drops the oldest prefixes beyond the budget."""
        can_be_cropped = compat.can_be_cropped(cache)
        if can_be_cropped:
            self.prefixes = [
                prefix
                for prefix in self.prefixes
                if common_length(prefix.ids, ids) < len(prefix.ids)
            ]
        size = sum(tensor.nbytes for tensor in compat.tensors(cache))
        self.prefixes.append(
            CachedPrefix(ids.clone(), cache, tuple(boundaries), can_be_cropped, size)
        )
        while self.prefixes and (len(self.prefixes) > _MAX_PREFIXES or self.nbytes > self.budget):
            del self.prefixes[0]

    def clear(self) -> None:
        """Free all prefixes."""
        self.prefixes.clear()


def common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return the length of the longest common prefix of two sequences of ids."""
    length = min(len(one), len(other))
    different = (one[:length] != other[:length]).nonzero()
    return int(different[0]) if len(different) else length
