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
    """One message of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: The text.
    """

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Usage:
    """The token counts of one answer; None where the backend does not report them.

    Attributes:
        prompt_tokens: The tokens of the prompt, including the system prompt and the chat.
        completion_tokens: The generated tokens, including the reasoning.
        cached_tokens: The prompt tokens that were reused from an earlier answer.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        text: Text of the answer.
        reasoning: Text of the reasoning.
        tokens: The number of tokens in it, 0 if the backend does not report it.
        finish_reason: Why the answer ended; only in the last chunk.
        usage: The token counts of the answer; only in the last chunk.
        time: When the model produced it, in seconds of `time.perf_counter`.
        notice: What the request waits for, such as a busy server; not part of the answer.
        queued: Whether the backend answers other requests first.
        progress: How much of the prompt the model has read, while it reads a long one.
        reasoning_ended: Whether all text so far is reasoning: some models end their reasoning with a
            tag that they never opened.
    """

    text: str = ""
    reasoning: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    time: float = 0.0
    notice: str = ""
    queued: bool = False
    progress: Progress | None = None
    ends_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one answer; None where they cannot be measured.

    Attributes:
        first_token_s: The seconds from the call to the first token.
        total_s: The seconds from the call to the end.
        tokens_per_s: The speed after the first token.
    """

    first_token_s: float | None
    total_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is complete or was stopped; ``str(reply)`` is its text.

    Attributes:
        text: The text, exactly as the model generated it.
        model: The name of the loaded model.
        backend: The name of the backend.
        finish_reason: ``stop`` if the model ended the answer, ``length`` at the token limit,
            ``cancelled`` if the user stopped it, ``truncated`` if it ended without a reason.
        usage: The token counts.
        timing: The times.
        messages: The messages that were sent.
        reasoning: The reasoning of the model, "" if there is none.
        dropped_turns: The number of the oldest turns of the chat that were not sent, so that the
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

    Attributes:
        name: The name to use with ``-m``.
        backend: The name of the backend.
        where: Where it was found: ``embedded``, ``folder``, ``gguf``, ``cache``, ``hub`` or ``server``.
        source: The model as it was requested.
        folder: The folder of the weights.
        device: The device, such as ``cpu`` or ``cuda:0``.
        dtype: The number format of the weights.
        quantization: ``none``, ``8bit`` or ``4bit``.
        size: The size of the weights.
        context_length: The number of tokens that the model reads.
        revision: The requested branch, tag or commit on the hub.
        load_s: The seconds that the load took.
        server: The host and port of the server that runs it, "" for a model in this process.
        memory_bytes: The memory that it takes on the server now.
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
    """The memory of this process and its GPUs, in bytes.

    Attributes:
        process: The memory of this process (RSS).
        devices: Each GPU with the memory that torch has allocated on it.
        gpu_memory: Each GPU with its free and its total memory, for all processes together.
    """

    process: int
    devices: tuple[tuple[str, int], ...] = ()
    gpu_memory: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The result of an unload.

    Attributes:
        name: The name of the model.
        size: The size of the weights in bytes.
        before: The memory before the unload.
        after: The memory after it.
        holders: The variables that still refer to the weights.
        note: What the unload did, if the model was not in this process.
    """

    name: str
    size: int
    before: MemoryUse
    after: MemoryUse
    holders: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a load, or of a model that reads a prompt.

    Attributes:
        stage: What is being done.
        share: The finished share from 0 to 1, if known.
        detail: An amount or a speed.
    """

    stage: str
    share: float | None = None
    detail: str = ""
