"""Requests: what is asked, checked and prepared before anything is sent."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict

from llm_magic.config.commands import either, option
from llm_magic.errors import OptionError
from llm_magic.session.chat_files import checked_messages
from llm_magic.session.chats import check_name
from llm_magic.text import replace_surrogates, visible_line
from llm_magic.types import Message

if TYPE_CHECKING:
    from llm_magic.backends.base import TokenCount
    from llm_magic.backends.manager import LoadedModel
    from llm_magic.config.settings import GenerationConfig, SessionConfig
    from llm_magic.session.chats import Chats, Context, Turn
    from llm_magic.session.schemas import AnswerType
    from llm_magic.types import ModelInfo

# What options of magics and of other libraries are in Python.
_FIRST = "The prompt comes first, without a name:"
_DATA = "The data follows the prompt, without a name: llm.map(PROMPT, DATA)."
_IN_PYTHON = {
    "format": "For JSON, call json() of the reply.",
    "input": f"{_FIRST} llm.generate(PROMPT).",
    "messages": f"{_FIRST} llm.generate(MESSAGES).",
    "df": _DATA,
    "rows": _DATA,
    "prompts": 'For several prompts: llm.map("{item}", PROMPTS).',
    "stream": "Call llm.stream, which yields the answer in chunks.",
}
_NO_VALUES = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
Prompt = str | Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Request:
    """One question, before it is known who answers it.

    An answer to a request `as_json` that is no JSON fails, and so does one without a value of its
    `answer_type`. Times of the answer count from `started`
    (`time.perf_counter`). Messages refer to the reply as `stored_in`. `longest_reference` is the one of
    the prompt with the most text, and its number of characters.
    """

    prompt: Prompt
    model: str | None = None
    system: str | None = None
    chat: str | None = None
    key: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    trim: bool = False
    started: float = field(default_factory=time.perf_counter, compare=False)
    as_json: bool = False
    answer_type: AnswerType | None = None
    stored_in: str = "llm.last"
    longest_reference: tuple[str, int] = ("", 0)


class CallOptions(TypedDict, total=False):
    """Who answers, and how."""

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
    logprobs: int | None
    extra: Mapping[str, Any]


class TypeOptions(TypedDict, total=False):
    """What names the type of an answer."""

    schema: Any
    choice: Any
    regex: str | re.Pattern[str] | None
    grammar: str | os.PathLike[str] | None
    schema_by: Literal["backend", "prompt"] | None


class AskOptions(CallOptions, TypeOptions, total=False):
    """What one call may be given besides its prompt: who answers, and the options of this call."""


def request(prompt: Prompt, about: AskOptions) -> Request:
    """Make a request of keyword arguments."""
    check_names(about, AskOptions.__annotations__)
    if isinstance(prompt, str) and not prompt.strip():
        # `prepare` names the magics.
        raise OptionError("The prompt is empty. It comes first, as in llm.generate(PROMPT).")
    if isinstance(prompt, str) and "{" in prompt:
        _warn_about_reference(prompt)
    options: dict[str, Any] = dict(about)
    who = {name: options.pop(name, None) for name in ("model", "system", "chat")}
    trim = bool(options.pop("trim", False))
    named = {name: options.pop(name, None) for name in TypeOptions.__annotations__}
    return Request(prompt, **who, options=options, trim=trim, answer_type=type_of(named))


def type_of(named: Mapping[str, Any]) -> AnswerType | None:
    """Return the type that the options of `TypeOptions` name, None if they name none."""
    if all(value is None for value in named.values()):
        return None
    from llm_magic.session.schemas import answer_type

    return answer_type(named)


def _warn_about_reference(prompt: str) -> None:
    """Warn at the caller if a prompt has a variable of the caller in braces, which is sent as it is."""
    level, frame = 1, sys._getframe()
    while str(frame.f_globals.get("__name__")).partition(".")[0] in {"llm_magic", "contextlib"}:
        if frame.f_back is None:
            return
        level, frame = level + 1, frame.f_back
    from llm_magic.prompts.template import first_reference

    names = {
        name: value
        for name, value in {**frame.f_globals, **frame.f_locals}.items()
        # A short name is often one of a formula or of code.
        if len(name) > 1 and not issubclass(type(value), _NO_VALUES)
    }
    if code := first_reference(prompt, names):
        message = f'{{{code}}} is sent as text. To insert the value, write f"…", or use %%llm.'
        warnings.warn(message, stacklevel=level)


def check_names(about: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Raise `OptionError` for a keyword argument that is not a known one."""
    if unknown := about.keys() - known.keys():
        _raise_unknown(min(unknown), known)


