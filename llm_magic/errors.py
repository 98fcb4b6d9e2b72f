"""Everything that can go wrong, as one tree.

::

    LLMMagicError
    ├── OptionError            an unknown option, a wrong value, a wrong combination
    │   └── SettingsError      the same, in the environment or a .env file
    ├── PromptError            an expression in a prompt that is allowed and fails
    ├── MissingDependency      an optional package is not installed
    ├── UnsafeLoop             the event loop cannot be entered again, or only at the price of cells
    ├── ModelError
    │   ├── ModelNotFound      no such model here
    │   ├── ModelNotLoaded     nothing (or not that) is loaded
    │   ├── LoadInProgress     another load is running
    │   ├── LoadFailed         the model exists but could not be loaded
    │   ├── DeviceUnavailable  the device asked for is not here
    │   └── DoesNotFit         not enough memory, found before or while it was used
    ├── ServerError
    │   ├── ServerUnreachable  nothing listens there, or the connection broke before an answer
    │   ├── ServerSilent       it took the request and said nothing for too long
    │   ├── KeyRejected        the key is missing or refused
    │   └── RequestRefused     any other answer that is none
    │       └── ServerBusy     it works on other requests and takes no more of them now
    ├── GenerationError        (`reply` holds what had been answered until then)
    │   ├── PromptTooLong      the prompt does not fit the context window
    │   ├── GenerationFailed   the model broke while it answered
    │   └── AnswerBroken       the server stopped in the middle of its answer
    ├── JobNotFound            no job of that number
    └── Interrupted            stopped by the user

A message is one plain sentence: what happened, and what to type next. Exceptions of other
libraries are translated where they are caught, and never chained: their frames would keep
tensors alive for as long as the notebook remembers its last error. `release_frames` does the same
for the frames of this package where an error leaves one of its threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from llm_magic.text.terminal import visible_line

if TYPE_CHECKING:
    from llm_magic.types import Reply

# Words are compared character by character: a server may list any number of names of any length.
_LONGEST_WORD, _MOST_COMPARED = 200, 2_000
E = TypeVar("E", bound=BaseException)
_RED, _RESET = "\x1b[31m", "\x1b[0m"


class LLMMagicError(Exception):
    """The base of every error that this package raises on purpose.

    The message is one line without control characters: it quotes servers, files and users.
    `details` holds the traceback of the foreign error behind it, as text, where there was one.
    `explaining` is the exception that was to be explained when this one came up.
    """

    explaining: BaseException | None = None

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(visible_line(message))
        self.details = details

    def also(self, words: str) -> Self:
        """Say more in the one line; returns the error itself."""
        self.args = (visible_line(f"{self} {words}".strip()), *self.args[1:])
        return self

    def _render_traceback_(self) -> list[str]:
        """Show one line in IPython, and still be an error for nbclient, nbval and papermill."""
        return [f"{_RED}{type(self).__name__}{_RESET}: {self}"]


class OptionError(LLMMagicError):
    """An option that does not exist, has a wrong value or does not go with the others."""


class SettingsError(OptionError):
    """A setting in the environment or in a ``.env`` file that cannot be used."""


class PromptError(LLMMagicError):
    """An expression in a prompt that is allowed and fails."""


class MissingDependency(LLMMagicError):
    """An optional package is not installed."""


class UnsafeLoop(LLMMagicError):
    """The event loop cannot be made re-entrant here, or has been in a way that loses cells."""


class ModelError(LLMMagicError):
    """Something about a model, its files or its place in memory."""


class ModelNotFound(ModelError):
    """There is no such model."""


class ModelNotLoaded(ModelError):
    """Nothing is loaded, or not the model that was named."""


class LoadInProgress(ModelError):
    """Another model is being loaded."""


class LoadFailed(ModelError):
    """The model exists but could not be loaded."""


class DeviceUnavailable(ModelError):
    """The device that was asked for is not here."""


class DoesNotFit(ModelError):
    """There is not enough memory."""


class ServerError(LLMMagicError):
    """A server could not be used.

    `status` is what HTTP says; `retry_after` seconds is when it wants to be asked again; `parameter`
    is the part of the request that it does not take; `brief` is the reason in a word or two.
    """

    def __init__(
        self,
        message: str,
        *,
        brief: str = "",
        status: int | None = None,
        retry_after: float | None = None,
        parameter: str = "",
    ) -> None:
        super().__init__(message)
        self.brief = brief or (str(status) if status else "no answer")
        self.status, self.retry_after, self.parameter = status, retry_after, parameter


class ServerUnreachable(ServerError):
    """Nothing listens there, or the connection broke before an answer came."""


class ServerSilent(ServerError):
    """The server took the request and then said nothing for too long."""


class KeyRejected(ServerError):
    """The key is missing, or the server refuses it."""


class RequestRefused(ServerError):
    """The server answered, but not the question.

    `lengths` is how many tokens the prompt has and how many the model reads, where the server
    reports both.
    """

    lengths: tuple[int, int] | None = None


class ServerBusy(RequestRefused):
    """The server works on other requests and takes no more of them now."""


class GenerationError(LLMMagicError):
    """An answer could not be produced, or not to its end; `reply` holds what there was of it."""

    reply: Reply | None = None


class PromptTooLong(GenerationError):
    """The prompt does not fit the context window of the model."""


class GenerationFailed(GenerationError):
    """The model broke while it answered."""


class AnswerBroken(GenerationError):
    """The server stopped in the middle of its answer."""


class JobNotFound(LLMMagicError):
    """There is no job of that number."""


class Interrupted(LLMMagicError):
    """The user stopped it; `reply` holds what had been answered until then."""

    def __init__(self, message: str, *, reply: Reply | None = None) -> None:
        super().__init__(message)
        self.reply = reply


def release_frames(error: E) -> E:
    """Free the local variables of this package that an error keeps in memory; returns the error.

    An error of this package loses its traceback and what it was raised from: it is shown as one
    line. Any other error keeps its traceback, and the variables in the code of other packages.
    """
    for found in chained(error):
        _clear_own_frames(found.__traceback__)
        if isinstance(found, LLMMagicError):
            found.__traceback__ = found.__cause__ = found.__context__ = None
    return error


def chained(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, those that it was raised from, and those that a group of errors has."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        waiting += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions
        yield found


def _clear_own_frames(traceback: TracebackType | None) -> None:
    while traceback is not None:
        if is_own(traceback.tb_frame.f_globals):
            # A frame that still runs cannot be cleared.
            with contextlib.suppress(RuntimeError):
                traceback.tb_frame.clear()
        traceback = traceback.tb_next


def is_own(module: Mapping[str, object]) -> bool:
    """Return whether the namespace of a module belongs to this package."""
    return str(module.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return ``" Did you mean …?"`` with the nearest of the `known` words, or nothing."""
    if len(word) > _LONGEST_WORD:
        return ""
    near_enough = (name for name in known if len(name) <= _LONGEST_WORD)
    by_fold = {name.casefold(): name for name in islice(near_enough, _MOST_COMPARED)}
    near = get_close_matches(word.casefold(), list(by_fold), n=count, cutoff=0.5)
    likeness = [SequenceMatcher(None, name, word.casefold()).ratio() for name in near]
    # What is far behind the nearest one only distracts from it.
    near = [n for n, like in zip(near, likeness, strict=True) if like > likeness[0] - 0.25]
    return f" Did you mean {' or '.join(by_fold[n] for n in near)}?" if near else ""
