"""Token ids to chunks: their text up to a stop string, then the finish reason and the counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers.generation.streamers import BaseStreamer

from llm_magic.backends.local.generation.detokenizer import Detokenizer
from llm_magic.backends.local.worker import Cancelled
from llm_magic.backends.stop_strings import StopText
from llm_magic.types import Chunk, FinishReason, Usage

if TYPE_CHECKING:
    import torch
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class TokenStreamer:
    """Emits one chunk for each token of an answer, and one at its end."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str],
        emit: Callable[[Chunk], None],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopText(stop_strings)
        self._emit = emit
        self.token_count = 0
        self.last_token = -1

    @property
    def stop_reached(self) -> bool:
        """Whether the text has reached a stop string."""
        return self._stop.reached

    def append(self, token: int) -> float:
        """Emit the text that `token` completes; returns the time of the chunk."""
        self.last_token = token
        self.token_count += 1
        text = self._stop.feed(self._detokenizer.step(token))
        now = time.perf_counter()
        self._emit(Chunk(text=text, tokens=1, time=now))
        return now

    def finish(self, reason: FinishReason, prompt_tokens: int, cached_tokens: int = 0) -> None:
        """Emit the text that was held back, the finish reason and the token counts."""
        self._emit(
            Chunk(
                text=self._stop.feed(self._detokenizer.flush()) + self._stop.flush(),
                finish_reason=reason,
                usage=Usage(prompt_tokens, self.token_count, cached_tokens),
                time=time.perf_counter(),
            )
        )


class StopStringReached(Exception):
    """Raised inside `generate` to end it at a stop string."""


class GenerateStreamer(BaseStreamer):
    """The `streamer` of Transformers' own `generate`, which it can only leave by an exception."""

    def __init__(self, streamer: TokenStreamer, cancel: threading.Event) -> None:
        self._streamer, self._cancel = streamer, cancel
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with each token."""
        if self._cancel.is_set():
            raise Cancelled
        if self._has_prompt:
            self._streamer.append(int(value.item()))
            if self._streamer.stop_reached:
                raise StopStringReached
        self._has_prompt = True

    def end(self) -> None:
        """Called at the end; `TokenStreamer.finish` also runs where `generate` was left early."""
