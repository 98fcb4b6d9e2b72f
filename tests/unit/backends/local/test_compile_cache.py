"""The environment variable with the folder for compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_magic.backends.local import compile_cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def test_variable_is_set_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(tmp_path))
    # Registers the variable, so that the end of the test restores it.
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    compile_cache.set_folder()
    assert Path(os.environ[VARIABLE]).is_relative_to(tmp_path)
    compile_cache.restore()
    assert VARIABLE not in os.environ


def test_variable_of_the_user_is_not_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    compile_cache.set_folder()
    assert os.environ[VARIABLE] == str(tmp_path)
    compile_cache.restore()
    assert os.environ[VARIABLE] == str(tmp_path)
