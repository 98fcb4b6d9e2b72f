"""Conversations by name, made of keyed turns, so that running a cell again replaces its turn.

Running a cell again makes what followed its turn stale: it was said in answer to something else.
A stale turn is kept and listed, and is sent no more until its cell has run again. So a fresh turn
was always answered in sight of the fresh turns above it, and a notebook means what it shows.
"""

from __future__ import annotations

import dataclasses
import threading
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.session import chat_files
from llm_magic.text.surrogates import is_plain_name
from llm_magic.types import Message


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; `key` names the cell it came from.

    `system` is the system prompt that begins with it, "" for none from here on. `tokens` is what
    the conversation up to here took in the context of `model`, where that was told.
    """

    key: str
    question: Message
    answer: Message
    system: str | None = None
    stale: bool = False
    tokens: int | None = None
    model: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """What a turn is asked in: the system prompt in force, and the fresh turns above it.

    `stale` counts the turns above that are left out, `below` the fresh ones that become stale;
    `replaces` says that there is a turn of this key.
    """

    chat: str
    key: str
    system: str | None
    turns: tuple[Turn, ...]
    stale: int = 0
    below: int = 0
    replaces: bool = False

    def messages(self, dropped: int = 0) -> tuple[Message, ...]:
        """Return what precedes the question, without the `dropped` oldest turns."""
        system = (Message("system", self.system),) if self.system else ()
        turns = self.turns[dropped:]
        return (*system, *(m for turn in turns for m in (turn.question, turn.answer)))


@dataclass(slots=True)
class Chat:
    """One conversation."""

    name: str
    turns: tuple[Turn, ...] = ()

    @property
    def fresh(self) -> tuple[Turn, ...]:
        """The turns that are sent."""
        return tuple(turn for turn in self.turns if not turn.stale)

    @property
    def system(self) -> str | None:
        """The system prompt that the next question would have."""
        return _in_force(turn.system for turn in self.fresh)

    def record(self, turn: Turn) -> None:
        """Add a turn, or replace the one with the same key; what followed that is stale."""
        above = tuple(takewhile(lambda old: old.key != turn.key, self.turns))
        below = self.turns[len(above) + 1 :]
        self.turns = (*above, turn, *_stale(below))

    def lose(self, cell: str) -> None:
        """Make the turns of a cell that is gone stale, and what followed them."""
        gone = (t.key == cell or t.key.startswith(f"{cell} ") for t in self.turns)
        first = next((i for i, is_gone in enumerate(gone) if is_gone), len(self.turns))
        self.turns = (*self.turns[:first], *_stale(self.turns[first:]))


class Chats:
    """All conversations of a session; every method may be called from any thread."""

    def __init__(self) -> None:
        self._chats: dict[str, Chat] = {}
        # Cells answer on their thread, what runs in the background on another.
        self._lock = threading.RLock()

    def all(self) -> list[Chat]:
        """Return the conversations."""
        return list(self._chats.values())

    def get(self, name: str) -> Chat:
        """Return a conversation; raises `OptionError` if there is none of that name."""
        if name not in self._chats:
            known = ", ".join(self._chats) or "none"
            raise OptionError(
                f"There is no chat {name!r}; there are: {known}.{did_you_mean(name, self._chats)}"
            )
        return self._chats[name]

    def messages(self, name: str) -> list[Message]:
        """Return a conversation as messages, as the next question would continue it."""
        return list(self.context(self.get(name).name, "").messages())

    def context(self, name: str, key: str, system: str | None = None) -> Context:
        """Return what the turn `key` would be asked in; a new one if there is none of that key."""
        turns = self._chats[name].turns if name in self._chats else ()
        above = tuple(takewhile(lambda turn: turn.key != key, turns))
        fresh = tuple(turn for turn in above if not turn.stale)
        below = sum(not turn.stale for turn in turns[len(above) + 1 :])
        force = _in_force([*(turn.system for turn in fresh), system])
        replaces = len(above) < len(turns)
        return Context(name, key, force, fresh, len(above) - len(fresh), below, replaces)

    def record(self, turn: Turn, asked: Context) -> None:
        """Keep an answered turn; stale, if what it was asked in is no more what is above it."""
        with self._lock:
            if asked.turns and asked.chat not in self._chats:
                # Forgotten while it was answered.
                return
            now = self.context(asked.chat, turn.key, turn.system)
            if now.messages() != asked.messages():
                turn = dataclasses.replace(turn, stale=True)
            self._chats.setdefault(asked.chat, Chat(asked.chat)).record(turn)

    def put(self, name: str, messages: Sequence[Message], *, replace: bool = False) -> None:
        """Begin a conversation with messages: a system prompt if any, questions and answers."""
        self._put({name: messages}, replace)

    def _put(self, several: dict[str, Sequence[Message]], replace: bool) -> None:
        for name in several:
            check_name(name)
        made = {name: Chat(name, _turns(name, found)) for name, found in several.items()}
        with self._lock:
            there = [repr(name) for name in made if name in self._chats]
            if there and not replace:
                raise OptionError(
                    f"There is a chat {' and '.join(there)} already. --force replaces it."
                )
            self._chats.update(made)

    def save(self, path: str | Path, name: str | None = None, *, replace: bool = False) -> Path:
        """Write one conversation as a JSON list of messages, or all of them as an object by name."""
        if name is not None:
            return chat_files.write(path, self.messages(name), replace)
        if not self._chats:
            raise OptionError("There is no chat to export. %%llm -c NAME begins one.")
        return chat_files.write(path, {n: self.messages(n) for n in self._chats}, replace)

    def load(
        self, path: str | Path, name: str | None = None, *, replace: bool = False
    ) -> list[str]:
        """Read conversations that `save` or another program wrote; returns their names.

        A list of messages is called `name`, or as the file; of an object, `name` takes one.
        """
        found = chat_files.read(path)
        if isinstance(found, list):
            found = {name or Path(path).stem: found}
        elif name is not None:
            if name not in found:
                near = did_you_mean(name, found)
                raise OptionError(f"{path} has no chat {name!r}; it has: {', '.join(found)}.{near}")
            found = {name: found[name]}
        self._put(dict(found), replace)
        return list(found)

    def lose(self, cell: str) -> None:
        """Make what a deleted cell asked stale in every chat, and what followed that."""
        with self._lock:
            for chat in self._chats.values():
                chat.lose(cell)

    def reset(self, name: str | None = None, *, stale: bool = False) -> list[str]:
        """Forget one conversation, or all, or only their stale turns; returns their names."""
        with self._lock:
            names = list(self._chats) if name is None else [self.get(name).name]
            if not stale:
                for gone in names:
                    del self._chats[gone]
                return names
            names = [n for n in names if len(self._chats[n].fresh) < len(self._chats[n].turns)]
            for changed in names:
                self._chats[changed].turns = self._chats[changed].fresh
            return names


def check_name(name: str) -> None:
    """Raise `OptionError` for a name that no table or file can show as it is."""
    if not is_plain_name(name):
        raise OptionError(
            f"{name!r} cannot name a chat: it has a control character or half a character."
            " Choose another name."
        )


def spelled(name: str) -> str:
    """Return the name of a chat as one word of a magic line."""
    return repr(name) if any(c in name for c in " \t'\"") or not name else name


def in_turns(count: int) -> str:
    """Return a number of turns in words."""
    return "1 turn" if count == 1 else f"{count} turns"


def _stale(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    return tuple(dataclasses.replace(turn, stale=True) for turn in turns)


def _in_force(given: Iterable[str | None]) -> str | None:
    """Return the last system prompt that was given."""
    return next((system for system in reversed(list(given)) if system is not None), None)


def _turns(name: str, messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Pair questions with their answers."""
    system, rest = None, list(messages)
    if rest and rest[0].role == "system":
        system = rest.pop(0).content
    wrong = next((i for i, m in enumerate(rest) if m.role != ("user", "assistant")[i % 2]), None)
    if wrong is not None:
        where = wrong + 1 + len(messages) - len(rest)
        expected = ("user", "assistant")[wrong % 2]
        raise OptionError(
            f"Chat {name!r}, message {where}: {expected} is expected there, not"
            f" {rest[wrong].role}. Questions and answers take turns, after one system prompt if any."
        )
    if not rest or len(rest) % 2:
        what = "its last question has no answer" if rest else "there is no question in it"
        raise OptionError(f"Chat {name!r}: {what}. It ends with an answer.")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    turns = [Turn(uuid.uuid4().hex, question, answer) for question, answer in pairs]
    return (dataclasses.replace(turns[0], system=system), *turns[1:])
