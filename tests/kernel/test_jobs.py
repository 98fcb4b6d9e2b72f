"""Jobs as a new user takes them: as texts, by their variables, in prompts, and with ``-f json``."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.kernels import Kernel, within_a_second


@pytest.fixture
def k(scripted: Kernel) -> Iterator[Kernel]:
    scripted.ok(
        "from llm_magic.errors import GenerationFailed\nfrom tests.scripted import Hang, at_release"
    )
    yield scripted
    # A job that is stopped before it reaches the backend leaves its script.
    scripted.ok("%llm_stop\n%llm_wait\nbackend.scripts.clear()")


def started(k: Kernel, *script: str, options: str = "") -> int:
    """Start a job with a script whose step `hang` waits, and return its number."""
    k.ok(f"hang = Hang(); backend.will({', '.join(script)})")
    k.ok(f"%%llm --bg -o job {options}\nCount.")
    if script[0] != "hang":
        k.ok("while not job.text: __import__('time').sleep(0.01)")
    return int(k.value("job.number"))


def test_job_shows_its_text_and_where_the_reply_is(k: Kernel) -> None:
    number = started(k, "'one'", "hang", "*whole_answer(' two')")
    assert k.ok("job").text.startswith(f"<Job {number}: tiny, running, 1 token so far, ")
    wrong = k.run("job.upper()")
    assert (wrong.ename, wrong.error) == (
        "NoAttribute",
        f"Job {number} has no attribute 'upper'. Use .result().upper: result() returns the reply.",
    )
    assert len(wrong.traceback) == 1
    assert k.run("job.colour").error == f"Job {number} has no attribute 'colour'."
    k.ok("import numpy as np, pandas as pd")
    text = f"Job {number} is a Response, not a text. Use .result(), which returns the reply."
    for code in (
        "'two' in job",
        "job[:10]",
        "len(job)",
        "'a' + job",
        "f'{job:>9}'",
        "np.array(job)",
    ):
        wrong = k.run(code)
        assert (wrong.ename, wrong.error, len(wrong.traceback)) == ("NotText", text, 1)
    wrong = k.run("pd.DataFrame({'a': [1, 2]}).assign(x=job)")
    assert (wrong.ename, wrong.error, len(wrong.traceback)) == ("NotText", text, 1)
    assert k.value("(bool(job), len(pd.Series([job])))") == (True, 1)
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
        "Interrupted", f"Stopped waiting; job {number} continues.",
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
    k.ok("%llm {job}, {len(job.text)}, {job!r}")
    sent = k.value("backend.requests[-1].messages[-1].content")
    assert sent.startswith(f"one, 3, <Job {number}: tiny, stopped, 1 token, ")
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
    assert k.run(f"%llm_stop {first},999").error.endswith("See %llm_jobs. Nothing was stopped.")
    assert k.value("other.state") == "running"
    assert k.ok("%llm_stop other").text == f"Stopped job {first} (tiny) after 1 token."
    assert k.ok("%llm_wait other").text.splitlines()[1].split()[:2] == [str(first), "stopped"]
    assert k.ok("%llm_stop all").text == f"Stopped job {second} (tiny) after 1 token."
    assert k.ok("%llm_wait all").status == "ok"
    assert "all" in k.complete("%llm_stop a")
    found = k.value(f"[llm.jobs.find(one) is job for one in ({second}, '{second}', {first})]")
    assert found == [True, True, False]
    k.ok("words = 'no job'")
    for name in ("words", "missing", "llm.jobs"):
        wrong = k.run(f"%llm_stop {name}")
        assert (wrong.ename, f"There is no job '{name}'" in wrong.error) == ("JobNotFound", True)
    assert k.run("%llm_wait othr").error.endswith('See %llm_jobs. Did you mean "other"?')
    k.ok("jobs = {'a': job, 'b': other}")
    assert [line.split()[0] for line in k.ok("%llm_wait jobs").text.splitlines()[1:]] == [
        str(second), str(first),
    ]  # fmt: skip
    assert [line.split()[0] for line in k.ok("%llm_wait job, other job").text.splitlines()[1:]] == [
        str(second), str(first),
    ]  # fmt: skip


def test_stop_takes_several_jobs(k: Kernel) -> None:
    start = "hang = Hang(); backend.will(hang)\n%llm --bg -o job{0} {0}\nhang.reached.wait()\n"
    k.ok("".join(start.format(i) for i in range(5)))
    first = k.value("job0.number")
    numbers = range(first, first + 5)
    stopped = [f"Stopped job {n} (tiny) before the first word." for n in numbers]
    wrong = k.run(f"%llm_stop {first} nope")
    assert wrong.error.startswith("There is no job 'nope'; there are: ")
    assert k.value("job0.done") is False, "a wrong name stops nothing"
    assert k.ok(f"%llm_stop {first},{first + 1}").text.splitlines() == stopped[:2]
    assert k.ok(f"%llm_stop {first + 2} job3").text.splitlines() == stopped[2:4]
    assert k.ok(f"%llm_stop job4, {first + 4}").text == stopped[4]
    rows = k.ok(f"%llm_jobs {first} job4").text.splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == [str(first), str(first + 4)]
    assert all("before the first word" in row for row in rows)
    k.ok("job = job0; del job")
    assert k.ok(f"%llm_stop job {first}").text == f"Job {first} had already ended: stopped."
    assert k.run("%llm_stop job").error.startswith("There is no job 'job'; there are: ")
    assert k.run("%llm_jobs --clear").error == (
        "%llm_jobs has no option --clear. %llm_jobs lists the running jobs and the last 20 that have"
        " finished."
    )
    assert str(first) in k.complete(f"%llm_stop {first + 1} {str(first)[0]}")


def test_wait_ends_after_its_timeout(k: Kernel) -> None:
    number = started(k, "'one'", "hang", "*whole_answer(' two')")
    k.ok("other = job; backend.will(*whole_answer('all'))\n%llm --bg -o job All.\njob.result()")
    for line in (f"%llm_wait {number} job --timeout 0.3", "%llm_wait --timeout=0.3s"):
        ran = k.ok(line)
        assert 0.3 < ran.seconds < 0.3 + within_a_second()
        assert ran.text.splitlines()[1].split()[:2] == [str(number), "running"]
        assert ran.text.endswith(f"\nStopped waiting; job {number} continues.")
    assert k.value("(other.done, other.is_awaited)") == (False, False)
    for value in ("soon", "-1", "nan"):
        assert k.run(f"%llm_wait --timeout={value}").error == (
            f"--timeout {value} is not a number of seconds. Write --timeout 5."
        )
    k.ok("hang.go.set()")
    ran = k.ok("%llm_wait --timeout 60")
    assert (ran.seconds < 30, "continues" in ran.text, "done" in ran.text) == (True, False, True)
    k.ok("load = backend.hang('load')\n%llm_load org/other --bg --keep\nload.reached.wait()")
    assert k.ok("%llm_wait --timeout 0.2").text == "other is still loading."
    k.ok("backend.trouble.clear(); at_release(load.go.set)")
    cell = k.send("%llm_wait --timeout 60")
    k.wait_for_output(cell, "Loading other")
    k.release()
    assert k.wait(cell).text == "The active model is other."
    k.ok("%llm_unload other\n%llm_use tiny")


def test_all_names_every_model_and_chat_unless_one_has_that_name(k: Kernel) -> None:
    k.ok("%llm_load org/all --keep\n%llm -c all Hello\n%llm -c zoo Hello")
    assert "Unloaded all" in k.ok("%llm_unload all").text
    assert k.value("llm.status().active_model") == "tiny"
    assert k.ok("%llm_reset all").text == "Deleted: all."
    assert k.ok("%llm_reset all").text == "Deleted: zoo."
    assert k.ok("%llm_unload all").text.startswith("Unloaded tiny")
    assert k.value("llm.status().active_model") is None
    k.ok("%llm_load tiny")


def test_jobs_table_shows_the_answer_so_far(k: Kernel) -> None:
    started(k, "'one'", "hang")
    k.ok("backend.will(hang)\n%llm --bg Wait.")
    rows = [line.split("  ") for line in k.ok("%llm_jobs").text.splitlines()[-2:]]
    shown = [[part.strip() for part in row if part.strip()][1:4] for row in rows]
    assert shown == [
        ["running", "tiny", "1 token"],
        ["waiting", "tiny", "waiting for the first token"],
    ]


def test_option_o_takes_the_name_of_a_job_not_its_text(k: Kernel) -> None:
    number = started(k, "'one'", "hang")
    for option in ("-o {job}", "--bg -o {job}", "-o $job", "--output={job}"):
        wrong = k.run(f"%llm {option} Hello")
        assert (wrong.ename, wrong.error) == (
            "OptionError",
            "-o {job} would use the text of the job as a name. To store the answer in job, write -o job.",
        )
    assert k.ok("%llm_stop {job}").text == f"Stopped job {number} (tiny) after 1 token."
    assert k.ok("%llm_wait $job").text.splitlines()[1].split()[:2] == [str(number), "stopped"]
    k.ok("name, reply = 'answer', llm.generate('Hello')\n%llm -o {name} Hello")
    assert k.value("(str(answer), 'one' in globals())") == ("Hello", False)
    assert "the text of the reply" in k.run("%llm -o {reply} Hello").error


def test_finished_answer_is_printed_without_its_state(k: Kernel) -> None:
    number = started(k, "'one'", "hang", "*whole_answer(' two')")
    assert k.value("job.text") == "one"
    assert k.ok("print(job)").text.startswith(f"<Job {number}: tiny, running, 1 token so far, ")
    k.ok("hang.go.set()\njob.result()")
    assert k.ok("print(job)").text == "one two\n"
    started(k, "'one'", "hang")
    k.ok("%llm_stop")
    assert k.ok("print(job, f'{job}')").text == "one one\n"


def test_stopped_job_raises_an_error_that_a_program_can_catch(k: Kernel) -> None:
    number = started(k, "'one'", "hang")
    k.ok("%llm_stop")
    message = f"Job {number} was stopped after 1 token; the answer so far is in job.text."
    for wait in ("job.result()", "await job", "list(job)"):
        ran = k.run(wait)
        assert (ran.ename, ran.error, len(ran.traceback)) == ("GenerationStopped", message, 1)
        k.ok(f"try: {wait}\nexcept Exception as error: caught = error")
        assert k.value("(caught.reply.text, caught.reply.finish_reason)") == ("one", "cancelled")
    k.ok("import asyncio\ngot = await asyncio.gather(job, return_exceptions=True)")
    assert k.value("type(got[0]).__name__") == "GenerationStopped"


def test_completion_offers_what_is_documented(k: Kernel) -> None:
    started(k, "'one'", "hang")
    offered = {name.removeprefix("job.").removeprefix(".") for name in k.complete("job.")}
    assert {"result", "text", "done", "cancel", "reply", "state"} <= offered
    assert not offered & {"add", "end", "revision", "prepared", "is_awaited", "pending_chunks"}
    offered = {name.removeprefix("llm.").removeprefix(".") for name in k.complete("llm.")}
    assert {"generate", "load", "last", "jobs", "generation"} <= offered
    assert not offered & {"cells", "listen", "load_with_details", "answering", "known_models"}


def test_jobs_table_shows_which_cell_or_panel_started_a_job(k: Kernel) -> None:
    k.ok("from llm_magic.notebook.panel import ControlPanel\npanel = ControlPanel(llm)")
    ran = k.wait(k.send("%llm --bg From a cell."))
    k.ok("%llm_wait")
    count = ran.reply["execution_count"]
    k.ok("panel.asking.ask('From the panel.')\nllm.jobs.all[-1].result()")
    rows = [line for line in k.ok("%llm_jobs").text.splitlines() if line[0].isdigit()][-2:]
    assert [re.split("  +", row)[-2] for row in rows] == [
        f"cell [{count}]", "panel",
    ]  # fmt: skip


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
    number = k.value("job.number")
    assert str(number) not in k.ok("%llm_wait").text, "%llm_stop reported it"
    assert k.ok(f"%llm_wait {number}").text.splitlines()[-1].startswith(f"{number} ")


def test_objects_of_python_show_what_they_are_and_how_to_do_it(k: Kernel) -> None:
    for code, advice in (
        ("llm.stop()", "%llm_stop stops all answers, job.cancel() stops a job"),
        ("llm.config(temperature=0)", "Use llm.generation.temperature = 0.2."),
        ("llm.generation.temprature", 'Did you mean "temperature"?'),
        ("llm.load(bg=True)", "To load it meanwhile: %llm_load --bg."),
        (
            "llm.generate('Hello', bg=True)",
            "use %%llm --bg -o job, or await llm.agenerate(PROMPT).",
        ),
    ):
        wrong = k.run(code)
        assert (advice in wrong.error, len(wrong.traceback)) == (True, 1), wrong.error
    assert k.ok("hasattr(llm, 'stop') or hasattr(llm.generation, 'temprature')").text == "False"
    number = started(k, "'one'", "hang")
    assert f"{number} running" in k.ok("llm.jobs").text
    k.ok("%llm -c eda Hello")
    assert "eda (1 turn)" in k.ok("llm.chats").text


def test_answers_of_threads_are_shown_awaited_and_stopped(k: Kernel) -> None:
    k.ok(
        "import threading\n"
        "hang = Hang(); backend.will('one', hang)\n"
        "thread = threading.Thread(target=lambda: llm.generate('Hello')); thread.start()\n"
        "hang.reached.wait()"
    )
    assert re.search(r"an answer to Python code +tiny · 1 token", k.ok("%llm_status").text)
    cell = k.send("%llm_unload")
    k.wait_for_output(cell, "Waiting for an answer to Python code (running, 1 token) … ")
    k.interrupt()
    stopped = k.wait(cell)
    assert (stopped.ename, stopped.error) == (
        "Interrupted", "Stopped waiting; 1 answer to Python code continues. Nothing was unloaded.",
    )  # fmt: skip
    assert k.value("(thread.is_alive(), llm.status().active_model)") == (True, "tiny")
    assert k.ok("%llm_stop").text == "Stopped 1 answer to Python code."
    assert k.ok("%llm_stop").text == "No job is running."
    assert k.value("(thread.join(), llm.last.text)") == (None, "one")


def test_map_of_a_task_and_one_that_is_half_read_are_shown_and_stopped(k: Kernel) -> None:
    k.ok(
        "import asyncio\n"
        "hang = Hang(); backend.will('one', hang)\n"
        "task = asyncio.create_task(llm.amap('{item}', ['a', 'b'], workers=1))\n"
        "while not hang.reached.is_set(): await asyncio.sleep(0.01)"
    )
    assert re.search(r"a map +tiny · 0 of 2 rows", k.ok("%llm_status").text)
    assert k.ok("%llm_stop").text == "Stopped a map (tiny) after 0 of 2 rows."
    k.ok("import contextlib\nwith contextlib.suppress(BaseException): await task")
    assert k.value("(task.done(), llm.last_mapped.pending)") == (True, [0, 1])
    k.ok("answers = llm.imap('{item}', range(1_000))\nnext(answers)")
    assert re.fullmatch(r"Stopped a map \(tiny\) after \d+ of 1,000 rows\.", k.ok("%llm_stop").text)
    assert k.ok("%llm_stop").text == "No job is running."
    assert "GenerationStopped" in k.run("list(answers)").ename


def test_stop_ends_what_an_executor_has_queued(k: Kernel) -> None:
    k.ok(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool, hang = ThreadPoolExecutor(1), Hang()\n"
        "for _ in range(9): backend.will('one', hang)\n"
        "futures = [pool.submit(llm.generate, 'Hello') for _ in range(9)]\n"
        "hang.reached.wait()"
    )
    assert (
        k.ok("stopped = %llm_stop\npool.shutdown()\nstopped").text
        == "Stopped 1 answer to Python code."
    )
    assert k.value("{type(f.exception()).__name__ for f in futures}") == {"Interrupted"}
    assert k.value("futures[0].exception().reply.text") == "one"
    k.ok("backend.scripts.clear()")
    assert k.ok("print(ThreadPoolExecutor(1).submit(llm.generate, 'Hi').result())").text == "Hi\n"


def test_unload_that_is_stopped_shows_what_is_still_loaded(k: Kernel) -> None:
    k.ok("hang = backend.hang('unload')\nfrom tests import interrupt_points")
    cell = k.send("interrupt_points.announce(hang.reached.is_set)\n%llm_unload")
    k.wait_for_announcement(cell)
    k.interrupt()
    stopped = k.wait(cell)
    assert (stopped.ename, stopped.error) == (
        "Interrupted", "Stopped while the memory was being freed. No model is loaded any more.",
    )  # fmt: skip
    k.ok("backend.trouble.clear()\n%llm_load tiny")


def test_errors_in_threads_are_one_line(k: Kernel) -> None:
    ran = k.ok(
        "import threading\n"
        "backend.will('one', GenerationFailed('It broke.'))\n"
        "thread = threading.Thread(target=lambda: llm.generate('Hello'), name='mine')\n"
        "thread.start(); thread.join()"
    )
    lines = re.sub(r"\x1b\[\d*m", "", ran.text).splitlines()
    assert lines[0] == "Exception in mine: GenerationFailed: It broke."
    assert (len(lines), "target=lambda" in lines[-1]) == (2, True)
    cell = k.send(
        "hang = Hang(); backend.will('one', hang)\n"
        "thread = threading.Thread(target=lambda: llm.generate('Hello')); thread.start()\n"
        "hang.reached.wait(); print('begun')\nthread.join()"
    )
    k.wait_for_output(cell, "begun")
    k.interrupt()
    stopped = k.wait(cell)
    assert stopped.error == (
        "Stopped 1 answer in other threads. The partial texts are in their exceptions (.reply)."
    )
    assert "Exception in" not in stopped.text
    other = k.ok("t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()")
    assert "ZeroDivisionError" in other.text
    assert "Traceback (most recent call last)" in other.text


def test_prompt_after_a_failed_load_goes_to_the_active_model(k: Kernel) -> None:
    load = (
        "from llm_magic.errors import LoadFailed\nbackend.trouble['check'] = LoadFailed('Full.')\n"
        "%llm_load org/other --bg\nwhile llm.loading: __import__('time').sleep(0.01)"
    )
    k.ok(load)
    assert k.ok("%llm Hello").text.startswith(
        "Note: org/other was not loaded; tiny answers.\nHello"
    )
    assert "Note" not in k.ok("%llm Hello").text
    k.ok(load)
    assert "tiny" in k.ok("%llm_use tiny").text
    k.ok("backend.trouble.clear()")
