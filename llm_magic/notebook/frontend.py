"""What a click can do while a cell runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def reach_busy_kernels() -> bool:
    """Return whether this kernel handles a click while a cell runs: ipykernel 7.1 to 7.3 do."""
    try:
        major, minor = map(int, version("ipykernel").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return major == 7 and 1 <= minor <= 3
