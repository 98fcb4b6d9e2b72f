"""The exceptions of this package.

::

    LLMMagicException
    ├── LLMMagicError                 what failed: the base class of all errors
    │   ├── OptionError               an unknown option, an invalid value or an invalid combination
    │   │   └── SettingsError         the same, in the environment or a .env file
    │   ├── PromptError               an expression in a prompt failed
    │   ├── MissingDependency         an optional package is not installed
    │   ├── BackendUnavailable        the package of a backend is broken, or two have the same name
    │   ├── WorkersFailed             the worker processes of a map died, or cannot load its model
    │   ├── EventLoopError            the event loop cannot be made re-entrant, or only at the loss of cells
    │   ├── ModelError
    │   │   ├── ModelNotFound         there is no model of that name
    │   │   ├── ModelNotLoaded        no model is loaded, or not the one that was named
    │   │   ├── LoadInProgress        another model is being loaded
    │   │   ├── LoadFailed            the model exists but could not be loaded
    │   │   ├── DeviceUnavailable     the requested device does not exist
    │   │   └── OutOfMemory           the memory is not sufficient; raised before or during use
    │   ├── ServerError
    │   │   ├── ServerUnreachable     no connection, or it was closed before a response
    │   │   ├── ServerTimeout         connected, but no data for too long
    │   │   ├── AuthenticationFailed  the API key is missing or was rejected
    │   │   └── RequestFailed         an error response, or one that cannot be read
    │   │       └── ServerBusy        the server is processing other requests and takes no more now
    │   ├── GenerationError           `reply` holds the text that was generated before the error
    │   │   ├── PromptTooLong         the prompt exceeds the context window
    │   │   ├── GenerationFailed      the model raised an error
    │   │   ├── GenerationStopped     `%llm_stop` or `cancel` stopped the answer
    │   │   ├── IncompleteReply       the server failed in the middle of the reply
    │   │   └── InvalidReply          the reply does not have the required form, such as JSON
    │   ├── JobNotFound               there is no job with that number
    │   ├── NoAttribute               an object of this package has no attribute of that name
    │   └── NotText                   a job or another response is used like its text
    └── Interrupted                   the user stopped the operation; as `KeyboardInterrupt`, no `Exception`

A message is one line: what happened, then what to do. Exceptions of other libraries are translated
in one module each: torch and Transformers in `backends.local.errors`, HTTP in
`backends.remote.server_errors`. They are never chained, because their frames keep tensors alive for
as long as IPython keeps the last error. `release_frames` clears the frames of this package in an
error that leaves one of its threads.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from llm_magic.text import visible_line

if TYPE_CHECKING:
    from llm_magic.types import Reply

# A server may list any number of names of any length, and comparing them takes quadratic time.
_LONGEST_WORD, _MOST_COMPARED = 200, 2_000
# Less similar words are other words: tone and context, --json and --stop.
_SIMILAR = 0.75
E = TypeVar("E", bound=BaseException)
# Of the code that led to an error: characters, and lines besides the first.
_LONGEST_LINE, _MOST_LINES = 100, 4
_RED, _RESET = "\x1b[31m", "\x1b[0m"


class LLMMagicException(BaseException):
    """What all exceptions of this package have in common: those of `LLMMagicError`, and `Interrupted`.

    The message is one line without control characters, because it quotes servers and files.

    Attributes:
        problem: The message without its advice.
        advice: What to do, if that names a magic or an option, for which the panel has other words.
        option: The name of the option that the advice is about.
        choice: The value of that option that the advice is to choose, if it is one.
        details: The traceback of the translated exception as text, empty if there is none.
        explaining: The exception that `%llm_explain` was explaining when this one was raised.
        mapped: The result so far of the map that this exception ended, a `Mapped`.
    """

    explaining: BaseException | None = None
    mapped: Any = None

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(visible_line(message))
        self.problem, self.advice = visible_line(message), ""
        self.option = self.choice = ""
        self.details = details

    @classmethod
    def like(cls, error: LLMMagicException, before: str = "") -> Self:
        """Return an error of this class with the message of another, without its traceback."""
        made = cls(_joined(before, str(error)))
        made.problem = _joined(before, error.problem)
        made.advice, made.option, made.choice = error.advice, error.option, error.choice
        return made

    def append(self, text: str) -> Self:
        """Append a sentence to the message and return the error."""
        self.args = (_joined(self, text), *self.args[1:])
        self.problem = _joined(self.problem, text)
        return self

    def advise(self, text: str, option: str = "", choice: str = "") -> Self:
        """Append what to do, which names magics or an option, and return the error."""
        self.args = (_joined(self, text), *self.args[1:])
        self.advice, self.option = _joined(self.advice, text), option or self.option
        self.choice = choice or self.choice
        return self

    def _render_traceback_(self) -> list[str]:
        """Return what IPython displays: one line, and the lines of the user's code that led to it.

        The cell still fails for nbclient and papermill.
        """
        name, shell = type(self).__name__, _shell(self.__traceback__)
        if shell is None or shell.colors.lower() != "nocolor":
            name = f"{_RED}{name}{_RESET}"
        lines = [] if shell is None else _cell_lines(_cell_frames(self.__traceback__), shell)
        return [f"{name}: {self}", *lines]


class LLMMagicError(LLMMagicException, Exception):
    """The base class of all errors of this package."""


class OptionError(LLMMagicError):
    """An unknown option, an invalid value or an invalid combination of options.

    `option` is the name of the option with the invalid value, if it is one. `problem` is the message
    without that name: the panel shows the label of its control instead.
    """

    def __init__(self, problem: str, *, option: str = "", details: str = "") -> None:
        super().__init__(f"{option}={problem}" if option else problem, details=details)
        self.option, self.problem = option, visible_line(problem)


class SettingsError(OptionError):
    """An invalid setting in the environment or in a ``.env`` file."""


class PromptError(LLMMagicError):
    """An expression in a prompt failed."""


class MissingDependency(LLMMagicError):
    """An optional package is not installed."""


class BackendUnavailable(LLMMagicError):
    """The package that provides a backend cannot be used."""


class EventLoopError(LLMMagicError):
    """The event loop cannot be made re-entrant, or only at the loss of queued cells."""


class WorkersFailed(LLMMagicError):
    """The worker processes of a map died, or cannot load its model."""


class ModelError(LLMMagicError):
    """An error about a model, its files or its memory."""


class ModelNotFound(ModelError):
    """There is no model of that name."""


class ModelNotLoaded(ModelError):
    """No model is loaded, or not the one that was named."""


class LoadInProgress(ModelError):
    """Another model is being loaded."""


class LoadFailed(ModelError):
    """The model exists but could not be loaded."""


class DeviceUnavailable(ModelError):
    """The requested device does not exist."""


class OutOfMemory(ModelError):
    """The memory is not sufficient."""


class ServerError(LLMMagicError):
    """A request to a server failed.

    Attributes:
        brief: The reason in one to three words, for a progress message.
        status: The HTTP status code.
        retry_after: The seconds after which the server accepts a new request.
        parameter: The field of the request that the server does not support.
        is_temporary: Whether the same request may succeed later. It follows from `status` by default.
    """

    def __init__(
        self,
        message: str,
        *,
        brief: str = "",
        status: int | None = None,
        retry_after: float | None = None,
        parameter: str = "",
        is_temporary: bool | None = None,
    ) -> None:
        super().__init__(message)
        if is_temporary is None:
            is_temporary = status is not None and (status in {408, 429} or status >= 500)
        self.is_temporary = is_temporary
        self.brief = brief or (str(status) if status else "no answer")
        self.status, self.retry_after, self.parameter = status, retry_after, parameter


class ServerUnreachable(ServerError):
    """The connection failed, or was closed before a response."""


class ServerTimeout(ServerError):
    """The server accepted the request and then sent no data for too long."""


class AuthenticationFailed(ServerError):
    """The API key is missing, or the server rejected it.

    Attributes:
        summary: The message without the text of the server, which may contain a part of the key.
    """

    summary = ""


class RequestFailed(ServerError):
    """The server sent an error response, or a response that cannot be read.

    Attributes:
        lengths: The token counts of the prompt and of the context window, if the server reports them.
        exceeds_context: Whether the prompt exceeds the context window.
        code: The kind of the error, as the server names it.
        is_page: Whether the response is a web page, such as that of a proxy.
    """

    code = ""
    is_page = False
    lengths: tuple[int, int] | None = None
    exceeds_context = False


class ServerBusy(RequestFailed):
    """The server is processing other requests and takes no more of them now."""


class GenerationError(LLMMagicError):
    """No reply, or an incomplete one; `reply` holds the text that was generated before the error."""

    reply: Reply | None = None


class PromptTooLong(GenerationError):
    """The prompt exceeds the context window of the model.

    Attributes:
        tokens: The number of tokens in the prompt; None if unknown.
    """

    tokens: int | None = None

    @classmethod
    def measured(cls, model: str, tokens: int, context: int, advice: str = "") -> Self:
        """Return the error with the length of the prompt; the default advice is how much to cut."""
        error = cls(f"The prompt has {tokens:,} tokens, but {model} reads at most {context:,}.")
        error.tokens = tokens
        if advice:
            return error.advise(advice)
        return error.append(f"Shorten it by at least {tokens - context + 1:,}.")


class GenerationFailed(GenerationError):
    """The model raised an error."""


class GenerationStopped(GenerationError):
    """Something else than an interrupt of this call stopped the answer, such as ``%llm_stop``."""


class IncompleteReply(GenerationError):
    """The server failed in the middle of the reply."""


class InvalidReply(GenerationError, ValueError):
    """The reply does not have the required form, such as JSON; it is a `ValueError`, as `json` raises."""


class JobNotFound(LLMMagicError):
    """There is no job with that number."""


class NoAttribute(LLMMagicError, AttributeError):
    """An object of this package has no attribute of that name; it is an `AttributeError`."""


class NotText(LLMMagicError, TypeError):
    """A response is used like its text; it is a `TypeError`."""


class Interrupted(LLMMagicException):
    """The user stopped the operation; `reply` holds the text that was generated until then.

    Like `KeyboardInterrupt` it is no `Exception`: a loop with ``except Exception`` ends at ■.
    """

    def _render_traceback_(self) -> list[str]:
        """Return one line: which line was interrupted is no error of the code."""
        return super()._render_traceback_()[:1]

    def __init__(self, message: str, *, reply: Reply | None = None) -> None:
        super().__init__(message)
        self.reply = reply


def _joined(message: object, text: str) -> str:
    # A sentence that ends with a command has no full stop.
    before = f"{message}." if text and str(message)[-1:].isalnum() else message
    return visible_line(f"{before} {text}".strip())


def _shell(traceback: TracebackType | None) -> Any:
    """Return the IPython shell that executes the code of a traceback, or None outside of IPython."""
    while traceback is not None:
        # IPython defines it in the namespace of the notebook.
        get_shell = traceback.tb_frame.f_globals.get("get_ipython")
        if callable(get_shell):
            return get_shell()
        traceback = traceback.tb_next
    return None


def _cell_frames(traceback: TracebackType | None) -> list[TracebackType]:
    """Return the frames of the notebook's code above the first frame of this package.

    There are none if a magic is between them.
    """
    found: list[TracebackType] = []
    while traceback is not None and not is_own(traceback.tb_frame.f_globals):
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module == "__main__":
            found.append(traceback)
        elif module.partition(".")[0] in {"IPython", "ipykernel"}:
            found.clear()
        traceback = traceback.tb_next
    return found


def _cell_lines(frames: Sequence[TracebackType], shell: Any) -> list[str]:
    """Return where each frame is in the notebook's code; nothing for a cell of one line."""
    lines = []
    for entry in frames:
        code = entry.tb_frame.f_code
        source = linecache.getlines(code.co_filename, entry.tb_frame.f_globals)
        if len(frames) == 1 and len("".join(source).strip().splitlines()) <= 1:
            return []
        line = source[entry.tb_lineno - 1] if entry.tb_lineno <= len(source) else ""
        cell = shell.compile.format_code_name(code.co_filename) or ("File", code.co_filename)
        where = f"{' '.join(cell)}, line {entry.tb_lineno}"
        where += "" if code.co_name.startswith("<") else f", in {code.co_name}"
        lines.append(f"  {where}: {visible_line(line.strip())[:_LONGEST_LINE]}")
    # Recursion repeats lines.
    lines = list(dict.fromkeys(lines))
    return [*lines[:1], "  …", *lines[-_MOST_LINES:]] if len(lines) > _MOST_LINES + 1 else lines


