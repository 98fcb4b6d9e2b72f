"""Reads the variables of ``.env`` files in the encodings of common editors and shells."""

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
_MAX_BYTES = 1 << 20
_MAX_NAME_LENGTH = 100
# ${NAME} and ${NAME:-default}. The lengths are limited so that the search takes linear time.
_REFERENCE = re.compile(r"\$\{([^}:]{0,256})(?::-([^}]{0,1024}))?\}")
# PowerShell writes UTF-16 with a byte order mark, Notepad UTF-8 with one.
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_env_file(name: str = ENV_FILE) -> dict[str, str | None]:
    """Return the variables of a file, none if it does not exist or is a folder.

    Raises:
        SettingsError: The file cannot be read or decoded, or is too large.
    """
    path = Path(name)
    try:
        if not (path.is_file() or path.is_fifo()):
            return {}
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{_absolute(path)} cannot be read: {error.strerror}. Change its permissions or remove it."
        ) from None
    if len(data) > _MAX_BYTES:
        raise SettingsError(f"{_absolute(path)} is larger than 1 MB. Keep only settings in it.")
    # `%load_ext` must not import it.
    from dotenv import dotenv_values

    text = _decoded(data, path)
    return _expanded(dotenv_values(stream=io.StringIO(text), interpolate=False), path)


def _expanded(values: Mapping[str, str | None], path: Path) -> dict[str, str | None]:
    """Return the values with their references replaced in the way of python-dotenv.

    python-dotenv limits neither size nor time: 27 lines, each of which refers to the previous line
    twice, take 1.3 GB.
    """
    expanded: dict[str, str | None] = {}
    variables = ChainMap[str, str | None](expanded, dict(os.environ))
    left = _MAX_BYTES
    for name, value in values.items():
        if value is not None and "${" in value:
            value = _replaced(value, variables, left)
        left -= len(value or "")
        if left < 0:
            raise SettingsError(
                f"{_absolute(path)} is larger than 1 MB after its ${{…}} references are replaced:"
                f" {name[:_MAX_NAME_LENGTH]} is too long. Shorten the values that refer to each other."
            )
        expanded[name] = value
    return expanded


def _replaced(value: str, variables: Mapping[str, str | None], max_length: int) -> str:
    """Return `value` with its references replaced; stops once it exceeds `max_length`."""
    pieces, size, end = [], 0, 0
    for match in _REFERENCE.finditer(value):
        before, found = value[end : match.start()], variables.get(match[1], match[2] or "") or ""
        pieces += [before, found]
        size, end = size + len(before) + len(found), match.end()
        if size > max_length:
            break
    return "".join([*pieces, value[end:]])


def _decoded(data: bytes, path: Path) -> str:
    encoding = next((name for bom, name in _ENCODINGS.items() if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        _raise(path, before, f"not {encoding.removesuffix('-sig').upper()}")
    if "\0" in text:
        _raise(path, text.partition("\0")[0], "not text: it contains a NUL character")
    return text


def _raise(path: Path, before: str, problem: str) -> NoReturn:
    line = before.count("\n") + 1
    raise SettingsError(f"{_absolute(path)}, line {line}, is {problem}. Save the file as UTF-8.")


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:  # the working folder was deleted
        return path
