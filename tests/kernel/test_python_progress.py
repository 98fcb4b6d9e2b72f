"""The line that a cell shows while `llm.generate` or `llm.map` runs, and what is left of it."""

from __future__ import annotations

import re
import time

import pytest

from tests.kernels import ROOT, Kernel, Ran, kernel, within_a_second

_SCRIPT = """from tests.scripted import Hang, Pause, at_release, settings
from llm_magic.errors import GenerationFailed
def slow(*texts, seconds=0.4):
    backend.will(*(step for text in texts for step in (text, Pause(seconds))), *whole_answer('.'))
def held(*texts, end=whole_answer('.')):
    hang = Hang()
    backend.will(*texts, hang, *end)
    at_release(hang.go.set)"""


@pytest.fixture(scope="module")
def k(scripted: Kernel) -> Kernel:
    """Return a kernel with a scripted model, and helpers for slow answers."""
    scripted.ok(_SCRIPT)
    return scripted


def left(ran: Ran) -> list[str]:
    """Return what a saved notebook shows of the displays of a cell."""
    data = [output["data"] for output in ran.outputs if "data" in output]
    return [one["text/plain"] + one["text/html"] for one in data]


def lines(ran: Ran, word: str) -> list[str]:
    """Return the lines with a word that the cell showed, in order."""
    return [text for _, _, text in ran.arrivals if word in text]


@pytest.mark.parametrize("call", ["llm.map", "await llm.amap"])
def test_map_shows_one_line_that_is_gone_at_the_end(k: Kernel, call: str) -> None:
    # The last row takes until a line with all that it can have is shown.
    k.ok(f"for n in range(8): slow('{call[:3]}', seconds=0.25)\nheld('{call[:3]}')")
    cell = k.send(f"answers = {call}('{call} {{item}}', range(9), workers=1)\nprint('after')")
    k.wait_for_output(cell, "tiny · ")
    k.wait_for_output(cell, " s left")
    k.release()
    assert "<progress" in k.state(cell).html
    ran = k.wait(cell)
    running = re.compile(
        r"tiny · \d of 9 rows · 1 being written · [\d.]+ rows/s · \d+ tokens · [\d.]+ tokens/s · \d+ s"
        r" · (at most )?\d+ s left"
    )
    assert any(map(running.fullmatch, lines(ran, "of 9 rows")))
    assert 2 <= ran.updates <= 4 * ran.seconds + 2
    assert left(ran) == [""]
    assert ran.text == "after\n"
    assert k.value("[one.text for one in answers][0]") == f"{call[:3]}."


def test_failed_rows_leave_their_count(k: Kernel) -> None:
    k.ok("held('a'); backend.will(GenerationFailed('It broke.'))")
    cell = k.send("answers = llm.map('which {item}', range(2), workers=1)")
    k.wait_for_output(cell, "0 of 2 rows")
    k.release()
    ran = k.wait(cell)
    assert re.fullmatch(r"tiny · 2 of 2 rows · 1 failed · 7 → 1 token · .* tokens/s", ran.text)
    k.ok(
        "hangs = [Hang(), Hang()]\n"
        "backend.will('a', hangs[0], GenerationFailed('It broke.'))\n"
        "backend.will('b', hangs[1], *whole_answer('.'))\n"
        "at_release(lambda: hangs.pop(0).go.set())"
    )
    cell = k.send("for n in (1, 2): llm.map(f'in a loop {n} {{item}}', range(n), workers=1)")
    for shown in ("0 of 1 row", "0 of 2 rows"):
        k.wait_for_output(cell, shown)
        k.release()
    ran = k.wait(cell)
    assert "1 failed" in left(ran)[0]
    assert left(ran)[1:] == [""]
    # A map that sends failed rows again shows its progress, too.
    k.ok("held('b')")
    cell = k.send("answers.retry();")
    k.wait_for_output(cell, "1 of 2 rows")
    k.release()
    assert left(k.wait(cell)) == [""]


def test_answer_shows_its_tokens_after_some_seconds(k: Kernel) -> None:
    k.ok("held(*'abc')")
    cell = k.send("reply = llm.generate('?')\nprint(reply)")
    k.wait_for_output(cell, "tiny · ")
    k.release()
    ran = k.wait(cell)
    shown = re.fullmatch(r"tiny · 3 tokens · (\d+) s", lines(ran, "tiny · ")[0])
    assert shown
    assert int(shown[1]) >= 3
    assert ran.updates <= 4 * ran.seconds
    assert left(ran) == [""]
    assert ran.text == "abc.\n"
    # Until the first word, the line has what is waited for.
    k.ok("held()")
    cell = k.send("llm.generate('?');")
    k.wait_for_output(cell, "tiny · waiting for the first token · ")
    k.release()
    assert k.wait(cell).status == "ok"


