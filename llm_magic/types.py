"""The immutable values that all packages exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn, NotRequired, Self, TypedDict, Unpack

from llm_magic.errors import InvalidReply
from llm_magic.text import parse_json, visible

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled", "truncated"]
State = Literal["Inactive", "Loading", "Configuring", "Ready", "Unloading", "Failed"]
_REPR_CHARACTERS = 60  # of the text of a reply


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
    """The token counts and the cost of one answer; None where the backend does not report them.

    Attributes:
        prompt_tokens: The tokens of the prompt, including the system prompt and the chat.
        completion_tokens: The generated tokens, including the reasoning.
        cached_tokens: The prompt tokens that were reused from an earlier answer.
        reasoning_tokens: The generated tokens that are reasoning.
        cost: The cost in US dollars, as the server reports it. It is never computed from prices.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: float | None = None


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


class ReplyAttributes(TypedDict):
    """The attributes of a reply besides its text."""

    model: str
    backend: str
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    messages: tuple[Message, ...]
    reasoning: NotRequired[str]
    dropped_turns: NotRequired[int]


class Reply(str):
    """An answer that is complete or was stopped: a `str`, the text exactly as the model generated it.

    Attributes:
        model: The name of the loaded model.
        backend: The name of the backend.
        finish_reason: ``stop`` if the model ended the answer, ``length`` at the token limit,
            ``cancelled`` if the user stopped it, ``truncated`` if it ended without a reason.
        usage: The token counts and the cost.
        timing: The times.
        messages: The messages that were sent.
        reasoning: The reasoning of the model, "" if there is none.
        dropped_turns: The number of the oldest turns of the chat that were not sent, so that the
            prompt fits the context.
    """

    # The values of a reply that other code makes of a text alone, as some libraries do with a `str`.
    model: str = ""
    backend: str = ""
    finish_reason: FinishReason = "stop"
    usage: Usage = Usage()
    timing: Timing = Timing(None, 0.0, None)
    messages: tuple[Message, ...] = ()
    reasoning: str = ""
    dropped_turns: int = 0

    def __new__(cls, text: str, /, **attributes: Unpack[ReplyAttributes]) -> Self:
        """Create a reply; copies and pickles set the attributes themselves."""
        reply = super().__new__(cls, text)
        vars(reply).update(attributes)
        return reply

    @property
    def text(self) -> str:
        """The text as a plain `str`, without the attributes."""
        return str(self)

    def json(self) -> Any:
        """Return the JSON value in the text.

        The whole text is the value, or one fenced block, or one object or array between text without
        brackets.

        Raises:
            InvalidReply: There is no such value, or more than one.
        """
        try:
            value = parse_json(self)
        except ValueError as error:
            problem = f"The answer is not valid JSON: {str(error).rstrip('.')}."
        else:
            # The start of a number is a number.
            if self.finish_reason == "stop" or type(value) not in {int, float}:
                return value
            problem = "The answer is not complete JSON: it ends in a number."
        if self.finish_reason == "length":
            problem += " It was cut off at the token limit: use a higher --max-new-tokens."
        raise InvalidReply(problem, reply=self)

    def __repr__(self) -> str:
        start = self[:_REPR_CHARACTERS]
        parts = [repr(start)]
        if len(self) > len(start):
            parts = [f"{parts[0]}…", f"{len(self):,} characters"]
        if self.finish_reason != "stop":
            parts.append(f"finish_reason={self.finish_reason!r}")
        return f"Reply({', '.join(parts)})"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Show the text where IPython shows a value as text, and the repr inside another value."""
        printer.text(visible(self) if len(printer.stack) == 1 else repr(self))

    def __setattr__(self, name: str, _value: object) -> NoReturn:
        raise AttributeError(f"A reply is immutable: {name} cannot be set.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"A reply is immutable: {name} cannot be deleted.")


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
