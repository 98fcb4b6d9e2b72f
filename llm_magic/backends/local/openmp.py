"""OpenMP in this process: how long its threads spin, how many they are, when they end.

Helper threads spin while they wait for work. On a machine that others use, too, they spin away the
time in which the thread they wait for could run: beside two busy processes, answers came at a
fortieth of their speed. After about a thousand turns of the loop they should sleep instead. OpenMP
reads that from the environment, once, when it is loaded together with torch. All variables that the
user has set stay as they are.

Each thread that enters an OpenMP region keeps a team of its own. Once there are more such threads
in a process than cores, libgomp's threads no longer spin while they wait, and every operation
begins with a wake-up: whoever ran torch in a cell made each answer slower for good, and each answer
made the notebook's own torch slower. `omp_pause_resource` (OpenMP 5) ends the team of the thread
that calls it; the next one is started in less time than a token takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from llm_magic.backends.local.cpus import Cpus

# omp_pause_hard: nothing of the team is kept.
_HARD = 2
# GNU's OpenMP counts turns of a loop (by itself 300,000), Intel's and LLVM's milliseconds (200); by
# each, the variables with which the user decides.
_SPIN = {
    "GOMP_SPINCOUNT": ("1000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")),
    "KMP_BLOCKTIME": ("1", ("KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_WAIT_POLICY")),
}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(slots=True)
class _Process:
    """What was changed in this process: threads of torch before and since, for so many sessions."""

    bounded: bool = False
    before: int = 0
    since: int = 0
    sessions: int = 0


_PROCESS = _Process()


def spin_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that bound the spinning, without what the user has decided."""
    return {
        name: value
        for name, (value, decisive) in _SPIN.items()
        if not any(environment.get(other) for other in decisive)
    }


def child_variables(environment: Mapping[str, str], cpus: Cpus) -> dict[str, str]:
    """Return the variables of a child process that imports torch."""
    variables = spin_variables(environment)
    if cpus.usable < cpus.affinity and not any(environment.get(name) for name in _THREADS):
        variables["OMP_NUM_THREADS"] = str(cpus.usable)
    return variables


@contextlib.contextmanager
def bounded_spin() -> Iterator[None]:
    """Import torch within, so that its threads soon sleep; the environment is then as before."""
    if "torch" in sys.modules:
        yield
        return
    variables = spin_variables(os.environ)
    before = _mapped()
    os.environ.update(variables)
    try:
        yield
        import torch

        # Intel's and LLVM's read the environment when they are first called.
        torch.get_num_threads()
        # Another package may have loaded the libgomp that torch uses.
        _PROCESS.bounded = not before or _mapped() != before
    finally:
        for name in variables:
            os.environ.pop(name, None)


def spins_unbounded() -> bool:
    """Return whether torch, or its OpenMP, was loaded before the spinning could be bounded."""
    decisive = "GOMP_SPINCOUNT" if sys.platform == "linux" else "KMP_BLOCKTIME"
    late = "torch" in sys.modules and not _PROCESS.bounded
    return late and decisive in spin_variables(os.environ)


def limit_threads(cpus: Cpus) -> None:
    """Let torch compute on the CPUs that are usable, unless the user chose a number of threads.

    It stays so until `restore_threads` was called as often.
    """
    import torch

    _PROCESS.sessions += 1
    threads = torch.get_num_threads()
    # What torch chooses by itself; any other number was set in the notebook.
    own = {cpus.machine, cpus.affinity, psutil.cpu_count(logical=False)}
    chosen = any(os.environ.get(name) for name in _THREADS) or threads not in own
    if _PROCESS.sessions == 1 and threads > cpus.usable and not chosen:
        torch.set_num_threads(cpus.usable)
        _PROCESS.before, _PROCESS.since = threads, cpus.usable


def restore_threads() -> None:
    """Undo `limit_threads`, unless the number was changed since.

    Threads that have computed meanwhile keep their number, as torch has it.
    """
    import torch

    _PROCESS.sessions -= 1
    if _PROCESS.sessions == 0 and _PROCESS.since:
        if torch.get_num_threads() == _PROCESS.since:
            torch.set_num_threads(_PROCESS.before)
        _PROCESS.since = 0


def release() -> None:
    """End the team of the calling thread, if it has one."""
    for library in _loaded():
        library.omp_pause_resource(_HARD, library.omp_get_initial_device())


def _loaded() -> tuple[ctypes.CDLL, ...]:
    """Return the libgomp that torch uses, and others of this process; none before torch is there."""
    return _libraries() if "torch" in sys.modules else ()


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    found = map(_opened, _mapped())
    return tuple(one for one in found if one is not None and hasattr(one, "omp_pause_resource"))


def _mapped() -> list[str]:
    """Return the files of libgomp in this process; LLVM's and Microsoft's do not give up spinning."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():  # macOS and Windows, which have no libgomp
        return []
    lines = maps.read_text("utf-8", "surrogateescape").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "gomp" in line}
    return sorted(path for path in paths if "libgomp" in Path(path).name)


def _opened(path: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path)
    except OSError:
        # Its file was exchanged by an installation since.
        return None
