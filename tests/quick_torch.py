"""A package ``torch`` without a GPU that is imported at once, for child processes that report its GPUs.

The import of the real one takes 2 s of CPU time.
"""

from __future__ import annotations

from pathlib import Path

_CODE = """
class cuda:
    is_available = staticmethod(lambda: False)
class version:
    cuda = hip = None
class backends: ...
"""


def install(folder: Path) -> None:
    """Write the package into a folder of the path."""
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(_CODE)
