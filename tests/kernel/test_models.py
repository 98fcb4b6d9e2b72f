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
    lost = (
        "Stopped loading slow. tiny was unloaded for it. No model is loaded now. To load tiny again:"
        " %llm_load tiny"
    )
    assert k.wait(cell).error == lost
    status = k.ok("%llm_status").text
    assert "Inactive" in status
    assert "Loading" not in status
    assert "importing" not in status
    waiting = "Loading next: waiting for the end of the stopped load … "
    cell = k.send("%llm_load next")
    k.wait_for_output(cell, waiting)
    pressed = time.monotonic()
    k.interrupt()
    stopped = k.wait(cell)
    assert (stopped.ename, stopped.error) == ("Interrupted", "Stopped loading next.")
    assert stopped.finished - pressed < within_a_second()
    assert waiting not in stopped.text
    assert "Inactive" in k.ok("%llm_status").text
    k.ok("from tests.scripted import at_release\nat_release(hang.go.set)")
    cell = k.send("%llm_load next")
    k.wait_for_output(cell, waiting)
    k.release()
    ran = k.wait(cell)
    assert ran.text.startswith("next · local cpu")


def test_a_load_that_is_stopped_before_it_was_checked_keeps_the_model(k: Kernel) -> None:
    k.ok(
        "%llm_load kept\nhang = backend.hang('check', deaf=True)\n"
        "backend.reports['check'] = [Progress('looking')]"
    )
    cell = k.send("%llm_load slow")
    k.wait_for_output(cell, "looking")
    k.interrupt()
    assert k.wait(cell).error == "Stopped loading slow."
    assert "Ready" in k.ok("%llm_status").text
    assert k.ok("%llm Hello").text.startswith("Hello")
    k.ok("hang.go.set()")


def test_unknown_name_is_answered_with_the_nearest_one_first(k: Kernel) -> None:
    k.ok("%llm_load org/Big-Model --keep")
    for line, error in {
        "%llm_use big": 'big is not loaded. Did you mean "Big-Model"?',
        "%llm_use other": "other is not loaded. Loaded models: tiny, Big-Model. Run %llm_load other.",
        "%llm_use qwen3": "qwen3 is not loaded. Loaded models: tiny, Big-Model."
        " Run %llm_load qwen3 -b ollama.",
        "%llm_unload other": "other is not loaded. Loaded models: tiny, Big-Model.",
    }.items():
        ran = k.run(line)
        assert (ran.ename, ran.error) == ("ModelNotLoaded", error)


def test_case_of_a_name_does_not_matter(k: Kernel) -> None:
    k.ok("%llm_load org/Big-Model --keep")
    assert "already loaded" in k.ok("%llm_load big-model --keep").text
    assert k.ok("%llm -m BIG-model hi").text.startswith("hi")
    k.ok("%llm_use TINY")
    assert k.value("llm.status().active_model") == "tiny"
    assert "Unloaded Big-Model" in k.ok("%llm_unload big-MODEL").text


def test_status_names_the_model_that_was_not_loaded(k: Kernel) -> None:
    k.ok(
        "from llm_magic.errors import LoadFailed\nbackend.trouble['check'] = LoadFailed('No server.')"
    )
    assert k.run("%llm_load smolm2").ename == "LoadFailed"
    assert "smolm2 failed: No server." in k.ok("%llm_status").text


def test_errors_name_the_line_that_works(k: Kernel) -> None:
    k.ok("backend.will(*whole_answer('```json\\nthe', finish='length'))")
    for line, error in {
        "%llm_use gpt4": "Run %llm_load gpt-4 -b openai.",
        "%llm --quiet --seed 5 Say it. -f json": "%llm --quiet --seed 5 -f json PROMPT.",
        "%llm -f json Say it.": "It was cut off at the token limit: use a higher --max-new-tokens.",
    }.items():
        assert error in k.run(line).error


def test_llm_that_is_called_names_the_method(k: Kernel) -> None:
    ran = k.run("llm('Hello', temperature=0)")
    assert (ran.ename, ran.error, len(ran.traceback)) == (
        "OptionError", "llm cannot be called. Use llm.generate(…), or llm.stream(…) for chunks.", 1,
    )  # fmt: skip
    ran = k.run("llm.ask('Hello')")
    assert ran.error == "llm.ask takes a Request. For a prompt: llm.generate(PROMPT)."
    page = k.help("llm")
    assert all(text in page for text in ("llm.generate(", "llm.stream(", "await llm.agenerate"))
    assert "Signature" not in page
    k.ok("from llm_magic import Reply\nreply = llm.generate('Hello')")
    assert (
        k.value("(isinstance(reply, Reply), 'Reply' in dir(__import__('llm_magic')))")
        == (True,) * 2
    )