def _raise_unknown(name: str, known: Mapping[str, object]) -> NoReturn:
    if name == "bg":
        magic = either("use %%llm --bg -o job, or ", "")
        raise OptionError(
            f"'bg' is not an option. For an answer in the background, {magic}await llm.agenerate(PROMPT)."
        )
    if name in _IN_PYTHON:
        raise OptionError(f"{name!r} is not an option. {_IN_PYTHON[name]}")
    from llm_magic.config.option_spec import unknown_option

    raise OptionError(unknown_option(name, known))


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked request: this model, these messages, these options.

    In a chat, `context` is what precedes the question, without the `dropped` oldest turns.
    `session_system` is the system prompt if it is the one of the session. `notes` are about the options.
    `instruction` describes the type of the answer to the model, which no turn of a chat contains.
    """

    loaded_model: LoadedModel
    messages: tuple[Message, ...]
    config: GenerationConfig
    request: Request
    context: Context | None = None
    dropped: int = 0
    session_system: str | None = None
    notes: tuple[str, ...] = ()
    instruction: str = ""

    @property
    def sent(self) -> tuple[Message, ...]:
        """The messages as they are sent: with the instruction at the end of the question."""
        return instructed(self.messages, self.instruction)

    def without(self, dropped: int) -> PreparedRequest:
        """Return the request without the `dropped` oldest turns of its chat."""
        if self.context is None:
            return self
        messages = _sendable(*self.context.messages(dropped), self.messages[-1])
        return dataclasses.replace(self, messages=messages, dropped=dropped)


def prepare(
    request: Request, loaded_model: LoadedModel, current: SessionConfig, chats: Chats
) -> PreparedRequest:
    """Check the options of a request and return its messages; nothing is sent.

    `current` has the options and the system prompt for what the request does not set.
    """
    options = dict(request.options)
    for name, value in request.options.items():
        in_session = getattr(current, name, None)
        # A mapping adds to that of the session.
        if isinstance(value, Mapping) and isinstance(in_session, Mapping):
            options[name] = {**in_session, **value}
    answer_type = request.answer_type
    if answer_type is not None and answer_type.by == "backend":
        options["structure"] = answer_type.structure
    config = _penalized(current.generation.replace(**options), answer_type)
    loaded_model.backend.check_options(loaded_model.name, config, options.keys())
    messages, context, session_system = _conversation(request, current, chats)
    note = limit_note(config.max_new_tokens, loaded_model.info)
    return PreparedRequest(
        loaded_model,
        messages,
        config,
        request,
        context,
        session_system=session_system,
        notes=(note,) if note else (),
        instruction=_instruction(answer_type, loaded_model),
    )


def _penalized(config: GenerationConfig, answer_type: AnswerType | None) -> GenerationConfig:
    """Return the options without the default repetition penalty if the answer has a type.

    It would change names and numbers of the prompt, and punish the punctuation that a structure repeats.
    A penalty that the user has set stays.
    """
    if answer_type is None or "repetition_penalty" in config.model_fields_set:
        return config
    values = {**dict(config), "repetition_penalty": 1.0}
    # It does not count as set: a backend without the option omits it.
    return type(config).model_construct(_fields_set={*config.model_fields_set}, **values)


def _instruction(answer_type: AnswerType | None, loaded_model: LoadedModel) -> str:
    """Return what describes the type of an answer to the model; "" where it need not be described."""
    if answer_type is None:
        return ""
    is_needed = answer_type.by == "prompt" or loaded_model.backend.needs_description(
        loaded_model.name, answer_type.structure
    )
    return answer_type.instruction if is_needed else ""


def instructed(messages: tuple[Message, ...], instruction: str) -> tuple[Message, ...]:
    """Return messages with an instruction at the end of the last one of the user."""
    if not instruction:
        return messages
    of_user = (i for i in reversed(range(len(messages))) if messages[i].role == "user")
    position = next(of_user, len(messages) - 1)
    question = messages[position]
    content = f"{question.content}\n\n{instruction}"
    changed = dataclasses.replace(question, content=content)
    return (*messages[:position], changed, *messages[position + 1 :])


def messages_of(prepared: PreparedRequest, prompt: Prompt) -> tuple[Message, ...]:
    """Return the messages of a prepared request with another prompt; it is in no chat.

    Raises `OptionError` for what is no prompt, or an empty one.
    """
    if type(prompt) is str:
        if not prompt or prompt.isspace():
            raise OptionError("The prompt is empty.")
        question = Message("user", replace_surrogates(prompt))
        return instructed((*prepared.messages[:-1], question), prepared.instruction)
    request = dataclasses.replace(prepared.request, prompt=prompt)
    messages = _messages(request, None)
    if prepared.session_system and _has_no_system(request, messages):
        messages = _sendable(Message("system", prepared.session_system), *messages)
    return instructed(messages, prepared.instruction)


def limit_note(max_new_tokens: int | None, model: ModelInfo | None) -> str:
    """Return that no answer of a model can be as long as this limit, or an empty string."""
    context = model.context_length if model is not None else None
    if model is None or not context or (max_new_tokens or 0) <= context:
        return ""
    return (
        f"max_new_tokens {max_new_tokens:,} is more than the context of {visible_line(model.name)}"
        f" ({context:,} tokens): no answer can be that long."
    )


def _conversation(
    request: Request, current: SessionConfig, chats: Chats
) -> tuple[tuple[Message, ...], Context | None, str | None]:
    """Return the messages of a request, what precedes it in its chat, and the session's system prompt."""
    context = None
    if request.chat is not None:
        check_name(request.chat)
        key = request.key or str(request.prompt)
        context = chats.context(request.chat, key, request.system, current.system)
    elif request.trim:
        raise OptionError(
            f"{option('trim')} drops turns of a chat. Name the chat: {option('chat', 'NAME')}."
        )
    messages = _messages(request, context)
    session_system = context.default if context is not None else None
    if current.system and context is None and _has_no_system(request, messages):
        session_system = current.system
        messages = _sendable(Message("system", session_system), *messages)
    return messages, context, session_system


