"""Conversations that are longer than the context: ``--trim``, and what to say without it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

from llm_magic.errors import GenerationError, LLMMagicError, PromptTooLong, RequestFailed
from llm_magic.session.chats import in_turns, spelled
from llm_magic.types import Chunk

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager, LoadedModel
    from llm_magic.session.chats import Chat
    from llm_magic.session.requests import Call, Draft
    from llm_magic.types import Message

# At most this share of the context is kept free for the answer.
_ANSWER = 1 / 4
_UNCLEAR = frozenset({400, 413, 422, 500, None})


async def stream(manager: BackendManager, draft: Draft) -> AsyncGenerator[Chunk, None]:
    """Ask the model of a draft, after leaving out what it was told to leave out."""
    draft.call = await fit(manager, draft.call)
    while True:
        call = draft.call
        answer = manager.stream(call.loaded_model.name, call.messages, call.config)
        try:
            async with contextlib.aclosing(answer) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        except (PromptTooLong, RequestFailed) as error:
            more = _more(call) if isinstance(error, PromptTooLong) and draft.is_empty else 0
            if not more:
                raise error.append(_advice(call, error)) from None
        draft.call = call.without(call.dropped + more)
        yield Chunk(notice=f"too long, asking with {in_turns(draft.call.dropped)} less")


async def fit(manager: BackendManager, call: Call) -> Call:
    """Leave out the fewest of the oldest turns with which it fits, where the backend can count."""
    if not call.request.trim or call.context is None:
        return call
    low, high = 0, len(call.context.turns)
    while low < high:
        middle = (low + high) // 2 if low else 0
        fits = await _fits(manager, call.without(middle))
        if fits is None:
            return call
        low, high = (low, middle) if fits else (middle + 1, high)
    return call.without(low)


async def _fits(manager: BackendManager, call: Call) -> bool | None:
    """Return whether a call leaves room for its answer; None where that is not known."""
    count = await manager.count(call.loaded_model.name, call.messages)
    if count.prompt_tokens is None or not count.context_length:
        return None
    most = int(count.context_length * _ANSWER)
    return (
        count.prompt_tokens + min(call.config.max_new_tokens or most, most) <= count.context_length
    )


def _more(call: Call) -> int:
    """Return how many more turns to leave out after a refusal: a third, so that tries are few."""
    if not call.request.trim or call.context is None:
        return 0
    left = len(call.context.turns) - call.dropped
    return max(1, left // 3) if left else 0


def _advice(call: Call, error: GenerationError | RequestFailed) -> str:
    """Return what helps against a conversation that is too long."""
    context, trim = call.context, call.request.trim
    if context is None or not context.turns:
        return ""
    turns = in_turns(len(context.turns))
    forget = f"%llm_reset {spelled(context.chat)}"
    if isinstance(error, RequestFailed):
        unclear = trim and error.status in _UNCLEAR
        return (
            f"It does not say whether the {turns} above are too long; {forget} forgets them."
            if unclear
            else ""
        )
    if trim:
        return f"That is without the {turns} above it, too."
    return (
        f"Chat {context.chat!r} has {turns} above it: --trim leaves out the oldest, {forget} all."
    )


def told(chat: Chat, model: str) -> int | None:
    """Return what a conversation took when it was last continued, where `model` said so."""
    last = chat.fresh[-1] if chat.fresh else None
    return last.tokens if last is not None and last.model == model else None


async def counted(loaded_model: LoadedModel, messages: Sequence[Message]) -> int | None:
    """Count the tokens of messages with the model's own tokenizer; None where it cannot."""
    try:
        return (await loaded_model.backend.count(loaded_model.name, messages)).prompt_tokens
    except LLMMagicError:
        # Some templates refuse some conversations: the next question will tell, a list does not.
        return None
