"""``%reload_ext llm_magic``: keep what is loaded, and import changed code of `llm_magic.notebook` again.

IPython reloads an extension by unloading and loading it. The other packages hold models, connections
and jobs, whose classes cannot be replaced: a change in them needs a new kernel, which a note reports.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_magic import notebook
from llm_magic.notebook.magics import unregister
from llm_magic.notebook.magics.panel import PanelMagics
from llm_magic.session import IMPORTED_AT, kernel_session
from llm_magic.text import counted

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_NOTEBOOK = notebook.__name__
_PACKAGE = _NOTEBOOK.partition(".")[0]
_MOST_NAMED = 3  # changed modules


def is_reload(shell: InteractiveShell) -> bool:
    """Return whether IPython unloads the extension only to load it again.

    IPython does not pass that on, so its method is searched in the functions that run. Where it has
    another name, a reload is an unload and a load.
    """
    method: Any = getattr(shell.extension_manager, "reload_extension", None)
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not getattr(method, "__code__", None):
        frame = frame.f_back
    return frame is not None


def prepare(shell: InteractiveShell) -> None:
    """Remove the modules of `llm_magic.notebook` if their code has changed, so that it is imported again."""
    if any(_changed(_NOTEBOOK, notebook.IMPORTED_AT)):
        for magics in unregister(shell, keep=kernel_session()):
            if isinstance(magics, PanelMagics) and magics.panel is not None:
                magics.panel.retire()
        for name in [name for name in sys.modules if _is_in(name, _NOTEBOOK)]:
            del sys.modules[name]
    # The module of the extension itself is imported again by IPython.
    below = sorted(
        n for n in _changed(_PACKAGE, IMPORTED_AT) if n != _PACKAGE and not _is_in(n, _NOTEBOOK)
    )
    if below:
        is_long = len(below) > _MOST_NAMED
        names = f"{counted(len(below), 'module')} of {_PACKAGE}" if is_long else ", ".join(below)
        sys.stdout.write(f"Note: {names} changed. Restart the kernel to use the new code.\n")


def _changed(package: str, since: float) -> Iterator[str]:
    """Yield the names of imported modules of a package whose files have changed since a time."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if _is_in(name, package) and file is not None:
            with contextlib.suppress(FileNotFoundError):
                if Path(file).stat().st_mtime > since:
                    yield name


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
