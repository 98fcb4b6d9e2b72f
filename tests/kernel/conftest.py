"""Kernels that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import ROOT, Kernel, kernel


@pytest.fixture(scope="module")
def loaded(model_cache: Path) -> Iterator[Kernel]:
    """Return a kernel with the extension, the embedded model, and `llm`."""
    with kernel(LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        k.ok("%llm_load")
        yield k


@pytest.fixture(scope="module")
def scripted() -> Iterator[Kernel]:
    """Return a kernel whose model ``tiny`` says what `backend` is told, or repeats the prompt."""
    with kernel(PYTHONPATH=str(ROOT)) as k:
        k.ok(
            "from llm_magic.notebook.magics import register\n"
            "from llm_magic.session import Session\n"
            "from tests.scripted import ScriptedBackend, say\n"
            "backend = ScriptedBackend()\n"
            "llm = Session(create=lambda _name: backend)\n"
            "register(get_ipython(), llm)\n"
            "%llm_load tiny"
        )
        yield k
