"""Crowds: many answers and many streams at once, every client in a process of its own.

The server has one, too, so that a client's CPU time is its own. A peer may live in an environment of
its own, ``.peers/NAME``; one that is missing is a row with the command to type.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.benchmarks.server import PIECE, Timing, serving
from tests.kernels import ROOT

_SCRIPT = "tests/benchmarks/crowd_client.py"
# Or litellm asks the network for prices while it is imported, and waits for an answer.
_QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True, slots=True)
class Kind:
    """A client by its name in the script; `home` is its environment, None for the one that runs."""

    client: str
    home: str | None = None

    @property
    def python(self) -> str | None:
        """Its interpreter; None where it is missing."""
        if self.home is not None:
            python = ROOT / ".peers" / self.home / "bin" / "python"
            return str(python) if python.exists() else None
        here = self.client == "ours" or find_spec(self.client) is not None
        return sys.executable if here else None

    @property
    def missing(self) -> str:
        """What to type to get it."""
        how = f"scripts/install-peers {self.home}" if self.home else f"pip install {self.client}"
        return f"missing: {how}"


_OURS, _OPENAI, _OLDER, _LITELLM = "ours", "openai", "openai 2", "litellm"
_KINDS = {
    _OURS: Kind("ours"), _OPENAI: Kind("openai"), _OLDER: Kind("openai", "openai-2"),
    _LITELLM: Kind("litellm", "litellm"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """So many answers at this pace, so many of them at once; they are asked `whole` or `streamed`."""

    job: str
    pace: Timing
    count: int
    at_once: int


# A few words at once: what a column of short answers is made of. The peers ask for one piece.
_ANSWERS = Task("whole", Timing(50, 0, 8), 1024, 256)
_STREAMS = Task("streamed", Timing(50, 20, 50), 256, 256)


def measure_crowd(rounds: Rounds) -> Iterator[Row]:
    """Ask 1024 times, 256 at once, where each answer takes 50 ms."""
    taken = _measured(rounds, _ANSWERS)
    for name, kind in _KINDS.items():
        yield Row(f"all answers: {name}", "s", taken.get(f"{name} wall_s", ()), note=_note(kind))
    for name, target in ((_OPENAI, 0.2), (_OLDER, 0.2), (_LITELLM, 0.3)):
        yield from _against(name, "all answers", "wall_s", taken, Target("<=", target))
    yield from _computed(taken, "CPU of an answer", 1e6 / _ANSWERS.count)


def measure_streams(rounds: Rounds) -> Iterator[Row]:
    """Follow 256 streams at once, each a word every 20 ms."""
    taken = _measured(rounds, _STREAMS)
    chunks = _STREAMS.count * _STREAMS.pace.count
    yield from _computed(taken, "CPU of a chunk", 1e6 / chunks)
    for name, target in ((_OPENAI, 0.7), (_OLDER, 0.7), (_LITELLM, None)):
        limit = Target("<=", target) if target is not None else None
        yield from _against(name, "CPU of a chunk", "cpu_s", taken, limit)


def _computed(taken: dict[str, tuple[float, ...]], title: str, scale: float) -> Iterator[Row]:
    for name, kind in _KINDS.items():
        values = tuple(value * scale for value in taken.get(f"{name} cpu_s", ()))
        yield Row(f"{title}: {name}", "us", values, note=_note(kind))


def _against(
    name: str, title: str, figure: str, taken: dict[str, tuple[float, ...]], target: Target | None
) -> Iterator[Row]:
    about = f"{title}: ours / {name}"
    theirs = taken.get(f"{name} {figure}")
    if theirs is None:
        yield Row(about, "x", (), target, _note(_KINDS[name]))
    else:
        yield ratio(about, taken[f"{_OURS} {figure}"], theirs, target)


def _note(kind: Kind) -> str:
    return "" if kind.python else kind.missing


def _measured(rounds: Rounds, task: Task) -> dict[str, tuple[float, ...]]:
    """Give the task to one client after the other, each round beginning with another."""
    with serving() as url, ExitStack() as stack:
        clients = {
            name: stack.enter_context(_client(kind.client, Path(kind.python), url))
            for name, kind in _KINDS.items()
            if kind.python is not None
        }
        for client in clients.values():
            # Connections are made and modules imported before it counts.
            client.done(task)
        order = deque(clients)

        def once() -> dict[str, float]:
            order.rotate(-1)
            figures: dict[str, float] = {}
            for name in order:
                done = clients[name].done(task)
                figures |= {f"{name} {figure}": done[figure] for figure in ("wall_s", "cpu_s")}
            return figures

        return rounds.run(once)


class _Client:
    """A client that waits for tasks in its own process."""

    def __init__(self, tasks: IO[str], answers: IO[str]) -> None:
        self._tasks, self._answers = tasks, answers

    def done(self, task: Task) -> dict[str, Any]:
        """Have a task done, and see that every answer was whole."""
        line = f"{task.job} {task.pace.model} {task.count} {task.at_once}\n"
        self._tasks.write(line)
        self._tasks.flush()
        done: dict[str, Any] = json.loads(self._answers.readline())
        assert done["texts"] == [PIECE * task.pace.count]
        return done


@contextmanager
def _client(name: str, python: Path, url: str) -> Iterator[_Client]:
    with subprocess.Popen(
        [python, "-P", _SCRIPT, name, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | _QUIET,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield _Client(process.stdin, process.stdout)
        finally:
            # It works until its input ends, so that it cannot outlive us whatever happens here.
            process.stdin.close()
