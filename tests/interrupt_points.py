"""SIGINT at a given point of the next cell, from inside its kernel."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


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


def after_code(shell: Any) -> None:
    """Send it when the code of the next cell has finished, before its reply is sent."""

    def finish(_result: object) -> None:
        shell.events.unregister("post_run_cell", finish)
        shell.events.register("post_run_cell", interrupt)

    def interrupt(_result: object) -> None:
        shell.events.unregister("post_run_cell", interrupt)
        _interrupt()

    shell.events.register("post_run_cell", finish)
