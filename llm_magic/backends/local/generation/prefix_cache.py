"""Key-value caches kept between answers, so that a conversation pays only for what is new in it.

Only equal token ids count, never equal text: templates rewrite what was said (dates, thoughts of
earlier turns), and a tokenizer may join the end of an answer with what follows.

A kept cache is used up to a place where a forward pass once began. A matrix product of another
shape rounds differently: cutting anywhere else, the same cell with the same seed could give
another text the second time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.memory import bytes_by_device

# More conversations than one person goes back and forth between.
_MOST = 16


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A cache, the token ids it holds, and the positions at which forward passes began."""

    ids: torch.Tensor
    cache: DynamicCache
    cuts: tuple[int, ...]

    def usable(self, shared: int) -> int:
        """Return how many tokens it spares where `shared` of its own may be used."""
        if shared == len(self.ids):
            return shared
        if not can_be_cut(self.cache):
            return 0
        return self.cuts[bisect_right(self.cuts, shared) - 1]


@dataclass(frozen=True, slots=True)
class Taken:
    """A cache to go on with, if any, how many tokens it holds, where its forward passes began.

    `ahead` is where the next ones began in what is the same from there on.
    """

    cache: DynamicCache | None
    length: int
    cuts: tuple[int, ...]
    ahead: tuple[int, ...] = ()


class Prefixes:
    """The caches of one model: several, the least recently used go first, within `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._kept: list[Prefix] = []

    @property
    def nbytes(self) -> int:
        """What all of them hold."""
        return self.held().total()

    def held(self) -> Counter[str]:
        """Return the bytes that all of them hold, by device."""
        kept = (prefix.cache for prefix in self._kept)
        return bytes_by_device(tensor for cache in kept for tensor in compat.tensors(cache))

    def take(self, ids: torch.Tensor) -> Taken | None:
        """Return the cache that spares most of a prompt of shape (length,), on the CPU."""
        if not self._kept:
            return None
        found = [(*_spared(prefix, ids), prefix) for prefix in self._kept]
        # What spares most; then what has most in common.
        length, shared, best = max(found, key=lambda one: one[:2])
        ahead = tuple(cut for cut in (*best.cuts, len(best.ids)) if length < cut <= shared)
        if length == 0:
            return Taken(None, 0, (), ahead)
        self._kept.remove(best)
        whole = length == len(best.ids)
        if whole and can_be_cut(best.cache):
            # The longer one will stand for this one too: until then nobody needs both.
            return Taken(best.cache, length, best.cuts)
        self._kept.append(best)
        cache = compat.fork(best.cache)
        if not whole:
            cache.crop(length - len(best.ids))
        return Taken(cache, length, tuple(cut for cut in best.cuts if cut < length), ahead)

    def keep(self, ids: torch.Tensor, cache: DynamicCache, cuts: Sequence[int]) -> None:
        """Remember a cache that holds `ids` (on the CPU); drops what is too much."""
        prefix = Prefix(ids.clone(), cache, tuple(cuts))
        if can_be_cut(cache):
            self._kept = [old for old in self._kept if common_length(old.ids, ids) < len(old.ids)]
        self._kept.append(prefix)
        while self._kept and (len(self._kept) > _MOST or self.nbytes > self.budget):
            del self._kept[0]

    def clear(self) -> None:
        """Free them all."""
        self._kept.clear()


def _spared(prefix: Prefix, ids: torch.Tensor) -> tuple[int, int]:
    """Return how much of a prompt a prefix spares, and how much it has in common with it."""
    shared = common_length(prefix.ids, ids)
    # One token at least is left to be read: its logits are wanted.
    return prefix.usable(min(shared, len(ids) - 1)), shared


def common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return the length of the longest common beginning of two sequences of ids."""
    length = min(len(one), len(other))
    different = (one[:length] != other[:length]).nonzero()
    return int(different[0]) if len(different) else length


def can_be_cut(cache: DynamicCache) -> bool:
    """Whether the end of a cache can be taken away again.

    A state space has only its last state, and a window that is full has forgotten what was before.
    """
    layer: Any
    for layer in cache.layers:
        if compat.has_state(layer):
            return False
        window = compat.window(layer)
        if window is not None and layer.get_seq_length() >= window:
            return False
    return compat.is_croppable(cache)


def rope_parameters(model: PreTrainedModel) -> dict[str, Any]:
    """Return how a model places its tokens; nothing where it does that in another way."""
    found = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    return found if isinstance(found, dict) else {}


def short_length(model: PreTrainedModel) -> int | None:
    """Return the length of text beyond which a model reads all of it anew; None for most.

    Phi-3 and its like place the tokens of longer texts in another way: what was read of a shorter
    one says something else there, and the other way round.
    """
    config: Any = model.config.get_text_config(decoder=True)
    scaling = rope_parameters(model)
    if scaling.get("rope_type") != "longrope":
        return None
    own = getattr(config, "original_max_position_embeddings", None)
    length = own or scaling.get("original_max_position_embeddings")
    return int(length) if length else None
