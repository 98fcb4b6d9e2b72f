"""``asyncio.run(...)`` inside a cell, for code that insists on it; nothing here needs that itself.

A cell runs inside the kernel's event loop, which cannot be entered again. nest-asyncio makes that
possible by patching asyncio for the whole process. On ipykernel 7, where every cell runs in one context,
its last version (1.6.0; it is archived) and nest-asyncio2 before 1.7.4 silently lose the cells that
are queued meanwhile (https://github.com/Chaoses-Ib/nest-asyncio2/pull/4).
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from llm_magic.errors import EventLoopError, MissingDependency

_SAFE = (1, 7, 4)
_INSTALL = "pip install 'llm_magic[nested]'"


class Problem(NamedTuple):
    """What is wrong with how asyncio was patched, and what to do."""

    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.text}. Fix: {self.fix}."


def allow() -> None:
    """Let ``asyncio.run(...)`` work inside cells, or raise in one line why it cannot."""
    if found := problem():
        raise EventLoopError(str(found))
    name = _applied() or _usable()
    _refuse_other_loops()
    # Again where it was applied before: the loop of this kernel may have come later.
    importlib.import_module(name).apply()


def problem() -> Problem | None:
    """Return what is wrong with how another package has patched asyncio, or None."""
    name = _applied()
    if name is None or not _shares_context() or (name == "nest_asyncio2" and _is_safe_version()):
        return None
    package = f"{name.replace('_', '-')} {_version(name)}".strip()
    return Problem(
        f"{package} was applied in this kernel; on ipykernel 7 it causes queued cells to be lost without"
        " an error",
        f"{_INSTALL}, restart the kernel, and call llm_magic.allow_nested_loops() instead of"
        f" {name}.apply()",
    )


def _usable() -> str:
    """Return the package to apply: the maintained one, or the archived one where that is safe."""
    if _version("nest_asyncio2") and _is_safe_version():
        return "nest_asyncio2"
    archived = _version("nest_asyncio")
    if archived and not _shares_context() and sys.version_info < (3, 14):
        return "nest_asyncio"
    if archived:
        where = "ipykernel 7" if _shares_context() else "Python 3.14"
        raise EventLoopError(
            f"Only nest-asyncio {archived} is installed, which is not safe on {where}."
            f" Run: {_INSTALL}"
        )
    raise MissingDependency(f"Nested loops need nest-asyncio2 1.7.4 or newer. Run: {_INSTALL}")


def _refuse_other_loops() -> None:
    """Refuse loops that cannot be patched, before anything is."""
    import asyncio

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if not isinstance(loop, asyncio.BaseEventLoop):
        kind = f"{type(loop).__module__}.{type(loop).__name__}"
        raise EventLoopError(
            f"The loop of this kernel is a {kind}, which cannot be made re-entrant."
        )


def _applied() -> str | None:
    """Return which package has patched asyncio; the archived one leaves less behind."""
    asyncio = sys.modules.get("asyncio")
    if not hasattr(asyncio, "_nest_patched"):
        return None
    return "nest_asyncio2" if hasattr(asyncio, "_nest_asyncio2") else "nest_asyncio"


def _shares_context() -> bool:
    """Return whether this is a kernel whose cells share one context: ipykernel 7 and newer."""
    if "ipykernel.kernelapp" not in sys.modules:
        return False
    return bool(sys.modules["ipykernel"].version_info[0] >= 7)


def _version(name: str) -> str:
    """Return the version of an installed package, or nothing."""
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return ""


def _is_safe_version() -> bool:
    numbers = [part for part in _version("nest_asyncio2").split(".")[:3] if part.isdigit()]
    return tuple(map(int, numbers)) >= _SAFE
