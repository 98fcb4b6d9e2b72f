"""Fixtures of several packages' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_magic.config.commands import use_magics


@pytest.fixture
def failing_torch(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the import of torch fail in child processes: in ``%llm_doctor`` it takes seconds."""
    folder = tmp_path_factory.mktemp("path")
    (Path(folder) / "torch.py").write_text("raise ImportError('not in this test')")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture(autouse=True)
def _messages_name_magics() -> Iterator[None]:
    """Spell commands in messages as in a kernel; the tests of programs run in processes of their own."""
    use_magics(True)
    yield
    use_magics(False)
