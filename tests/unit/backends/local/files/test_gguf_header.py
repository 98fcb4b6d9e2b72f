"""What is said of GGUF files that are no good."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from llm_magic.backends.local.files.gguf import read_header
from llm_magic.errors import LoadFailed
from tests.tiny_gguf import write_gguf


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "some model.gguf")


def damaged(whole: bytes) -> dict[str, bytes]:
    """What has to be one plain line, by what the line has to say."""
    return {
        "is not complete: ": whole[:-100],
        "is damaged or not complete": whole[: len(whole) // 200],
        "is damaged": whole[:4] + b"\x63" + whole[5:],
        "does not begin with GGUF": b"version https://git-lfs.github.com/spec/v1\n",
        "not a GGUF file": b"",
        "header cannot be read": b"GGUF",
    }


@pytest.mark.parametrize("says", damaged(b""))
def test_a_damaged_file_is_one_line(says: str, file: Path) -> None:
    file.write_bytes(damaged(file.read_bytes())[says])
    with pytest.raises(LoadFailed, match=says) as bad:
        read_header(file)
    assert str(bad.value).startswith("some model.gguf is ")
    assert "\n" not in str(bad.value)


def test_any_cut_and_any_flipped_byte_is_one_line_or_no_matter(file: Path) -> None:
    whole = file.read_bytes()
    tensors = whole.index(b"ffn_down") + 2000  # behind the header
    rng = np.random.default_rng(0)
    for place in rng.integers(0, tensors, 400):
        flipped = bytearray(whole)
        flipped[place] = rng.integers(0, 256)
        file.write_bytes(bytes(flipped))
        with contextlib.suppress(LoadFailed):
            read_header(file)
        file.write_bytes(whole[:place])
        with pytest.raises(LoadFailed):
            read_header(file)


def test_one_part_of_a_model_says_how_to_join_them(tmp_path: Path) -> None:
    part = write_gguf(tmp_path / "big-00001-of-00003.gguf", parts=3)
    with pytest.raises(LoadFailed, match=r"is one of 3 parts\. Join them first: llama-gguf-split"):
        read_header(part)
