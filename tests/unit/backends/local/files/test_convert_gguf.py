"""The real child process that converts a GGUF file, on a tiny one."""

from __future__ import annotations

import json
import multiprocessing
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer

from llm_magic.backends.local.files import gguf
from llm_magic.errors import LoadFailed
from llm_magic.types import Progress
from tests.tiny_gguf import HIDDEN, LAYERS, TEMPLATE, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def convert(file: Path) -> Path:
    """Convert as one kernel does; a plain function, so that another process can run it."""
    return gguf.convert(file, report=lambda progress: None, cancelled=lambda: False)


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, list[Progress]]]:
    """Return a converted folder, and the progress of the conversion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_MAGIC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        reported: list[Progress] = []
        tiny = write_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")
        yield gguf.convert(tiny, report=reported.append, cancelled=lambda: False), reported


def test_converted_weights_are_tied_bfloat16(converted: tuple[Path, list[Progress]]) -> None:
    raw = (converted[0] / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header
    assert len(header) == 2 + LAYERS * 9
    start, end = header["model.embed_tokens.weight"]["data_offsets"]
    halves = np.frombuffer(raw[8 + length + start : 8 + length + end], np.uint16)
    numbers = (halves.astype(np.uint32) << 16).view(np.float32).reshape(-1, HIDDEN)
    rng = np.random.default_rng(len("token_embd.weight"))
    np.testing.assert_allclose(numbers, rng.normal(size=numbers.shape), rtol=2**-8)


def test_converted_config_has_the_metadata_of_the_file(
    converted: tuple[Path, list[Progress]],
) -> None:
    folder, _ = converted
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    made_of = json.loads((folder / "llm_magic.json").read_text())
    assert made_of["source"].endswith("tiny.gguf")


def test_stop_tokens_include_the_end_of_a_turn(
    converted: tuple[Path, list[Progress]],
) -> None:
    generation = json.loads((converted[0] / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    assert generation["pad_token_id"] == 0


def test_spaces_before_a_number_are_one_token(converted: tuple[Path, list[Progress]]) -> None:
    tokenizer = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    assert tokenizer.encode("x  12<|im_end|>").tokens == ["x", "ĠĠ", "1", "2", "<|im_end|>"]


def test_progress_never_decreases(converted: tuple[Path, list[Progress]]) -> None:
    _, reported = converted
    shares = [progress.share or 0.0 for progress in reported]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert 0.9 < shares[-1] <= 1.0
    assert {progress.stage for progress in reported} == {"converting tiny.gguf"}
    details = list(dict.fromkeys(progress.detail for progress in reported))
    assert details == ["starting", "reading the tokenizer", "reading the weights", "saving"]


def test_unknown_architecture_is_an_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    odd = write_gguf(tmp_path / "odd.gguf", "nonsense")
    with pytest.raises(
        LoadFailed, match=r"^odd\.gguf could not be converted: .*nonsense"
    ) as failed:
        convert(odd)
    assert "\n" not in str(failed.value)
    assert "Traceback" in failed.value.details
    assert "GOMP_SPINCOUNT = '10000'" in failed.value.details, (
        "the threads of the child spin longer"
    )
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_missing_weights_are_an_error(tmp_path: Path, cache: Path) -> None:
    odd = write_gguf(tmp_path / "odd.gguf", lacking="blk.1.ffn_up.weight")
    with pytest.raises(LoadFailed, match=r"the file lacks weights, such as model\.layers\.1"):
        convert(odd)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_child_ends_when_its_kernel_is_killed(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    process = multiprocessing.get_context("spawn").Process(target=convert, args=(file,))
    process.start()
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        of_kernel = psutil.Process(process.pid).children()
        children = [child for child in of_kernel if "convert_gguf.py" in " ".join(child.cmdline())]
        time.sleep(0.02)
    process.kill()
    process.join()
    process.close()
    assert children
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not list(cache.glob("*.partial/*.safetensors")), "it went on to the end"
    assert not [path for path in cache.iterdir() if path.suffix not in {".lock", ".partial"}]
