"""■ ends a cell within a second at any moment; what was answered and the model stay."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_magic.text import counted
from tests.kernels import Kernel, Ran, kernel, within_a_second
from tests.until import until

LONG = "Write a very long story about a fox, with all details."
# The likeliest tokens: the answer has this length, whatever is drawn elsewhere.
SURE = "temperature=0, max_new_tokens=400"
OTHERS = ["6.31.0", "7.3.0"]
# Seconds from the start of a cell to the interrupt. The other versions of ipykernel differ in how they
# deliver an interrupt, not in what it stops: there one moment is enough.
DELAYS = (0.0, 0.3, 1.0)
OTHER_DELAYS = (0.3,)


# Once this many answers wait for the model: what comes before that is not theirs.
_ANNOUNCE = """from tests import interrupt_points
def announce(count=1): interrupt_points.announce(lambda: len(llm.answering) >= count)"""


@pytest.fixture(scope="module", params=["", *OTHERS], ids=lambda version: version or "installed")
def k(request: pytest.FixtureRequest, model_cache: Path) -> Iterator[Kernel]:
    if not request.param:
        k = request.getfixturevalue("loaded")
        k.ok(_ANNOUNCE)
        yield k
        return
    with kernel(request.param, LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        k.ok(_ANNOUNCE)
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        k.ok("%llm_load")
        assert k.value("__import__('ipykernel').__version__") == request.param
        yield k


def stop(k: Kernel, cell: str, delay: float, *, shown: str = "") -> tuple[Ran, float]:
    """Press ■ some time after a cell announces or shows something; returns how long it took to end."""
    if shown:
        k.wait_for_output(cell, shown)
    else:
        k.wait_for_announcement(cell)
    time.sleep(delay)
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(cell, timeout=20)
    return ran, ran.finished - pressed


def is_installed(k: Kernel) -> bool:
    """Return whether a kernel runs the installed version of ipykernel."""
    version: str = k.value("__import__('ipykernel').__version__")
    return version not in OTHERS


def delays(k: Kernel) -> tuple[float, ...]:
    return DELAYS if is_installed(k) else OTHER_DELAYS


def assert_works_at_once(k: Kernel) -> None:
    # Half a second of it may be the last step of what was stopped.
    assert k.ok("%llm -t 0 --max-new-tokens 1 Hello").seconds < 2 * within_a_second()


def assert_partial_answer(k: Kernel, ran: Ran) -> None:
    """Check what an interrupted ``print`` and ``%llm`` show and store, wherever the interrupt came.

    `before` is the last reply before them.
    """
    answered = k.value("llm.last is not before")
    reason = k.value("None if llm.last is None else llm.last.finish_reason")
    if ran.status == "ok":  # it had just ended
        assert (answered, reason in {"stop", "length"}) == (True, True)
        return
    if ran.ename == "KeyboardInterrupt":  # in the code of the cell, beside the magic
        assert not answered or reason in {"stop", "length"}
        return
    assert ran.ename == "Interrupted"
    assert len(ran.traceback) == 1
    if ran.error == "Stopped.":  # the answer had not begun, or was shown already
        assert not answered or reason in {"stop", "length"}
        return
    assert answered
    text = k.value("llm.last.text.strip()")
    assert text in ran.text
    if reason != "cancelled":
        complete = "Stopped just after the answer was complete; it is in llm.last."
        assert (ran.error, reason in {"stop", "length"}) == (complete, True)
        return
    # No count is known (None) before the first token.
    tokens = k.value("llm.last.usage.completion_tokens or 0")
    stopped = f"after {counted(tokens)}; the answer so far is in llm.last"
    assert ran.error == f"Stopped {stopped if tokens else 'before the first word'}."
    label = "stopped by you; incomplete" if tokens else "stopped before the first word"
    assert f"· {label}" in ran.text


def test_random_moments_in_a_row(k: Kernel, record_property: Callable[[str, object], None]) -> None:
    count = 12 if is_installed(k) else 4
    moments = random.Random(2)
    threads, latencies = k.threads(), []
    for number in range(count):
        k.ok("before = llm.last")
        cell = k.send(f"print('begun')\n%llm --max-new-tokens 400 {LONG}")
        ran, latency = stop(k, cell, moments.uniform(0, 1) if number % 4 else 0.0, shown="begun")
        latencies.append(latency)
        assert_partial_answer(k, ran)
        assert_works_at_once(k)
    record_property("latencies_s", latencies)
    assert max(latencies) < within_a_second(), latencies
    assert k.value("llm.status().active_model") == "SmolLM2-135M-Instruct"
    until(lambda: set(k.threads()) <= set(threads), "there are more threads")


_PRESS = "__import__('os').kill(__import__('os').getpid(), 2)"


@pytest.mark.parametrize(("before", "after"), [(_PRESS, ""), ("", _PRESS)], ids=["before", "after"])
def test_interrupt_beside_the_magic_is_one_of_the_cell(
    scripted: Kernel, before: str, after: str
) -> None:
    scripted.ok("before = llm.last")
    ran = scripted.run(f"{before}\n%llm Hello\n{after}")
    assert ran.ename == "KeyboardInterrupt"
    assert_partial_answer(scripted, ran)
    assert scripted.value("llm.last is not before") is bool(after)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("Chunk(finish_reason='stop', usage=Usage(7, 0))", None),
        (
            "'one', Presses(), *whole_answer()",
            "Stopped just after the answer was complete; it is in llm.last.",
        ),
        ("'one', Hang()", "Stopped after 1 token; the answer so far is in llm.last."),
        ("Hang()", "Stopped before the first word."),
    ],
    ids=["empty", "complete", "one token", "no token"],
)
def test_every_answer_that_may_be_interrupted(
    scripted: Kernel, script: str, error: str | None
) -> None:
    scripted.ok("from llm_magic.types import Chunk, Usage\nfrom tests.scripted import Hang")
    scripted.ok(f"class Presses(Hang):\n    async def wait(self): {_PRESS}")
    scripted.ok(f"backend.will({script})\nbefore = llm.last")
    cell = scripted.send("print('begun')\n%llm Hello")
    if "Hang" in script:
        scripted.wait_for_output(cell, "one" if "one" in script else "tiny")
        scripted.interrupt()
    ran = scripted.wait(cell)
    assert (ran.status == "ok" or ran.error) == (error or True)
    assert_partial_answer(scripted, ran)


def test_while_a_long_prompt_is_read(k: Kernel) -> None:
    k.ok("long = 'The fox runs over the hill and far away. ' * 600")
    for delay in delays(k):
        cell = k.send("announce()\n%llm -t 0 --max-new-tokens 400 List all words: {long}")
        ran, latency = stop(k, cell, delay)
        assert ran.ename == "Interrupted", delay
        assert latency < within_a_second(), delay
        assert_works_at_once(k)


def test_between_the_chunks_of_a_stream(k: Kernel) -> None:
    cell = k.send(
        "import time\n"
        f"for chunk in llm.stream({LONG!r}, {SURE}):\n"
        "    print(chunk.text, 'begun', flush=True); time.sleep(0.2)"
    )
    ran, latency = stop(k, cell, 0.5, shown="begun")
    assert ran.ename in {"KeyboardInterrupt", "Interrupted"}
    assert latency < within_a_second()
    assert_works_at_once(k)
    cell = k.send(f"announce()\nfor chunk in llm.stream({LONG!r}, {SURE}): pass")
    ran, latency = stop(k, cell, 1)
    # Between two chunks it is in the code of the cell.
    is_own = ran.ename == "KeyboardInterrupt" and "llm_magic" not in "".join(ran.traceback)
    assert ran.ename == "Interrupted" or is_own, ran.text
    assert latency < within_a_second()
    assert_works_at_once(k)


def test_generate_in_python(k: Kernel) -> None:
    for delay in delays(k):
        cell = k.send(f"announce()\nllm.generate({LONG!r}, {SURE})")
        ran, latency = stop(k, cell, delay)
        assert ran.ename == "Interrupted", delay
        assert len(ran.traceback) == 1, delay
        assert latency < within_a_second(), delay
        assert k.value("llm.last.finish_reason") == "cancelled", delay
        assert_works_at_once(k)


def test_loop_that_catches_exceptions_ends(k: Kernel) -> None:
    cell = k.send(
        f"""rows = []
