"""Loads on the device: the size of a model, and errors that leave the loaded one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import threading
from pathlib import Path

import pytest

from llm_magic.backends.local import memory
from llm_magic.errors import DeviceUnavailable, Interrupted, OutOfMemory
from llm_magic.session import Session
from tests.gpu import devices

pytestmark = pytest.mark.gpu
only_gpu = pytest.mark.skipif(not devices.ON_GPU, reason="only a GPU has memory of its own")
_FIGURES = r"needs about [\d.,]+ [MG]B on \S+, but only [\d.,]+ [MG]B is free\."


@pytest.mark.parametrize("device", [devices.NAME, "auto"])
def test_device_is_reported(session: Session, one_b: Path, device: str) -> None:
    assert session.load(str(one_b), device=device).device == devices.LABEL
    assert session.generate("Hello", max_new_tokens=4).finish_reason == "length"


def test_unknown_gpu_is_an_error(loaded: Session, one_b: Path) -> None:
    with pytest.raises(DeviceUnavailable, match=r"^\S[^\n]+\.$"):
        loaded.load(str(one_b), device="cuda:7")
    _still_answers(loaded)


@pytest.mark.parametrize("shape", ["one_b", "eight_b"])
def test_loaded_model_uses_its_reported_size(
    session: Session, shape: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(shape)
    devices.free_garbage()
    before = devices.allocated()
    size = session.load(str(folder)).size
    assert size is not None
    devices.free_garbage()
    assert devices.allocated() - before == pytest.approx(size, rel=0.01)


def test_model_larger_than_any_device_is_an_error(
    loaded: Session, one_b: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemory, match=_FIGURES) as refused:
        loaded.load(str(_huge(one_b, tmp_path / "huge")))
    assert "Try " in str(refused.value)
    assert "-q 4bit" not in str(refused.value)
    assert "\n" not in str(refused.value)
    _still_answers(loaded)


@only_gpu
def test_model_larger_than_the_free_memory_is_an_error(loaded: Session, one_b: Path) -> None:
    with devices.ballast(512 << 20), pytest.raises(OutOfMemory, match=_FIGURES):
        loaded.load(str(one_b), keep=True, name="second", device=devices.NAME)
    _still_answers(loaded)


@only_gpu
def test_out_of_memory_within_a_load_is_freed(
    session: Session, one_b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = devices.allocated()
    # As if another process had used the memory after the check.
    monkeypatch.setattr(memory, "check_fit", lambda *_args, **_kwargs: None)
    with devices.ballast(512 << 20):
        held = devices.allocated()
        with pytest.raises(OutOfMemory, match=r"^Memory ran out while [^\n]+ was being loaded\."):
            session.load(str(one_b), device=devices.NAME)
        # The threads that read files may still hold a tensor.
        assert devices.comes_back_to(held)
    assert devices.comes_back_to(before)
    session.load(str(one_b))
    _still_answers(session)


@only_gpu
def test_interrupted_load_is_freed(session: Session, eight_b: Path) -> None:
    before = devices.allocated()
    pressed = threading.Event()

    def stop() -> None:
        progress = session.progress
        if progress is not None and (progress.share or 0) > 0.2 and not pressed.is_set():
            pressed.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        session.load_with_details(str(eight_b), on_wait=stop)
    assert devices.comes_back_to(before)
    assert session.status().status == "Inactive"


def _still_answers(session: Session) -> None:
    assert session.status().status == "Ready"
    assert session.generate("Hello", max_new_tokens=4).usage.completion_tokens == 4


def _huge(model: Path, folder: Path) -> Path:
    """Make a folder whose weights take 1 TiB, all of it a hole in the file."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensor = {"dtype": "BF16", "shape": [1 << 19, 1 << 20], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"model.layers.0.weight": tensor}).encode()
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(weights, 8 + len(header) + (1 << 40))
    return folder
