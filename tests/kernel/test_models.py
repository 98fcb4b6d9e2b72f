"""Models as a new user loads and names them: after a stopped load, by a part of a name, from Python."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.kernels import Kernel, within_a_second


@pytest.fixture
def k(scripted: Kernel) -> Iterator[Kernel]:
    yield scripted
    scripted.ok("backend.trouble.clear()\n%llm_load tiny")


def test_load_waits_for_the_end_of_a_stopped_one(k: Kernel) -> None:
    k.ok("from llm_magic.types import Progress\nhang = backend.hang('load', deaf=True)")
    k.ok("backend.reports['load'] = [Progress('importing torch')]")
    cell = k.send("%llm_load slow")
    k.wait_for_output(cell, "importing torch")
    k.interrupt()
    assert k.wait(cell).error == "Stopped loading slow."
    waiting = "Loading next: waiting for the end of the stopped load … "
    cell = k.send("%llm_load next")
    k.wait_for_output(cell, waiting)
    pressed = time.monotonic()
    k.interrupt()
    stopped = k.wait(cell)
    assert (stopped.ename, stopped.error) == ("Interrupted", "Stopped loading next.")
    assert stopped.finished - pressed < within_a_second()
    assert waiting not in stopped.text
    k.ok("__import__('threading').Timer(0.3, hang.go.set).start()")
    ran = k.ok("%llm_load next")
    assert any(waiting in text for _, _, text in ran.arrivals)
    assert ran.text.startswith("next · local cpu")


def test_unknown_name_is_answered_with_the_nearest_one_first(k: Kernel) -> None:
    k.ok("%llm_load org/Big-Model --keep")
    for line, error in {
        "%llm_use big": 'big is not loaded. Did you mean "Big-Model"?',
        "%llm -m big-model hi": 'big-model is not loaded. Did you mean "Big-Model"?',
        "%llm_use other": "other is not loaded. Loaded models: tiny, Big-Model. Run %llm_load other.",
        "%llm_use qwen3": "qwen3 is not loaded. Loaded models: tiny, Big-Model."
        " Run %llm_load qwen3 -b ollama.",
        "%llm_unload other": "other is not loaded. Loaded models: tiny, Big-Model.",
    }.items():
        ran = k.run(line)
        assert (ran.ename, ran.error) == ("ModelNotLoaded", error)


def test_llm_that_is_called_names_the_method(k: Kernel) -> None:
    ran = k.run("llm('Hello', temperature=0)")
    assert (ran.ename, ran.error, len(ran.traceback)) == (
        "OptionError", "llm cannot be called. Use llm.generate(…), or llm.stream(…) for chunks.", 1,
    )  # fmt: skip
    k.ok("from llm_magic import Reply\nreply = llm.generate('Hello')")
    assert (
        k.value("(isinstance(reply, Reply), 'Reply' in dir(__import__('llm_magic')))")
        == (True,) * 2
    )
