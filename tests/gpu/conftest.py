"""Models of real size, and a session that holds one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_magic.config.settings import Settings
from llm_magic.session import Session
from tests.gpu import devices, shapes


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of the tests that also need bitsandbytes."""
    config.addinivalue_line("markers", "bnb: needs bitsandbytes beside the GPU (scripts/test-gpu)")


def pytest_report_header() -> str:
    """Print the device under test."""
    return f"device under test: {devices.NAME} ({devices.versions()})"


@pytest.fixture(scope="session")
def one_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a 1B model."""
    return shapes.folder_of(shapes.sized(shapes.ONE_B), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def eight_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an 8B model."""
    return shapes.folder_of(shapes.sized(shapes.EIGHT_B), tmp_path_factory.mktemp("models"))


@pytest.fixture
def session() -> Iterator[Session]:
    """Return a session without a model and without settings of the environment."""
    # The tests count bytes: the prefix cache would be among them.
    settings = Settings(_env_file=None, LLM_DEVICE=devices.NAME, LLM_PREFIX_CACHE="off")
    fresh = Session(settings)
    yield fresh
    fresh.close()
    devices.free_garbage()


@pytest.fixture
def loaded(session: Session, one_b: Path) -> Session:
    """Return a session with the 1B model that has answered once.

    torch has then allocated what it never frees: the workspace of cuBLAS, and kernels.
    """
    session.load(str(one_b))
    session.generate("Hello", max_new_tokens=4)
    devices.free_garbage()
    return session
