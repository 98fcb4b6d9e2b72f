"""Chats: conversations with a name, made of turns with keys; a cell that runs again replaces its turn.

The turns after a replaced turn become stale: they continue a conversation that no longer exists. A
stale turn is stored and listed, but not sent until its cell has run again. So each fresh turn continues
the fresh turns above it, as the notebook shows them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

from llm_magic.config.commands import either
from llm_magic.errors import OptionError, did_you_mean
from llm_magic.session import chat_files
from llm_magic.text import counted, is_plain_name
from llm_magic.types import FinishReason, Message


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; `key` identifies its cell.

    `system` is the system prompt from this turn on, "" for none. `tokens` is the size of the
    conversation up to here in the context of `model`, where the backend reported it.
    `finish_reason` is how the answer ended; `context_full` is as in `Reply`.
    """

    key: str
    question: Message
    answer: Message
    system: str | None = None
    stale: bool = False
    tokens: int | None = None
    model: str = ""
    finish_reason: FinishReason = "stop"
    context_full: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """What precedes a turn: the system prompt, and the fresh turns above it.

    `default` is the system prompt of the session, if the chat has none of its own.

    `stale` counts the turns above that are not sent, `below` the fresh ones that become stale;
    `replaces` is true where a turn of this key exists; `is_stale` where the turn itself became stale.
    """

    chat: str
    key: str
    system: str | None
    turns: tuple[Turn, ...]
    stale: int = 0
    below: int = 0
    replaces: bool = False
    default: str | None = None
    is_stale: bool = False

    @property
    def changes_system(self) -> bool:
        """Whether the system prompt differs from that of the turns above."""
        return bool(self.turns) and self.system != _in_force(turn.system for turn in self.turns)

    def messages(self, dropped: int = 0) -> tuple[Message, ...]:
        """Return what precedes the question, without the `dropped` oldest turns.

        An empty system prompt is one, too: the model gets none then, also not one of its own.
        """
        text = self.default if self.system is None else self.system
        system = () if text is None else (Message("system", text),)
        turns = self.turns[dropped:]
        return (*system, *(m for turn in turns for m in (turn.question, turn.answer)))


@dataclass(slots=True)
class Chat:
    """One conversation."""

    name: str
    turns: tuple[Turn, ...] = ()

    def __repr__(self) -> str:
        stale = f", {len(self.turns) - len(self.fresh)} stale" * (self.fresh != self.turns)
        return f"<Chat {spelled(self.name)}: {counted(len(self.turns), 'turn')}{stale}>"

    @property
    def fresh(self) -> tuple[Turn, ...]:
        """The turns that are sent."""
        return tuple(turn for turn in self.turns if not turn.stale)

    @property
    def system(self) -> str | None:
        """The system prompt that the next question would have."""
        return _in_force(turn.system for turn in self.fresh)

    def record(self, turn: Turn) -> None:
        """Add a turn, or replace the one with the same key, which makes the turns below it stale."""
        above = tuple(takewhile(lambda old: old.key != turn.key, self.turns))
        below = self.turns[len(above) + 1 :]
        self.turns = (*above, turn, *_stale(below))

    def lose(self, cell: str) -> None:
        """Make the first turn of a deleted cell stale, and all turns below it."""
        above = tuple(
            takewhile(lambda t: t.key != cell and not t.key.startswith(f"{cell} "), self.turns)
        )
        self.turns = (*above, *_stale(self.turns[len(above) :]))


