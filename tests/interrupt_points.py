"""SIGINT at a given point of the next cell, from inside its kernel; or a sign that it is reached."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from IPython import get_ipython


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def before_code(shell: Any) -> None:
    """Send it while IPython prepares the next cell, before a line of it runs."""
    transformers: list[Callable[[list[str]], list[str]]] = shell.input_transformers_cleanup

    def transform(lines: list[str]) -> list[str]:
        transformers.remove(transform)
        _interrupt()
        return lines

    # This cell is being run: its own code was prepared already.
    transformers.append(transform)


def before_cell(shell: Any) -> None:
    """Send it when IPython begins the next cell, after it has prepared its code."""

    def interrupt() -> None:
        shell.events.unregister("pre_execute", interrupt)
        _interrupt()

    shell.events.register("pre_execute", interrupt)


def after_code(shell: Any) -> None:
    """Send it when the code of the next cell has finished, before its reply is sent."""

    def finish(_result: object) -> None:
        shell.events.unregister("post_run_cell", finish)
        shell.events.register("post_run_cell", interrupt)

    def interrupt(_result: object) -> None:
        shell.events.unregister("post_run_cell", interrupt)
        _interrupt()

    shell.events.register("post_run_cell", finish)


def hold_import(name: str) -> threading.Event:
    """Let the next import of a module wait until the returned event is set; others go on."""
    held = _HeldImport(name)
    sys.meta_path.insert(0, held)
    return held.go


class _HeldImport(MetaPathFinder, Loader):
    def __init__(self, name: str) -> None:
        self.name, self.go = name, threading.Event()
        self._loader: Any = None

    def find_spec(self, fullname: str, *others: Any) -> ModuleSpec | None:
        """Return the specification of the module with this loader: here all imports would wait."""
        if fullname != self.name:
            return None
        finders: list[Any] = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, *others) for finder in finders)
        spec: ModuleSpec = next(spec for spec in specs if spec is not None)
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Wait, and create it."""
        self.go.wait()
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute it."""
        self._loader.exec_module(module)


def announce(is_reached: Callable[[], object]) -> None:
    """End `tests.kernels.Kernel.wait_for_announcement` once `is_reached` returns something true.

    In a file: what a thread prints comes with a delay, and in ipykernel 6 below another cell.
    """
    file = _announcement()

    def wait() -> None:
        while not is_reached():
            time.sleep(0.002)
        file.touch()

    threading.Thread(target=wait, daemon=True).start()


def announce_wait() -> None:
    """Announce that the main thread waits where SIGINT ends the wait."""
    usual = signal.getsignal(signal.SIGINT)
    announce(lambda: signal.getsignal(signal.SIGINT) is not usual)


def announce_await() -> None:
    """Announce that the cell awaits what follows, and that a task that it waits for awaits, too."""
    asyncio.get_running_loop().call_later(0.1, _announcement().touch)


def _announcement() -> Path:
    """Return the file that stands for the running cell."""
    shell: Any = get_ipython()
    return Path(os.environ["IPYTHONDIR"], shell.kernel.get_parent("shell")["header"]["msg_id"])
