"""Chats that are longer than the context: ``--trim``, and the advice without it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

from llm_magic.config.commands import command, option
from llm_magic.errors import GenerationError, LLMMagicError, PromptTooLong, RequestFailed
from llm_magic.session.chats import spelled
from llm_magic.session.requests import DryRun, limit_note
from llm_magic.text import counted
from llm_magic.types import Chunk

if TYPE_CHECKING:
    from llm_magic.backends.base import TokenCount
    from llm_magic.backends.manager import BackendManager, LoadedModel
    from llm_magic.session.chats import Chat
    from llm_magic.session.requests import PreparedRequest
    from llm_magic.session.response import Response
    from llm_magic.types import Message

# At most this share of the context is kept free for the answer.
_ANSWER = 1 / 4
# From this share of the characters on, a reference is named in the error.
_LONG = 1 / 4
_UNCLEAR = frozenset({400, 413, 422, 500, None})


async def stream(manager: BackendManager, response: Response) -> AsyncGenerator[Chunk, None]:
    """Yield an answer, in a chat after dropping the turns that do not fit where `--trim` is given."""
    response.prepared = await fit(manager, response.prepared)
    while True:
        prepared = response.prepared
        name = prepared.loaded_model.name
        # Searched again, because it may have been unloaded since.
        answer = manager.find(name).backend.stream(name, prepared.sent, prepared.config)
        try:
            async with contextlib.aclosing(answer) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        except (PromptTooLong, RequestFailed) as error:
            more = _more(prepared) if isinstance(error, PromptTooLong) and response.is_empty else 0
            if not more:
                raise error.advise(_advice(prepared, error)) from None
        response.prepared = prepared.without(prepared.dropped + more)
        yield Chunk(
            notice=f"too long; trying again without {counted(response.prepared.dropped, 'turn')}"
        )


async def fit(manager: BackendManager, prepared: PreparedRequest) -> PreparedRequest:
    """Return the request without the fewest oldest turns that do not fit, where `--trim` is given.

    The backend has to count tokens for that.
    """
    if not prepared.request.trim or prepared.context is None:
        return prepared
    low, high = 0, len(prepared.context.turns)
    while low < high:
        middle = (low + high) // 2 if low else 0
        fits = await _fits(manager, prepared.without(middle))
        if fits is None:
            return prepared
        low, high = (low, middle) if fits else (middle + 1, high)
    return prepared.without(low)


async def _fits(manager: BackendManager, prepared: PreparedRequest) -> bool | None:
    """Return whether a request and its answer fit the context; None where that is unknown."""
    name = prepared.loaded_model.name
    count = await manager.find(name).backend.count(name, prepared.sent)
    if count.prompt_tokens is None or not count.context_length:
        return None
    most = int(count.context_length * _ANSWER)
    return (
        count.prompt_tokens + min(prepared.config.max_new_tokens or most, most)
        <= count.context_length
    )


def _more(prepared: PreparedRequest) -> int:
    """Return how many more turns to drop after an error response: a third, so that tries are few."""
    if not prepared.request.trim or prepared.context is None:
        return 0
    left = len(prepared.context.turns) - prepared.dropped
    return max(1, left // 3) if left else 0


def _advice(prepared: PreparedRequest, error: GenerationError | RequestFailed) -> str:
    """Return what helps against a conversation that is too long."""
    context, trim = prepared.context, prepared.request.trim
    if context is None or not context.turns:
        return ""
    turns = counted(len(context.turns), "turn")
    reset = command("reset", spelled(context.chat))
    if isinstance(error, RequestFailed):
        unclear = trim and error.status in _UNCLEAR
        return f"The {turns} above may be too long; {reset} deletes them." if unclear else ""
    if trim:
        return f"Even without the {turns} above it, it is too long."
    trim_option = option("trim", True)
    above = f"Chat {context.chat!r} has {turns} above it"
    return f"{above}: {trim_option} drops the oldest, and {reset} deletes all."


def long_reference(prepared: PreparedRequest, error: PromptTooLong) -> str:
    """Return which reference takes much of a prompt that is too long, or an empty string."""
    code, length = prepared.request.longest_reference
    share = length / sum(len(message.content) for message in prepared.messages)
    if share < _LONG:
        return ""
    tokens = f" (about {error.tokens * share:,.0f} tokens)" if error.tokens else ""
    return f"{{{code}}} takes {share:.0%} of the prompt{tokens}: insert a part of the value."


async def dry_run(manager: BackendManager, prepared: PreparedRequest) -> DryRun:
    """Return what a request would send, and how many tokens that is."""
    prepared = await fit(manager, prepared)
    name, backend = prepared.loaded_model.name, manager.find(prepared.loaded_model.name).backend
    count = await backend.count(name, prepared.sent)
    dropped = prepared.context.turns[: prepared.dropped] if prepared.context is not None else ()
    problem = _problem(prepared, count)
    return DryRun(
        name,
        prepared.loaded_model.config.backend,
        prepared.sent,
        backend.sent_options(name, prepared.config),
        count,
        dropped,
        problem,
        prepared.session_system,
        prepared.request.answer_type,
        _enforced_by(prepared),
    )


def _enforced_by(prepared: PreparedRequest) -> str:
    """Return how an answer is held to its type, "" if it is not."""
    structure, loaded = prepared.config.structure, prepared.loaded_model
    return "" if structure is None else loaded.backend.enforced_by(loaded.name, structure)


def _problem(prepared: PreparedRequest, count: TokenCount) -> str:
    """Return that the prompt or the longest answer does not fit the context, or an empty string."""
    tokens, context, limit = (
        count.prompt_tokens, count.context_length, prepared.config.max_new_tokens or 0,
    )  # fmt: skip
    if not context:
        return ""
    if tokens is None:
        drops = prepared.request.trim and prepared.context is not None and prepared.context.turns
        if drops:
            return "How many turns --trim drops is unknown until the server answers."
        return limit_note(limit, prepared.loaded_model.info)
    if tokens >= context:
        error = PromptTooLong.measured(prepared.loaded_model.name, tokens, context)
        error.advise(_advice(prepared, error))
        return str(error.append(long_reference(prepared, error)))
    if (left := context - tokens) < limit:
        return f"The context leaves {counted(left)} for the answer, fewer than max_new_tokens={limit:,}."
    return ""


def reported_tokens(chat: Chat, model: str) -> int | None:
    """Return the tokens of a conversation as `model` reported them for its last turn, if it did."""
    last = chat.fresh[-1] if chat.fresh else None
    return last.tokens if last is not None and last.model == model else None


async def count_tokens(loaded_model: LoadedModel, messages: Sequence[Message]) -> int | None:
    """Count the tokens of messages with the model's own tokenizer; None where it cannot."""
    try:
        return (await loaded_model.backend.count(loaded_model.name, messages)).prompt_tokens
    except LLMMagicError:
        # Some templates reject some conversations: the next request shows the error.
        return None
