"""The folder for the kernels that torch compiles, so that the next process finds them again."""

from __future__ import annotations

import os

from llm_magic.backends.local.files.gguf import cache_folder

# torch reads the folder from the environment.
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_folders: list[str] = []


def set_folder() -> None:
    """Let torch store compiled kernels in the cache folder, unless the user has set another one."""
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = str(cache_folder() / "inductor")
        _folders.append(os.environ[_VARIABLE])


def restore() -> None:
    """Undo `set_folder`."""
    if os.environ.get(_VARIABLE) in _folders:
        del os.environ[_VARIABLE]
    _folders.clear()
