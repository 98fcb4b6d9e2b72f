"""The immutable values that all packages exchange."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, NotRequired, Self, TypedDict, Unpack

from llm_magic.errors import InvalidReply, NoAttribute, did_you_mean
from llm_magic.text import is_cut_json, parse_json, visible

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled", "truncated"]
StructureKind = Literal["json_schema", "choice", "regex", "grammar"]
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
class Structure:
    """What an answer must conform to; a backend that supports its kind generates nothing else.

    Attributes:
        kind: ``json_schema``, ``choice``, ``regex`` or ``grammar``.
        source: The JSON schema as text, the labels of a choice as a JSON list, the regular expression,
            or the grammar in the notation of Lark.
    """

    kind: StructureKind
    source: str

    @classmethod
    def choice(cls, labels: Sequence[str]) -> Structure:
        """Return the structure of an answer that is one of `labels`."""
        return cls("choice", json.dumps(list(labels), ensure_ascii=False))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a choice."""
        return tuple(json.loads(self.source)) if self.kind == "choice" else ()

    @property
    def option(self) -> str:
        """The name of the option that sets it."""
        return "schema" if self.kind == "json_schema" else self.kind


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

    @property
    def total_tokens(self) -> int | None:
        """The number of tokens in the prompt and the answer; None if one of them is unknown."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return None
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer with its probability at its place, given all tokens before it.

    A local model reports its own distribution over all tokens: before the temperature, top-p, top-k,
    penalties and the structure of the answer. A server reports what it computes.

    Attributes:
        text: The text of the token. Of several tokens that make up one character, the last one has the
            character, and the others have no text.
        logprob: The natural logarithm of its probability.
        alternatives: The likeliest tokens at its place with their logarithms, the likeliest first; as
            many as ``logprobs`` requests. The token itself is one of them if it is likely enough.
    """

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def probability(self) -> float:
        """The probability of the token, from 0 to 1."""
        return math.exp(self.logprob)


