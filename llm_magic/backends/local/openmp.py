"""OpenMP in this process: how long its threads spin, how many there are, and when they end.

Worker threads spin while they wait for work. On a machine with other busy processes they use up the
CPU time of the thread that they wait for: beside two busy processes, answers were 40 times slower.
This module lets them sleep after about 1,000 iterations. OpenMP reads the limit from the environment
once, when torch loads it. Variables that the user has set are not changed.

Each thread that enters an OpenMP region gets worker threads of its own. Once a process has more of
them than cores, libgomp stops spinning, and each operation begins with a wake-up: torch in a cell made
all later answers slower, and answers made torch in cells slower. `omp_pause_resource` (OpenMP 5) ends
the workers of the calling thread. Starting new ones takes less time than a token.
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

_OMP_PAUSE_HARD = 2
# The limit for GNU's OpenMP is in iterations (default 300,000), for Intel's and LLVM's in milliseconds
# (default 200). The tuples are the variables with which the user sets it.
_SPIN = {
    "GOMP_SPINCOUNT": ("1000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")),
    "KMP_BLOCKTIME": ("1", ("KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_WAIT_POLICY")),
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(slots=True)
class _Process:
    """What this module has changed in the process, for how many users of it.

    `threads_before` and `threads_set` are numbers of torch's threads; 0 if nothing was changed.
    """

    is_spin_bounded: bool = False
    threads_before: int = 0
    threads_set: int = 0
    users: int = 0


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
    """Limit the spinning of the OpenMP that a first import of torch in this context loads.

    Restores the environment at the end.
    """
    if "torch" in sys.modules:
        yield
        return
    variables = spin_variables(os.environ)
    before = _mapped()
    os.environ.update(variables)
    try:
        yield
        import torch

        # Intel's and LLVM's OpenMP read the environment at their first call.
        torch.get_num_threads()
        # If another package had loaded this libgomp before, the variables have no effect.
        _PROCESS.is_spin_bounded = not before or _mapped() != before
    finally:
        for name in variables:
            os.environ.pop(name, None)


def spins_unbounded() -> bool:
    """Return whether torch, or its OpenMP, was loaded before the spinning could be limited."""
    variable = "GOMP_SPINCOUNT" if sys.platform == "linux" else "KMP_BLOCKTIME"
    late = "torch" in sys.modules and not _PROCESS.is_spin_bounded
    return late and variable in spin_variables(os.environ)


def limit_threads(cpus: Cpus) -> None:
    """Limit torch's threads to the usable CPUs, unless the user has set their number.

    Has effect until `restore_threads` has been called as often.
    """
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
