"""Reads the variables of a ``.env`` file, in the encodings that editors and shells write."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import NoReturn

from llm_magic.errors import SettingsError

ENV_FILE = ".env"
_MOST_BYTES = 1 << 20
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

    return dotenv_values(stream=io.StringIO(_decoded(data, path)))


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
