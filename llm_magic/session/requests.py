"""One question on its way to an answer: asked, made definite, drafted, replied to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from llm_magic.errors import OptionError
from llm_magic.session.chat_files import message
from llm_magic.session.chats import check_name
from llm_magic.text.formatting import generated
from llm_magic.text.surrogates import has_surrogates, replace_surrogates
from llm_magic.types import Chunk, FinishReason, Message, Reply, Timing, Usage

if TYPE_CHECKING:
    from llm_magic.backends.base import TokenCount
    from llm_magic.backends.manager import LoadedModel
    from llm_magic.config.settings import GenerationConfig
    from llm_magic.session.chats import Chats, Context

_LUMP_S = 0.1
Prompt = str | Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Request:
    """One question, before it is known who answers it.

    Times of the answer count from `started` (`time.perf_counter`).
    """

    prompt: Prompt
    model: str | None = None
    system: str | None = None
    chat: str | None = None
    key: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    trim: bool = False
    started: float = field(default_factory=time.perf_counter, compare=False)


class AskOptions(TypedDict, total=False):
    """What one call may be given besides its prompt: who answers, and the options of this call."""

    model: str | None
    system: str | None
    chat: str | None
    trim: bool
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    extra: Mapping[str, Any]


def request(prompt: Prompt, about: AskOptions) -> Request:
    """Make a request of keyword arguments."""
    options: dict[str, Any] = dict(about)
    who = {name: options.pop(name, None) for name in ("model", "system", "chat")}
    trim = bool(options.pop("trim", False))
    return Request(prompt, **who, options=options, trim=trim)


@dataclass(frozen=True, slots=True)
class Call:
    """A request made definite: this model, these messages, these options.

    In a chat, `context` is what precedes the question, without the `dropped` oldest turns.
    """

    loaded_model: LoadedModel
    messages: tuple[Message, ...]
    config: GenerationConfig
    request: Request
    context: Context | None = None
    dropped: int = 0

    def without(self, dropped: int) -> Call:
        """Return the call without the `dropped` oldest turns of its chat."""
        if self.context is None:
            return self
        messages = _sendable(*self.context.messages(dropped), self.messages[-1])
        return dataclasses.replace(self, messages=messages, dropped=dropped)


def definite(
    request: Request, loaded_model: LoadedModel, current: GenerationConfig, chats: Chats
) -> Call:
    """Make a request definite: check its options and write its messages; nothing is sent."""
    options = dict(request.options)
    if "extra" in options:
        options["extra"] = {**current.extra, **options["extra"]}
    config = current.replace(**options)
    loaded_model.backend.check_options(config, options.keys())
    context = _context(request, chats)
    messages = _messages(request, context)
    return Call(loaded_model, messages, config, request, context)


def _context(request: Request, chats: Chats) -> Context | None:
    if request.chat is not None:
        check_name(request.chat)
        key = request.key or str(request.prompt)
        return chats.context(request.chat, key, request.system)
    if request.trim:
        raise OptionError("--trim leaves out turns of a chat. Name the chat: -c NAME.")
    return None


def _messages(request: Request, context: Context | None) -> tuple[Message, ...]:
    prompt = request.prompt
    asked = [Message("user", prompt)] if isinstance(prompt, str) else _checked(prompt)
    if not asked or not asked[-1].content.strip():
        raise OptionError("The prompt is empty. Write the question below %%llm.")
    if context is None:
        before = [Message("system", request.system)] if request.system else []
        return _sendable(*before, *asked)
    if not isinstance(prompt, str):
        raise OptionError("A chat takes its turns one by one: give it a text, not messages.")
    return _sendable(*context.messages(), *asked)


def _checked(prompt: object) -> list[Message]:
    """Return the messages of a prompt; raises `OptionError` for anything else."""
    if not isinstance(prompt, (list, tuple)):
        raise OptionError(
            f"The prompt is of the type {type(prompt).__name__}. Give a text, or a list of messages:"
            ' [{"role": "user", "content": "…"}].'
        )
    plain = [dataclasses.asdict(one) if isinstance(one, Message) else one for one in prompt]
    return [message(one, f"The prompt, message {i}") for i, one in enumerate(plain, 1)]


def _sendable(*messages: Message) -> tuple[Message, ...]:
    """Return messages that tokenizers and servers read: without half characters."""
    return tuple(
        dataclasses.replace(m, content=replace_surrogates(m.content))
        if has_surrogates(m.content)
        else m
        for m in messages
    )


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a call would send, and what it costs; nothing was called."""

    model: str
    backend: str
    messages: tuple[Message, ...]
    config: GenerationConfig
    count: TokenCount
    dropped_turns: int = 0


