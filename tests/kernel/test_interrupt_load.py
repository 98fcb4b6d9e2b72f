"""■ ends a load within a second, wherever it is, and the next one works."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.kernels import Kernel, Ran, kernel, within_a_second
from tests.tiny_gguf import write_gguf
from tests.until import until


def stop(k: Kernel, cell: str, word: str, delay: float) -> tuple[Ran, float]:
    """Press ■ some time after a load has shown a stage."""
    k.wait_for_output(cell, word)
    time.sleep(delay)
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    return ran, ran.finished - pressed


def assert_stopped(k: Kernel, ran: Ran, error: str = "") -> None:
    """Check that nothing is loaded after ■, unless the load had just ended."""
    count = k.value("len(llm.status().models)")
    if ran.status == "ok":
        assert count == 1
        return
    is_late = ran.error.startswith("Stopped just after ")
    assert (ran.ename, count, len(ran.traceback)) == ("Interrupted", int(is_late), 1)
    assert is_late or ran.error.startswith(error)
    assert "<progress" not in ran.html


def load_again(k: Kernel, model: str = "") -> Ran:
    """Load again at once; an import that cannot be stopped may have to end first."""
    ran = k.ok(f"%llm_load {model}")
    k.ok("%llm -t 0 --max-new-tokens 2 Hello")
    return ran


@pytest.fixture
def fresh(model_cache: Path) -> Iterator[Kernel]:
    with kernel(LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        k.ok("%load_ext llm_magic\nfrom llm_magic import llm")
        yield k


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_while_torch_is_imported(fresh: Kernel, delay: float) -> None:
    ran, latency = stop(fresh, fresh.send("%llm_load"), "importing torch", delay)
    assert_stopped(fresh, ran, "Stopped loading the default model.")
    assert latency < within_a_second()
    load_again(fresh)


def test_while_an_import_waits(fresh: Kernel) -> None:
    fresh.ok("from tests.interrupt_points import hold_import\ngo = hold_import('torch')")
    ran, latency = stop(fresh, fresh.send("%llm_load"), "importing torch", 0.3)
    assert (ran.ename, ran.error) == ("Interrupted", "Stopped loading the default model.")
    assert len(ran.traceback) == 1
    assert latency < within_a_second()
    fresh.ok("go.set()")
    load_again(fresh)


def test_while_the_weights_are_read(loaded: Kernel) -> None:
    loaded.ok("%llm_unload")
    ran, latency = stop(loaded, loaded.send("%llm_load"), "reading the", 0.0)
    assert_stopped(loaded, ran)
    assert latency < within_a_second()
    load_again(loaded)


def test_while_a_file_is_converted(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    with kernel(LLM_MAGIC_CACHE_DIR=str(tmp_path)) as k:
        k.ok("%load_ext llm_magic\nfrom llm_magic import llm")
        ran, latency = stop(k, k.send(f"%llm_load {file}"), "converting", 0.3)
        assert_stopped(k, ran)
        assert latency < within_a_second()
        _wait_until_no_child_is_left(k)
        partial = functools.partial(tmp_path.glob, "converted/*.partial")
        until(lambda: not list(partial()), "a partial folder is left")
        # One if the conversion had just ended.
        assert len(list(tmp_path.glob("converted/*/*.safetensors"))) <= 1
        load_again(k, str(file))
        assert len(list(tmp_path.glob("converted/*/*.safetensors"))) == 1
        assert k.process.children(recursive=True) == []


def _wait_until_no_child_is_left(k: Kernel) -> None:
    _gone, alive = psutil.wait_procs(k.process.children(recursive=True), timeout=30)
    assert alive == []


def test_waiting_for_a_load_can_be_stopped_and_the_load_goes_on(fresh: Kernel) -> None:
    fresh.ok(
        "from tests.interrupt_points import hold_import\nfrom tests.scripted import at_release"
    )
    fresh.ok("at_release(hold_import('torch').set)\n%llm_load --bg")
    cell = fresh.send("%llm -t 0 --max-new-tokens 2 Hello")
    ran, latency = stop(fresh, cell, "Loading the default model", 0.3)
    assert ran.ename == "Interrupted"
    assert "the model is still loading" in ran.error
    assert "Loading" not in ran.text, "it is not shown any more"
    assert latency < within_a_second()
    cell = fresh.send("%llm -t 0 --max-new-tokens 2 Hello")
    fresh.wait_for_output(cell, "Loading the default model")
    fresh.release()
    ran = fresh.wait(cell)
    # One output from the first stage to the answer.
    assert len(ran.outputs) == 1
    assert ran.arrivals[0][2].startswith("Loading ")
    assert "2 tokens" in ran.text
