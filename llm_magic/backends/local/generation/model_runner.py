"""Forward passes over one sequence of token ids, with the key-value cache of what was read."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.prefix_cache import PrefixHit, common_length
from llm_magic.backends.local.worker import Cancelled


class ModelRunner:
    """Runs a model over token ids of shape (1, length), and keeps its cache in step with them.

    The cache holds the first `cached_length` tokens. `boundaries` are the lengths that it had when
    each forward pass began.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        traits: compat.ModelTraits,
        ids: torch.Tensor,
        arguments: dict[str, Any],
        max_new_tokens: int,
    ) -> None:
        """`arguments` are those that `generate` prepares for `forward`, the cache among them."""
        self._model: Any = model
        self._traits, self._arguments = traits, arguments
        self.cache: Any = arguments[traits.cache_name]
        self._buffer = ids.new_empty((1, ids.shape[1] + max_new_tokens))
        self._buffer[:, : ids.shape[1]] = ids
        self.length = ids.shape[1]
        self.cached_length = 0
        self.boundaries: list[int] = []
        self._next_boundaries: list[int] = []
        self._in_prefill = True
        self._is_recording = False

    @property
    def ids(self) -> torch.Tensor:
        """The tokens so far, of shape (1, length)."""
        return self._buffer[:, : self.length]

    def resume(self, hit: PrefixHit) -> None:
        """Start from the cache of an earlier prompt."""
        if hit.cache is not None:
            self.cache = hit.cache
        self.cached_length, self.boundaries = hit.length, list(hit.boundaries)
        self._next_boundaries = list(hit.next_boundaries)

    def prefill_chunk(
        self, chunk_size: PrefillChunkSize, cancel: threading.Event
    ) -> torch.Tensor | None:
        """Read the next chunk of the tokens that are not cached; raises `Cancelled` before it.

        Returns the logits of shape (1, vocabulary) after the last token, None after earlier chunks.
        """
        if cancel.is_set():
            raise Cancelled
        began = time.perf_counter()
        # The same chunks as in an earlier prompt round in the same way.
        planned = self._next_boundaries
        end = planned.pop(0) if planned else self.cached_length + chunk_size.tokens
        end = min(end, self.length)
        size = end - self.cached_length
        logits = self._forward(end, 1)
        if end == self.length:
            self._in_prefill = False
            return logits
        if self._buffer.device.type == "cuda":
            torch.cuda.synchronize(self._buffer.device)
        chunk_size.update(size, time.perf_counter() - began)
        return None

    def append(self, token: int) -> None:
        """Append a generated token; the next forward pass reads it."""
        self._buffer[0, self.length] = token
        self.length += 1

    def decode(self, draft: list[int]) -> torch.Tensor:
        """Read the last token and a draft of the tokens that may follow it.

        Returns logits of shape (1 + len(draft), vocabulary). `crop` removes from the cache what was
        drafted and not appended.
        """
        end = self.length + len(draft)
        if draft:
            self.start_recording()
            self._buffer[0, self.length : end] = torch.tensor(draft)
        return self._forward(end, 1 + len(draft))

    def read_side_by_side(
        self, continuations: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Read what is not cached, and after it several continuations that do not see each other.

        Returns the logits after the tokens so far, of shape (vocabulary,), and for each continuation
        those after its tokens, of shape (tokens, vocabulary). The cache does not keep the continuations.
        Returns None for a model that takes no positions or no mask of its own.
        """
        start, lengths = self.cached_length, [len(tokens) for tokens in continuations]
        added = self._buffer.new_tensor([[t for tokens in continuations for t in tokens]])
        end = self.length + sum(lengths)
        ids = torch.cat([self.ids, added.to(self._buffer.dtype)], dim=-1)
        arguments = compat.resized(self._arguments, end)
        arguments |= {self._traits.cache_name: self.cache, "logits_to_keep": 1 + sum(lengths)}
        inputs = compat.prepare_inputs(
            self._model, ids, end - start, arguments, first=self._in_prefill
        )
        if inputs.get("position_ids") is None:
            return None
        inputs["position_ids"], inputs["attention_mask"] = _side_by_side(
            start, self.length, lengths, self._model
        )
        self.start_recording()
        logits = self._model(**inputs, return_dict=True).logits[0].float().cpu()
        self._in_prefill = False
        self.boundaries.append(start)
        self.cached_length = end
        self.crop(self.length)
        compat.stop_recording(self.cache)
        self._is_recording = False
        return logits[0], list(logits[1:].split(lengths))

    def replace(self, tokens: Sequence[int]) -> None:
        """Replace the sequence by `tokens`, and keep the cache of the prefix that is the same."""
        new = torch.tensor(tokens[: self._buffer.shape[1]], device=self._buffer.device)
        same = common_length(self.ids[0], new)
        self._buffer[0, same : len(new)] = new[same:]
        self.length = len(new)
        # The last token is always read again: its logits are needed.
        self.crop(min(same, self.length - 1))

    def replace_cache(self, cache: DynamicCache) -> None:
        """Take the cache of decoding steps that ran elsewhere, one token each."""
        length = cache.get_seq_length()
        self.boundaries += range(self.cached_length, length)
        self.cache, self.cached_length = cache, length

    def start_recording(self) -> None:
        """Let windows and convolutions keep what they would drop, so that `crop` can remove tokens."""
        if not self._is_recording:
            compat.start_recording(self.cache)
            self._is_recording = True

    def crop(self, length: int) -> None:
        """Remove the tokens after the first `length` from the cache."""
        excess = max(0, self.cached_length - length)
        if excess or (compat.is_recording(self.cache) and self.cached_length):
            self.cache.crop(-excess)
            self.cached_length -= excess

    def trim_cache(self) -> None:
        """Remove drafted tokens that were not appended, and what only the removal of drafts needs."""
        if self._is_recording:
            self.crop(self.length - 1)
            compat.stop_recording(self.cache)

    def _forward(self, end: int, logits_to_keep: int) -> torch.Tensor:
        """Read the tokens up to `end` that are not cached; returns the last logits."""
        arguments = compat.resized(self._arguments, end)
        arguments[self._traits.cache_name] = self.cache
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = logits_to_keep
        inputs = compat.prepare_inputs(
            self._model,
            self._buffer[:, :end],
            end - self.cached_length,
            arguments,
            first=self._in_prefill,
        )
        if self._traits.masks_single_tokens and end - self.cached_length == 1:
            inputs["attention_mask"] = self._buffer.new_ones((1, 1, 1, end), dtype=torch.bool)
        outputs = self._model(**inputs, return_dict=True)
        cache = getattr(outputs, self._traits.cache_name, None)
        if isinstance(cache, Cache) and cache is not self.cache:
            # The model read the whole text anew, see `longest_reuse` of `compat.ModelTraits`.
            self.cache, self._is_recording = cache, False
            self.cached_length, self.boundaries = 0, []
        self.boundaries.append(self.cached_length)
        self.cached_length = end
        logits: torch.Tensor = outputs.logits[0, -logits_to_keep:].float()
        return logits


def _side_by_side(
    start: int, length: int, lengths: Sequence[int], model: PreTrainedModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions and the mask for tokens from `start` on and continuations at `length`.

    Shapes: (1, new tokens), and (1, 1, new tokens, all tokens).
    """
    positions = [*range(start, length), *(length + n for size in lengths for n in range(size))]
    allowed = torch.ones(length + sum(lengths), length + sum(lengths), dtype=torch.bool).tril()
    column = length
    for size in lengths:
        # What follows a continuation sees the tokens before all of them, and itself.
        allowed[column + size :, column : column + size] = False
        column += size
    mask = torch.zeros(allowed.shape, dtype=model.dtype)
    mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    rows = mask[start:].to(model.device)
    return torch.tensor([positions], device=model.device), rows[None, None]


class PrefillChunkSize:
    """How many tokens of a prompt one forward pass reads: as many as take about 0.2 s, or `smallest`.

    It changes seldom, in powers of two, and is kept with the model: chunks of another size round
    differently, see `prefix_cache`.
    """

    _MIN, _MAX = 8, 4096
    _SLOW_S, _FAST_S = 0.6, 0.05
    # Where others use the CPU, too, shorter chunks take as long, and the whole prompt much longer.
    _LESS = 0.75

    def __init__(self, tokens: int = 256, smallest: int = _MIN) -> None:
        self.tokens, self._smallest = tokens, smallest
        # The seconds of the slow chunk after which the size was reduced last.
        self._slow_s = math.inf

    @classmethod
    def for_model(cls, parameters: int, device: str, smallest: int = _MIN) -> PrefillChunkSize:
        """Estimate it from the number of parameters and the type of the device."""
        operations_per_s = 2e11 if device == "cpu" else 5e13
        tokens = 0.2 * operations_per_s / (2 * max(parameters, 1))
        power = 1 << max(0, round(tokens).bit_length() - 1)
        return cls(max(smallest, min(power, 1024)), smallest)

    def update(self, size: int, seconds: float) -> None:
        """Adapt to the time that a chunk of `size` tokens took; shorter chunks do not count."""
        if size < self.tokens:
            return
        if seconds > self._SLOW_S:
            if seconds < self._LESS * self._slow_s:
                self.tokens, self._slow_s = max(self.tokens // 2, self._smallest), seconds
        elif seconds < self._FAST_S:
            self.tokens = min(self.tokens * 2, self._MAX)
