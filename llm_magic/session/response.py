"""The answers of a session: how they are drafted, kept when they end early, and remembered."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TYPE_CHECKING

from llm_magic.backends.reasoning import split_thoughts
from llm_magic.backends.stop_strings import until_stop
from llm_magic.errors import GenerationError, Interrupted
from llm_magic.session import context_window, interrupts
from llm_magic.session.chats import Chats, Context, Turn
from llm_magic.session.requests import Call, Draft, stopped
from llm_magic.types import Chunk, FinishReason, Message, Reply

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager


class Answers:
    """What is being answered now, and the last answer there was."""

    def __init__(self, chats: Chats, changed: Callable[[], None]) -> None:
        """`changed` is called after every piece of every answer."""
        self._chats, self._changed = chats, changed
        self._drafts: list[Draft] = []
        self.last: Reply | None = None
        # When `last` was kept, and the time of its latest chunk.
        self._last_kept = self._last_chunk = 0.0

    @property
    def drafts(self) -> tuple[Draft, ...]:
        """The answers in the making."""
        return tuple(self._drafts)

    def draft(self, call: Call) -> Draft:
        """Begin an answer."""
        return Draft(call, self._changed)

    @contextlib.contextmanager
    def kept(self, draft: Draft) -> Iterator[None]:
        """Keep what there is of an answer that ends early: by the caller, or by an error."""
        self._drafts.append(draft)
        self._changed()
        try:
            yield
        except (KeyboardInterrupt, Interrupted, GeneratorExit, asyncio.CancelledError) as stop:
            reply = self.keep(draft, "cancelled")
            if isinstance(stop, KeyboardInterrupt | Interrupted):
                kind = type(stop) if isinstance(stop, Interrupted) else Interrupted
                error = kind(stopped(reply), reply=reply)
                self._show(error, reply)
                raise error from None
            raise
        except BaseException as error:
            # Where nothing was said, the last answer is still the one before.
            reply = draft.reply("truncated") if draft.is_empty else self.keep(draft, "truncated")
            if isinstance(error, GenerationError):
                error.reply = reply
            raise
        finally:
            self._drafts.remove(draft)
            self._changed()

    def keep(self, draft: Draft, ended: FinishReason | None = None) -> Reply:
        """Make the reply the last one, and a turn of its chat where there is text to continue."""
        reply = self._recorded(draft, ended)
        context = draft.call.context
        if context is not None and reply.text and reply.finish_reason != "truncated":
            self._chats.record(_turn(draft.call, context, reply), context)
        return reply

    def stopping(self, draft: Draft) -> None:
        """Record what there is of an answer whose task is about to be cancelled by ■."""
        reply = self._recorded(draft, "cancelled")
        self._show(interrupts.Interrupted(stopped(reply), reply=reply), reply)

    def _recorded(self, draft: Draft, ended: FinishReason | None) -> Reply:
        draft.kept = reply = draft.reply(ended)
        if ended != "cancelled" or not self._is_overtaken(draft):
            self.last = reply
            self._last_kept, self._last_chunk = time.perf_counter(), draft.latest
        return reply

    def _is_overtaken(self, draft: Draft) -> bool:
        """Return whether a stopped answer ran beside the last one, which has more recent text."""
        last = self.last
        if last is None or not (last.text or last.reasoning):
            return False
        if self._last_kept < draft.call.request.started:
            return False
        return draft.is_empty or (
            last.finish_reason == "cancelled" and self._last_chunk > draft.latest
        )

    def _show(self, error: Interrupted, reply: Reply) -> None:
        """Let a cell that ■ ends show the interrupt of the last answer."""
        if isinstance(error, interrupts.Interrupted):
            shown = interrupts.Noting.stopped
            if self.last is reply or shown is None or shown.reply is None:
                interrupts.Noting.stopped = error


def _turn(call: Call, context: Context, reply: Reply) -> Turn:
    asked, said = reply.usage.prompt_tokens, reply.usage.completion_tokens
    # Thoughts are counted and not sent back, and what was left out was not counted.
    whole = asked is not None and said is not None and not (reply.reasoning or reply.dropped_turns)
    return Turn(
        context.key,
        call.messages[-1],
        Message("assistant", reply.text),
        call.request.system,
        tokens=(asked or 0) + (said or 0) if whole else None,
        model=reply.model,
    )


def chunks(manager: BackendManager, draft: Draft) -> AsyncGenerator[Chunk, None]:
    """Return the stream that an answer is drafted from; nothing is asked before its first step."""
    # Not every server ends before a stop text, as local models do.
    source = until_stop(context_window.stream(manager, draft), draft.call.config.stop, draft.rest)
    return split_thoughts(source, draft.rest)


async def filled(
    draft: Draft, source: AsyncGenerator[Chunk, None], *, all_of_it: bool = False
) -> AsyncGenerator[Chunk, None]:
    """Draft an answer where it arrives; nobody else's thread has to wake up for every chunk.

    It yields nothing, or `all_of_it`.
    """
    async with contextlib.aclosing(source):
        async for chunk in source:
            draft.add(chunk)
            if all_of_it:
                yield chunk
