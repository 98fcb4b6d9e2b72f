"""Speculative decoding: drafts of the next tokens, which one forward pass verifies together.

The answer is the same as without drafts: every token is chosen from the model's own logits, and a
draft only saves the passes between its tokens. The length of a draft follows from how many tokens
were accepted, never from the clock, so that the same call takes the same steps again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.model_runner import ModelRunner, PrefillChunkSize

_LENGTHS = (1, 2, 4, 8)
# The length of the n-grams that are looked up; pairs occur twice by chance.
_NGRAM = 3


class DraftLengthController:
    """Chooses the length of the next draft from the cost of a drafted token and past acceptance.

    `cost` is the time that one more token adds to a forward pass, as a share of a pass with one.
    """

    _DECAY = 0.9
    # Drafts that are skipped before one is tried again; doubled each time.
    _PAUSE, _MAX_PAUSE = 16, 256

    def __init__(self, cost: float) -> None:
        self._cost = cost
        self._accepted, self._rejected = 2.0, 1.0
        self._pause, self._skipped = self._PAUSE, 0

    def next_length(self) -> int:
        """Return how many tokens to draft now; 0 where a draft would cost more than it saves."""
        best = max(_LENGTHS, key=self._speedup)
        if self._speedup(best) > 1.0:
            self._pause = self._PAUSE
            return best
        self._skipped += 1
        if self._skipped < self._pause:
            return 0
        self._skipped, self._pause = 0, min(2 * self._pause, self._MAX_PAUSE)
        return _LENGTHS[1]

    def update(self, proposed: int, accepted: int) -> None:
        """Count the accepted tokens of a draft, and the rejected one that ended them."""
        self._accepted = self._DECAY * self._accepted + accepted
        self._rejected = self._DECAY * self._rejected + (accepted < proposed)

    def _speedup(self, length: int) -> float:
        """Return the expected speed with drafts of `length`, relative to decoding without."""
        rate = self._accepted / (self._accepted + self._rejected)
        tokens = length + 1 if rate == 1 else (1 - rate ** (length + 1)) / (1 - rate)
        return tokens / (1 + self._cost * length)


class PromptLookup:
    """Drafts what followed the last tokens where they occurred before.

    As in https://github.com/apoorvumang/prompt-lookup-decoding: it helps where code is edited, a text
    is summarized, or a list has a pattern.
    """

    def __init__(self, draft_length: DraftLengthController) -> None:
        self.draft_length = draft_length
        self._following: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Return at most `limit` tokens that may follow `tokens`."""
        start = self._find(tokens)
        if start is None:
            return []
        return list(tokens[start : start + min(self.draft_length.next_length(), limit)])

    def _find(self, tokens: Sequence[int]) -> int | None:
        """Return the position after the last earlier occurrence of the last tokens."""
        end = len(tokens)
        for stop in range(max(self._indexed, _NGRAM), end):
            self._following[tuple(tokens[stop - _NGRAM : stop])] = stop
        self._indexed = end
        return self._following.get(tuple(tokens[end - _NGRAM :])) if end >= _NGRAM else None


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
        logits = runner.prefill(self._chunk_size, self._cancel)
        for _ in range(length - 1):
            runner.append(int(logits.argmax()))
            logits = runner.decode([])
        runner.append(int(logits.argmax()))
        draft: list[int] = runner.ids[0, -length:].tolist()
        return draft

    def _new_runner(self, tokens: Sequence[int], max_new_tokens: int) -> ModelRunner:
        ids = torch.tensor([tokens], device=self._model.device)
        arguments = {
            **compat.cache_argument(self._model, compat.new_cache(self._model)),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        runner = ModelRunner(self._model, ids, arguments, max_new_tokens + 1)
        runner.start_recording()
        return runner
