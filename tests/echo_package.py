"""Installs the example package of docs/guides/add-a-backend.md, which adds a backend to ``-b``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.kernels import ROOT

SOURCE = ROOT / "docs" / "examples" / "llm-magic-echo"


def install(folder: Path) -> Path:
    """Install the package by pip, without a network, and return the folder to put on the path."""
    # setuptools writes beside the sources.
    copy = shutil.copytree(SOURCE, folder / "source")
    target = folder / "site-packages"
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(copy),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    return target
