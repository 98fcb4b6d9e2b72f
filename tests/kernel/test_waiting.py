"""What a cell shows while its answer has no text: the load, the queue, the prompt that is read."""

from __future__ import annotations

import re
import time

import pytest

from tests.kernels import Kernel, Ran, within_a_second

_IMPORTS = """from tests import interrupt_points
from tests.scripted import Hang, at_release
from llm_magic.errors import LoadFailed
from llm_magic.types import Chunk"""


@pytest.fixture(scope="module")
def k(scripted: Kernel) -> Kernel:
    scripted.ok(_IMPORTS)
    return scripted


def start(k: Kernel, cell: str) -> Ran:
    """Run a cell that starts a job; it must return at once."""
    ran = k.wait(k.send(cell))
    assert (ran.status, ran.seconds < within_a_second()) == ("ok", True), ran.error
    return ran


def until(k: Kernel, ran: Ran, text: str) -> None:
    """Wait until the output of a cell that has ended contains a text."""
    deadline = time.monotonic() + 20
    while text not in ran.text + ran.html:
        assert time.monotonic() < deadline, ran.text + ran.html
        k.receive(0.05)


def test_background_answer_is_queued_behind_a_load(k: Kernel) -> None:
    k.ok("hang = backend.hang('load')")
    load = start(k, "%llm_load org/other --bg")
    assert load.text.startswith("Loading org/other · %llm_status shows the progress")
    under = start(k, "%%llm --bg -o job\nSay this.")
    later = start(k, "%%llm --bg -o later\nSay that.")
    number = k.value("job.number")
    assert under.text.endswith(f"job {number}: no answer yet · queued until the model is loaded")
    assert k.ok("%llm_jobs").text.splitlines()[-1].split()[:3] == [
        str(number + 1), "queued", "other",
    ]  # fmt: skip
    assert k.run("%%llm --bg -t 9\nHello").ename == "OptionError", "checked at once"
    assert k.value("(job.state, job.text, len(backend.requests))") == ("queued", "", 0)
    k.ok("backend.trouble.clear(); hang.go.set()")
    assert k.value("[job.result().text, later.result().text]") == ["Say this.", "Say that."]
    until(k, later, "Say that.\n\nother · 7 → 2 tokens")
    until(k, under, "Say this.\n\nother · 7 → 2 tokens")
    assert "job" not in under.text + later.text, "nothing is left of the wait"
    until(k, load, "other · local cpu bf16 · 269 MB · 8,192 ctx · ready in ")
    assert "Unloaded tiny" in load.text
    assert "Loading" not in load.text + load.html


def test_background_answer_fails_with_the_reason_of_the_load(k: Kernel) -> None:
    k.ok("hang = backend.hang('check')\nbackend.trouble['load'] = LoadFailed('The disk is full.')")
    load = start(k, "%llm_load org/broken --bg")
    under = start(k, "%%llm --bg -o job\nSay this.")
    k.ok("backend.trouble.pop('check').go.set()")
    until(k, under, "LoadFailed: The disk is full.")
    assert under.text.startswith("LoadFailed")
    ran = k.run("%llm_wait")
    assert (ran.ename, k.value("job.state")) == ("LoadFailed", "failed")
    again = "To load other again: %llm_load org/other"
    until(k, load, again)
    assert load.text == f"LoadFailed: The disk is full. other was unloaded for it. {again}"
    assert "Loading" not in load.html
    k.ok("backend.trouble.clear()\n%llm_load tiny")


def test_stop_ends_a_load_in_the_background(k: Kernel) -> None:
    k.ok("hang = backend.hang('load')")
    load = start(k, "%llm_load org/other --bg --keep")
    cell = k.send("%llm Hello")
    k.wait_for_output(cell, "Loading other")
    k.interrupt()
    waited = k.wait(cell)
    assert (waited.ename, waited.error) == (
        "Interrupted", "Stopped waiting; the model is still loading.",
    )  # fmt: skip
    assert load.text.startswith("Loading org/other"), "■ ends only the wait"
    assert k.ok("%llm_stop").text == "Stopped loading other."
    until(k, load, "Stopped loading org/other.")
    assert load.text == "Stopped loading org/other."
    k.ok("backend.trouble.clear()")
    assert k.ok("%llm_stop").text == "No job is running."
    assert k.ok("%llm Hello").text.startswith("Hello\n"), "the model of before answers"


def test_wait_takes_a_load_in_the_background(k: Kernel) -> None:
    k.ok("hang = backend.hang('load')")
    start(k, "%llm_load org/other --bg --keep")
    k.ok("hang.reached.wait()\nbackend.trouble.clear()\nat_release(hang.go.set)")
    cell = k.send("%llm_wait")
    k.wait_for_output(cell, "Loading other")
    k.release()
    assert k.wait(cell).text == "The active model is other."
    k.ok("backend.trouble['load'] = LoadFailed('The disk is full.')\nhang = backend.hang('check')")
    start(k, "%llm_load org/broken --bg --keep")
    k.ok("at_release(hang.go.set)")
    cell = k.send("%llm_wait")
    k.wait_for_output(cell, "Loading org/broken")
    k.release()
    assert k.wait(cell).ename == "LoadFailed"
    assert k.ok("%llm_wait").text == "No job is running."
    k.ok("backend.trouble.clear()\n%llm_unload other\n%llm_use tiny")


