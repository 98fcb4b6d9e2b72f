"""Reads the variables of a ``.env`` file, in the encodings that editors and shells write."""

from __future__ import annotations

import codecs
import io
import os
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from llm_magic.errors import SettingsError

ENV_FILE = ".env"
_MOST_BYTES = 1 << 20
_LONGEST_NAME = 100
# ${NAME} and ${NAME:-default}; their lengths are limited so that the search takes linear time.
_REFERENCE = re.compile(r"\$\{([^}:]{0,256})(?::-([^}]{0,1024}))?\}")
# PowerShell writes UTF-16 with a byte order mark, Notepad UTF-8 with one.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_env_file(name: str = ENV_FILE) -> dict[str, str | None]:
    """Return the variables of a file; nothing where there is no such file, or a folder.

    Raises `SettingsError` that names the file, and the line where it cannot be decoded.
    """
    path = Path(name)
    try:
        if not (path.is_file() or path.is_fifo()):
            return {}
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{_shown(path)} cannot be read: {error.strerror}. Change its permissions or remove it."
        ) from None
    if len(data) > _MOST_BYTES:
        raise SettingsError(f"{_shown(path)} is larger than 1 MB. Keep only settings in it.")
    # Not at the top: the extension loads without it.
    from dotenv import dotenv_values

    text = _decoded(data, path)
    return _expanded(dotenv_values(stream=io.StringIO(text), interpolate=False), path)


def _expanded(values: Mapping[str, str | None], path: Path) -> dict[str, str | None]:
    """Return the values with their references replaced, as python-dotenv replaces them.

    python-dotenv limits neither the size nor the time: 27 lines that each name the line before twice
    take 1.3 GB.
    """
    expanded: dict[str, str | None] = {}
    known = ChainMap[str, str | None](expanded, dict(os.environ))
    left = _MOST_BYTES
    for name, value in values.items():
        if value is not None and "${" in value:
            value = _replaced(value, known, left)
        left -= len(value or "")
        if left < 0:
            raise SettingsError(
                f"{_shown(path)} is larger than 1 MB after its ${{…}} references are replaced:"
                f" {name[:_LONGEST_NAME]} is too long. Shorten the values that refer to each other."
            )
        expanded[name] = value
    return expanded


def _replaced(value: str, known: Mapping[str, str | None], most: int) -> str:
    """Return `value` with its references replaced; ends early once it is longer than `most`."""
    pieces, size, end = [], 0, 0
    for match in _REFERENCE.finditer(value):
        before, found = value[end : match.start()], known.get(match[1], match[2] or "") or ""
        pieces += [before, found]
        size, end = size + len(before) + len(found), match.end()
        if size > most:
            break
    return "".join([*pieces, value[end:]])


def _decoded(data: bytes, path: Path) -> str:
    encoding = next((e for mark, e in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        _refuse(path, before, f"not {encoding.removesuffix('-sig').upper()}")
    if "\0" in text:
        _refuse(path, text.partition("\0")[0], "no text: it holds a NUL character")
    return text


def _refuse(path: Path, before: str, why: str) -> NoReturn:
    line = before.count("\n") + 1
    raise SettingsError(f"{_shown(path)}, line {line}, is {why}. Save the file as UTF-8.")


def _shown(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:  # the working folder is gone
        return path
