"""A model, its cache and the tokens it has read, kept in step."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.prefix_cache import Taken, common_length
from llm_magic.backends.local.worker import Cancelled


class Steps:
    """Feeds token ids of shape (1, length) to a model; `generate` made the other arguments."""

    def __init__(
        self, model: PreTrainedModel, ids: torch.Tensor, arguments: dict[str, Any], room: int
    ) -> None:
        """`room` is how many tokens may be added to `ids`."""
        self._model: Any = model
        self._arguments = arguments
        found = compat.cache_in(arguments)
        assert found is not None
        self._name, self.cache = found
        self._buffer = ids.new_empty((1, ids.shape[1] + room))
        self._buffer[:, : ids.shape[1]] = ids
        self._covered = ids.shape[1]
        self.length = ids.shape[1]
        self.fed = 0
        self.cuts: list[int] = []
        self._ahead: list[int] = []
        self._reading = True

    @property
    def ids(self) -> torch.Tensor:
        """The tokens so far, of shape (1, length)."""
        return self._buffer[:, : self.length]

    @property
    def room(self) -> int:
        """How many tokens can still be added."""
        return self._buffer.shape[1] - self.length

    def go_on_from(self, taken: Taken) -> None:
        """Begin with a cache that was kept."""
        if taken.cache is not None:
            self.cache = self._arguments[self._name] = taken.cache
        self.fed, self.cuts, self._ahead = taken.length, list(taken.cuts), list(taken.ahead)

    def read(self, pace: Pace, cancel: threading.Event) -> torch.Tensor:
        """Read what was not fed yet in pieces, so that a long prompt can be stopped.

        Returns the logits of shape (1, vocabulary) after the last token.
        """
        while True:
            if cancel.is_set():
                raise Cancelled
            began = time.perf_counter()
            # As it was read before, or in pieces as long as they take now.
            stop = self._ahead.pop(0) if self._ahead else self.fed + pace.piece
            stop = min(stop, self.length)
            size = stop - self.fed
            logits = self._feed(stop, 1)
            if stop == self.length:
                self._reading = False
                return logits
            _wait_for(self._buffer.device)
            pace.took(size, time.perf_counter() - began)

    def add(self, token: int) -> None:
        """Add a token that was chosen."""
        self._buffer[0, self.length] = token
        self.length += 1

    def become(self, tokens: Sequence[int]) -> None:
        """Take other tokens, keeping what was read of those that are the same."""
        wanted = torch.tensor(tokens[: self._buffer.shape[1]], device=self._buffer.device)
        same = common_length(self.ids[0], wanted)
        self._buffer[0, same : len(wanted)] = wanted[same:]
        self.length = len(wanted)
        # The last one is always read again: its logits are what is wanted.
        self._cut(min(same, self.length - 1))

    def advance(self, draft: list[int]) -> torch.Tensor:
        """Feed the last token, and a draft of those that may follow it.

        Returns logits of shape (1 + len(draft), vocabulary): after the last token, and after each
        of the draft. What turns out not to follow is taken back by `forget_draft`.
        """
        stop = self.length + len(draft)
        if draft:
            self.record_past()
            self._buffer[0, self.length : stop] = torch.tensor(draft)
        return self._feed(stop, 1 + len(draft))

    def forget_draft(self) -> None:
        """Take out of the cache what was drafted and not added; the last token is not in it."""
        self._cut(self.length - 1)

    def _cut(self, length: int) -> None:
        """Let the cache hold `length` tokens at most."""
        too_much = max(0, self.fed - length)
        if too_much or (compat.is_recording(self.cache) and self.fed):
            dynamic: Any = self.cache
            dynamic.crop(-too_much)
            self.fed -= too_much

    def take_over(self, cache: DynamicCache) -> None:
        """Take the cache of steps that were made elsewhere, one token each."""
        length = cache.get_seq_length()
        self.cuts += range(self.fed, length)
        self.cache = self._arguments[self._name] = cache
        self.fed = length

    def can_draft(self) -> bool:
        """Whether tokens can be taken back out of the cache."""
        return isinstance(self.cache, DynamicCache) and compat.can_roll_back(self.cache)

    def settle(self) -> None:
        """Let the cache hold no more than it needs from here on."""
        self.forget_draft()
        compat.stop_recording(self.cache)

    def record_past(self) -> None:
        """Let tokens be taken back: windows and convolutions forget at once what they do not need."""
        if not compat.is_recording(self.cache):
            compat.start_recording(self.cache)

    def _feed(self, stop: int, keep: int) -> torch.Tensor:
        arguments = self._arguments_upto(stop)
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = keep
        inputs = compat.prepare_inputs(
            self._model,
            self._buffer[:, :stop],
            stop - self.fed,
            arguments,
            first=self._reading,
        )
        outputs = self._model(**inputs, return_dict=True)
        made = getattr(outputs, self._name, None)
        if isinstance(made, Cache) and made is not self.cache:
            # It read all of it anew, see `prefixes.short_length`.
            self.cache = self._arguments[self._name] = made
            self.fed, self.cuts = 0, []
        self.cuts.append(self.fed)
        self.fed = stop
        logits: torch.Tensor = outputs.logits[0, -keep:].float()
        return logits

    def _arguments_upto(self, stop: int) -> dict[str, Any]:
        if stop > self._covered:
            self._arguments = compat.extended(self._arguments, stop - self._covered)
            self._covered = stop
        return compat.shortened(self._arguments, stop)


class Pace:
    """How many tokens of a prompt a model reads at once: as many as take about 0.2 s.

    It changes in powers of two and seldom, and stays with the model: pieces of other sizes round
    differently, see `prefixes`.
    """

    _LEAST, _MOST = 8, 4096
    _SLOW_S, _FAST_S = 0.6, 0.05

    def __init__(self, piece: int = 256) -> None:
        self.piece = piece

    def took(self, size: int, seconds: float) -> None:
        """Learn from a whole piece."""
        if size < self.piece:
            return
        if seconds > self._SLOW_S:
            self.piece = max(self.piece // 2, self._LEAST)
        elif seconds < self._FAST_S:
            self.piece = min(self.piece * 2, self._MOST)


def first_pace(parameters: int, device: str) -> Pace:
    """Guess from the size of a model and from where it is."""
    speed = 2e11 if device == "cpu" else 5e13
    tokens = 0.2 * speed / (2 * max(parameters, 1))
    piece = 1 << max(0, round(tokens).bit_length() - 1)
    return Pace(max(Pace._LEAST, min(piece, 1024)))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