def release_frames(error: E) -> E:
    """Clear the local variables of this package that `error` keeps in memory; returns `error`.

    Errors of this package also lose their traceback and their cause, because they are displayed as
    one line. Other errors keep their traceback and the variables of other packages.
    """
    for found in chained(error):
        _clear_own_frames(found.__traceback__)
        if isinstance(found, LLMMagicException):
            found.__traceback__ = found.__cause__ = found.__context__ = None
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or its type if it has no message."""
    lines = str(error).splitlines()
    return visible_line(lines[0]) if lines else type(error).__name__


def shown_error() -> BaseException | None:
    """Return the exception that Python or IPython displayed last."""
    # `last_exc` is new in Python 3.12, and not every tool sets it.
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return error if isinstance(error, BaseException) else None


def chained(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its causes and contexts, and the members of exception groups."""
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
            # The frame is still executing.
            with contextlib.suppress(RuntimeError):
                traceback.tb_frame.clear()
        traceback = traceback.tb_next


def is_own(module: Mapping[str, object]) -> bool:
    """Return whether a module's namespace belongs to this package."""
    return str(module.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]


def did_you_mean(
    word: str, known: Iterable[str], *, count: int = 3, prefix: str = "", similar: float = _SIMILAR
) -> str:
    """Return `` Did you mean "…"?`` with the `known` names that are similar to `word`, or ``""``.

    `prefix` is displayed before each name. `similar` is the least similarity, from 0 to 1.
    """
    from difflib import get_close_matches

    if len(word) > _LONGEST_WORD:
        return ""
    near_enough = (name for name in known if len(name) <= _LONGEST_WORD)
    by_fold: dict[str, list[str]] = {}
    for name in islice(near_enough, _MOST_COMPARED):
        by_fold.setdefault(name.casefold(), []).append(name)
    folded = word.casefold()
    near = get_close_matches(folded, list(by_fold), n=count, cutoff=similar)
    if not near:
        # The word is a part of the name: `qwen`, `--temp`.
        near = [name for name in by_fold if _is_part(folded, name)][:count]
    # Of names that differ only in case, the one that is written like the word is the first.
    found = [name for fold in near for name in get_close_matches(word, by_fold[fold], cutoff=0)]
    names = " or ".join(f'"{prefix}{name}"' for name in found[:count])
    return f" Did you mean {names}?" if names else ""


def _is_part(word: str, name: str) -> bool:
    """Return whether a word is the start of a name, or a longer word is anywhere in it."""
    return (len(word) >= 3 and name.startswith(word)) or (len(word) >= 4 and word in name)
