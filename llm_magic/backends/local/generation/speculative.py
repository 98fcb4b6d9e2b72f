"""Guesses at the next tokens, which one forward pass confirms or refuses together.

The answer is the one that would have come without them: every token is still chosen from the
model's own logits, and a guess only saves the pass that would have led to the next ones. How far to
guess follows from how often it was right, counted while running; never from the clock, so that the
same call takes the same steps again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.kv_cache import Pace, Steps

_LENGTHS = (1, 2, 4, 8)
# So many tokens in a row have to have come before; a pair comes again by chance.
_MATCH = 3


class Drafter(Protocol):
    """Something that guesses."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that may follow `tokens`."""

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the last guesses were right."""


class NoDrafts:
    """Guesses nothing."""

    def propose(self, _tokens: Sequence[int], _most: int) -> list[int]:
        """Return nothing."""
        return []

    def learn(self, _proposed: int, _accepted: int) -> None:
        """Nothing is learnt."""


class Confidence:
    """How many tokens to guess: as many as pay, by what a guess costs and how often it was right.

    `cost` is what one more token in a forward pass takes, as a share of the pass with one.
    """

    _FORGET = 0.9
    # Guesses that were left out until one is tried again; doubled each time it was wrong.
    _PAUSE, _LONGEST_PAUSE = 16, 256

    def __init__(self, cost: float) -> None:
        self._cost = cost
        self._right, self._wrong = 2.0, 1.0
        self._pause, self._left_out = self._PAUSE, 0

    def length(self) -> int:
        """Return how many tokens to guess now; 0 where it does not pay."""
        best = max(_LENGTHS, key=self._gain)
        if self._gain(best) > 1.0:
            self._pause = self._PAUSE
            return best
        self._left_out += 1
        if self._left_out < self._pause:
            return 0
        self._left_out, self._pause = 0, min(2 * self._pause, self._LONGEST_PAUSE)
        return _LENGTHS[1]

    def learn(self, proposed: int, accepted: int) -> None:
        """Count: each right guess, and the wrong one that ended them."""
        self._right = self._FORGET * self._right + accepted
        self._wrong = self._FORGET * self._wrong + (accepted < proposed)

    def _gain(self, length: int) -> float:
        """Return the tokens per time of a pass with so many guesses, beside one with none."""
        share = self._right / (self._right + self._wrong)
        expected = length + 1 if share == 1 else (1 - share ** (length + 1)) / (1 - share)
        return expected / (1 + self._cost * length)


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again.

    As in https://github.com/apoorvumang/prompt-lookup-decoding: code that is edited, text that is
    summed up, lists.
    """

    def __init__(self, confidence: Confidence) -> None:
        self._confidence = confidence
        self._seen: dict[tuple[int, ...], int] = {}
        self._read = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return what followed the last tokens when they came before."""
        begin = self._find(tokens)
        if begin is None:
            return []
        length = min(self._confidence.length(), most)
        return list(tokens[begin : begin + length])

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the last guesses were right."""
        self._confidence.learn(proposed, accepted)

    def _find(self, tokens: Sequence[int]) -> int | None:
        """Return where it went on after the last tokens came before; reads each token once."""
        end = len(tokens)
        for stop in range(max(self._read, _MATCH), end):
            self._seen[tuple(tokens[stop - _MATCH : stop])] = stop
        self._read = end
        return self._seen.get(tuple(tokens[end - _MATCH :])) if end >= _MATCH else None


class Assistant:
    """Lets a smaller model with the same vocabulary guess; it always takes its likeliest token."""

    def __init__(
        self, model: PreTrainedModel, confidence: Confidence, pace: Pace, cancel: threading.Event
    ) -> None:
        self._model, self._confidence = model, confidence
        self._pace, self._cancel = pace, cancel
        self._steps: Steps | None = None

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return what the smaller model would say."""
        length = min(self._confidence.length(), most)
        if length <= 0:
            return []
        if self._steps is None:
            self._steps = self._begin(tokens, most)
        steps = self._steps
        steps.become(tokens)
        logits = steps.read(self._pace, self._cancel)
        for _ in range(length - 1):
            steps.add(int(logits.argmax()))
            logits = steps.advance([])
        steps.add(int(logits.argmax()))
        guesses: list[int] = steps.ids[0, -length:].tolist()
        return guesses

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the last guesses were right."""
        self._confidence.learn(proposed, accepted)

    def _begin(self, tokens: Sequence[int], room: int) -> Steps:
        ids = torch.tensor([tokens], device=self._model.device)
        arguments = {
            **compat.cache_argument(self._model, compat.new_cache(self._model)),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        steps = Steps(self._model, ids, arguments, room + 1)
        steps.record_past()
        return steps
