"""A small model in float32 that the tests of a file share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_magic.backends.local.batch import scheduler, shared_prefix
from llm_magic.session import Session
from tests.local_models import listening, local_session
from tests.many import SIZE, BatchModel
from tests.tiny_models import tiny_llama


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fewer sequences share a step, so that few prompts are enough for some to wait.

    They share every prefix, also one that is as fast to copy.
    """
    monkeypatch.setitem(scheduler.MAX_SEQUENCES, "cpu", SIZE)
    monkeypatch.setattr(shared_prefix, "MIN_SHARED_TOKENS", 1)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with local_session(prefix_cache="off") as session:
        yield session


@pytest.fixture(scope="module")
def llama(session: Session, tmp_path_factory: pytest.TempPathFactory) -> BatchModel:
    """A model that all tests share; the other models are loaded besides."""
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    return BatchModel(session, str(folder), keep=True)


@pytest.fixture
def load(session: Session, llama: BatchModel) -> Iterator[Callable[[Path], BatchModel]]:
    """Load one model after another besides the shared one."""

    def load_one(folder: Path) -> BatchModel:
        unload()
        return BatchModel(session, str(folder), name="other", keep=True)

    def unload() -> None:
        if "other" in [info.name for info in session.status().models]:
            session.unload("other")

    yield load_one
    unload()


@pytest.fixture(autouse=True)
def no_noise(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test here may log or print anything."""
    with listening() as noise:
        yield
    # Mamba logs once a process that its Python code is slow.
    assert [line for line in noise if "reference PyTorch implementation" not in line] == []
    lines = capfd.readouterr().err.splitlines()
    expected = ("Writing model shards", "reference PyTorch implementation")
    assert [x for x in lines if x and not any(text in x for text in expected)] == []
