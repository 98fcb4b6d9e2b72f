"""The immutable values that all packages exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled", "truncated"]
State = Literal["Inactive", "Loading", "Configuring", "Ready", "Unloading", "Failed"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; None where the backend does not report them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer; the last one carries `finish_reason` and `usage`.

    `tokens` is the number of tokens in it, 0 if the backend does not report it. `time` is when the
    model produced it (`time.perf_counter` seconds). `notice` is not part of the answer: it states
    what the request waits for. `ends_reasoning` means that all text so far was reasoning: some models end
    their reasoning with a tag that they never opened.
    """

    text: str = ""
    reasoning: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    time: float = 0.0
    notice: str = ""
    ends_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the call to the first token and to the end, and the decoding speed."""

    first_token_s: float | None
    total_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer; ``str(reply)`` is its text.

    `dropped_turns` is the number of the oldest turns of its chat that were not sent, so that the
    prompt fits the context.
    """

    text: str
    model: str
    backend: str
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    messages: Sequence[Message] = field(repr=False)
    reasoning: str = ""
    dropped_turns: int = 0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as its backend describes it; sizes are in bytes, None if unknown.

    `where` is where it was found: ``embedded``, ``folder``, ``gguf``, ``cache``, ``hub`` or
    ``server``. `source` is the requested model, `folder` holds the weights. `server` runs the model
    unless this process does, and `memory_bytes` is the memory it takes there now.
    """

    name: str
    backend: str
    where: str = ""
    source: str = ""
    folder: str = ""
    device: str = ""
    dtype: str = ""
    quantization: str = "none"
    size: int | None = None
    context_length: int | None = None
    revision: str | None = None
    load_s: float | None = None
    server: str = ""
    memory_bytes: int | None = None

    @property
    def local_size(self) -> int | None:
        """The bytes it takes in this process; None if a server runs it, or if unknown."""
        return None if self.server else self.size


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory of this process (RSS) in bytes, and what torch has allocated on each GPU.

    `gpu_memory` holds the free and the total bytes of each GPU, for all processes together.
    """

    process: int
    devices: tuple[tuple[str, int], ...] = ()
    gpu_memory: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The result of an unload: the memory before and after, and what still refers to the weights.

    `note` describes it if the model was not in this process.
    """

    name: str
    size: int
    before: MemoryUse
    after: MemoryUse
    holders: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a load: its stage, and the finished share from 0 to 1 if known."""

    stage: str
    share: float | None = None
    detail: str = ""
