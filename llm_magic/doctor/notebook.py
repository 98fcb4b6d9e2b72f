"""The kernel: its version, the loop it runs on, the widgets of its frontend, who owns ``%%llm``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from llm_magic.doctor.finding import Finding
from llm_magic.doctor.packages import installed
from llm_magic.session import nested_asyncio

_MANAGER = "@jupyter-widgets/jupyterlab-manager"
# The major version of ipywidgets and of the package that draws them in JupyterLab.
_DRAWN_BY = {"8": "3", "7": "1"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What only the face knows: whose ``%%llm`` is, and whether there is a kernel with subshells."""

    owner: str = ""
    in_kernel: bool = True
    subshells: bool = False


def notebook(kernel: Kernel | None) -> list[Finding]:
    """Return what is to be known of a kernel, the running one if there is one."""
    found = [_ipykernel(kernel), _widgets(), _owner(kernel)]
    return [finding for finding in (*found, _nested(kernel)) if finding is not None]


def _ipykernel(kernel: Kernel | None) -> Finding | None:
    has = installed("ipykernel")
    if has is None:
        return Finding("kernel", "warn", "ipykernel is not installed", "pip install ipykernel")
    if kernel is None or not kernel.in_kernel:
        return Finding("kernel", "ok", f"ipykernel {has}")
    if has.startswith("7.0."):
        text = f"ipykernel {has} loses output and interrupts"
        return Finding("kernel", "problem", text, "pip install -U ipykernel, restart the kernel")
    words = "with subshells" if kernel.subshells else "without subshells"
    return Finding("kernel", "ok", f"ipykernel {has}, {words}")


def _nested(kernel: Kernel | None) -> Finding | None:
    """Tell of a patched asyncio that loses queued cells."""
    found = nested_asyncio.problem() if kernel is not None else None
    if found is None:
        return None
    text, _, fix = found.partition(" Type: ")
    return Finding("event loop", "problem", text, fix)


def _owner(kernel: Kernel | None) -> Finding | None:
    cellmage = installed("cellmage")
    if kernel is not None and kernel.owner:
        name = kernel.owner.partition(".")[0]
        fix = f"%unload_ext {name}, then %reload_ext llm_magic"
        return Finding("%%llm", "problem", f"belongs to {kernel.owner}, not to llm_magic", fix)
    if cellmage is not None:
        text = f"cellmage {cellmage} is installed, and takes %%llm when it is loaded"
        return Finding("%%llm", "warn", text, "load one of the two; llm_magic after it if both")
    return Finding("%%llm", "ok", "is ours") if kernel is not None else None


def _widgets() -> Finding | None:
    """Compare ipywidgets with what draws them; known only where JupyterLab is installed here too."""
    has = installed("ipywidgets")
    if has is None:
        return None
    drawn = installed("jupyterlab_widgets")
    wanted = _DRAWN_BY.get(has.partition(".")[0])
    fix = "pip install -U ipywidgets jupyterlab_widgets, then reload the page"
    if drawn is None or not _extension():
        text = f"ipywidgets {has}; what draws them in JupyterLab is not in this environment"
        here = installed("jupyterlab") is not None
        return Finding("widgets", "problem" if here else "ok", text, fix if here else "")
    text = f"ipywidgets {has}, drawn by jupyterlab_widgets {drawn} ({_extension()})"
    if wanted is not None and drawn.partition(".")[0] != wanted:
        return Finding("widgets", "problem", f"{text}: they do not go together", fix)
    return Finding("widgets", "ok", text)


def _extension() -> str:
    """Return the version of JupyterLab's own half, nothing where it is not here."""
    for root in (Path(sys.prefix, "share"), Path("~/.local/share").expanduser()):
        file = root / "jupyter" / "labextensions" / _MANAGER / "package.json"
        try:
            return f"manager {json.loads(file.read_text('utf-8'))['version']}"
        except (OSError, ValueError, KeyError):
            continue
    return ""
