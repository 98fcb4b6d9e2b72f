"""Speculative decoding: drafts of the next tokens, which one forward pass verifies together.

The answer is the same as without drafts: every token is chosen from the model's own logits, and a
draft only saves the passes between its tokens. The length of a draft follows from how many tokens
were accepted, never from the clock, so that the same call takes the same steps again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.model_runner import ModelRunner, PrefillChunkSize
from llm_magic.backends.local.local_model import LocalModel

_LENGTHS = (1, 2, 4, 8)
# The length of the n-grams that are looked up; pairs occur twice by chance.
_NGRAM = 3
# How much of the counts of accepted and rejected tokens each draft leaves.
_DECAY = 0.9
# Drafts that are skipped before one is tried again; doubled each time.
_PAUSE, _MAX_PAUSE = 16, 256


# What one more token in a forward pass costs, as a share of a pass with one. A GPU reads the weights
# meanwhile, and has time to spare for the arithmetic.
_DRAFT_COST = {"cpu": 0.25, "mps": 0.1, "cuda": 0.03}


def drafter(loaded: LocalModel, cancel: threading.Event) -> PromptLookup | AssistantModel:
    """Return what proposes drafts for one answer of a model."""
    cost = _DRAFT_COST.get(loaded.model.device.type, 0.25)
    if loaded.assistant is None:
        return PromptLookup(DraftLengthController(cost))
    cost += loaded.assistant.num_parameters() / loaded.model.num_parameters()
    return AssistantModel(
        loaded.assistant, DraftLengthController(cost), loaded.prefill_chunk_size, cancel
    )


@dataclass(slots=True)
class DraftLengthController:
    """Chooses the length of the next draft from the cost of a drafted token and past acceptance.

    `cost` is the time that one more token adds to a forward pass, as a share of a pass with one.
    """

    cost: float
    _accepted: float = field(init=False, default=2.0)
    _rejected: float = field(init=False, default=1.0)
    _pause: int = field(init=False, default=_PAUSE)
    _skipped: int = field(init=False, default=0)

    def next_length(self) -> int:
        """Return how many tokens to draft now; 0 where a draft would cost more than it saves."""
        best = max(_LENGTHS, key=self._speedup)
        if self._speedup(best) > 1.0:
            self._pause = _PAUSE
            return best
        self._skipped += 1
        if self._skipped < self._pause:
            return 0
        self._skipped, self._pause = 0, min(2 * self._pause, _MAX_PAUSE)
        return _LENGTHS[1]

    def update(self, proposed: int, accepted: int) -> None:
        """Count the accepted tokens of a draft, and the rejected one that ended them."""
        self._accepted = _DECAY * self._accepted + accepted
        self._rejected = _DECAY * self._rejected + (accepted < proposed)

    def _speedup(self, length: int) -> float:
        """Return the expected speed with drafts of `length`, relative to decoding without."""
        rate = self._accepted / (self._accepted + self._rejected)
        tokens = length + 1 if rate == 1 else (1 - rate ** (length + 1)) / (1 - rate)
        return tokens / (1 + self.cost * length)


@dataclass(slots=True)
class PromptLookup:
    """Drafts what followed the last tokens where they occurred before.

    As in https://github.com/apoorvumang/prompt-lookup-decoding: it helps where code is edited, a text
    is summarized, or a list has a pattern.
    """

    draft_length: DraftLengthController
    # The position after the last occurrence of each n-gram of the first `_indexed` tokens.
    _following: dict[tuple[int, ...], int] = field(init=False, default_factory=dict)
    _indexed: int = field(init=False, default=_NGRAM)

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Return at most `limit` tokens that may follow `tokens`."""
        end = len(tokens)
        for stop in range(self._indexed, end):
            self._following[tuple(tokens[stop - _NGRAM : stop])] = stop
        self._indexed = max(end, _NGRAM)
        start = self._following.get(tuple(tokens[-_NGRAM:]))
        if start is None:
            return []
        return list(tokens[start : start + min(self.draft_length.next_length(), limit)])


class AssistantModel:
    """Drafts the likeliest tokens of a smaller model with the same vocabulary."""

    def __init__(
        self,
        model: PreTrainedModel,
        draft_length: DraftLengthController,
        chunk_size: PrefillChunkSize,
        cancel: threading.Event,
    ) -> None:
        self._model, self.draft_length = model, draft_length
        self._chunk_size, self._cancel = chunk_size, cancel
        self._runner: ModelRunner | None = None

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Return at most `limit` tokens that may follow `tokens`."""
        length = min(self.draft_length.next_length(), limit)
        if length <= 0:
            return []
        if self._runner is None:
            self._runner = self._new_runner(tokens, limit)
        runner = self._runner
        runner.replace(tokens)
        while (logits := runner.prefill_chunk(self._chunk_size, self._cancel)) is None:
            pass
        for _ in range(length - 1):
            runner.append(int(logits.argmax()))
            logits = runner.decode([])
        runner.append(int(logits.argmax()))
        draft: list[int] = runner.ids[0, -length:].tolist()
        return draft

    def _new_runner(self, tokens: Sequence[int], max_new_tokens: int) -> ModelRunner:
        ids = torch.tensor([tokens], device=self._model.device)
        traits, cache = compat.traits(self._model), compat.new_cache(self._model)
        arguments = {traits.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        runner = ModelRunner(self._model, traits, ids, arguments, max_new_tokens + 1)
        runner.start_recording()
        return runner
