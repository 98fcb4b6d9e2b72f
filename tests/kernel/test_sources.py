"""Models from a folder, from a file and from a hub, loaded with the magic."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Faults, HubServer
from tests.kernels import SIZE, Kernel, kernel, within_a_second
from tests.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = tmp_path_factory.mktemp("hub")
    with HubServer({"tiny/llama": tiny_llama(folder / "llama")}) as hub:
        yield hub


@pytest.fixture(scope="module")
def k(
    hub: HubServer, model_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kernel]:
    online = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "NO_PROXY": "*",
        "no_proxy": "*",
    }
    with kernel(None, None, None, LLM_MAGIC_CACHE_DIR=str(model_cache), **online) as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        yield k


def test_an_unknown_model_names_what_is_near(k: Kernel, hub: HubServer) -> None:
    ran = k.run("%llm_load SmolLM2-135M-Instrukt")
    assert (ran.ename, len(ran.traceback)) == ("ModelNotFound", 1)
    assert 'Did you mean "SmolLM2-135M-Instruct"?' in ran.error
    assert "SmolLM2-135M-Instruct" in k.ok("%llm_load smollm2-135m-instruct").text
    k.ok("%llm_unload")


def test_a_slow_download_shows_how_far_it_is_and_can_be_stopped(k: Kernel, hub: HubServer) -> None:
    hub.script("tiny/llama", Faults(only="*.safetensors", bytes_per_second=100_000))
    cell = k.send("%llm_load tiny/llama")
    hub.wait_for("GET", "model.safetensors")
    k.wait_for_output(cell, "downloading")
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, ran.error) == ("Interrupted", "Stopped loading tiny/llama.")
    assert ran.finished - pressed < within_a_second()
    assert k.value("llm.status().models") == ()

    hub.script("tiny/llama", Faults())
    deadline = time.monotonic() + 30
    while (ran := k.run("%llm_load tiny/llama")).ename == "LoadInProgress":
        assert time.monotonic() < deadline
    assert len(ran.outputs) == 1
    assert ran.text.startswith("llama · local cpu fp32 · ")
    k.ok("%llm --max-new-tokens 4 Hello")
    listed = k.ok("%llm_models").text.splitlines()
    assert any(line.split()[:3] == ["hub", "cache", "tiny/llama"] for line in listed)


def test_what_is_in_the_cache_needs_no_hub(k: Kernel, hub: HubServer) -> None:
    k.ok("%llm_unload")
    requests = len(hub.requests)
    k.ok("%llm_load tiny/llama")
    assert len(hub.requests) == requests


def test_a_folder_with_a_base_model_gets_the_plain_prompt(k: Kernel, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "my base", chat_template=None)
    assert k.ok(f"%llm_load '{folder}' --name base").text.startswith("base · local cpu fp32")
    # One token a byte, and no template around them.
    assert " · 5 tokens · " in k.ok("%llm --dry-run abcde").text
    k.ok("%llm --max-new-tokens 4 abcde")
    assert k.value("llm.last.usage.prompt_tokens") == 5


def test_the_embedded_file_by_its_path(k: Kernel) -> None:
    k.ok("from llm_magic.backends.local.files.gguf import embedded_file")
    file = k.value("str(embedded_file())")
    ran = k.ok(f"%llm_load {file} --name file")
    assert re.match(rf"file · local cpu bf16 · {SIZE} · 8,192 ctx", ran.text)
    # Once: not for the next file.
    assert (
        "\nOn a CPU, -b llamacpp generates two to four times as many tokens per second" in ran.text
    )
    assert "llamacpp" not in k.ok(f"%llm_load {file} --name again").text
    assert k.value("llm.status().models[0].where") == "gguf"
