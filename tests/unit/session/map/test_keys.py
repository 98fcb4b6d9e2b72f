"""What identifies a row: the same key on every machine, another one for anything that changes the answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llm_magic.backends.manager import LoadedModel
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.session.map.keys import KEY_BYTES, Keys
from llm_magic.types import Message, ModelInfo
from tests.scripted import ScriptedBackend

_HUB = ModelInfo(
    "tiny", "local", "cache", "/home/ada/models--org--tiny/snapshots/abc",
    "/home/ada/models--org--tiny/snapshots/abc", dtype="bfloat16", size=1_000,
)  # fmt: skip


def key(info: ModelInfo = _HUB, prompt: str = "?", **options: Any) -> bytes:
    """Return the key of a row that a model answers with some options."""
    loaded = LoadedModel(info.name, "org/tiny", LoadConfig(), ScriptedBackend(), info)
    config = GenerationConfig().replace(**{"temperature": 0, **options})
    return Keys(loaded, config).key([Message("user", prompt)])


def test_key_depends_on_the_model_the_prompt_and_the_settings() -> None:
    first = key()
    assert len(first) == KEY_BYTES
    assert first == key()
    changed = [
        key(prompt="??"),
        key(max_new_tokens=7),
        key(stop=("\n",)),
        key(seed=1),
        key(dataclasses.replace(_HUB, quantization="4bit")),
        key(dataclasses.replace(_HUB, dtype="float32")),
        key(dataclasses.replace(_HUB, folder="/home/ada/models--org--tiny/snapshots/def")),
    ]  # fmt: skip
    assert len({first, *changed}) == 1 + len(changed)


def test_name_and_folder_of_a_hub_model_do_not_count_but_the_path_of_another_does() -> None:
    elsewhere = "/data/models--org--tiny/snapshots/abc"
    moved = dataclasses.replace(_HUB, name="mine", source=elsewhere, folder=elsewhere)
    assert key(moved) == key()
    one, other = (
        dataclasses.replace(_HUB, where="folder", source=path, folder=path)
        for path in ("/runs/1/final", "/runs/2/final")
    )
    assert key(one) != key(other)


def test_files_of_a_local_model_count_and_not_its_size_in_memory(tmp_path: Path) -> None:
    def local(size: int) -> ModelInfo:
        return dataclasses.replace(_HUB, source=str(tmp_path), folder=str(tmp_path), size=size)

    (tmp_path / "model.safetensors").write_bytes(b"12")
    before = key(local(1_000))
    assert key(local(1_500)) == before
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert key(local(1_000)) != before


def test_equal_rows_above_temperature_0_have_keys_of_their_own_in_order() -> None:
    loaded = LoadedModel("tiny", None, LoadConfig(), ScriptedBackend(), _HUB)
    config = GenerationConfig(temperature=1.0)
    message = [Message("user", "?")]
    keys = [Keys(loaded, config) for _ in range(2)]
    first, second = ([one.key(message) for _ in range(3)] for one in keys)
    assert first == second
    assert len(set(first)) == 3
