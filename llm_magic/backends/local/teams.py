"""Teams of OpenMP threads, given back when their thread has computed.

Each thread that enters an OpenMP region keeps a team of its own. Once there are more such threads
in a process than cores, libgomp's threads no longer spin while they wait, and every operation
begins with a wake-up: whoever ran torch in a cell made each answer slower for good, and each answer
made the notebook's own torch slower. `omp_pause_resource` (OpenMP 5) ends the team of the thread
that calls it; the next one is started in less time than a token takes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

# omp_pause_hard: nothing of the team is kept.
_HARD = 2


def release() -> None:
    """End the team of the calling thread, if it has one."""
    for library in _loaded():
        library.omp_pause_resource(_HARD, library.omp_get_initial_device())


def _loaded() -> tuple[ctypes.CDLL, ...]:
    """Return the libgomp that torch uses, and others of this process; none before torch is there."""
    return _libraries() if "torch" in sys.modules else ()


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        # LLVM's OpenMP on macOS and Microsoft's on Windows do not give up spinning.
        return ()
    lines = maps.read_text("utf-8", "surrogateescape").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "gomp" in line}
    found = map(_opened, sorted(path for path in paths if "libgomp" in Path(path).name))
    return tuple(one for one in found if one is not None and hasattr(one, "omp_pause_resource"))


def _opened(path: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path)
    except OSError:
        # Its file was exchanged by an installation since.
        return None
