"""`%%llm --bg`: answers that stream into their own cell while other cells run; jobs to stop and await."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.kernels import ROOT, Kernel, Ran, kernel, within_a_second
from tests.until import until

SCRIPTED = """
from llm_magic.notebook.magics import register
from llm_magic.session import Session
from tests.scripted import Hang, Pause, ScriptedBackend, at_release, whole_answer
from llm_magic.errors import GenerationFailed
from llm_magic.types import Chunk
backend = ScriptedBackend()
llm = Session(create=lambda _name: backend)
register(get_ipython(), llm)
def slowly(*words):
    return [step for word in words for step in (Pause(0.1), word)] + whole_answer()
%llm_load tiny
"""
VERSIONS = ["", "6.31.0", "7.3.0"]


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda v: v or "installed")
def k(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    with kernel(request.param or None) as k:
        k.ok(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
        k.ok(SCRIPTED)
        yield k


@pytest.fixture(autouse=True)
def no_script_is_left(request: pytest.FixtureRequest) -> None:
    """Begin without the script of a job that was stopped before it reached the backend."""
    if "k" in request.fixturenames:
        request.getfixturevalue("k").ok("backend.scripts.clear()")


@pytest.fixture
def messages(k: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Return what is shown from now on: parent, kind and plain text, as it is received."""
    received: list[tuple[str, str, str]] = []
    get = k.client.get_iopub_msg

    def spy(**options: Any) -> dict[str, Any]:
        message: dict[str, Any] = get(**options)
        text = message["content"].get("data", {}).get("text/plain", "")
        received.append((message["parent_header"].get("msg_id", ""), message["msg_type"], text))
        return message

    monkeypatch.setattr(k.client, "get_iopub_msg", spy)
    return received


def begun(k: Kernel, cell: str) -> Ran:
    """Run a cell that begins a job; it must return at once."""
    ran = k.ok(cell)
    assert ran.seconds < within_a_second()
    return ran


def wait_for_end(k: Kernel, job: str = "job") -> None:
    """Wait until a job has ended and its end is on the screen, without running magics."""
    k.ok(f"while not ({job}.done and {job}.view.is_shown): __import__('time').sleep(0.01)")


def test_it_streams_under_its_own_cell_while_others_run(
    k: Kernel, messages: list[tuple[str, str, str]]
) -> None:
    letters = "a b c d e f g h i j k l m n o p q r s t"
    k.ok(f"hang = Hang()\nbackend.will(hang, *slowly(*{letters!r}.split()))")
    cell = k.send("%%llm --bg -o job\nCount.")
    first = k.wait(cell)
    assert first.seconds < within_a_second()
    assert "job" in first.text.lower(), "until the first word comes"
    messages.clear()
    k.ok("hang.go.set()")
    busy = k.ok("import time\ntime.sleep(1)\nprint('B')")
    captured = k.ok("%%capture\ntime.sleep(1)")
    assert (busy.text, captured.text) == ("B\n", "")
    during = [text for parent, kind, text in messages if kind == "update_display_data"]
    assert len(during) >= 2, "it is drawn while other cells block the main thread"
    wait_for_end(k)
    k.ok("1")
    assert {parent for parent, kind, _ in messages if kind == "update_display_data"} == {cell}
    texts = [text for _, kind, text in messages if kind == "update_display_data"]
    assert "abcdefghijklmnopqrst" in texts[-1]
    assert "tokens" in texts[-1], "the footer"
    assert all(kind != "display_data" for _, kind, _ in messages)
    assert "abcdefghijklmnopqrst" in first.text, "by its display id, as frontends do it"


def test_the_variable_is_the_job(k: Kernel) -> None:
    k.ok("hang = Hang()\nbackend.will('one', ' two', hang, *whole_answer(' three'))")
    begun(k, "%%llm --bg -o job\nCount to three.")
    k.ok("while job.text != 'one two': __import__('time').sleep(0.01)")
    assert k.value("(job.text, job.done, job.state, job.tokens)") == (
        "one two", False, "running", 2,
    )  # fmt: skip
    assert k.value("repr(job)").startswith(
        f"<Job {k.value('job.number')}: tiny, running, 2 tokens so far, "
    )
    late = k.run("job.result(timeout=0.2)")
    assert (late.ename, k.value("job.done")) == ("TimeoutError", False)
    k.ok("import asyncio\nasyncio.get_running_loop().call_later(0.3, hang.go.set)")
    k.ok("reply = await job")
    assert k.value("(reply.text, job.result() is reply, job.done, job.state)") == (
        "one two three", True, True, "done",
    )  # fmt: skip
    assert k.value("[r.text for r in await asyncio.gather(job, job)]") == ["one two three"] * 2


