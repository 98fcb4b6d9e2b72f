"""One prompt of a batch: its tokens, its text, its limits, and the emission of its chunks."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event

import torch

from llm_magic.backends.local.generation.token_streamer import TokenStreamer
from llm_magic.backends.local.worker import Translate
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import LLMMagicError, release_frames
from llm_magic.types import Chunk, FinishReason, Message, Usage

# A chunk of an answer, or the error that ends it.
Item = Chunk | LLMMagicError


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """The conversations to answer; `emit` gets each item with the index of its conversation."""

    conversations: abc.Sequence[abc.Sequence[Message]]
    config: GenerationConfig
    cancel: Event
    emit: Callable[[tuple[int, Item]], None]
    translate: Translate


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and its answer so far, of at most `max_new_tokens`.

    `ids` includes the answer, so that a preempted sequence can be read again. `finished` is set once
    the answer has ended, also by an error.
    """

    index: int
    ids: list[int]
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    streamer: TokenStreamer
    emit: Callable[[tuple[int, Item]], None]
    generator: torch.Generator | None = None
    finished: bool = field(init=False, default=False)
    prompt_tokens: int = field(init=False)
    _started: float | None = field(init=False, default=None)
    _deadline: float = field(init=False, default=float("inf"))

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)

    @property
    def max_length(self) -> int:
        """The tokens that prompt and answer may have together."""
        return self.prompt_tokens + self.max_new_tokens

    def start(self, max_time: float) -> None:
        """Emit the length of the prompt and start the time limit, at the first call only."""
        if self._started is None:
            self._started = time.perf_counter()
            self.emit((self.index, Chunk(usage=Usage(self.prompt_tokens, 0, 0))))
            self._deadline = self._started + max_time

    def append(self, token: int) -> None:
        """Append the next token of the answer and emit it; finishes the answer with the last one."""
        self.ids.append(token)
        now = self.streamer.append(token)
        if self.streamer.stop_reached or token in self.eos_token_ids:
            self._finish("stop")
        elif self.streamer.token_count >= self.max_new_tokens:
            self._finish("length")
        elif now >= self._deadline:
            self._finish("truncated")

    def _finish(self, reason: FinishReason) -> None:
        self.finished = True
        self.streamer.finish(reason, self.prompt_tokens)

    def fail(self, error: LLMMagicError) -> None:
        """End this answer with an error; other sequences go on."""
        self.finished = True
        self.emit((self.index, release_frames(error)))


def common_prefix_length(sequences: abc.Sequence[Sequence]) -> int:
    """Return how many tokens all sequences start with; at least the last of each is its own."""
    low, high = min(s.ids for s in sequences), max(s.ids for s in sequences)
    longest = min(len(s.ids) for s in sequences) - 1
    return next((n for n in range(longest) if low[n] != high[n]), longest)
