"""What is said about conversations: lists, the short form of one, notes about stale turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_magic.notebook.display.tables import Table
from llm_magic.session.chats import in_turns, spelled

if TYPE_CHECKING:
    from llm_magic.session import Session
    from llm_magic.session.chats import Chat, Context

_SHORT = 60
_UNKNOWN = "-"
_STALE = (
    "Stale: what was above has changed since. Not sent until its cell runs again;"
    " %llm_reset CHAT --stale forgets it."
)


def chats_table(session: Session) -> Table:
    """Return ``%llm_chats``: every conversation and what it takes."""
    chats = session.chats.all()
    rows = [_row(session, chat) for chat in chats]
    if not rows:
        note = "There is none. %%llm -c NAME begins one."
    else:
        note = _STALE if any(len(chat.fresh) < len(chat.turns) for chat in chats) else ""
    return Table(("chat", "turns", "stale", "tokens", "of context"), rows, note)


def _row(session: Session, chat: Chat) -> list[str]:
    tokens, context = session.chat_tokens(chat.name), _context_length(session)
    return [
        chat.name,
        str(len(chat.turns)),
        str(len(chat.turns) - len(chat.fresh) or ""),
        f"{tokens:,}" if tokens is not None else _UNKNOWN,
        f"{tokens / context:.1%}" if tokens is not None and context else _UNKNOWN,
    ]


def _context_length(session: Session) -> int | None:
    status = session.status()
    known = (info for info in status.models if info.name == status.active_model)
    return next((info.context_length for info in known), None)


def chat_table(chat: Chat) -> Table:
    """Return ``%llm_chats NAME``: its turns in a line each."""
    rows = [
        [
            str(number),
            _short(turn.question.content),
            _short(turn.answer.content),
            "stale" if turn.stale else "",
        ]
        for number, turn in enumerate(chat.turns, 1)
    ]
    notes = [f"System prompt: {_short(chat.system)}"] if chat.system else []
    notes += [_STALE] if len(chat.fresh) < len(chat.turns) else []
    return Table(("turn", "asked", "answered", ""), rows, " · ".join(notes))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def context_notes(
    context: Context, *, by_text: bool = False, in_terminal: bool = False
) -> tuple[str, ...]:
    """Return what to know before a question is asked there.

    `by_text`: its cell has no id; `in_terminal`: there is no cell, which could be run again.
    """
    notes = []
    if context.stale:
        notes.append(
            f"{in_turns(context.stale)} of chat {context.chat!r} {_are(context.stale)} stale and left"
            " out: run the cells above from the top, or forget them with"
            f" %llm_reset {spelled(context.chat)} --stale."
        )
    if by_text and (context.below or (context.replaces and in_terminal)):
        becomes = (
            f": {in_turns(context.below)} below it {_are(context.below)} stale now"
            if context.below
            else ", and replaces its turn"
        )
        notes.append(
            "this frontend sends no cell ids, so this counts as the earlier cell with the same text,"
            f" run again{becomes}."
        )
    return tuple(notes)


def _are(count: int) -> str:
    return "are" if count != 1 else "is"
