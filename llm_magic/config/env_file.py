"""Reads the variables of ``.env`` files in the encodings of common editors and shells."""

from __future__ import annotations

import codecs
import io
import os
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

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
    shown = _absolute(path)
    try:
        if not (path.is_file() or path.is_fifo()):
            return {}
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{shown} cannot be read: {error.strerror}. Change its permissions or remove it."
        ) from None
    if len(data) > _MAX_BYTES:
        raise SettingsError(f"{shown} is larger than 1 MB. Keep only settings in it.")
    # `%load_ext` must not import it.
    from dotenv import dotenv_values

    text = _decoded(data, shown)
    return _expanded(dotenv_values(stream=io.StringIO(text), interpolate=False), shown)


def _decoded(data: bytes, shown: Path) -> str:
    """Return the text of a file; `shown` is its path in messages."""
    encoding = next((name for bom, name in _ENCODINGS.items() if data.startswith(bom)), "utf-8")
    problem = "not text: it contains a NUL character"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        problem = f"not {encoding.removesuffix('-sig').upper()}"
        text = data[: error.start].decode(encoding, "replace") + "\0"
    before, invalid, _ = text.partition("\0")
    if invalid:
        line = before.count("\n") + 1
        raise SettingsError(f"{shown}, line {line}, is {problem}. Save the file as UTF-8.")
    return text


def _expanded(values: Mapping[str, str | None], shown: Path) -> dict[str, str | None]:
    """Return the values with their references replaced in the way of python-dotenv.

    python-dotenv limits neither size nor time: 27 lines, each of which refers to the previous line
    twice, take 1.3 GB.
    """
    expanded: dict[str, str | None] = {}
    variables = ChainMap[str, str | None](expanded, dict(os.environ))
    left = _MAX_BYTES

    def value_of(reference: re.Match[str]) -> str:
        nonlocal left
        found = variables.get(reference[1], reference[2]) or ""
        left -= len(found)
        if left < 0:
            raise SettingsError(
                f"After its ${{…}} references are replaced, {shown} exceeds 1 MB, at"
                f" {name[:_MAX_NAME_LENGTH]}. Shorten the values that refer to each other."
            )
        return found

    for name, value in values.items():
        expanded[name] = value and _REFERENCE.sub(value_of, value)
    return expanded


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except OSError:  # the working folder was deleted
        return path
