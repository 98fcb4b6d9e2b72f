"""OpenMP in this process: how long its threads spin, how many there are, and when they end.

Worker threads spin while they wait for work. Alone on a machine that saves a wake-up an operation. On
one with other busy processes they use up the CPU time of the thread that they wait for: beside two
busy processes, answers were 40 times slower. Beside busy processes, `throttle_beside_others` lets them
sleep almost at once. This module also lets those of torch sleep after about 10,000 iterations (0.1 ms).
OpenMP reads the limit from the environment once, when torch loads it. Variables that the user has set
are not changed. Those of llama.cpp have no such limit: threads of Python interrupt one of them several
times a token, and if the others sleep meanwhile, a token takes 1.2 times as long.

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
from collections.abc import Container, Iterator, Mapping
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
# The packages with an OpenMP that this module limits; each may have its own copy of the library.
_PACKAGES = ("torch", "xllamacpp")


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


def can_throttle() -> bool:
    """Return whether `throttle_beside_others` has an effect where libgomp is used."""
    return _waited_s(set()) is not None


@contextlib.contextmanager
def throttle_beside_others(*, by_python: bool = True) -> Iterator[None]:
    """Let OpenMP's threads sleep at once while others use the CPUs; for work on the CPU.

    `by_python` is whether a thread of Python computes. Where none does, its threads wait for the CPU
    of those that compute, which is no sign of others. Only libgomp can be throttled, and only on
    Linux the waiting of threads can be read.
    """
    if not _libraries() or not can_throttle():
        yield
        return
    end = threading.Event()
    monitor = threading.Thread(
        target=_monitor, args=(end, by_python), name="llm_magic-openmp", daemon=True
    )
    monitor.start()
    try:
        yield
    finally:
        end.set()
        monitor.join()


def _monitor(end: threading.Event, by_python: bool) -> None:
    """Throttle the spinning while threads of this process wait for CPUs.

    For that this thread starts OpenMP threads that do nothing: the process then has more of them than
    CPUs. They end with this thread.
    """

    def waited_s() -> float:
        ignored = set() if by_python else {str(one.native_id) for one in threading.enumerate()}
        return _waited_s(ignored) or 0

    busy = calm = 0
    if _PROCESS.is_beside_others:
        _start_idle_threads()
    before = waited_s()
    while not end.wait(_WINDOW_S):
        now = waited_s()
        busy, calm = (busy + 1, 0) if now - before > _BUSY * _WINDOW_S else (0, calm + 1)
        before = now
        if busy >= _BUSY_WINDOWS and not _PROCESS.is_beside_others:
            _PROCESS.is_beside_others = True
            _start_idle_threads()
        elif calm >= _CALM_WINDOWS and _PROCESS.is_beside_others:
            _PROCESS.is_beside_others = False
            release_threads()


def _waited_s(ignored: Container[str]) -> float | None:
    """Return how long the threads of this process have waited for a CPU, where the system reports it.

    `ignored` has the numbers of threads that do not count.
    """
    waited = 0
    try:
        for thread in Path("/proc/self/task").iterdir():
            if thread.name not in ignored:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    waited += int((thread / "schedstat").read_text("ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return waited / 1e9


def _start_idle_threads() -> None:
    """Start OpenMP threads of the calling thread that do nothing, more of them than CPUs."""
    for library in _libraries():
        # What the compiler calls for a parallel region, with a function that has no effect.
        nothing = ctypes.cast(library.omp_get_level, ctypes.c_void_p)
        library.GOMP_parallel(nothing, None, library.omp_get_num_procs() + 1, 0)


def release_threads() -> None:
    """End the OpenMP threads of the calling thread; does nothing before torch or llama.cpp is imported."""
    for library in _libraries():
        library.omp_pause_resource(_OMP_PAUSE_HARD, library.omp_get_initial_device())


def _libraries() -> tuple[ctypes.CDLL, ...]:
    """Return the libgomp that torch uses, that of xllamacpp, and others in this process."""
    return _opened(tuple(name for name in _PACKAGES if name in sys.modules))


@functools.cache
def _opened(packages: tuple[str, ...]) -> tuple[ctypes.CDLL, ...]:
    """Return each libgomp in this process once `packages` are imported; none before one of them is."""
    libraries = map(_open, _mapped() if packages else ())
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