for number in range(20):
    announce()
    try:
        rows.append(llm.generate({LONG!r}, temperature=0))
    except Exception as error:
        rows.append(error)"""
    )
    ran, took = stop(k, cell, 0.3)
    assert (ran.ename, took < within_a_second()) == ("Interrupted", True), (ran.text, took)
    assert k.value("len(rows)") < 2


@pytest.mark.parametrize(
    "wait",
    [
        # Of five prompts, two run; the end of the block waits for all of them.
        "with ThreadPoolExecutor(2) as pool:\n    [f.result() for f in [pool.submit(ask) for _ in range(5)]]",
        "await asyncio.gather(asyncio.to_thread(ask), asyncio.to_thread(ask))",
    ],
    ids=["executor", "to_thread"],
)
def test_answers_in_other_threads_of_the_cell(k: Kernel, wait: str) -> None:
    k.ok("import asyncio\nfrom concurrent.futures import ThreadPoolExecutor")
    cell = k.send(
        f"replies, asked = [], []\n"
        f"def ask():\n    asked.append(1)\n    replies.append(llm.generate({LONG!r}, {SURE}))\n"
        f"announce(2)\n{wait}"
    )
    ran, latency = stop(k, cell, 0.5)
    assert (ran.ename, ran.error) == (
        "Interrupted",
        "Stopped 2 answers in other threads. The partial texts are in their exceptions (.reply).",
    )
    assert len(ran.traceback) == 1
    assert latency < within_a_second()
    assert_works_at_once(k)
    k.ok("while llm.answering: __import__('time').sleep(0.01)")
    assert k.value("replies") == []
    assert k.value("len(asked)") in {2, 5}
    k.ok("list(ThreadPoolExecutor(1).map(lambda p: llm.generate(p, max_new_tokens=1), ['Hello']))")


@pytest.mark.parametrize(
    "ask",
    [
        f"reply = await llm.agenerate({LONG!r}, {SURE})",
        f"async for chunk in llm.astream({LONG!r}, {SURE}): pass",
    ],
    ids=["agenerate", "astream"],
)
def test_an_async_cell(k: Kernel, ask: str) -> None:
    for delay in delays(k):
        ran, latency = stop(k, k.send(f"announce()\n{ask}"), delay)
        assert ran.status == "error", delay
        assert latency < within_a_second(), delay
        assert_works_at_once(k)


@pytest.mark.parametrize("cell", ["%llm_status", "%%llm\nHello", "x = %llm --dry-run Hello"])
def test_interrupt_before_first_line_is_one_line(k: Kernel, cell: str) -> None:
    k.ok("from tests import interrupt_points\ninterrupt_points.before_code(get_ipython())")
    ran = k.run(cell)
    assert (ran.ename, ran.error, len(ran.traceback)) == ("Interrupted", "Stopped.", 1)
    assert_works_at_once(k)


@pytest.mark.parametrize("cell", ["1 + 1", "await asyncio.sleep(0)"])
def test_interrupt_after_last_line_has_no_effect(k: Kernel, cell: str) -> None:
    k.ok(
        "import asyncio\nfrom tests import interrupt_points\ninterrupt_points.after_code(get_ipython())"
    )
    k.ok(cell)
    k.ok("import time; time.sleep(0.1)")


def test_interrupt_of_own_code_shows_own_traceback(k: Kernel) -> None:
    k.ok("import time\ndef wait():\n    time.sleep(30)")
    for code in ("wait()", "while True: pass", "while True: print('.', end='')", "input()"):
        cell = k.send(f"print('begun')\n{code}", asks=True)
        ran, latency = stop(k, cell, 0.2, shown="begun")
        assert ran.ename == "KeyboardInterrupt", code
        assert "Cell" in "\n".join(ran.traceback), "the line of the cell is in it"
        assert latency < within_a_second()
    k.ok("from tests import interrupt_points\ninterrupt_points.before_code(get_ipython())")
    assert k.run("wait()").seconds < within_a_second(), "a signal that was held back is not lost"


def test_interrupt_of_slow_display_is_not_held_back(k: Kernel) -> None:
    k.ok(
        "import types\n"
        "slow = types.ModuleType('slow')\n"
        "exec('import time\\nclass Slow:\\n    def __repr__(self): print(\"begun\"); time.sleep(30)',"
        " vars(slow))"
    )
    ran, latency = stop(k, k.send("slow.Slow()"), 0.1, shown="begun")
    assert "KeyboardInterrupt" in ran.text
    assert latency < within_a_second()


def test_unloaded_extension_leaves_interrupts_alone(k: Kernel) -> None:
    hooks = "[n for n in vars(get_ipython().kernel) if n.endswith('_handler_hook')]"
    handler = "__import__('signal').getsignal(2).__name__"
    assert len(k.value(hooks)) == 2
    k.ok("import asyncio\nawait asyncio.sleep(0)\n%unload_ext llm_magic")
    assert k.value(hooks) == []
    assert k.value("get_ipython().custom_exceptions") == ()
    assert k.value(handler) == "default_int_handler"
    k.ok("%load_ext llm_magic\n%llm_load")


def test_two_interrupts_do_not_end_queued_cell(k: Kernel) -> None:
    cell = k.send(f"announce()\n%llm -t 0 --max-new-tokens 400 {LONG}")
    queued = k.send("%llm -t 0 --max-new-tokens 1 Hello")
    k.wait_for_announcement(cell)
    time.sleep(0.5)
    k.interrupt()
    k.interrupt()
    assert k.wait(cell, timeout=20).ename == "Interrupted"
    assert k.wait(queued).status in {"aborted", "ok"}
    assert_works_at_once(k)