def test_giving_up_the_wait_does_not_stop_the_job(k: Kernel) -> None:
    k.ok("hang = Hang()\nbackend.will('begun', hang, *whole_answer(' whole'))")
    begun(k, "%%llm --bg -o job\nGo on.")
    for waiting in ("%llm_wait", "job.result()", "await job"):
        cell = k.send(f"print('here')\n{waiting}")
        k.wait_for_output(cell, "here")
        time.sleep(0.3)
        pressed = time.monotonic()
        k.interrupt()
        ran = k.wait(cell)
        assert ran.status == "error", waiting
        assert ran.finished - pressed < within_a_second(), waiting
        assert not k.value("job.done"), waiting
    k.ok("hang.go.set()")
    assert k.value("job.result().text") == "begun whole"


def test_wait_shows_progress_and_result_of_jobs(k: Kernel) -> None:
    k.ok("%llm_wait")
    k.ok("hang = Hang()\nbackend.will('x', 'y', 'z', 'z', 'z', 'z', hang)\nat_release(hang.go.set)")
    first = k.send("%%llm --bg -o job\nSay   some\n letters.")
    under = k.wait(first)
    number = k.value("job.number")
    cell = k.send("%llm_wait")
    k.wait_for_output(cell, f"Waiting for job {number} (running, 6 tokens)")
    k.release()
    ran = k.wait(cell)
    wait_for_end(k)
    k.ok("1")
    expected = r"(\d+) +incomplete +tiny +6 tokens +\d+\.\d +cell \[\d+\] +Say some letters\."
    row = re.fullmatch(expected, ran.text.splitlines()[1])
    assert row, ran.text
    assert int(row[1]) == number
    assert "xyzzzz" in under.text
    assert k.ok("%llm_wait").text == "No job is running."
    assert "incomplete" in k.ok(f"%llm_wait {number}").text, "asked for by number, it says it again"


def test_wait_and_stop_show_the_end_that_takes_long_to_draw(k: Kernel) -> None:
    k.ok(
        "from llm_magic.notebook.display.answer_view import RichView\n"
        "usual = RichView.finish\n"
        "def slow(view):\n    __import__('time').sleep(1.5)\n    usual(view)\n"
        "RichView.finish = slow"
    )
    try:
        for line, script, end in (
            ("%llm_wait", "*whole_answer('whole')", "first after"),
            ("%llm_stop", "'part', Hang()", "stopped by you; incomplete"),
        ):
            k.ok(f"backend.will({script})")
            under = begun(k, "%%llm --bg -o job\nSay it.")
            k.ok("while not job.text: __import__('time').sleep(0.01)")
            # The update comes from the cell that waits: nbclient drops what comes after it.
            ran = k.ok(line)
            assert end in under.text
            assert ran.updates == 1
    finally:
        k.ok("RichView.finish = usual")


def test_end_of_a_load_that_takes_long_to_draw_is_sent_again(k: Kernel) -> None:
    k.ok("load = backend.hang('load')")
    under = begun(k, "%llm_load org/other --bg --keep")
    k.ok(
        "from llm_magic.notebook.display.live_output import LoadView\n"
        "usual = LoadView.finish\n"
        "def slow(*args, **options):\n    __import__('time').sleep(1.5)\n    usual(*args, **options)\n"
        "LoadView.finish = slow"
    )
    try:
        first = k.ok("load.go.set()\nwhile llm.loading: __import__('time').sleep(0.001)")
        # The first cell may end just before the load.
        second = k.ok("1")
        assert " · ready in " in under.text
        assert first.updates + second.updates == 1
    finally:
        k.ok("LoadView.finish = usual; backend.trouble.clear()\n%llm_unload other\n%llm_use tiny")


