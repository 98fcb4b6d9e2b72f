"""The immutable values that all packages exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn, NotRequired, Self, TypedDict, Unpack

from llm_magic.errors import InvalidReply
from llm_magic.text import parse_json, visible
from llm_magic.text.code_blocks import first_fenced

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
        prompt_tokens: The number of tokens in the prompt, including the system prompt and the chat.
        completion_tokens: The number of generated tokens, including the reasoning.
        cached_tokens: How many of the prompt tokens were reused from an earlier answer.
        reasoning_tokens: How many of the generated tokens are reasoning.
        cost: The cost in US dollars that the server reports. It is never computed from prices.
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
        text: The next part of the answer.
        reasoning: The next part of the reasoning.
        tokens: The number of tokens in the chunk, 0 if the backend does not report it.
        finish_reason: Why the answer ended; only in the last chunk.
        usage: The token counts of the whole answer; only in the last chunk.
        time: When the model generated the chunk, as a value of `time.perf_counter`.
        notice: What the request is waiting for, such as a busy server; not part of the answer.
        queued: Whether the backend answers other requests first.
        progress: How much of a long prompt the model has read so far.
        ends_reasoning: Whether all text before this chunk was reasoning. Some models close their
            reasoning with a tag that they never opened.
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

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one answer; None where they cannot be measured.

    Attributes:
        first_token_s: The seconds from the call to the first token.
        total_s: The seconds from the call to the end of the answer.
        tokens_per_s: The tokens per second after the first token.
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
    """An answer that has ended: a `str` with the text exactly as the model generated it.

    Attributes:
        model: The name of the loaded model.
        backend: The name of the backend.
        finish_reason: ``stop`` if the model ended the answer, ``length`` if it reached the token limit,
            ``cancelled`` if the user stopped it, ``truncated`` if it ended without a reason.
        usage: The token counts and the cost.
        timing: How long the answer took.
        messages: The messages that were sent.
        reasoning: The reasoning of the model, "" if there is none.
        dropped_turns: How many of the oldest turns of the chat were not sent, so that the prompt fits
            the context.
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
        """The text as a plain `str` without the attributes."""
        return str(self)

    def json(self) -> Any:
        """Parse the JSON in the text and return its value.

        The JSON may be the whole text, one fenced block, or one object or array between text without
        brackets.

        Raises:
            InvalidReply: The text contains no such value, or more than one.
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
        raise self._invalid(problem)

    def code(self) -> str:
        """Return the code of the first fenced block in the text, which ``-f code`` puts into a cell.

        Raises:
            InvalidReply: The text contains no such block, or the answer ended in it.
        """
        block = first_fenced(self.text)
        if block is None:
            raise self._invalid("The answer contains no fenced code block.")
        if not block.closed and self.finish_reason != "stop":
            raise self._invalid("The code block is not closed.")
        return block.code.rstrip("\n")

    def _invalid(self, problem: str) -> InvalidReply:
        invalid = InvalidReply(problem)
        if self.finish_reason == "length":
            cut = "It was cut off at the token limit: use a higher --max-new-tokens."
            invalid.advise(cut, "max_new_tokens")
        invalid.reply = self
        return invalid

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
    """The description of a model by its backend. Sizes are in bytes, and None if unknown.

    Attributes:
        name: The name to use with ``-m``.
        backend: The name of the backend.
        where: Where it was found: ``bundled``, ``folder``, ``gguf``, ``cache``, ``hub`` or ``server``.
        source: The name or path that was requested.
        folder: The folder that contains the weights.
        device: The device, such as ``cpu`` or ``cuda:0``.
        dtype: The number format of the weights.
        quantization: ``none``, ``8bit`` or ``4bit``.
        size: The size of the weights.
        context_length: The number of tokens that the model can read.
        revision: The requested branch, tag or commit on the hub.
        load_s: How long the load took, in seconds.
        server: The host and port of the server that runs it, "" for a model in this process.
        memory_bytes: The memory that it uses on the server now.
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


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory of this process and its GPUs, in bytes.

    Attributes:
        process: The memory of this process (RSS).
        devices: For each GPU, its name and the memory that torch has allocated on it.
        gpu_memory: For each GPU, its name, free memory and total memory, counting all processes.
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
        holders: The names of the variables that still refer to the weights.
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
    """The progress of loading a model, or of reading a prompt.

    Attributes:
        stage: The current step.
        share: The finished share, from 0 to 1, or None if unknown.
        detail: An amount or a speed.
    """

    stage: str
    share: float | None = None
    detail: str = ""
