"""Fixtures of several packages' tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def failing_torch(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the import of torch fail in child processes: in ``%llm_doctor`` it takes seconds."""
    folder = tmp_path_factory.mktemp("path")
    (Path(folder) / "torch.py").write_text("raise ImportError('not in this test')")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
