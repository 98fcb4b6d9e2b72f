"""Jobs as a new user takes them: as texts, by their variables, in prompts, and with ``-f json``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels import Kernel, within_a_second


@pytest.fixture
def k(scripted: Kernel) -> Iterator[Kernel]:
    scripted.ok("from llm_magic.errors import GenerationFailed\nfrom tests.scripted import Hang")
    yield scripted
    scripted.ok("%llm_stop\n%llm_wait")


def started(k: Kernel, *script: str, options: str = "") -> int:
    """Start a job with a script whose step `hang` waits, and return its number."""
    k.ok(f"hang = Hang(); backend.will({', '.join(script)})")
    k.ok(f"%%llm --bg -o job {options}\nCount.")
    if script[0] != "hang":
        k.ok("while not job.text: __import__('time').sleep(0.01)")
    return int(k.value("job.number"))


def test_job_shows_its_text_and_where_the_reply_is(k: Kernel) -> None:
    number = started(k, "'one'", "hang", "*whole_answer(' two')")
    assert k.ok("job").text.startswith(f"<Job {number}: tiny, running, 1 token, ")
    wrong = k.run("job.upper()")
    assert (wrong.ename, wrong.error) == (
        "AttributeError",
        "'Response' object has no attribute 'upper'. Use result().upper: result() returns the reply.",
    )
    assert k.run("job.colour").error == "'Response' object has no attribute 'colour'."
    for code in ("'two' in job", "job[:10]"):
        wrong = k.run(code)
        assert (wrong.ename, "Use result()" in wrong.error) == ("TypeError", True)
    k.ok("hang.go.set()\njob.result()")
    assert k.ok("job").text.endswith(" s: 'one two'>")
    assert k.value("'two' in job.result()")


def test_prompt_waits_for_the_jobs_in_it(k: Kernel) -> None:
    number = started(k, "'one'", "hang", "*whole_answer(' two')")
    before = k.value("len(backend.requests)")
    cell = k.send("%llm -f text Translate: {job}")
    k.wait_for_output(cell, f"Waiting for job {number} (running, 1 token) … ")
    k.interrupt()
    stopped = k.wait(cell)
    assert (stopped.ename, stopped.error) == (
        "Interrupted", f"Stopped waiting; still running: {number}.",
    )  # fmt: skip
    assert k.value("(len(backend.requests), job.done)") == (before, False)
    k.ok("__import__('threading').Timer(0.5, hang.go.set).start()")
    ran = k.ok('%llm -f text -s "{job.text}" Translate: {job}')
    assert ran.text.startswith("Translate: one two\n")
    assert "Waiting" not in ran.text
    assert k.value("[m.content for m in backend.requests[-1].messages]") == [
        "one two", "Translate: one two",
    ]  # fmt: skip


def test_prompt_with_a_job_that_was_stopped_or_failed(k: Kernel) -> None:
    number = started(k, "'one'", "hang")
    k.ok(f"%llm_stop {number}")
    note = f"Note: job {number} was stopped: its incomplete answer is inserted"
    for options in ("", "--dry-run "):
        assert note in k.ok(f"%llm {options}Translate: {{job}}").text
    started(k, "'one'", "hang", "GenerationFailed('It broke.')")
    k.ok("__import__('threading').Timer(0.2, hang.go.set).start()")
    before = k.value("len(backend.requests)")
    failed = k.run("%llm Translate: {job}")
    number = k.value("job.number")
    assert (failed.ename, failed.error, len(failed.traceback)) == (
        "PromptError", f"{{job}}: job {number} failed: It broke.", 1,
    )  # fmt: skip
    assert k.value("len(backend.requests)") == before
    assert "1 token · It broke." in k.ok("%llm_jobs").text
    shown = k.ok("job").text
    assert shown.startswith(f"<Job {number}: tiny, failed, 1 token, ")
    assert shown.endswith(" s: 'one': It broke.>")


def test_load_of_the_loaded_model_waits_for_no_job(k: Kernel) -> None:
    started(k, "'one'", "hang")
    ran = k.ok("%llm_load tiny")
    assert "already loaded" in ran.text
    assert "Waiting" not in ran.text
    assert ran.seconds < within_a_second()
    assert k.value("job.state") == "running"


def test_stop_and_wait_take_all_and_variables(k: Kernel) -> None:
    first = started(k, "'one'", "hang")
    k.ok("other = job")
    second = started(k, "'two'", "hang")
    assert k.ok("%llm_stop other").text == f"Stopped job {first} (tiny) after 1 token."
    assert k.ok("%llm_wait other").text.splitlines()[1].startswith(f"{first}    stopped")
    assert k.ok("%llm_stop all").text == f"Stopped job {second} (tiny) after 1 token."
    assert k.ok("%llm_wait all").status == "ok"
    assert "all" in k.complete("%llm_stop a")
    k.ok("words = 'no job'")
    for name in ("words", "missing", "llm.jobs"):
        wrong = k.run(f"%llm_stop {name}")
        assert (wrong.ename, f"There is no job '{name}'" in wrong.error) == ("JobNotFound", True)
    assert k.run("%llm_wait othr").error.endswith('See %llm_jobs. Did you mean "other"?')
    assert k.run("%llm_wait job other").error == (
        "%llm_wait: unexpected argument 'other'. Name one job, or all."
    )


def test_jobs_table_shows_the_answer_so_far(k: Kernel) -> None:
    started(k, "'one'", "hang")
    k.ok("backend.will(hang)\n%llm --bg Wait.")
    rows = [line.split("  ") for line in k.ok("%llm_jobs").text.splitlines()[-2:]]
    shown = [[part.strip() for part in row if part.strip()][1:4] for row in rows]
    assert shown == [
        ["running", "tiny", "1 token"],
        ["waiting", "tiny", "waiting for the first token"],
    ]


def test_job_whose_answer_is_no_json_fails_the_wait(k: Kernel) -> None:
    k.ok("backend.will(*whole_answer('no', ' json'))")
    under = k.wait(k.send("%%llm --bg -f json -o job\nList."))
    failed = k.run("%llm_wait job")
    error = "The answer is not valid JSON: there is no object or array in it."
    assert (failed.ename, failed.error, len(failed.traceback)) == ("InvalidReply", error, 1)
    assert failed.seconds < within_a_second()
    assert k.value("(job.state, str(job.reply))") == ("failed", "no json")
    assert under.text.count(error) == 1
    assert under.text.startswith("no json")
    assert k.run("job.result()").ename == "InvalidReply"
    k.ok("backend.will(*whole_answer('[1, ', '2]'))\n%llm --bg -f json -o job List.")
    assert k.ok("%llm_wait").status == "ok"
    assert k.value("job.result().json()") == [1, 2]
    started(k, "'[1'", "hang", options="-f json")
    k.ok("%llm_stop")
    assert k.value("job.state") == "stopped", "the user stopped it"
