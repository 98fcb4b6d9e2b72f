"""What comes out of the loop, one token at a time: text, counts, and when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from llm_magic.backends.local.generation.detokenizer import Detokenizer
from llm_magic.backends.local.generation.parameters import end_ids
from llm_magic.backends.local.worker import Cancelled
from llm_magic.backends.stop_strings import StopText
from llm_magic.types import Chunk, FinishReason, Usage

if TYPE_CHECKING:
    import torch

    from llm_magic.backends.local.local_model import LocalModel

Emit = Callable[[Chunk], None]


class Stopped(Exception):
    """Raised inside the loop when the text reached a stop string."""


class Emitter(BaseStreamer):
    """Turns every token into a chunk, or stops the work; what `generate` calls a streamer."""

    def __init__(
        self, loaded: LocalModel, stop: Sequence[str], cancel: threading.Event, emit: Emit
    ) -> None:
        self._text = Detokenizer(loaded.tokenizer)
        self._stop = StopText(stop)
        self._cancel, self._emit = cancel, emit
        self._prompt_seen = False
        self._count = 0
        self._last = -1
        self._ends = end_ids(loaded.model.generation_config)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then one token at a time."""
        if self._cancel.is_set():
            raise Cancelled
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.token(int(value.item()))

    def token(self, token: int) -> None:
        """Take one token; raises `Cancelled`, or `Stopped` at a stop string."""
        if self._cancel.is_set():
            raise Cancelled
        self._last = token
        self._count += 1
        text = self._stop.feed(self._text.step(token))
        self._emit(Chunk(text=text, tokens=1, time=time.perf_counter()))
        if self._stop.reached:
            raise Stopped

    def end(self) -> None:
        """Called by `generate`; `finish` does the work, also when `generate` was left early."""

    def finish(self, prompt_tokens: int, options: Mapping[str, Any], reused: int) -> None:
        """Emit what was held back, why it ended, and the counts."""
        ended = self._stop.reached or self._last in self._ends
        reason: FinishReason = "stop"
        if not ended and self._count >= options["max_new_tokens"]:
            reason = "length"
        elif not ended and options.get("max_time") is not None:
            reason = "truncated"
        self._emit(
            Chunk(
                text=self._stop.feed(self._text.flush()) + self._stop.flush(),
                finish_reason=reason,
                usage=Usage(prompt_tokens, self._count, reused),
                time=time.perf_counter(),
            )
        )
