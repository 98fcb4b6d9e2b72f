"""One prompt among many: its tokens, its text, its limits, and where its chunks go."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event

import torch

from llm_magic.backends.local.generation.detokenizer import Detokenizer
from llm_magic.backends.local.worker import Translate
from llm_magic.backends.stop_strings import StopText
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import LLMMagicError, release_frames
from llm_magic.types import Chunk, FinishReason, Message, Usage

Item = Chunk | LLMMagicError
Emit = Callable[[tuple[int, Item]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked, and how; `pages` is whether by continuous batching, None where it is faster."""

    conversations: Sequence[Sequence[Message]]
    config: GenerationConfig
    cancel: Event
    emit: Emit
    translate: Translate
    pages: bool | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends an answer besides its stop strings: tokens, and seconds from its beginning."""

    tokens: frozenset[int]
    seconds: float | None = None


@dataclass(eq=False, slots=True)
class Row:
    """A prompt and as much of its answer as there is; `over` once nothing more will come.

    `ids` grows with the answer, so that a row whose memory was lost can be read again. `limit` is
    how many tokens the answer may have.
    """

    index: int
    ids: list[int]
    limit: int
    text: Detokenizer
    stop: StopText
    emit: Emit
    generator: torch.Generator | None = None
    prompt_tokens: int = field(init=False)
    over: bool = field(init=False, default=False)
    _begun: float | None = field(init=False, default=None)
    _deadline: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)

    @property
    def count(self) -> int:
        """The tokens of the answer until now."""
        return len(self.ids) - self.prompt_tokens

    @property
    def longest(self) -> int:
        """The tokens that prompt and answer may have together."""
        return self.prompt_tokens + self.limit

    def begin(self, ending: Ending) -> None:
        """Say what the prompt costs, and start the clock of the answer if it has one; once."""
        if self._begun is None:
            self._begun = time.perf_counter()
            self.emit((self.index, Chunk(usage=Usage(self.prompt_tokens, 0, 0))))
        if ending.seconds is not None:
            self._deadline = self._begun + ending.seconds

    def take(self, token: int, now: float, ending: Ending) -> None:
        """Emit the next token of the answer; finishes it if it was the last one."""
        self.ids.append(token)
        text = self.stop.feed(self.text.step(token))
        self.emit((self.index, Chunk(text=text, tokens=1, time=now)))
        late = self._deadline is not None and now >= self._deadline
        ended = self.stop.reached or token in ending.tokens
        if ended or late or self.count >= self.limit:
            cut: FinishReason = "length" if self.count >= self.limit else "truncated"
            self._finish("stop" if ended else cut, now)

    def _finish(self, reason: FinishReason, now: float) -> None:
        self.over = True
        rest = self.stop.feed(self.text.flush()) + self.stop.flush()
        usage = Usage(self.prompt_tokens, self.count, 0)
        chunk = Chunk(text=rest, finish_reason=reason, usage=usage, time=now)
        self.emit((self.index, chunk))

    def fail(self, error: LLMMagicError) -> None:
        """End with an error, which loses no other row."""
        self.over = True
        self.emit((self.index, release_frames(error)))


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Return how many tokens all begin with; each keeps at least one of its own."""
    if not rows:
        return 0
    low, high = min(rows), max(rows)
    longest = min(map(len, rows)) - 1
    return next((n for n in range(longest) if low[n] != high[n]), longest)
