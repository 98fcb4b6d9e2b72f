"""Conversations by name, made of keyed turns, so that running a cell again replaces its turn."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.types import Message


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; `key` names the cell it came from."""

    key: str
    question: Message
    answer: Message


@dataclass(slots=True)
class Chat:
    """One conversation."""

    name: str
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def record(self, turn: Turn) -> None:
        """Add a turn, or replace the one with the same key in its place."""
        keys = [old.key for old in self.turns]
        if turn.key in keys:
            self.turns[keys.index(turn.key)] = turn
        else:
            self.turns.append(turn)


class Chats:
    """All conversations of a session."""

    def __init__(self) -> None:
        self._chats: dict[str, Chat] = {}

    def all(self) -> list[Chat]:
        """Return the conversations."""
        return list(self._chats.values())

    def before(self, name: str, key: str, system: str | None = None) -> list[Message]:
        """Return what precedes the turn `key`: the system prompt, and the turns above it."""
        chat = self._chats.get(name) or Chat(name)
        system = system or chat.system
        messages = [Message("system", system)] if system else []
        for turn in chat.turns:
            if turn.key == key:
                break
            messages += [turn.question, turn.answer]
        return messages

    def record(self, name: str, turn: Turn, system: str | None = None) -> None:
        """Keep an answered turn; a system prompt stays until another is given."""
        chat = self._chats.setdefault(name, Chat(name))
        chat.system = system or chat.system
        chat.record(turn)

    def reset(self, name: str | None = None) -> list[str]:
        """Forget one conversation, or all; returns the names of what was forgotten."""
        if name is None:
            names = list(self._chats)
            self._chats.clear()
            return names
        if name not in self._chats:
            known = ", ".join(self._chats) or "none"
            raise OptionError(
                f"There is no chat {name!r}; there are: {known}.{did_you_mean(name, self._chats)}"
            )
        del self._chats[name]
        return [name]
