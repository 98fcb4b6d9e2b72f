"""The values that travel between the rooms: small, frozen, without behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled", "truncated"]
State = Literal["Inactive", "Loading", "Configuring", "Ready", "Unloading", "Failed"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as chat templates and servers know it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; None where the backend does not tell."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    The last one of an answer carries `finish_reason` and `usage`. `tokens` is how many tokens it is,
    0 where the backend does not tell. `time` is when the model produced it (`time.perf_counter`
    seconds), so that a slow display does not blur the timing. `notice` is not part of the answer: it
    says what is waited for. `reasoning_ended` says that all text until now was reasoning: some models
    only end their thoughts with a tag, and never began them with one.
    """

    text: str = ""
    reasoning: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    time: float = 0.0
    notice: str = ""
    reasoning_ended: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the call to the first token and to the end, and the decoding speed."""

    first_token_s: float | None
    total_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; ``str(reply)`` is its text.

    `dropped_turns` is how many of the oldest turns of its chat were not sent, to make room.
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
    """A model as a backend knows it; sizes in bytes, None where unknown.

    `where` says how it was found: ``embedded``, ``folder``, ``gguf``, ``cache``, ``hub`` or
    ``server``; `source` is what was asked for, `folder` what the weights were read from, `server` who
    runs it if not this process, and `memory_bytes` the memory it takes there now.
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
    def size_here(self) -> int | None:
        """What it takes of this machine's memory; None where a server has it, or it is unknown."""
        return None if self.server else self.size


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes this process holds: resident memory, and what torch has allocated on each GPU.

    `room` is what is free and what there is on each GPU, whoever has the rest.
    """

    process: int
    devices: tuple[tuple[str, int], ...] = ()
    room: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What an unload gave back, measured: bytes before and after, and who still holds on.

    `note` says it in words where the model was not in this process.
    """

    name: str
    size: int
    before: MemoryUse
    after: MemoryUse
    holders: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is: a stage in words, and a share between 0 and 1 where it is known."""

    stage: str
    share: float | None = None
    detail: str = ""
