"""■ ends a load within a second, wherever it is, and the next one works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.kernels import Kernel, Ran, kernel, within_a_second
from tests.tiny_gguf import write_gguf


def stop(k: Kernel, cell: str, word: str, delay: float) -> tuple[Ran, float]:
    """Press ■ some time after a load has shown a stage."""
    k.wait_for_output(cell, word)
    time.sleep(delay)
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    return ran, ran.finished - pressed


def load_again(k: Kernel, model: str = "") -> Ran:
    """Load again at once; an import that cannot be stopped may have to end first."""
    ran = k.ok(f"%llm_load {model}")
    k.ok("%llm -t 0 --max-new-tokens 2 Hello")
    return ran


@pytest.fixture
def fresh(model_cache: Path) -> Iterator[Kernel]:
    with kernel(LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        k.ok("%load_ext llm_magic")
        yield k


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_while_torch_is_imported(fresh: Kernel, delay: float) -> None:
    ran, latency = stop(fresh, fresh.send("%llm_load"), "importing torch", delay)
    assert (ran.ename, ran.error) == ("Interrupted", "Stopped loading the default model.")
    assert len(ran.traceback) == 1
    assert "<progress" not in ran.html
    assert latency < within_a_second()
    load_again(fresh)


def test_while_the_weights_are_read(loaded: Kernel) -> None:
    loaded.ok("%llm_unload")
    ran, latency = stop(loaded, loaded.send("%llm_load"), "reading the", 0.0)
    if ran.status == "error":  # it had not just ended
        assert ran.ename == "Interrupted"
        assert loaded.value("llm.status().models") == ()
    assert latency < within_a_second()
    load_again(loaded)


def test_while_a_file_is_converted(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    with kernel(LLM_MAGIC_CACHE_DIR=str(tmp_path)) as k:
        k.ok("%load_ext llm_magic")
        ran, latency = stop(k, k.send(f"%llm_load {file}"), "converting", 1.0)
        assert ran.ename == "Interrupted"
        assert latency < within_a_second()
        _wait_until_no_child_is_left(k)
        assert list(tmp_path.glob("converted/*.partial")) == []
        assert list(tmp_path.glob("converted/*/*.safetensors")) == []
        load_again(k, str(file))
        assert len(list(tmp_path.glob("converted/*/*.safetensors"))) == 1
        assert k.process.children(recursive=True) == []


def _wait_until_no_child_is_left(k: Kernel) -> None:
    _gone, alive = psutil.wait_procs(k.process.children(recursive=True), timeout=5)
    assert alive == []


def test_waiting_for_a_load_can_be_stopped_and_the_load_goes_on(fresh: Kernel) -> None:
    fresh.ok("%llm_load --bg")
    cell = fresh.send("%llm -t 0 --max-new-tokens 2 Hello")
    ran, latency = stop(fresh, cell, "Loading the default model: importing torch … ", 0.3)
    assert ran.ename == "Interrupted"
    assert "the model is still loading" in ran.error
    assert "Loading" not in ran.text, "it is not shown any more"
    assert latency < within_a_second()
    ran = fresh.ok("%llm -t 0 --max-new-tokens 2 Hello")
    # One output from the first stage to the answer.
    assert len(ran.outputs) == 1
    assert ran.arrivals[0][2].startswith("Loading ")
    assert "2 tokens" in ran.text