def test_stop(k: Kernel) -> None:
    k.ok("backend.will('one', Hang()); hang = Hang(); backend.will(hang)")
    cell = k.send("%%llm --bg -o job\nFirst.")
    under = k.wait(cell)
    begun(k, "%llm --bg -o other Second.")
    k.ok("while not (job.text and hang.reached.is_set()): __import__('time').sleep(0.01)")
    assert k.value("(job.state, other.state)") == ("running", "waiting")
    first, second = k.value("(job.number, other.number)")
    assert k.ok(f"%llm_stop {second}").text == f"Stopped job {second} (tiny) before the first word."
    assert k.value("(job.state, other.state)") == ("running", "stopped")
    assert k.ok("%llm_stop").text == f"Stopped job {first} (tiny) after 1 token."
    assert k.ok("%llm_stop").text == "No job is running."
    assert k.ok(f"%llm_stop {first}").text == f"Job {first} had already ended: stopped."
    assert k.value("[a.outcome for a in backend.requests[-2:]]") == ["closed", "closed"]
    wait_for_end(k)
    # Most servers count only at the end.
    k.ok("backend.will(Chunk(text='x' * 331), Hang())")
    begun(k, "%llm --bg -o uncounted Third.")
    third = k.value("uncounted.number")
    k.ok("while not uncounted.text: __import__('time').sleep(0.01)")
    stopped = k.ok(f"%llm_stop {third}").text
    assert stopped == f"Stopped job {third} (tiny) after 331 characters."
    wait_for_end(k, "uncounted")
    k.ok("1")
    assert "one" in under.text
    assert "stopped by you; incomplete" in under.text
    ran = k.run("job.result()")
    assert (ran.ename, k.value("job.reply.text")) == ("GenerationStopped", "one")
    assert k.ok("%llm_wait").status == "ok", "what the user stopped is no error"


def test_failed_job_shows_error_in_its_cell_and_fails_waiting_cell(k: Kernel) -> None:
    k.ok("backend.will('some', Pause(0.2), GenerationFailed('The <b>GPU</b> melted.'))")
    under = k.wait(k.send("%%llm --bg -o job\nMelt."))
    wait_for_end(k)
    k.ok("1")
    assert under.text.startswith("some")
    assert under.text.endswith("GenerationFailed: The <b>GPU</b> melted.")
    assert "&lt;b&gt;GPU" in under.html
    assert k.value("(job.state, job.reply.text)") == ("failed", "some")
    ran = k.run("%llm_wait")
    assert (ran.ename, ran.error) == ("GenerationFailed", "The <b>GPU</b> melted.")
    assert len(ran.traceback) == 1
    assert k.run("await job").ename == "GenerationFailed"
    assert k.ok("%llm_wait").text == "No job is running.", "it was told already"
    k.ok("backend.will(GenerationFailed('At once.'))")
    under = k.wait(k.send("%%llm --bg -o job\nMelt."))
    wait_for_end(k)
    k.ok("1")
    assert under.text == "GenerationFailed: At once."
    assert k.run("%llm_wait").ename == "GenerationFailed"


def test_the_table_keeps_the_last_twenty(k: Kernel) -> None:
    k.ok(
        "from llm_magic.session.requests import Request\n"
        "jobs = [llm.ask(Request(f'n {i}'), background=True) for i in range(25)]"
    )
    k.ok("replies = [job.result() for job in jobs]")
    *rows, note = k.ok("%llm_jobs").text.splitlines()[1:]
    numbers = k.value("[job.number for job in jobs]")
    assert [int(row.split()[0]) for row in rows] == numbers[-20:]
    assert rows[-1].split()[1:4] == ["done", "tiny", "2"]
    assert rows[-1].endswith("n 24")
    ran = k.run(f"%llm_stop {numbers[0]}")
    assert ran.ename == "JobNotFound"
    assert ran.error == (
        f"Job {numbers[0]} is older than the last 20 finished ones and no longer listed."
        " Only the variable of its -o still has it."
    )
    assert note == f"… and {numbers[-1] - 20} older; the variables of -o still have them."
    assert k.run("%llm_wait what").error.startswith(
        f"There is no job 'what'; there are: {numbers[5]}, "
    )
    assert (
        k.ok("oldest = jobs[0]\n%llm_wait oldest").text.splitlines()[1].startswith(str(numbers[0]))
    )


