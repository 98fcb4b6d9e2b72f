"""Kernels that the tests of several modules share; each module finds them like new."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import ROOT, Kernel, kernel

# Removes what a module leaves: variables, history, the last exception, and traits of IPython.
_RESET = """%reset -f
import sys
for name in ("last_exc", "last_type", "last_value", "last_traceback"):
    vars(sys).pop(name, None)
get_ipython().config.pop("LLMMagics", None)
del sys, name"""
_SCRIPTED = """from llm_magic.notebook.magics import register
from llm_magic.session import Session
from tests.scripted import ScriptedBackend, whole_answer
backend = ScriptedBackend()
llm = Session(create=lambda _name: backend)
register(get_ipython(), llm)
%llm_load tiny"""


@pytest.fixture(scope="session")
def kernel_with_model(model_cache: Path) -> Iterator[Kernel]:
    """Return a kernel that is used for local models."""
    with kernel(LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        yield k


@pytest.fixture(scope="module")
def loaded(kernel_with_model: Kernel) -> Iterator[Kernel]:
    """Return a kernel with the extension, the bundled model, and `llm`."""
    k = kernel_with_model
    k.ok(_RESET)
    k.ok("%load_ext llm_magic")
    k.ok("from llm_magic import llm")
    k.ok("%llm_load")
    yield k
    k.ok("%unload_ext llm_magic")


@pytest.fixture(scope="session")
def kernel_with_script() -> Iterator[Kernel]:
    """Return a kernel that is used for scripted models."""
    with kernel(PYTHONPATH=str(ROOT)) as k:
        yield k


@pytest.fixture(scope="module")
def scripted(kernel_with_script: Kernel) -> Kernel:
    """Return a kernel whose model ``tiny`` generates the script of `backend`, or repeats the prompt."""
    kernel_with_script.ok(_RESET)
    kernel_with_script.ok(_SCRIPTED)
    return kernel_with_script
