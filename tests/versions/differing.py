"""Print the requirements of a constraints file that this environment does not meet.

``python -m tests.versions.differing tests/constraints-oldest.txt``, for ``pip install --target``.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement


def differing(lines: list[str]) -> list[str]:
    """Return the requirements among `lines` that the installed versions do not meet."""
    requirements = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return [str(each) for each in requirements if not _is_met(each)]


def _is_met(requirement: Requirement) -> bool:
    try:
        return version(requirement.name) in requirement.specifier
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.stdout.writelines(
        f"{each}\n" for each in differing(Path(sys.argv[1]).read_text().splitlines())
    )
