"""Smaller weights by bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_magic.session import Session
from tests.gpu import devices

pytestmark = [pytest.mark.gpu, pytest.mark.bnb]


@pytest.mark.parametrize(("bits", "share"), [("4bit", 0.6), ("8bit", 0.8)])
def test_quantized_model_is_smaller_and_answers(
    session: Session, one_b: Path, bits: str, share: float
) -> None:
    whole = session.load(str(one_b)).size
    session.unload()
    session.load(str(one_b), quantization=bits)
    session.generate("Hello", max_new_tokens=4)
    session.unload()
    devices.free_garbage()
    before = devices.allocated()
    info = session.load(str(one_b), quantization=bits)
    assert info.device == devices.LABEL
    assert info.size is not None
    assert whole is not None
    assert info.size < share * whole
    assert session.generate("Hello", max_new_tokens=8).usage.completion_tokens == 8
    session.unload()
    devices.free_garbage()
    assert devices.allocated() == before
