"""Unloads free all memory of the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_magic.errors import GenerationFailed
from llm_magic.session import Session
from llm_magic.types import Unloaded
from tests.gpu import devices
from tests.local_models import local_model

pytestmark = pytest.mark.gpu

_MIB = 1 << 20


@pytest.fixture
def warm(loaded: Session) -> Session:
    """Return a session that has loaded, answered and unloaded once, and holds nothing."""
    loaded.unload()
    devices.free_garbage()
    return loaded


@pytest.mark.parametrize("shape", ["one_b", "eight_b"])
def test_unload_frees_all_memory(warm: Session, shape: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(shape)
    devices.free_garbage()
    allocated, reserved = devices.allocated(), devices.reserved()
    unloaded = _cycle(warm, folder)
    assert devices.allocated() == allocated
    assert devices.reserved() - reserved <= 32 * _MIB
    assert unloaded.holders == ()
    _assert_sizes_are_right(unloaded)


def test_ten_loads_do_not_grow(warm: Session, one_b: Path) -> None:
    allocated, reserved = [], []
    for _ in range(10):
        _cycle(warm, one_b)
        allocated.append(devices.allocated())
        reserved.append(devices.reserved())
    assert len(set(allocated)) == 1
    assert max(reserved[2:]) - reserved[1] <= 32 * _MIB


def test_unload_after_a_failed_answer_frees_all_memory(warm: Session, one_b: Path) -> None:
    before = devices.allocated()
    warm.load(str(one_b))
    local_model(warm).model.register_forward_pre_hook(_BreaksAtStep(5))
    with pytest.raises(GenerationFailed, match="a broken step") as failed:
        warm.generate("Hello", max_new_tokens=16)
    warm.unload()
    # The error is still held here, as a notebook holds its last one.
    assert failed.value.details
    assert devices.allocated() == before


class _BreaksAtStep:
    """A hook that raises in the middle of an answer."""

    def __init__(self, step: int) -> None:
        self._left = step

    def __call__(self, _model: object, _inputs: object) -> None:
        self._left -= 1
        if not self._left:
            raise RuntimeError("a broken step")


def _cycle(session: Session, folder: Path) -> Unloaded:
    session.load(str(folder))
    session.generate("Hello", max_new_tokens=16)
    return session.unload()


def _assert_sizes_are_right(unloaded: Unloaded) -> None:
    """On a GPU the sizes before and after differ by the size of the model."""
    if devices.ON_GPU:
        before, after = (dict(use.devices) for use in (unloaded.before, unloaded.after))
        freed = before[devices.LABEL] - after[devices.LABEL]
        assert freed == pytest.approx(unloaded.size, rel=0.01)
