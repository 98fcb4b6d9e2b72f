"""Chats as files: JSON messages, as many other programs read and write them."""

from __future__ import annotations

import dataclasses
import json
import stat
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_magic.config.commands import either
from llm_magic.errors import OptionError
from llm_magic.text import has_surrogates
from llm_magic.types import Message

_ROLES = ("system", "user", "assistant")


def write(
    path: str | Path,
    found: Sequence[Message] | Mapping[str, Sequence[Message]],
    replace: bool = False,
) -> Path:
    """Write messages, or several chats by name; an error leaves the file as it was."""
    target = _path(path)
    _check_kind(target)
    if target.exists() and not replace:
        raise OptionError(f"{target} already exists. Add {replacing()} to overwrite it.")
    if isinstance(found, Mapping):
        value: Any = {name: _plain(messages) for name, messages in found.items()}
    else:
        value = _plain(found)
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    # A lone surrogate has no UTF-8; with a backslash it is valid JSON.
    data = text.encode("utf-8", "backslashreplace")
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            draft.write_bytes(data)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OptionError(f"{target} cannot be written: {error.strerror or error}.") from None
    return target


def _path(path: str | Path) -> Path:
    """Return the path of a file; raises `OptionError` for an impossible name."""
    try:
        found = Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{path}: {str(error).rstrip('.')}. Write the full path.") from None
    if not found.name or "\0" in str(found) or has_surrogates(str(found)):
        raise OptionError(f"{str(path)!r} is not a valid file name. Choose another path.")
    return found


def _check_kind(target: Path) -> None:
    """Raise `OptionError` for a link, a device or a folder, which a file would replace."""
    try:
        mode = target.lstat().st_mode
    except OSError:
        # There is no file, or the error of writing gives the reason.
        return
    if stat.S_ISLNK(mode):
        raise OptionError(
            f"{target} is a symbolic link to {target.readlink()}. Write the path of the file itself."
        )
    if not stat.S_ISREG(mode):
        raise OptionError(f"{target} is not a regular file. Choose another path.")


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def read(path: str | Path) -> list[Message] | dict[str, list[Message]]:
    """Read a list of messages, or an object of such lists; raises `OptionError` in one line."""
    source = _path(path)
    if source.exists() and not (source.is_file() or source.is_dir()):
        # A device may have no end, and a pipe nothing to read.
        raise OptionError(f"{source} is not a regular file. Choose a file with a chat.")
    try:
        value = json.loads(source.read_bytes())
    except OSError as error:
        raise OptionError(f"{source} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise OptionError(f"{source} is not JSON.") from None
    if isinstance(value, list):
        return checked_messages(value, str(source))
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        return {name: checked_messages(v, f"{source}, chat {name!r}") for name, v in value.items()}
    raise OptionError(
        f'{source} contains no chat. It must be a list of {{"role": …, "content": …}}, or an object'
        " with such a list for each name."
    )


def replacing() -> str:
    """Return the option that overwrites what exists, in a magic or in Python."""
    return either("--force (in Python: replace=True)", "replace=True")


def checked_messages(listed: Iterable[Any], where: str) -> list[Message]:
    """Return the messages that dictionaries are; raises `OptionError` that begins with `where`."""
    return [_message(one, f"{where}, message {i}") for i, one in enumerate(listed, 1)]


def _message(value: Any, where: str) -> Message:
    if isinstance(value, Message):
        value = dataclasses.asdict(value)
    if not isinstance(value, dict):
        raise OptionError(f'{where}: it must be {{"role": …, "content": …}}.')
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES:
        raise OptionError(
            f"{where}: the role {str(role)[:40]!r} is not one of {', '.join(_ROLES)}."
        )
    if not isinstance(content, str):
        raise OptionError(f"{where}: its content is not text.")
    more = [name for name in value if name not in {"role", "content"} and value[name]]
    if more:
        # Without a picture or the result of a tool it would be another conversation.
        raise OptionError(f"{where}: a chat is only text, but it has {', '.join(more)[:80]}.")
    return Message(role, content)
