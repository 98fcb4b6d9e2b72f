"""Names of models on this disk: the right ones, and quickly, however much is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from llm_magic.backends.local.files import gguf, sources


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str, *files: str) -> Path:
    folder = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()
    return folder


def names(folder: Path | None = None) -> set[str]:
    return {info.name for info in sources.names(folder)} - {gguf.EMBEDDED_NAME}


def test_only_models_with_weights_of_the_hub_cache(hub: Path) -> None:
    assert names() == set()
    cached(hub, "org/one", "config.json", "model.safetensors")
    cached(hub, "gpt2", "model-00001-of-00002.safetensors")
    cached(hub, "org/tokenizer-only", "tokenizer.json")
    (hub / "datasets--org--data" / "snapshots" / "abc").mkdir(parents=True)
    (hub / "models--org--broken").mkdir()
    assert names() == {"org/one", "gpt2"}


def test_a_download_that_ends_is_seen_though_the_folder_was_looked_at_before(hub: Path) -> None:
    folder = cached(hub, "org/one", "config.json")
    os.utime(folder, ns=(1, 1))
    assert names() == set()
    (folder / "model.safetensors").touch()
    assert names() == {"org/one"}


def test_the_folder_of_the_settings(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "with blanks").mkdir(parents=True)
    (folder / "with blanks" / "config.json").touch()
    (folder / "no model").mkdir()
    (folder / "small.gguf").touch()
    (folder / "notes.txt").touch()
    assert names(folder) == {"with blanks", "small.gguf"}
    assert names(tmp_path / "nowhere") == set()


def test_paths_are_written_as_they_were_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").touch()
    (tmp_path / "models" / "more").mkdir()
    (tmp_path / "models" / ".hidden").mkdir()
    (tmp_path / "models" / "my file.gguf").touch()
    (tmp_path / "models" / "my notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.paths("mod") == ["models/"]
    assert sources.paths("./mod") == ["./models/"]
    assert sources.paths("~/mod") == ["~/models/"]
    assert sources.paths("models/m") == ["models/mine", "models/more/", "models/my file.gguf"]
    assert sources.paths("models/.h") == ["models/.hidden/"]
    assert sources.paths(f"{tmp_path}/models/mi") == [f"{tmp_path}/models/mine"]
    assert sources.paths("org/model") == []


def test_a_large_cache_is_read_within_a_key_press(hub: Path) -> None:
    for number in range(300):
        cached(hub, f"org/model-{number}", *(f"file-{part}" for part in range(10)), "m.safetensors")
    assert len(names()) == 300
    began = time.process_time()
    assert len(names()) == 300
    assert time.process_time() - began < 0.1  # 30 ms, and room for a busy machine
