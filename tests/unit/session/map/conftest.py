"""A session on the backend of `tests.worker_backend`, which worker processes find, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_magic.backends import registry
from llm_magic.session import Session
from tests import worker_backend
from tests.scripted import settings


@pytest.fixture(scope="module")
def worker_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Add the backend to the path, which new processes get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(worker_backend.install(tmp_path_factory.mktemp("packages") / "site"))
        yield
    registry.refresh()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the folder of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def recorded(worker_path: None, model: Path) -> Iterator[Session]:
    """Return a session with this model."""
    session = Session(settings())
    session.load(str(model), backend="recorded")
    yield session
    session.close()
