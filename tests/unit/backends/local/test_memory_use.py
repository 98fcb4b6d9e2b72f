"""The memory of loads, unloads and failed answers, measured in this process."""

from __future__ import annotations

import gc
import json
import struct
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_magic.backends.local import cpu_linear, load_plan, memory
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.errors import GenerationFailed, OutOfMemory
from llm_magic.session import Session
from tests.local_models import local_model, local_session
from tests.tiny_models import Architecture, tiny, tiny_llama
from tests.until import until

held: Any = None


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    # Without what is kept of earlier prompts: its tensors would be counted too.
    options: Any = {"max_new_tokens": 4, "repetition_penalty": 1, "temperature": 0}
    with local_session(prefix_cache="off", **options) as session:
        yield session


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def process_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def huge(folder: Path, size: int) -> Path:
    """A model whose one file is `size` bytes long, of which the disk only stores the header."""
    file = tiny_llama(folder) / "model.safetensors"
    shape, dtype = [size // 2 // 1000, 1000], "BF16"
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with file.open("r+b") as stream:
        stream.truncate(8 + len(header) + size)
    return folder


@pytest.mark.parametrize(
    ("quantization", "needed"),
    [
        ("none", "4120.1 GB"),
        ("8bit", "2061.1 GB"),
        ("4bit", "1287.6 GB"),
        ("bnb-4bit", "1158.8 GB"),
    ],
)
def test_too_large_model_leaves_the_loaded_one(
    session: Session, tmp_path: Path, quantization: str, needed: str
) -> None:
    session.load(str(tiny_llama(tmp_path / "small")))
    folder = huge(tmp_path / "m", 4 * 10**12)
    with pytest.raises(OutOfMemory) as caught:
        session.load(str(folder), quantization=quantization, device="cpu")
    message = str(caught.value)
    assert message.startswith(f"m needs about {needed} on cpu, ")
    # No smaller kind of it fits either, so none is proposed.
    assert message.endswith(" GB is free. Try a smaller model, or free memory with %llm_unload.")
    assert session.status().active_model == "small"
    assert session.generate("x").usage.completion_tokens


def test_error_suggests_a_quantization_that_fits(session: Session, tmp_path: Path) -> None:
    free = memory.free_bytes("cpu")
    session.load(str(tiny_llama(tmp_path / "small")))
    for share, proposed in ((1.3, "8bit"), (2.0, "4bit")):
        folder = huge(tmp_path / proposed, int(free * share))
        with pytest.raises(OutOfMemory, match=rf"Try -q {proposed} \(about [\d.]+ GB\), a smaller"):
            session.load(str(folder), device="cpu")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mamba"])
def test_estimated_size_is_that_of_the_loaded_model(
    tmp_path: Path, architecture: Architecture, dtype: str
) -> None:
    folder = tiny(tmp_path / "m", architecture, hidden=256, layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    estimate = memory.weight_bytes(folder, dtype, "none")
    cpu_linear.optimize(model)
    assert estimate == pytest.approx(model.get_memory_footprint(), rel=0.15)


def test_unload_reports_the_freed_memory(session: Session, model_cache: Path) -> None:
    size = session.load().size
    assert size is not None
    session.generate("x")
    unloaded = session.unload()
    assert (unloaded.name, unloaded.size, unloaded.holders) == ("SmolLM2-135M-Instruct", size, ())
    assert unloaded.before.process - unloaded.after.process > 0.8 * size
    assert abs(process_bytes() - unloaded.after.process) < 0.2 * size
    status = session.status()
    assert (status.status, status.models, status.active_model) == ("Inactive", (), None)


@pytest.mark.usefixtures("whole_heap")
def test_unload_names_what_holds_the_model(session: Session, tmp_path: Path) -> None:
    global held
    session.load(str(tiny_llama(tmp_path / "m")))
    held = local_model(session).model
    unloaded = session.unload()
    held = None
    assert unloaded.holders == (f"{__name__}.held",)


def test_unload_runs_no_garbage_collector(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m")))
    session.generate("x")
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            collections.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        unloaded = session.unload()
    finally:
        gc.callbacks.remove(note)
    assert (collections, unloaded.holders) == ([], ())


def test_weight_in_a_cycle_of_garbage_is_freed(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m")))
    weight = next(local_model(session).model.parameters())
    cycle: list[object] = [weight[:1]]
    cycle.append(cycle)
    freed = weakref.ref(weight)
    del weight, cycle
    assert session.unload().holders == ()
    assert freed() is None


@pytest.mark.parametrize(("quantization", "size"), [("8bit", 192), ("4bit", 152)])
def test_quantizing_load_never_has_the_usual_weights(
    session: Session, model_cache: Path, quantization: str, size: int
) -> None:
    session.load(quantization=quantization, device="cpu")
    session.unload()
    before = owned_bytes()
    done, peaks = threading.Event(), [before]

    def measure() -> None:
        while not done.wait(0.002):
            peaks.append(owned_bytes())

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        session.load(quantization=quantization, device="cpu")
    finally:
        done.set()
        thread.join()
    # The usual weights are 269 MB; the largest of them, of which the head is made, is 57 MB.
    assert (max(peaks) - before) / 1e6 < size + 75
    # The file is not mapped any more.
    mapped = Path("/proc/self/maps").read_text()
    assert "model.safetensors" not in mapped
    session.unload()


def owned_bytes() -> int:
    """Return the memory of the process without the files that it reads."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def test_ten_loads_do_not_grow_the_process(session: Session, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", hidden=512, layers=4, max_position_embeddings=2048)
    counts, sizes = [], []
    for _ in range(10):
        info = session.load(str(folder))
        session.generate("word " * 60)
        session.unload()
        counts.append(tensors())
        sizes.append(process_bytes())
    assert len(set(counts[1:])) == 1
    assert info.size is not None
    assert info.size > 20e6
    # In the first rounds torch takes what it keeps; after that less than one model comes on top.
    assert sizes[-1] - min(sizes[2:]) < info.size / 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("quantization", ["8bit", "4bit", "bnb-8bit", "bnb-4bit"])
def test_unload_frees_all_of_a_quantized_model(
    session: Session, tmp_path: Path, quantization: str
) -> None:
    folder = tiny_llama(tmp_path / "m")
    counts = []
    for _ in range(3):
        session.load(str(folder), quantization=quantization)
        session.generate("x")
        assert session.unload().holders == ()
        counts.append(tensors())
    assert counts[1] == counts[2]


@pytest.mark.parametrize("count", [2, 400], ids=["short", "in pieces"])
def test_failed_answer_keeps_no_tensor(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    session.load(str(tiny_llama(tmp_path / "m", max_position_embeddings=4096)))
    prompt = "word " * count
    session.generate(prompt)
    before = tensors()
    # Found wrong at the first token, after the prompt was read: cache and logits are alive then.
    with pytest.raises(GenerationFailed) as caught:
        session.generate(prompt, extra={"bad_words_ids": [[99_999]]})
    # A notebook stores its last error, with all its frames.
    error = caught.value
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
    assert "logits_process.py" in error.details
    assert tensors() == before
    session.generate(prompt)
    assert tensors() == before


def test_closed_stream_keeps_no_tensor(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m", max_position_embeddings=4096)))
    session.generate("x")
    before = tensors()
    stream = session.stream("word " * 400, max_new_tokens=500)
    for chunk in stream:
        if chunk.tokens:
            break
    assert tensors() > before
    stream.close()  # type: ignore[attr-defined]
    # The last frames of the inference thread end after the answer.
    until(lambda: tensors() == before, "tensors of the closed answer are alive")


def test_memory_freed_on_another_device_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 if device == "cpu" else 100)
    freed = {"cuda:0": 1000, "cpu": 7, "mps:0": 20}

    def free(device: str, requested: str = "", **options: Any) -> int:
        config = LocalLoadConfig().replace(device=requested or device, **options)
        return load_plan.available_bytes(config, device, freed)

    assert free("cpu") == 10 + 7 + 20
    assert free("cuda:1") == 100
    assert free("cuda:0") == 1100
    assert free("mps") == 100 + 7 + 20
    assert free("cuda", "auto") == 1100 + 37
    assert free("cuda", "auto", quantization="4bit") == 1100


def test_weight_bytes_by_device(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    loaded = local_model(session)
    assert set(loaded.weight_bytes()) == {"cpu"}
    assert loaded.weight_bytes()["cpu"] >= loaded.model.num_parameters() * 4