class Chats:
    """All conversations of a session; every method may be called from any thread."""

    def __init__(self) -> None:
        self._chats: dict[str, Chat] = {}
        # Background responses are recorded on the event-loop thread.
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        shown = (
            f"{spelled(chat.name)} ({counted(len(chat.turns), 'turn')})" for chat in self.all()
        )
        return f"<Chats: {', '.join(shown) or 'none'}>"

    def __getitem__(self, name: str) -> Chat:
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._chats

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._chats))

    def __len__(self) -> int:
        return len(self._chats)

    def all(self) -> list[Chat]:
        """Return the conversations."""
        return list(self._chats.values())

    def get(self, name: str) -> Chat:
        """Return a conversation; raises `OptionError` if there is none of that name."""
        if name not in self._chats:
            known = f" Chats: {', '.join(self._chats) or 'none'}."
            raise OptionError(
                f"There is no chat {name!r}.{did_you_mean(str(name), self._chats) or known}"
            )
        return self._chats[name]

    def messages(self, name: str, default: str | None = None) -> list[Message]:
        """Return a conversation as messages, as the next question would continue it.

        `default` is the system prompt if the chat has none of its own.
        """
        return list(self.context(self.get(name).name, "", default=default).messages())

    def context(
        self, name: str, key: str, system: str | None = None, default: str | None = None
    ) -> Context:
        """Return what precedes the turn `key`, which is a new one if no turn has that key.

        `system` is the system prompt from this turn on; `default` the one if the chat has none.
        """
        turns = self._chats[name].turns if name in self._chats else ()
        above = tuple(takewhile(lambda turn: turn.key != key, turns))
        fresh = tuple(turn for turn in above if not turn.stale)
        below = sum(not turn.stale for turn in turns[len(above) + 1 :])
        force = _in_force([*(turn.system for turn in fresh), system])
        replaces = len(above) < len(turns)
        stale, default = len(above) - len(fresh), default if force is None else None
        return Context(name, key, force, fresh, stale, below, replaces, default)

    def position(self, name: str, key: str) -> float:
        """Return the index of the turn `key`, and infinity for a new turn."""
        turns = self._chats[name].turns if name in self._chats else ()
        return next((i for i, turn in enumerate(turns) if turn.key == key), math.inf)

    def updated(self, sent: Context) -> Context | None:
        """Return what preceded a turn, with what is stale now; None if the turn is deleted."""
        turns = self._chats[sent.chat].turns if sent.chat in self._chats else ()
        own = list(dropwhile(lambda turn: turn.key != sent.key, turns))
        if not own:
            return None
        below = min(sent.below, sum(turn.stale for turn in own[1:]))
        return dataclasses.replace(sent, below=below, is_stale=own[0].stale)

    def record(self, turn: Turn, sent: Context) -> None:
        """Store an answered turn; it is stale if the turns above it changed since it was `sent`."""
        with self._lock:
            if sent.turns and sent.chat not in self._chats:
                # Deleted while it was answered.
                return
            now = self.context(sent.chat, turn.key, turn.system, sent.default)
            if now.messages() != sent.messages():
                turn = dataclasses.replace(turn, stale=True)
            self._chats.setdefault(sent.chat, Chat(sent.chat)).record(turn)

    def put(
        self,
        name: str,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        replace: bool = False,
    ) -> None:
        """Create a chat of messages: a system prompt if any, then questions and answers."""
        checked = chat_files.checked_messages(messages, f"Chat {name!r}")
        self._put({name: checked}, replace)

    def _put(self, several: dict[str, Sequence[Message]], replace: bool) -> None:
        for name in several:
            check_name(name)
        made = {name: Chat(name, _turns(name, found)) for name, found in several.items()}
        with self._lock:
            existing = [repr(name) for name in made if name in self._chats]
            if existing and not replace:
                raise OptionError(
                    f"There is already a chat {' and '.join(existing)}."
                    f" Add {chat_files.replacing()} to overwrite."
                )
            self._chats.update(made)

    def save(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        replace: bool = False,
        default: str | None = None,
    ) -> Path:
        """Write one chat as a JSON list of messages, or all of them as an object by name.

        `default` is the system prompt of chats that have none of their own.
        """
        if name is not None:
            return chat_files.write(path, self.messages(name, default), replace)
        if not self._chats:
            start = either("%%llm -c NAME", 'llm.generate(PROMPT, chat="NAME")')
            raise OptionError(f"There is no chat to export. {start} starts one.")
        return chat_files.write(path, {n: self.messages(n, default) for n in self._chats}, replace)

    def load(
        self, path: str | Path, name: str | None = None, *, replace: bool = False
    ) -> list[str]:
        """Read chats that `save` or another program wrote; returns their names.

        A list of messages gets the name `name`, or that of the file; of an object, `name` selects one.
        """
        found = chat_files.read(path)
        if isinstance(found, list):
            found = {name or Path(path).stem: found}
        elif name is not None:
            if name not in found:
                advice = did_you_mean(name, found) or f" It contains: {', '.join(found)}."
                raise OptionError(f"{path} contains no chat {name!r}.{advice}")
            found = {name: found[name]}
        self._put(dict(found), replace)
        return list(found)

    def lose(self, cell: str) -> None:
        """Make the turns of a deleted cell stale in every chat, and all turns below them."""
        with self._lock:
            for chat in self._chats.values():
                chat.lose(cell)

    def reset(self, name: str | None = None, *, stale: bool = False) -> list[str]:
        """Delete one chat, or all, or only their stale turns; returns their names."""
        with self._lock:
            names = list(self._chats) if name is None else [self.get(name).name]
            if stale:
                names = [n for n in names if any(turn.stale for turn in self._chats[n].turns)]
            for changed in names:
                if stale:
                    self._chats[changed].turns = self._chats[changed].fresh
                else:
                    del self._chats[changed]
            return names


def check_name(name: str, kind: str = "chat") -> None:
    """Raise `OptionError` for what is no name, or a name that no table or file can show as it is."""
    if not isinstance(name, str) or not name:
        problem = "it is empty" if name == "" else "it is not a text"
    elif not is_plain_name(name):
        problem = "it contains a control character or half a character"
    else:
        return
    raise OptionError(f"{name!r} cannot be the name of a {kind}: {problem}. Choose another name.")


def spelled(name: str) -> str:
    """Return the name of a chat as one word of a magic line."""
    return repr(name) if any(c in name for c in " \t'\"") else name


def _stale(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    return tuple(dataclasses.replace(turn, stale=True) for turn in turns)


def _in_force(given: Iterable[str | None]) -> str | None:
    """Return the last system prompt that was given."""
    return next((system for system in reversed(list(given)) if system is not None), None)


def _turns(name: str, messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Pair questions with their answers."""
    system = messages[0].content if messages and messages[0].role == "system" else None
    first = 0 if system is None else 1
    for number, message in enumerate(messages[first:], first + 1):
        expected = "assistant" if (number - first) % 2 == 0 else "user"
        if message.role != expected:
            raise OptionError(
                f"Chat {name!r}, message {number}: the role must be {expected}, not {message.role}."
                " Questions and answers alternate, after at most one system prompt."
            )
    if len(messages) == first or (len(messages) - first) % 2:
        what = "its last question has no answer" if messages[first:] else "it contains no question"
        raise OptionError(f"Chat {name!r}: {what}. A chat must end with an answer.")
    pairs = zip(messages[first::2], messages[first + 1 :: 2], strict=True)
    turns = [Turn(uuid.uuid4().hex, question, answer) for question, answer in pairs]
    return (dataclasses.replace(turns[0], system=system), *turns[1:])