def test_the_same_cell_run_again_stops_its_earlier_job(k: Kernel) -> None:
    k.ok("hangs = [Hang() for _ in range(6)]\nfor hang in hangs: backend.will('text', hang)")
    k.ok("%%llm --bg -o first\nA question.", cell_id="one")
    k.ok("%%llm --bg -o other\nA question.", cell_id="two")
    assert k.value("all(hang.reached.wait(30) for hang in hangs[:2])")
    number = k.value("first.number")
    ran = k.ok("%%llm --bg -o second\nA better question.", cell_id="one")
    assert ran.text.startswith(f"Note: stopped job {number}, which this cell started earlier.\n")
    k.ok("while not first.done: __import__('time').sleep(0.01)")
    assert k.value("[j.state in {'waiting', 'running'} for j in (first, other, second)]") == [
        False, True, True,
    ]  # fmt: skip
    assert k.value("hangs[2].reached.wait(30)")
    k.ok("%llm_stop")
    several = "for n in range(3):\n    get_ipython().run_line_magic('llm', f'--bg -o job{n} {n}')"
    assert "Note" not in k.ok(several, cell_id="three").text, "one run may begin several"
    assert k.value("[job.done for job in (job0, job1, job2)]") == [False] * 3
    k.ok("%llm_stop")


def test_a_chat_gets_its_turn_when_the_job_ends(k: Kernel) -> None:
    k.ok("hang = Hang()\nbackend.will(hang, *whole_answer('Ada.'))")
    k.ok("%%llm --bg -c names -o job\nWho?", cell_id="who")
    assert k.value("[len(chat.turns) for chat in llm.chats.all()]") == []
    k.ok("hang.go.set()\njob.result()")
    assert k.value("[t.answer.content for t in llm.chats.all()[0].turns]") == ["Ada."]
    k.ok("%llm_reset names")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--dry-run", "sends nothing"),
        ("-f code", "-f code"),
        ("-o 1x", "not a valid"),
        ("-t 9", "temp"),
    ],
)
def test_bg_refuses_what_it_cannot_do(k: Kernel, options: str, error: str) -> None:
    before = k.value("len(backend.requests)")
    ran = k.run(f"%%llm --bg {options}\nHello.")
    assert (ran.ename, error in ran.error) == ("OptionError", True), ran.error
    assert k.value("(len(backend.requests), llm.jobs.running)") == (before, ())


def test_plain_and_quiet(k: Kernel) -> None:
    ran = k.wait(k.send("%%llm --bg --plain -o job\n**Bold** words."))
    wait_for_end(k)
    k.ok("1")
    assert ran.text.startswith("**Bold** words.")
    assert "tokens" in ran.text
    assert ran.html == ""
    ran = k.wait(k.send("%%llm --bg --quiet -o job\n**Bold** words."))
    wait_for_end(k)
    k.ok("1")
    assert ran.text == "**Bold** words."
    assert "<strong>Bold</strong>" in ran.html


def test_a_foreground_answer_is_not_mistaken_for_a_jobs(k: Kernel) -> None:
    k.ok(
        "backend.will(Pause(0.3), *whole_answer('from the job'))\n"
        "backend.will(Pause(0.6), GenerationFailed('No.'))"
    )
    begun(k, "%%llm --bg -o job\nOne.")
    ran = k.run("%%llm -o mine\nTwo.")
    assert ran.ename == "GenerationFailed"
    assert "from the job" not in ran.text
    assert k.run("mine").ename == "NameError"
    assert k.value("job.result().text") == "from the job"


def test_completion_and_help(k: Kernel) -> None:
    k.ok("hang = Hang()\nbackend.will(hang)")
    begun(k, "%%llm --bg -o job\nWait.")
    # A job that is stopped before it asks the backend would leave its script to the next one.
    assert k.value("hang.reached.wait(30)")
    number = k.value("job.number")
    assert str(number) in k.complete("%llm_stop ")
    assert str(number) in k.complete("%llm_wait ")
    assert "--bg" in k.complete("%%llm --b")
    assert "stops its earlier job" in " ".join(k.help("%llm").split())
    k.ok("%llm_stop")


def test_reloading_stops_what_runs(k: Kernel) -> None:
    k.ok("backend.will('partial', Hang())")
    under = k.wait(k.send("%%llm --bg -o job\nNever ends."))
    k.ok("while not job.text: __import__('time').sleep(0.01)")
    k.ok("from llm_magic.notebook.magics import unregister\nunregister(get_ipython())")
    assert k.value("(job.state, job.text, backend.requests[-1].outcome)") == (
        "stopped", "partial", "closed",
    )  # fmt: skip
    # The one that draws may still end.
    until(lambda: not any(name.startswith("llm_magic") for name in k.threads()), "a thread is left")
    k.ok("1")
    assert "stopped by you" in under.text
    k.ok("register(get_ipython(), llm)\n%llm_load tiny")
    assert k.ok("%llm --bg -o job Hello").status == "ok"
    assert k.value("job.result().text") == "Hello"


