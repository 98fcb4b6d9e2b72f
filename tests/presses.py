"""■ at a given point of the next cell, from inside its kernel."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def before_code(shell: Any) -> None:
    """Press while IPython prepares the next cell, before a line of it runs."""
    transformers: list[Callable[[list[str]], list[str]]] = shell.input_transformers_cleanup

    def transform(lines: list[str]) -> list[str]:
        transformers.remove(transform)
        _press()
        return lines

    # This cell is being run: its own code was prepared already.
    transformers.append(transform)


def after_code(shell: Any) -> None:
    """Press when the code of the next cell has ended, before its reply is sent."""

    def ended(_result: object) -> None:
        shell.events.unregister("post_run_cell", ended)
        shell.events.register("post_run_cell", pressed)

    def pressed(_result: object) -> None:
        shell.events.unregister("post_run_cell", pressed)
        _press()

    shell.events.register("post_run_cell", ended)