def test_running_and_queued_answers_show_it(k: Kernel) -> None:
    k.ok("hang, turn = Hang(), Hang()\nbackend.will('one', ' two', hang, *whole_answer(' three'))")
    k.ok("backend.will(Chunk(queued=True), turn, Chunk(), hang, *whole_answer('four'))")
    running = start(k, "%%llm --bg -o first\nCount.")
    queued = start(k, "%%llm --bg -o second\nCount on.")
    number = k.value("first.number")
    state = (
        f"job {number}: incomplete so far · when complete: first.text, unless the kernel restarts"
    )
    until(k, running, "one two")
    until(k, running, state)
    until(k, queued, f"tiny · job {number + 1}: no answer yet · queued behind job {number} (tiny)")
    assert k.value("(first.state, second.state)") == ("running", "queued")
    k.ok("turn.go.set()")
    until(k, queued, f"job {number + 1}: no answer yet · waiting for the first token")
    k.ok("hang.go.set()")
    k.ok("%llm_wait")
    for ran, text in ((running, "one two three"), (queued, "four")):
        until(k, ran, f"{text}\n\ntiny · 7 → ")
        assert ran.text.startswith(text)
        assert not re.search(r"job|incomplete|queued|waiting", ran.text + ran.html)


def test_plain_answer_prints_that_it_is_queued(k: Kernel) -> None:
    k.ok("backend.will('one', Hang())\nhang = Hang()\nat_release(hang.go.set)")
    k.ok("backend.will(Chunk(queued=True), hang, *whole_answer('two'))")
    start(k, "%%llm --bg -o job\nCount.")
    k.ok("while not job.text: __import__('time').sleep(0.01)")
    cell = k.send("%llm --plain Count on.")
    k.wait_for_output(cell, "[queued behind job")
    k.release()
    shown = k.wait(cell).text
    assert shown.startswith(f"[queued behind job {k.value('job.number')} (tiny)]\ntwo\n")
    k.ok("%llm_stop")


def test_unload_shows_the_job_that_it_waits_for(k: Kernel) -> None:
    k.ok("hang = Hang()\nbackend.will('one', hang, *whole_answer(' two'))")
    start(k, "%%llm --bg -o job\nCount.")
    number = k.value("job.number")
    waiting = f"Waiting for job {number} (running, 1 token)"
    cells = {"%llm_unload": waiting, "%llm_unload --all": waiting}
    for cell_text, shown in (cells | {"llm.unload()": ""}).items():
        cell = k.send(cell_text if shown else f"interrupt_points.announce_wait()\n{cell_text}")
        if shown:
            k.wait_for_output(cell, shown)
        else:
            k.wait_for_announcement(cell)
        k.interrupt()
        ran = k.wait(cell)
        expected = f"Stopped waiting; job {number} continues. Nothing was unloaded."
        assert (ran.ename, ran.error) == ("Interrupted", expected)
    assert k.value("(job.state, llm.status().active_model)") == ("running", "tiny")
    # A load that replaces the model waits in the same way.
    cell = k.send("%llm_load org/other")
    k.wait_for_output(cell, f"Loading org/other: waiting for job {number}")
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"
    assert k.value("(job.state, llm.status().active_model)") == ("running", "tiny")
    k.ok("import threading\nthreading.Timer(0.5, hang.go.set).start()")
    assert k.ok("%llm_unload").text.startswith("Unloaded tiny")
    assert k.value("(job.state, job.text)") == ("done", "one two")
    k.ok("%llm_load tiny")


def test_long_prompt_is_shown_while_it_is_read(loaded: Kernel) -> None:
    loaded.ok("words = ' '.join(f'w{i}' for i in range(200))")
    ran = loaded.ok("%llm -t 0 --max-new-tokens 1 Repeat: {words}")
    counts = [re.search(r"([\d,]+) of ([\d,]+) tokens", text) for *_, text in ran.arrivals]
    read = [int(count[1].replace(",", "")) for count in counts if count]
    total = {int(count[2].replace(",", "")) for count in counts if count}
    prompt, cached = loaded.value("(llm.last.usage.prompt_tokens, llm.last.usage.cached_tokens)")
    assert (len(read) > 1, read == sorted(read), total) == (True, True, {prompt - cached})
    assert "reading" not in ran.text
    # What an earlier prompt has read is not read again, so it does not count.
    ran = loaded.ok("%llm -t 0 --max-new-tokens 1 Repeat: {words} and {words[:400]}")
    totals = {
        found for *_, text in ran.arrivals for found in re.findall(r"of ([\d,]+) tokens", text)
    }
    prompt, cached = loaded.value("(llm.last.usage.prompt_tokens, llm.last.usage.cached_tokens)")
    assert cached > 300
    assert totals == {f"{prompt - cached:,}"}


def test_answer_is_queued_behind_one_of_the_same_process(loaded: Kernel) -> None:
    long = "--max-new-tokens 4000 -p min_new_tokens=4000"
    loaded.ok(f"%%llm --bg -o first {long}\nCount to one hundred.")
    alone = "-p no_repeat_ngram_size=3"  # which cannot share steps
    queued = loaded.wait(loaded.send(f"%%llm --bg -o second --max-new-tokens 2 {alone}\nCount on."))
    number = loaded.value("first.number")
    until(loaded, queued, f"queued behind job {number} (SmolLM2-135M-Instruct)")
    assert loaded.value("second.state") == "queued"
    loaded.ok("%llm_stop " + str(number))
    loaded.ok("%llm_wait")
    until(loaded, queued, "cut off at 2 tokens")
    assert "queued" not in queued.text