@pytest.mark.parametrize("version", VERSIONS)
def test_shutdown_with_a_running_job(version: str) -> None:
    with kernel(version or None) as k:
        k.ok(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
        k.ok(SCRIPTED)
        k.ok("backend.will('partial', Hang())")
        begun(k, "%%llm --bg\nNever ends.")
        process = k.process
        began = time.monotonic()
    assert not process.is_running()
    assert time.monotonic() - began < 5 * within_a_second()


def test_shown_once_at_the_end_where_answers_do_not_stream() -> None:
    with kernel(PYTHONPATH=str(ROOT), LLM_MAGIC_STREAM="off") as k:
        k.ok(SCRIPTED)
        k.ok("hang = Hang()\nbackend.will('one', ' two', ' three', hang)")
        cell = k.send("%%llm --bg -o job\nCount.")
        while not (under := k.state(cell)).finished:
            k.receive(0.02)
        assert under.outputs == [], "nothing while the cell runs: that would depend on the speed"
        k.ok("hang.go.set()")
        deadline = time.monotonic() + 60
        while not under.outputs:
            assert time.monotonic() < deadline
            k.receive()
        assert under.text.startswith("one two three")
        assert "tokens" in under.text
        k.receive()
        assert (len(under.outputs), under.updates) == (1, 0)
        ran = k.ok("%llm_wait")
        assert ran.text.startswith("one two three"), "also where the first cell's is lost"
        assert ran.updates == 0
        k.ok("load = backend.hang('load')")
        cell = k.send("%llm_load org/other --bg --keep")
        while not (under := k.state(cell)).finished:
            k.receive(0.02)
        k.ok("load.go.set()")
        deadline = time.monotonic() + 60
        while len(under.outputs) < 2:
            assert time.monotonic() < deadline
            k.receive()
        assert under.text.startswith("Loading org/other · ")
        assert "other · local cpu bf16 · 269 MB · 8,192 ctx · ready in " in under.text


def run_notebook(folder: Path, *cells: str) -> Any:
    """Run cells as CI does, and return the notebook as it is saved."""
    setup = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPTED}"
    new: Any = nbformat.v4.new_notebook
    cell: Any = nbformat.v4.new_code_cell
    notebook = new(cells=[cell(source) for source in (setup, *cells)])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook.cells[1:]


def test_wait_makes_it_right_under_nbclient(tmp_path: Path) -> None:
    cells = run_notebook(
        tmp_path,
        "%%llm --bg -o job\nSay these words.",
        "while not job.done: __import__('time').sleep(0.01)",
        "%llm_wait",
        "job.text",
        "%llm_load org/other --bg",
        "%llm Hello",
        "from llm_magic.errors import LoadFailed\nbackend.trouble['load'] = LoadFailed('Full.')",
        "%llm_load org/third --bg",
        "try: llm.generate('Hello')\nexcept LoadFailed: pass",
    )
    first, _, wait, last, load, _, _, failed, _ = cells
    assert load.outputs[0].data["text/plain"].startswith("other · local cpu bf16")
    again = "To load other again: %llm_load org/other"
    lost = f"LoadFailed: Full. other was unloaded for it. {again}"
    assert failed.outputs[0].data["text/plain"] == lost
    shown = ["".join(out.data["text/plain"]) for out in (first.outputs[0], last.outputs[0])]
    assert shown[0].startswith("Say these words.\n\ntiny · 7 → 3 tokens")
    assert shown[1] == "'Say these words.'"
    assert "done" in wait.outputs[0].data["text/plain"]
    assert len(first.outputs) == 1


def test_wait_fails_the_notebook_under_nbclient(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match=r"GenerationFailed.*It broke"):
        run_notebook(
            tmp_path,
            "backend.will('some', GenerationFailed('It broke.'))",
            "%%llm --bg -o job\nBreak.",
            "while not job.done: __import__('time').sleep(0.01)",
            "%llm_wait",
        )
