"""OpenMP in this process: how long its threads spin, how many there are, and when they end.

Worker threads spin while they wait for work. Alone on a machine that saves a wake-up an operation. On
one with other busy processes they use up the CPU time of the thread that they wait for: beside two
busy processes, answers were 40 times slower. This module lets them sleep after about 10,000
iterations (0.1 ms). OpenMP reads the limit from the environment once, when torch loads it. Variables
that the user has set are not changed. Beside busy processes, `throttle_beside_others` lets them sleep
almost at once.

Each thread that enters an OpenMP region gets worker threads of its own. Once a process has more of
them than cores, libgomp throttles spinning to 100 iterations, and each operation begins with a
wake-up: torch in a cell made all later answers slower, and answers made torch in cells slower.
`omp_pause_resource` (OpenMP 5) ends the workers of the calling thread. Starting new ones takes less
time than a token.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_magic.backends.local.cpus import Cpus

_OMP_PAUSE_HARD = 2
# The limit for GNU's OpenMP is in iterations (default 300,000), for Intel's and LLVM's in milliseconds
# (default 200). The tuples are the variables with which the user sets it.
_SPIN = {
    "GOMP_SPINCOUNT": ("10000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")),
    "KMP_BLOCKTIME": ("1", ("KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_WAIT_POLICY")),
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# How long the threads of this process waited for a CPU, in seconds a second: alone less than 0.05,
# beside one busy process on 2 CPUs more than 0.5.
_BUSY = 0.2
_WINDOW_S = 0.1
# Spinning ends after so many windows in a row (in the first one of an answer, threads of this process
# wait for each other), and begins again after as many in which the CPUs were free.
_BUSY_WINDOWS, _CALM_WINDOWS = 2, 10
# All threads of OpenMP fill a tensor of this size together.
_PARALLEL_SIZE = 1 << 17


@dataclass(slots=True)
class _Process:
    """What this module has changed in the process, for how many users of it.

    `threads_before` and `threads_set` are numbers of torch's threads; 0 if nothing was changed.
    """

    threads_before: int = 0
    threads_set: int = 0
    users: int = 0
    # Whether other processes used the CPUs when this process last computed.
    is_beside_others: bool = False


_PROCESS = _Process()


def spin_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that limit the spinning, except where the user has set the limit."""
    return {
        name: value
        for name, (value, variables) in _SPIN.items()
        if not any(environment.get(variable) for variable in variables)
    }


def child_variables(environment: Mapping[str, str], cpus: Cpus) -> dict[str, str]:
    """Return the variables of a child process that imports torch."""
    variables = spin_variables(environment)
    if cpus.usable < cpus.affinity and not any(environment.get(name) for name in _THREAD_VARIABLES):
        variables["OMP_NUM_THREADS"] = str(cpus.usable)
    return variables


@contextlib.contextmanager
def bounded_spin() -> Iterator[None]:
    """Limit the spinning of the OpenMP that a first import of torch or xllamacpp in this context loads.

    Restores the environment at the end.
    """
    if "torch" in sys.modules:
        yield
        return
    variables = spin_variables(os.environ)
    os.environ.update(variables)
    try:
        yield
        if torch := sys.modules.get("torch"):
            # Intel's and LLVM's OpenMP read the environment at their first call.
            torch.get_num_threads()
    finally:
        for name in variables:
            os.environ.pop(name, None)


def limit_threads(cpus: Cpus) -> None:
    """Limit torch's threads to the usable CPUs, unless the user has set their number.

    Has effect until `restore_threads` has been called as often.
    """
    import psutil
    import torch

    _PROCESS.users += 1
    threads = torch.get_num_threads()
    # The defaults of torch. Any other number was set by the user.
    defaults = {cpus.machine, cpus.affinity, psutil.cpu_count(logical=False)}
    chosen = any(os.environ.get(name) for name in _THREAD_VARIABLES) or threads not in defaults
    if _PROCESS.users == 1 and threads > cpus.usable and not chosen:
        torch.set_num_threads(cpus.usable)
        _PROCESS.threads_before, _PROCESS.threads_set = threads, cpus.usable


def restore_threads() -> None:
    """Undo `limit_threads`, unless the user has changed the number since.

    torch keeps the number of a thread that has computed in the meantime.
    """
    import torch

    _PROCESS.users -= 1
    if _PROCESS.users == 0 and _PROCESS.threads_set:
        if torch.get_num_threads() == _PROCESS.threads_set:
            torch.set_num_threads(_PROCESS.threads_before)
        _PROCESS.threads_set = 0


@contextlib.contextmanager
def throttle_beside_others() -> Iterator[None]:
    """Let OpenMP's threads sleep at once while others use the CPUs; for work on the CPU with torch.

    Only libgomp can be throttled, and only on Linux the waiting of threads can be read.
    """
    if not _libraries() or _waited_s() is None:
        yield
        return
    end = threading.Event()
    monitor = threading.Thread(target=_monitor, args=(end,), name="llm_magic-openmp", daemon=True)
    monitor.start()
    try:
        yield
    finally:
        end.set()
        monitor.join()


def _monitor(end: threading.Event) -> None:
    """Throttle the spinning while threads of this process wait for CPUs.

    For that this thread starts OpenMP threads that do nothing: the process then has more of them than
    CPUs. They end with this thread.
    """
    import torch

    busy = calm = 0
    if _PROCESS.is_beside_others:
        torch.ones(_PARALLEL_SIZE)
    before = _waited_s() or 0
    while not end.wait(_WINDOW_S):
        now = _waited_s() or 0
        busy, calm = (busy + 1, 0) if now - before > _BUSY * _WINDOW_S else (0, calm + 1)
        before = now
        if busy >= _BUSY_WINDOWS and not _PROCESS.is_beside_others:
            _PROCESS.is_beside_others = True
            torch.ones(_PARALLEL_SIZE)
        elif calm >= _CALM_WINDOWS and _PROCESS.is_beside_others:
            _PROCESS.is_beside_others = False
            release_threads()


def _waited_s() -> float | None:
    """Return how long all threads of this process have waited for a CPU, where the system reports it."""
    waited = 0
    try:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                waited += int((thread / "schedstat").read_text("ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return waited / 1e9


def release_threads() -> None:
    """End the OpenMP worker threads of the calling thread; does nothing before torch is imported."""
    if "torch" in sys.modules:
        for library in _libraries():
            library.omp_pause_resource(_OMP_PAUSE_HARD, library.omp_get_initial_device())


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    """Return the libgomp that torch uses, and others in this process."""
    libraries = map(_open, _mapped())
    return tuple(one for one in libraries if one and hasattr(one, "omp_pause_resource"))


def _mapped() -> list[str]:
    """Return the files of libgomp in this process. Other OpenMP libraries do not stop spinning."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():  # macOS and Windows, which have no libgomp
        return []
    lines = maps.read_text("utf-8", "surrogateescape").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "gomp" in line}
    return sorted(path for path in paths if "libgomp" in Path(path).name)


def _open(path: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path)
    except OSError:
        # An installation has replaced the file.
        return None
