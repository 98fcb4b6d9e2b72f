"""The finished rows of maps: in a file that survives the process, or in memory after an interrupt."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_magic.errors import OptionError
from llm_magic.session.map.keys import KEY_BYTES
from llm_magic.session.map.outcome import Outcome
from llm_magic.session.usage import REPORTED
from llm_magic.types import TokenLogprob, Usage

if TYPE_CHECKING:
    from llm_magic.session.map.sender import PreparedRow

# Of maps that ended early: the oldest rows are discarded first.
_MOST_ROWS = 200_000
# A row that was not written completely.
_TORN = re.compile(rb'\{"key":"(?:[0-9a-f]{0,32}|[0-9a-f]{32}"(?:,"text":".*)?)', re.DOTALL)
_REASONS = frozenset({"stop", "length", "cancelled", "truncated"})


class UnfinishedMaps:
    """The finished rows of maps that ended early, by key: the same call again does not send them."""

    def __init__(self) -> None:
        self._rows: dict[bytes, Outcome] = {}

    def rows(self) -> dict[bytes, Outcome]:
        """Return a copy of the rows, newest last."""
        return dict(self._rows)

    def keep(self, rows: Mapping[bytes, Outcome]) -> None:
        """Add the rows of a map that ended early."""
        self._rows |= rows
        for key in list(self._rows)[:-_MOST_ROWS]:
            del self._rows[key]

    def discard(self, keys: Iterable[bytes]) -> None:
        """Remove the rows of a map that has completed: the same call later sends them again."""
        for key in keys:
            self._rows.pop(key, None)


class SavedRows:
    """The finished rows of maps in a file of JSON lines, which is only appended to.

    Each row is one line, written with one system call in append mode under a lock, so that several
    kernels can use one file. A line that is not complete, because a process or a machine stopped, is
    skipped. The file is flushed to the disk at the end of a map: a machine that stops without warning
    can lose the rows of the last seconds, which are then sent again.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, which need not exist; raises `OptionError` if that is impossible."""
        self.path = _path(path)
        # Lines that are no rows.
        self.skipped = 0
        with self._translated("read"):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            self._file = os.open(self.path, flags, 0o666)
        weakref.finalize(self, os.close, self._file)
        self._is_torn = False

    def read(self, *, with_failed: bool) -> dict[bytes, Outcome]:
        """Return the rows by key; of several lines with one key, the last one counts."""
        rows: dict[bytes, Outcome] = {}
        with self._translated("read"), self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                found = _row(line)
                self._is_torn = not line.endswith(b"\n")
                is_ours = found is not None or (self._is_torn and _TORN.fullmatch(line) is not None)
                if number == 0 and not is_ours:
                    raise OptionError(
                        f"{self.path} is not a file of saved rows. Choose another file name."
                    )
                if found is None:
                    self.skipped += bool(line.strip()) and not self._is_torn
                elif with_failed or not found[1].error:
                    rows[found[0]] = found[1]
                else:
                    rows.pop(found[0], None)
        return rows

    def write(self, row: PreparedRow, outcome: Outcome) -> None:
        """Append the outcome of a row; raises `OptionError` if that fails."""
        text = json.dumps(_entry(row, outcome), ensure_ascii=False, separators=(",", ":")) + "\n"
        # A lone surrogate has no UTF-8; with a backslash it is valid JSON.
        line = text.encode("utf-8", "backslashreplace")
        if self._is_torn:
            line, self._is_torn = b"\n" + line, False
        with self._translated("written"), _locked(self._file):
            while line:
                line = line[os.write(self._file, line) :]

    def flush(self) -> None:
        """Write what the operating system holds of the file to the disk."""
        # Some file systems cannot.
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    @contextlib.contextmanager
    def _translated(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise OptionError(f"{self.path} cannot be {done}: {reason}.") from None


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        found = Path(path).expanduser()
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"{path!r} is not a path: {error}", option="save") from None
    if found.exists() and not found.is_file():
        raise OptionError(f"{found} is not a regular file. Choose another path.")
    return found


def _entry(row: PreparedRow, outcome: Outcome) -> dict[str, Any]:
    """Return what is stored of a row; nothing of its prompt and its server."""
    usage = {name: getattr(outcome.usage, name) for name in REPORTED}
    entry: dict[str, Any] = {
        "key": row.key.hex(),
        "text": outcome.text,
        "finish_reason": outcome.finish_reason,
        "usage": {name: value for name, value in usage.items() if value is not None},
        "seconds": round(outcome.seconds, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if outcome.reasoning:
        entry["reasoning"] = outcome.reasoning
    if outcome.error:
        entry["error"] = outcome.error
    if outcome.probabilities:
        entry["probabilities"] = dict(outcome.probabilities)
    if outcome.tokens is not None:
        entry["tokens"] = [dataclasses.astuple(token) for token in outcome.tokens]
    return entry


def _row(line: bytes) -> tuple[bytes, Outcome] | None:
    """Return the key and the outcome in a line, None if it is no row."""
    try:
        entry = json.loads(line)
        key = bytes.fromhex(entry["key"])
        usage = {n: v for n, v in entry["usage"].items() if n in REPORTED and _is_number(v)}
        outcome = Outcome(
            _text(entry["text"]),
            entry["finish_reason"],
            Usage(**usage),
            float(entry["seconds"]),
            _text(entry.get("reasoning", "")),
            _text(entry.get("error", "")),
            probabilities=tuple(
                (label, float(share)) for label, share in entry.get("probabilities", {}).items()
            ),
            tokens=_tokens(entry["tokens"]) if "tokens" in entry else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    has_end = outcome.finish_reason in _REASONS or (outcome.finish_reason is None and outcome.error)
    return (key, outcome) if len(key) == KEY_BYTES and has_end else None


def _tokens(entries: list[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            _text(text),
            float(logprob),
            tuple((_text(one), float(its)) for one, its in alternatives),
        )
        for text, logprob, alternatives in entries
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Lock a file against other processes: file systems of several machines do not append atomically."""
    unlock: Callable[[], None] | None = None
    # Windows has no such locks, and some file systems have none.
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX)
        unlock = lambda: fcntl.lockf(file, fcntl.LOCK_UN)  # noqa: E731
    try:
        yield
    finally:
        if unlock is not None:
            unlock()