def tokens_of(text: str, tokens: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Return the tokens of an answer whose texts are `text`: without its reasoning, and what ends it.

    Returns all of them where `text` is no part of their texts, as those of some servers.
    """
    joined = "".join(token.text for token in tokens)
    start = len(joined) - len(text) if joined.endswith(text) else joined.find(text)
    if start < 0:
        return tuple(tokens)
    found, at, end = list[TokenLogprob](), 0, start + len(text)
    for token in tokens:
        part = token.text[max(start - at, 0) : max(end - at, 0)]
        # A token without text belongs to the one that follows it.
        if part or (not token.text and start <= at < end):
            is_whole = part == token.text
            found.append(token if is_whole else dataclasses.replace(token, text=part))
        at += len(token.text)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a text is as the answer to a prompt.

    Attributes:
        text: The text.
        logprob: The natural logarithm of its probability: the sum over its tokens.
        tokens: Its tokens with their probabilities.
    """

    text: str
    logprob: float
    tokens: tuple[TokenLogprob, ...]


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
        backoff_s: The seconds until the request is sent again, if an overloaded server rejected it.
        queued: Whether the backend answers other requests first.
        progress: How much of a long prompt the model has read so far.
        ends_reasoning: Whether all text before this chunk was reasoning. Some models close their
            reasoning with a tag that they never opened.
        probabilities: The labels of a choice with their probabilities; only in the last chunk.
        logprobs: The tokens whose text is complete now, with their probabilities, if they were requested.
        retry: What was wrong with all text before this chunk, which is no part of the answer: a second
            answer follows.
    """

    text: str = ""
    reasoning: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    time: float = field(default=0.0, repr=False)
    notice: str = ""
    backoff_s: float = 0.0
    queued: bool = False
    progress: Progress | None = None
    ends_reasoning: bool = False
    probabilities: tuple[tuple[str, float], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    retry: str = ""

    @property
    def has_content(self) -> bool:
        """Whether it has text or tokens, reports what is waited for, or ends the reasoning or the answer."""
        waits = self.queued or bool(self.notice) or self.progress is not None
        ends = self.ends_reasoning or bool(self.retry) or self.finish_reason is not None
        return bool(self.text or self.reasoning or self.tokens) or waits or ends

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: object) -> str:
        """Return the text followed by that of another chunk or by a string."""
        return self.text + str(other) if isinstance(other, (str, Chunk)) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + self.text if isinstance(other, str) else NotImplemented

    def __repr__(self) -> str:
        """Return the fields that differ from their defaults."""
        values = ((one, getattr(self, one.name)) for one in fields(self) if one.repr)
        shown = (f"{one.name}={value!r}" for one, value in values if value != one.default)
        return f"Chunk({', '.join(shown)})"


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one answer; None where they cannot be measured.

    Attributes:
        first_token_s: The seconds from the call to the first token.
        total_s: The seconds from the call to the end of the answer.
        tokens_per_s: The tokens per second after the first token.
        load_s: The seconds of these until the model was loaded, if the call waited for that.
    """

    first_token_s: float | None
    total_s: float
    tokens_per_s: float | None
    load_s: float = 0.0


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
    context_full: NotRequired[bool]
    probabilities: NotRequired[Mapping[str, float]]
    value: NotRequired[Any]
    retry: NotRequired[str]
    tokens: NotRequired[tuple[TokenLogprob, ...]]


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
        context_full: Whether the token limit that it reached is the context of the model, which a higher
            ``max_new_tokens`` does not change.
        probabilities: The labels of a choice with their probabilities, the likeliest first; empty
            where there is no choice, or the server does not report them.
        value: The value of a typed answer, such as an instance of the class after ``--schema``; None
            for any other answer.
        retry: What was wrong with the first answer, if this is the second one (``--schema-by prompt``).
        tokens: The tokens of the text with their probabilities, which ``logprobs`` requests: without it,
            there is no such attribute. Empty if the server sent none.
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
    context_full: bool = False
    probabilities: Mapping[str, float] = MappingProxyType({})
    value: Any = None
    retry: str = ""
    # Other libraries call a number so: without the request, its error names what to use.
    tokens: tuple[TokenLogprob, ...]

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
            raise self.invalid(problem, is_cut=is_cut_json(self)) from None
        else:
            # The start of a number is a number.
            if self.finish_reason == "stop" or type(value) not in {int, float}:
                return value
        raise self.invalid("The answer is not complete JSON: it ends in a number.")

    def code(self) -> str:
        """Return the code of the first fenced block in the text, which ``-f code`` puts into a cell.

        Raises:
            InvalidReply: The text contains no such block, or the answer ended in it.
        """
        from llm_magic.text.code_blocks import first_fenced

        block = first_fenced(self.text)
        if block is None:
            raise self.invalid("The answer contains no fenced code block.")
        if not block.closed and self.finish_reason != "stop":
            raise self.invalid("The code block is not closed.")
        return block.code.rstrip("\n")

    def invalid(self, problem: str, *, is_cut: bool = True) -> InvalidReply:
        """Return the error of a reply without its structure; `is_cut`: more tokens may give it that."""
        invalid = InvalidReply(problem)
        invalid.reply = self
        if not is_cut:
            return invalid
        if self.context_full:
            invalid.advise("It was cut off because the context is full: shorten the prompt.")
        elif self.finish_reason == "length":
            cut = "It was cut off at the token limit: use a higher --max-new-tokens."
            invalid.advise(cut, "max_new_tokens")
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

    if not TYPE_CHECKING:

        def __await__(self) -> Generator[None, None, Self]:
            """Return the reply itself: ``await llm.generate(…)`` is its value, too."""
            return self
            yield

        def __getattr__(self, name: str) -> NoReturn:
            """Raise `AttributeError`, which names what to use for a name of other libraries."""
            error = NoAttribute(f"'Reply' object has no attribute {name!r}.")
            raise error.advise(_reply_advice(name).strip())

    def __setattr__(self, name: str, _value: object) -> NoReturn:
        raise NoAttribute(f"A reply is immutable: {name} cannot be set.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"A reply is immutable: {name} cannot be deleted.")


# What other libraries call the attributes of a reply.
_OTHER_NAMES = {
    **dict.fromkeys(
        ("answer", "choices", "content", "message", "output", "response"),
        "The reply is the text itself.",
    ),
    **dict.fromkeys(
        ("dict", "model_dump", "model_dump_json", "to_dict"), "vars(reply) has its attributes."
    ),
    **dict.fromkeys(("reasoning_content", "thinking"), "Use reply.reasoning."),
    **dict.fromkeys(("seconds", "time"), "Use reply.timing.total_s."),
    "tokens": "Use reply.usage.completion_tokens, or ask with logprobs=0 for the probability of each token.",
}


def _reply_advice(name: str) -> str:
    """Return what to use for an attribute that a reply does not have, or an empty string."""
    if name.startswith("_"):
        return ""
    if name in _OTHER_NAMES:
        return f" {_OTHER_NAMES[name]}"
    for part, kind in (("usage", Usage), ("timing", Timing)):
        if hasattr(kind, name):
            return f" Use reply.{part}.{name}."
    return did_you_mean(name, [one for one in dir(Reply) if one[0] != "_"], count=1)


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
        quantization: ``none``, ``8bit`` or ``4bit``; ``bnb-8bit`` or ``bnb-4bit`` if bitsandbytes is used.
        size: The size of the weights.
        context_length: The number of tokens that the model can read.
        revision: The requested branch, tag or commit on the hub.
        load_s: How long the load took, in seconds.
        server: The host and port of the server that runs it, "" for a model in this process.
        memory_bytes: The memory that it uses on the server now.
        unsupported: The options that its backend has, and this model does not.
        digest: What identifies its weights, if the server reports that.
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
    unsupported: tuple[str, ...] = ()
    digest: str = ""


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
        server: The host and port of its server.
    """

    name: str
    size: int
    before: MemoryUse
    after: MemoryUse
    holders: tuple[str, ...] = ()
    note: str = ""
    server: str = ""


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
