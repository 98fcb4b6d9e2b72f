"""How many CPUs this process may use: affinity and the quotas of its cgroups, not the machine's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Cpus:
    """The CPUs of the machine, those of this process's affinity, and its quota, if it has one."""

    machine: int
    affinity: int
    quota: float | None = None

    @property
    def usable(self) -> int:
        """How many threads can compute at once.

        A quota is rounded down: one thread more would be throttled, and all others wait for it.
        """
        return self.affinity if self.quota is None else max(1, min(self.affinity, int(self.quota)))

    def __str__(self) -> str:
        if self.usable == self.machine:
            return f"{self.machine} CPUs"
        why = "affinity" if self.usable == self.affinity else f"a quota of {self.quota:g} CPUs"
        return f"{self.usable} of {self.machine} CPUs usable ({why})"


def cpus() -> Cpus:
    """Return what this process may use now."""
    machine = os.cpu_count() or 1
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux only
    return Cpus(machine, len(os.sched_getaffinity(0)) if has_affinity else machine, cpu_quota())


def cpu_quota(proc: Path = _PROC) -> float | None:
    """Return the smallest quota, in CPUs, of a process's cgroup and of those above it.

    Both versions of cgroups can be there at once. `proc` is the process's folder of ``/proc``.
    """
    try:
        mounts = list(_mounts((proc / "mountinfo").read_text("utf-8", "surrogateescape")))
        groups = (proc / "cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not Linux, or hidden
        return None
    quotas: list[float] = []
    for line in groups:
        _number, controllers, path = line.split(":", 2)
        for mount in mounts:
            if mount.holds(controllers):
                quotas += mount.quotas(PurePosixPath(path))
    return min(quotas, default=None)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy of cgroups: the group `root` is seen at `folder`."""

    kind: str
    root: PurePosixPath
    folder: Path
    options: frozenset[str]

    def holds(self, controllers: str) -> bool:
        """Return whether this is the hierarchy of a line of ``/proc/self/cgroup``, and has CPUs."""
        if self.kind == "cgroup2":
            return controllers == ""
        return "cpu" in controllers.split(",") and "cpu" in self.options

    def quotas(self, path: PurePosixPath) -> Iterator[float]:
        """Yield the quotas of a group and of those above it, as far as they can be seen."""
        # In a container the path may be that of the host, of which only its end is mounted.
        below = path.relative_to(self.root) if path.is_relative_to(self.root) else PurePosixPath()
        for part in (below, *below.parents):
            quota = _quota(self.folder / part)
            if quota is not None:
                yield quota


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(limit) / int(period) if limit != "max" and int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file at the root of a hierarchy
        return None


def _mounts(text: str) -> Iterator[_Mount]:
    """Yield the hierarchies in a ``mountinfo``: 31 23 0:28 ROOT FOLDER rw - KIND SOURCE OPTIONS."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _source, options = after.split(" ")[:3]
        if kind in {"cgroup", "cgroup2"}:
            root, folder = (_unescaped(field) for field in before.split(" ")[3:5])
            yield _Mount(kind, PurePosixPath(root), Path(folder), frozenset(options.split(",")))


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
