"""Records each reply once, when its response ends: as the last one, as the turn of its chat, in the usage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llm_magic.session import interruptible_wait
from llm_magic.session.chats import Chats, Context, Turn
from llm_magic.session.usage import UsageCounter, usage_of
from llm_magic.types import Message, Reply

if TYPE_CHECKING:
    from llm_magic.session.requests import PreparedRequest
    from llm_magic.session.response import Response


class Recorder:
    """The responses of a session that run, and the last reply."""

    def __init__(
        self, chats: Chats, changed: Callable[[], None], last: Reply | None = None
    ) -> None:
        """`changed` is called after every change of any response, from any thread."""
        self._chats, self.changed, self.last = chats, changed, last
        self.usage = UsageCounter()
        self._running: list[Response] = []
        # When `last` was recorded, and the time of its latest chunk.
        self._recorded_at = self._latest = 0.0

    @property
    def running(self) -> tuple[Response, ...]:
        """The responses that have started and not ended, oldest first."""
        return tuple(self._running)

    def turns(self, chat: str) -> dict[str, Response]:
        """Return the responses of a chat that run, by the keys of their turns, oldest first.

        Without those that a loop iterates over: they end only if the loop continues.
        """
        running = ((one, one.prepared.context) for one in self.running if not one.is_read)
        return {c.key: one for one, c in running if c is not None and c.chat == chat}

    def earlier_turns(self, chat: str, key: str) -> dict[str, Response]:
        """Return the running turns of a chat that precede the turn `key`.

        The order is that of the chat; new turns follow in the order of their requests. A turn that
        waits for this key follows it.
        """
        turns = self.turns(chat)
        order = {one: (self._chats.position(chat, one), i) for i, one in enumerate(turns)}
        own = order.get(key, (self._chats.position(chat, key), len(turns)))
        return {
            one: turn
            for one, turn in turns.items()
            if one != key and order[one] < own and key not in turn.awaited_turns
        }

    def start(self, response: Response) -> None:
        """Add a response to those that run."""
        self._running.append(response)
        self.changed()

    def record(self, response: Response, reply: Reply, *, cancelled: bool) -> None:
        """Make a reply the last one, and a turn of its chat if it is one."""
        if not cancelled or not self._is_overtaken(response):
            self.last = reply
            self._recorded_at, self._latest = time.perf_counter(), response.latest
        context = response.prepared.context
        if context is not None and response.is_turn:
            self._chats.record(_turn(response.prepared, context, reply), context)

    def end(self, response: Response) -> None:
        """Remove a response from those that run, and count what it took."""
        if response in self._running:
            self._running.remove(response)
            self.usage.add(usage_of(response))
        self.changed()

    def _is_overtaken(self, response: Response) -> bool:
        """Return whether a stopped answer ran beside the last one, which has more recent text."""
        last = self.last
        if last is None or not (last.text or last.reasoning):
            return False
        if self._recorded_at < response.prepared.request.started:
            return False
        return response.is_empty or (
            last.finish_reason == "cancelled" and self._latest > response.latest
        )

    def show(self, error: interruptible_wait.Interrupted) -> None:
        """Let a cell that ■ ends show the interrupt of the last answer."""
        shown = interruptible_wait.Noting.stopped
        if self.last is error.reply or shown is None or shown.reply is None:
            interruptible_wait.Noting.stopped = error


def _turn(prepared: PreparedRequest, context: Context, reply: Reply) -> Turn:
    prompt, completion = reply.usage.prompt_tokens, reply.usage.completion_tokens
    tokens = None
    # Reasoning is counted and not sent back, and dropped turns were not counted.
    if prompt is not None and completion is not None:
        tokens = None if reply.reasoning or reply.dropped_turns else prompt + completion
    return Turn(
        context.key,
        prepared.messages[-1],
        Message("assistant", reply.text),
        prepared.request.system,
        tokens=tokens,
        model=reply.model,
        finish_reason=reply.finish_reason,
        context_full=reply.context_full,
    )