def dry_run_without_model(
    request: Request, current: SessionConfig, chats: Chats, backend: str
) -> DryRun:
    """Return what a request would send to a model of this backend; its tokens are unknown."""
    from llm_magic.backends.base import TokenCount

    messages, _, session_system = _conversation(request, current, chats)
    answer_type = request.answer_type
    config = _penalized(current.generation.replace(**request.options), answer_type)
    messages = instructed(messages, answer_type.instruction if answer_type is not None else "")
    count = TokenCount(None, None)
    return DryRun(
        None,
        backend,
        messages,
        config,
        count,
        session_system=session_system,
        answer_type=answer_type,
    )


def _has_no_system(request: Request, messages: Sequence[Message]) -> bool:
    """Return whether a request does not set its system prompt; an empty one is set."""
    return request.system is None and all(message.role != "system" for message in messages)


def _messages(request: Request, context: Context | None) -> tuple[Message, ...]:
    prompt = request.prompt
    messages = [Message("user", prompt)] if isinstance(prompt, str) else _checked(prompt)
    if not messages or not messages[-1].content.strip():
        raise OptionError(
            f"The prompt is empty.{either(' Write it after %llm, or below %%llm.', '')}"
        )
    if context is None:
        before = [Message("system", request.system)] if request.system is not None else []
        return _sendable(*before, *messages)
    if not isinstance(prompt, str):
        raise OptionError("With a chat, the prompt must be a text, not a list of messages.")
    return _sendable(*context.messages(), *messages)


def _checked(prompt: object) -> list[Message]:
    """Return the messages of a prompt; raises `OptionError` for anything else."""
    from llm_magic.prompts.trusted_types import family

    if family(prompt) == "missing" or (isinstance(prompt, float) and isnan(prompt)):
        raise OptionError(
            f"The prompt is {prompt}, a missing value. Omit such rows first, for example with .dropna()."
        )
    if not isinstance(prompt, (list, tuple)):
        raise OptionError(
            f"A prompt cannot be of type {type(prompt).__name__}. Use a text, or a list of messages:"
            ' [{"role": "user", "content": "…"}].'
        )
    if prompt and all(isinstance(one, str) for one in prompt):
        raise OptionError(
            "A call has one prompt. For several: [llm.generate(prompt) for prompt in prompts]"
        )
    return checked_messages(prompt, "The prompt")


def _sendable(*messages: Message) -> tuple[Message, ...]:
    """Return messages of plain texts without lone surrogates, which tokenizers and servers reject."""
    # A reply would keep the messages before it in memory.
    contents = (replace_surrogates(str(message.content)) for message in messages)
    return tuple(
        message if content is message.content else dataclasses.replace(message, content=content)
        for message, content in zip(messages, contents, strict=True)
    )


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a call would send, and its size; nothing was called.

    `model` is None where none is loaded. `dropped` are the turns that ``--trim`` leaves out. `problem`
    is what a call would lack: context for the prompt, or for the longest answer. `enforced_by` is how the
    backend holds the answer to its `answer_type`, "" if it does not.
    """

    model: str | None
    backend: str
    messages: tuple[Message, ...]
    config: GenerationConfig
    count: TokenCount
    dropped: tuple[Turn, ...] = ()
    problem: str = ""
    session_system: str | None = None
    answer_type: AnswerType | None = None
    enforced_by: str = ""
