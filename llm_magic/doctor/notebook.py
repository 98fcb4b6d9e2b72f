"""Checks the kernel, its event loop, the widgets of the frontend, and the owner of ``%%llm``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from llm_magic.doctor.finding import Finding
from llm_magic.doctor.packages import installed
from llm_magic.session import nested_asyncio

_MANAGER = "@jupyter-widgets/jupyterlab-manager"
# Major versions of ipywidgets, and of the jupyterlab_widgets that displays them.
_MATCHING_VERSIONS = {"8": "3", "7": "1"}


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """What only the notebook layer can determine.

    `owner` is the module of the ``%%llm`` magic if it is not llm_magic.
    """

    owner: str = ""
    in_kernel: bool = True
    subshells: bool = False


def check_notebook(kernel: KernelInfo | None) -> list[Finding]:
    """Return findings about the notebook; `kernel` is the running kernel, if there is one."""
    found = [
        _check_ipykernel(kernel), _check_widgets(), check_prompt_cells(), _check_owner(kernel),
    ]  # fmt: skip
    if kernel is not None and (problem := nested_asyncio.problem()):
        found.append(Finding("event loop", "problem", problem.text, problem.fix))
    return [finding for finding in found if finding is not None]


def _check_ipykernel(kernel: KernelInfo | None) -> Finding:
    version = installed("ipykernel")
    if version is None:
        return Finding("kernel", "warn", "ipykernel is not installed", "pip install ipykernel")
    if kernel is None or not kernel.in_kernel:
        return Finding("kernel", "ok", f"ipykernel {version}")
    if version.startswith("7.0."):
        text = f"ipykernel {version} loses output and interrupts"
        return Finding("kernel", "problem", text, "pip install -U ipykernel, restart the kernel")
    subshells = "with subshells" if kernel.subshells else "without subshells"
    return Finding("kernel", "ok", f"ipykernel {version}, {subshells}")


def _check_owner(kernel: KernelInfo | None) -> Finding | None:
    cellmage = installed("cellmage")
    if kernel is not None and kernel.owner:
        name = kernel.owner.partition(".")[0]
        fix = f"%unload_ext {name}, then %reload_ext llm_magic"
        return Finding("%%llm", "problem", f"belongs to {kernel.owner}, not to llm_magic", fix)
    if cellmage is not None:
        text = f"cellmage {cellmage} is installed; it replaces %%llm when it is loaded"
        return Finding("%%llm", "warn", text, "load only one of them, or llm_magic last")
    return Finding("%%llm", "ok", "belongs to llm_magic") if kernel is not None else None


def _check_widgets() -> Finding | None:
    """Compare ipywidgets with the JupyterLab extension, if JupyterLab is in this environment."""
    version = installed("ipywidgets")
    if version is None:
        return None
    folder = _lab_extension(_MANAGER)
    lab_widgets, manager = installed("jupyterlab_widgets"), _version(folder)
    fix = "pip install -U ipywidgets jupyterlab_widgets, then reload the page"
    if lab_widgets is None or not manager:
        text = f"ipywidgets {version}; its JupyterLab extension is not in this environment"
        has_lab = installed("jupyterlab") is not None
        return Finding("widgets", "problem" if has_lab else "ok", text, fix if has_lab else "")
    text = f"ipywidgets {version}, jupyterlab_widgets {lab_widgets} (manager {manager})"
    expected = _MATCHING_VERSIONS.get(version.partition(".")[0])
    if expected is not None and lab_widgets.partition(".")[0] != expected:
        return Finding("widgets", "problem", f"{text}: the versions do not match", fix)
    return Finding("widgets", "ok", text)


def check_prompt_cells(checkout: Path = Path(__file__).parents[2]) -> Finding | None:
    """Check the JupyterLab extension that highlights prompts, if JupyterLab is in this environment.

    An editable install of a `checkout` has a copy of it, as old as the last ``pip install``.
    """
    if installed("jupyterlab") is None:
        return None
    source = checkout / "labextension" / "llm_magic.js"
    again = (
        f"pip install -e {checkout}"
        if source.is_file()
        else "pip install --force-reinstall llm_magic"
    )
    fix = f"{again}, then reload the page"
    folder = _lab_extension("llm-magic")
    if folder is None:
        return Finding("prompt cells", "warn", "the JupyterLab extension is not installed", fix)
    version = _version(folder)
    scripts = [file.read_bytes() for file in folder.glob("static/llm_magic.*.js")]
    if version != (installed("llm_magic") or version) or (
        source.is_file() and source.read_bytes() not in scripts
    ):
        return Finding(
            "prompt cells", "warn", f"the JupyterLab extension {version} is outdated", fix
        )
    return Finding("prompt cells", "ok", f"highlighted by the JupyterLab extension {version}")


def _lab_extension(name: str) -> Path | None:
    """Return the folder of an extension of JupyterLab, None if it is not installed."""
    roots = (Path(sys.prefix, "share"), Path("~/.local/share").expanduser())
    folders = (root / "jupyter" / "labextensions" / name for root in roots)
    return next((folder for folder in folders if (folder / "package.json").is_file()), None)


def _version(extension: Path | None) -> str:
    """Return the version of an extension of JupyterLab, "" if it has none."""
    if extension is None:
        return ""
    try:
        return str(json.loads((extension / "package.json").read_text("utf-8"))["version"])
    except (OSError, ValueError, KeyError):
        return ""