def test_short_calls_show_nothing(k: Kernel) -> None:
    ran = k.ok("for n in range(3): llm.generate('?')\nanswers = llm.map('short {item}', range(3))")
    # On a machine that stands still for a second, they are not short.
    assert ran.outputs == [] or (ran.seconds > 1 and left(ran) == [""])


def test_calls_of_a_cell_share_one_output(k: Kernel) -> None:
    k.ok(
        "hangs = [Hang() for _ in range(3)]\n"
        "for n, hang in enumerate(hangs):\n"
        "    backend.will('a', hang, *whole_answer('.'))\n"
        "    for _ in range(n): backend.will(*whole_answer('.'))\n"
        "at_release(lambda: hangs.pop(0).go.set())"
    )
    cell = k.send("for n in (1, 2, 3): llm.map('{item} of ' + str(n), range(n), workers=1)")
    for rows in ("1 row", "2 rows", "3 rows"):
        k.wait_for_output(cell, f"0 of {rows}")
        k.release()
    assert left(k.wait(cell)) == [""]


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ("llm.map('wait {item}', range(3))", "of 3 rows"),
        ("await llm.amap('await {item}', range(3))", "of 3 rows"),
        ("llm.generate('?')", "tiny · 1 token · "),
    ],
)
def test_interrupt_removes_the_line(k: Kernel, call: str, shown: str) -> None:
    k.ok("backend.scripts.clear(); [backend.will('a', Hang()) for _ in range(3)]")
    cell = k.send(call)
    k.wait_for_output(cell, shown)
    began = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    assert time.monotonic() - began < within_a_second()
    assert ran.ename == "Interrupted"
    assert left(ran) == [""]
    k.ok("backend.scripts.clear()")


def test_failure_removes_the_line(k: Kernel) -> None:
    k.ok("held('a', end=[GenerationFailed('It broke.')])")
    cell = k.send("llm.map('fails {item}', ['a'], on_error='stop')")
    k.wait_for_output(cell, "0 of 1 row")
    k.release()
    ran = k.wait(cell)
    assert "It broke." in ran.error
    assert left(ran) == [""]


def test_threads_and_imap_show_nothing(k: Kernel) -> None:
    k.ok("slow('a', seconds=1.5); slow('b', seconds=1.5)")
    ran = k.ok(
        "import threading\n"
        "thread = threading.Thread(target=lambda: llm.map('thread {item}', ['a']))\n"
        "thread.start(); thread.join()\n"
        "list(llm.imap('lazy {item}', ['a']));"
    )
    assert ran.outputs == []


def test_nested_and_simultaneous_calls_have_the_line_of_the_first(k: Kernel) -> None:
    k.ok(
        "import asyncio\nhang = Hang()\nat_release(hang.go.set)\n"
        "for n in range(2): backend.will('a', hang, *whole_answer('.'))"
    )
    cell = k.send(
        "await asyncio.gather(llm.amap('first {item}', ['a']), llm.amap('other {item}', [*'ab']));"
    )
    k.wait_for_output(cell, "of 1 row")
    k.release()
    ran = k.wait(cell)
    assert not lines(ran, "of 2 rows")
    assert left(ran) == [""]


@pytest.mark.parametrize("version", ["", "6.31.0"])
def test_task_of_an_earlier_cell_shows_nothing_in_a_later_one(k: Kernel, version: str) -> None:
    if not version:
        _check_task(k)
        return
    with kernel(version, PYTHONPATH=str(ROOT)) as older:
        from tests.kernel.conftest import _SCRIPTED

        older.ok(_SCRIPTED)
        older.ok(_SCRIPT)
        _check_task(older)


def _check_task(k: Kernel) -> None:
    k.ok("import asyncio\nslow('a', seconds=2.5)")
    # ipykernel 6 cannot tell in which cell a task was made that starts after it.
    first = k.send(
        "task = asyncio.create_task(llm.amap('task {item}', ['a']))\nawait asyncio.sleep(0.3)"
    )
    second = k.ok("await asyncio.sleep(2)\nprint('mine')")
    assert second.text == "mine\n"
    assert left(second) == []
    k.ok("await task;")
    assert left(k.state(first)) in ([], [""])


def test_notebooks_that_are_saved_once_and_unloaded_extensions_show_nothing(k: Kernel) -> None:
    k.ok("off = Session(settings(stream='off'), create=lambda _name: backend)")
    k.ok("register(get_ipython(), off)\noff.load('tiny')\nslow('a', seconds=1.5)")
    assert k.ok("off.map('off {item}', ['a']);").outputs == []
    k.ok("from llm_magic.notebook.magics import unregister\nunregister(get_ipython())")
    k.ok(
        "plain = Session(create=lambda _name: backend)\nplain.load('tiny')\nslow('a', seconds=1.5)"
    )
    assert k.ok("plain.map('plain {item}', ['a']);").outputs == []
    k.ok("plain.close()\nregister(get_ipython(), llm)")