class Draft:
    """An answer in the making; `changed` is called after every piece of it."""

    def __init__(self, call: Call, changed: Callable[[], None] = lambda: None) -> None:
        self.call = call
        self._changed = changed
        self._parts: list[str] = []
        self._reasoning: list[str] = []
        self._tokens = 0
        self._first: float | None = None
        self._latest = call.request.started
        self._usage = Usage()
        self._ended: FinishReason | None = None
        # What was on its way when nobody took it any more.
        self.rest: list[Chunk] = []
        # The reply that was made of it, whole or not.
        self.kept: Reply | None = None

    def add(self, chunk: Chunk) -> None:
        """Take in the next chunk."""
        if chunk.reasoning_ended:
            self._reasoning, self._parts = [*self._reasoning, *self._parts], []
        self._parts.append(chunk.text)
        self._reasoning.append(chunk.reasoning)
        self._tokens += chunk.tokens
        if chunk.time and (chunk.tokens or chunk.text or chunk.reasoning):
            self._first = self._first or chunk.time
            self._latest = chunk.time
        self._usage = chunk.usage or self._usage
        self._ended = chunk.finish_reason or self._ended
        self._changed()

    @property
    def latest(self) -> float:
        """The time of the latest chunk, on the clock of `time.perf_counter`."""
        return self._latest

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said yet."""
        return not self._tokens and not any(self._parts) and not any(self._reasoning)

    @property
    def tokens(self) -> int | None:
        """The number of tokens generated so far; None where it is unknown."""
        count = self._tokens or self._usage.completion_tokens
        # Some servers send a usage of 0 along with the first words.
        return count if count or self.is_empty else None

    @property
    def characters(self) -> int:
        """The number of characters generated so far, of answer and reasoning."""
        return len(self.text) + len(self.reasoning)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._parts)

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        return "".join(self._reasoning)

    def reply(self, ended: FinishReason | None = None) -> Reply:
        """Return the reply as it stands; a stream that did not say why it ended was cut."""
        rest, self.rest = self.rest, []
        for chunk in rest:
            self.add(chunk)
        loaded_model = self.call.loaded_model
        return Reply(
            text=self.text,
            model=loaded_model.name,
            backend=loaded_model.config.backend,
            finish_reason=self._ended or ended or "truncated",
            usage=Usage(self._usage.prompt_tokens, self.tokens, self._usage.cached_tokens),
            timing=self.timing(),
            messages=self.call.messages,
            reasoning=self.reasoning.strip(),
            dropped_turns=self.call.dropped,
        )

    def timing(self) -> Timing:
        """Return the times so far."""
        counted = self.tokens
        started, first = self.call.request.started, self._first
        decoding = self._latest - first if first is not None else 0.0
        # What a server counted may have come in a few lumps, whose times say nothing.
        measured = decoding > (0.0 if self._tokens else _LUMP_S)
        return Timing(
            first_token_s=first - started if first is not None else None,
            total_s=time.perf_counter() - started,
            tokens_per_s=(counted - 1) / decoding if counted and measured else None,
        )


def stopped(reply: Reply) -> str:
    """Return what an interrupt says."""
    if reply.finish_reason in {"stop", "length"}:
        return "Stopped when the answer had just ended; it is in llm.last."
    amount = generated(reply.usage.completion_tokens, len(reply.text) + len(reply.reasoning))
    if not amount:
        return "Stopped before the first word."
    return f"Stopped after {amount}; the answer so far is in llm.last."
