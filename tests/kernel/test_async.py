"""`agenerate` and `astream` in cells: many at once, cancelled, interrupted; what the server sees."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.fault_server import CHAT, FaultServer
from tests.kernels import ROOT, Kernel, kernel, within_a_second
from tests.wire import Hold, delta, sse, sse_words

VERSIONS = ["", "6.31.0", "7.3.0"]
# Once so many answers have text.
_ANNOUNCE = """from tests import interrupt_points
from tests.scripted import at_release
def announce(count=1):
    interrupt_points.announce(lambda: sum(bool(one.text) for one in llm.answering) >= count)"""


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda v: v or "installed")
def k(request: pytest.FixtureRequest, server: FaultServer) -> Iterator[Kernel]:
    with kernel(request.param or None) as k:
        k.ok(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
        k.ok(_ANNOUNCE)
        k.ok("%load_ext llm_magic\nfrom llm_magic import llm\nimport asyncio, time")
        k.ok(f"%llm_load tiny -b openai --base-url {server.url}")
        yield k


@pytest.fixture
def fast(server: FaultServer) -> Iterator[FaultServer]:
    server.pace = 0.0
    server.received.clear()
    yield server
    server.pace = 0.0


def test_agenerate_and_astream(k: Kernel, fast: FaultServer) -> None:
    k.ok("reply = await llm.agenerate('Say these words.')")
    assert k.value("(reply.text, reply.finish_reason)") == ("Say these words.", "stop")
    hold = Hold()
    fast.will(CHAT, *sse(delta("one"), done=False), hold, *sse_words(" two")[1:])
    cell = k.send(
        "async for chunk in llm.astream('Count.'):\n    if chunk.text: print(chunk.text, flush=True)"
    )
    # As they come, not at the end.
    k.wait_for_output(cell, "one")
    hold.go.set()
    assert k.wait(cell).text == "one\n two\n"
    assert k.value("llm.last.text") == "one two"


def test_many_at_once(k: Kernel, fast: FaultServer) -> None:
    ask = "await asyncio.gather(*(llm.agenerate(f'a b c d e {n}') for n in range(12)))"
    k.ok(f"replies = {ask}")
    assert k.value("[reply.text for reply in replies]") == [f"a b c d e {n}" for n in range(12)]
    fast.received.clear()
    hold = Hold()
    for _ in range(12):
        fast.will(CHAT, hold, *sse_words("held"))
    cell = k.send(f"replies = {ask}")
    # Side by side, not one after the other.
    fast.wait_for(CHAT, 12)
    hold.go.set()
    assert k.wait(cell).status == "ok"
    assert k.value("{reply.text for reply in replies}") == {"held"}


def test_one_that_fails_leaves_the_others(k: Kernel, fast: FaultServer) -> None:
    k.ok(
        "replies = await asyncio.gather(llm.agenerate('whole'), llm.agenerate('x', model='nobody'),"
        " return_exceptions=True)"
    )
    assert k.value("[type(one).__name__ for one in replies]") == ["Reply", "ModelNotLoaded"]
    assert k.value("replies[0].text") == "whole"


@pytest.mark.parametrize(
    "ask",
    [
        "llm.agenerate('Never ends.')",
        "anext(llm.astream('Never ends.'))",
        "asyncio.gather(llm.agenerate('Never ends.'))",
    ],
)
def test_cancelling_the_task_leaves_the_server(k: Kernel, fast: FaultServer, ask: str) -> None:
    fast.will(CHAT, *sse(delta(""), done=False), Hold())
    cell = k.send(
        f"async def ask(): return await {ask}\n"
        "task = asyncio.create_task(ask())\n"
        "go = asyncio.Event()\n"
        "at_release(lambda: task.get_loop().call_soon_threadsafe(go.set))\n"
        "print('asked')\n"
        "await go.wait()\n"
        "task.cancel()\n"
        "try:\n    await task\nexcept asyncio.CancelledError:\n    print('cancelled')"
    )
    received = fast.wait_for(CHAT)
    k.release()
    assert received.left.wait(3 * within_a_second())
    ran = k.wait(cell)
    assert ran.text == "asked\ncancelled\n"
    assert k.value("(await llm.agenerate('And on.')).text") == "And on."


def test_leaving_the_loop_leaves_the_server(k: Kernel, fast: FaultServer) -> None:
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    k.ok(
        "from contextlib import aclosing\n"
        "async with aclosing(llm.astream('Never ends.')) as chunks:\n"
        "    async for chunk in chunks:\n"
        "        if chunk.text: break"
    )
    assert fast.wait_for(CHAT).left.wait(within_a_second())
    assert k.value("(llm.last.text, llm.last.finish_reason)") == ("one", "cancelled")


@pytest.mark.parametrize(
    "ask",
    [
        "await llm.agenerate('Never ends.')",
        "async for c in llm.astream('?'): pass",
        "await asyncio.gather(llm.agenerate('Never ends.'))",
        "async with asyncio.timeout(60): await llm.agenerate('Never ends.')",
    ],
)
def test_the_stop_button_ends_an_awaiting_cell(k: Kernel, fast: FaultServer, ask: str) -> None:
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    cell = k.send(f"announce()\n{ask}")
    received = fast.wait_for(CHAT)
    k.wait_for_announcement(cell)
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, len(ran.traceback)) == ("Interrupted", 1)
    assert ran.error == "Stopped after 3 characters; the answer so far is in llm.last."
    assert ran.finished - pressed < within_a_second()
    assert received.left.wait(within_a_second())
    assert k.value("(llm.last.text, llm.last.finish_reason)") == ("one", "cancelled")
    assert k.value("__import__('sys').last_value.reply.text") == "one"


@pytest.mark.parametrize("wait", ["await job", "job.result()", "%llm_wait"])
def test_interrupt_of_waiting_for_job_is_one_line(k: Kernel, fast: FaultServer, wait: str) -> None:
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    k.ok("%llm --bg -o job Never ends.")
    kind = "await" if "await" in wait else "wait"
    cell = k.send(f"interrupt_points.announce_{kind}()\n{wait}")
    k.wait_for_announcement(cell)
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, len(ran.traceback)) == ("Interrupted", 1)
    assert ran.error == f"Stopped waiting; job {k.value('job.number')} continues."
    assert k.value("job.done") is False, "only the waiting ends"
    k.ok("%llm_stop")


def test_interrupted_task_counts_as_cancelled(k: Kernel, fast: FaultServer) -> None:
    for _ in range(2):
        fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    cell = k.send(
        "announce(2)\n"
        "try:\n"
        "    async with asyncio.TaskGroup() as group:\n"
        "        for _ in range(2): group.create_task(llm.agenerate('Never ends.'))\n"
        "except asyncio.CancelledError as error:\n"
        "    print('one cancellation, no group of errors')"
    )
    k.wait_for_announcement(cell)
    k.interrupt()
    assert k.wait(cell).text == "one cancellation, no group of errors\n"
    assert k.value("llm.last.text") == "one"


@pytest.mark.parametrize(
    "wait",
    [
        "await asyncio.wait_for(llm.agenerate('Never ends.'), 60)",
        "async with asyncio.TaskGroup() as group: group.create_task(llm.agenerate('Never ends.'))",
        "await asyncio.wait([asyncio.create_task(llm.agenerate('Never ends.'))])",
        "for one in asyncio.as_completed([llm.agenerate('Never ends.')]): await one",
        "await asyncio.shield(llm.agenerate('Never ends.'))",
    ],
    ids=["wait_for", "TaskGroup", "wait", "as_completed", "shield"],
)
def test_interrupt_of_asyncio_wait_is_one_line(k: Kernel, fast: FaultServer, wait: str) -> None:
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    cell = k.send(f"announce()\n{wait}")
    received = fast.wait_for(CHAT)
    k.wait_for_announcement(cell)
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, len(ran.traceback)) == ("Interrupted", 1)
    assert ran.error == "Stopped after 3 characters; the answer so far is in llm.last."
    assert (ran.reply["ename"], ran.reply["evalue"]) == (ran.ename, ran.error)
    assert ran.reply["traceback"] == ran.traceback
    assert received.left.wait(within_a_second()), "the answer stops, too"
    assert k.value("(llm.last.text, llm.last.finish_reason)") == ("one", "cancelled")
    assert k.value("__import__('sys').last_value.reply.text") == "one"
    assert k.value("(await llm.agenerate('And on.')).text") == "And on."


def test_interrupt_of_asyncio_wait_for_job_is_one_line(k: Kernel, fast: FaultServer) -> None:
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    k.ok("%llm --bg -o job Never ends.")
    cell = k.send(
        "interrupt_points.announce_await()\nawait asyncio.wait([asyncio.ensure_future(job)])"
    )
    k.wait_for_announcement(cell)
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, len(ran.traceback)) == ("Interrupted", 1)
    assert k.value("job.done") is False, "only the waiting ends"
    k.ok("%llm_stop")


def test_interrupt_without_answer_shows_own_traceback(k: Kernel, fast: FaultServer) -> None:
    cell = k.send(
        "await llm.agenerate('Before.')\nprint('here')\nwhile True: await asyncio.sleep(0.05)"
    )
    k.wait_for_output(cell, "here")
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, len(ran.traceback) > 1) == ("CancelledError", True)


def test_own_cancellation_and_own_error_show_own_tracebacks(k: Kernel, fast: FaultServer) -> None:
    ran = k.run("await asyncio.sleep(0)\nraise asyncio.CancelledError('mine')")
    assert (ran.ename, ran.error, len(ran.traceback) > 1) == ("CancelledError", "mine", True)
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    cell = k.send(
        "announce()\n"
        "try: await asyncio.wait_for(llm.agenerate('Never ends.'), 60)\n"
        "except asyncio.CancelledError: raise ValueError('mine')"
    )
    k.wait_for_announcement(cell)
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, ran.error, len(ran.traceback) > 1) == ("ValueError", "mine", True)


def test_interrupt_leaves_answers_of_earlier_cells(k: Kernel, fast: FaultServer) -> None:
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    k.ok("earlier = asyncio.create_task(llm.agenerate('Never ends.'))\nawait asyncio.sleep(0)")
    fast.wait_for(CHAT)
    fast.will(CHAT, *sse(delta("two"), done=False), Hold())
    cell = k.send("announce(2)\nawait asyncio.shield(llm.agenerate('Never ends.'))")
    k.wait_for_announcement(cell)
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"
    assert k.value("(llm.last.text, earlier.done())") == ("two", False)
    k.ok("earlier.cancel()")


def test_own_exception_handler_is_called_and_restored(k: Kernel, fast: FaultServer) -> None:
    k.ok(
        "def handle(shell, kind, error, tb, tb_offset=None): print('handled', kind.__name__, error)\n"
        "get_ipython().set_custom_exc((ZeroDivisionError,), handle)"
    )
    try:
        assert (
            k.run("await asyncio.sleep(0)\n1 / 0").text
            == "handled ZeroDivisionError division by zero\n"
        )
        assert k.run("1 / 0").text == "handled ZeroDivisionError division by zero\n"
        assert k.value("[e.__name__ for e in get_ipython().custom_exceptions]") == [
            "ZeroDivisionError"
        ]
    finally:
        k.ok("get_ipython().set_custom_exc((), None)")


def test_last_is_the_answer_that_has_text(k: Kernel, fast: FaultServer) -> None:
    fast.will(CHAT, *sse(delta("one"), done=False), Hold())
    k.ok("first = asyncio.create_task(llm.agenerate('Never ends.'))\nawait asyncio.sleep(0)")
    k.ok("while not any(one.text for one in llm.answering): await asyncio.sleep(0.01)")
    for _ in range(2):
        fast.will(CHAT, Hold())
    cell = k.send("await asyncio.gather(llm.agenerate('?'), first, llm.agenerate('?'))")
    fast.wait_for(CHAT, 3)
    time.sleep(0.3)
    k.interrupt()
    ran = k.wait(cell)
    assert ran.error == "Stopped after 3 characters; the answer so far is in llm.last."
    assert k.value("llm.last.text") == "one"
    assert k.value("__import__('sys').last_value.reply.text") == "one"


@pytest.mark.parametrize("point", ["before_code", "before_cell"])
@pytest.mark.parametrize("ask", ["await llm.agenerate('Hello.')", "reply = llm.generate('Hello.')"])
def test_interrupt_before_first_line_is_one_line(
    k: Kernel, fast: FaultServer, ask: str, point: str
) -> None:
    fast.pace = 0.3
    k.ok(f"from tests import interrupt_points\ninterrupt_points.{point}(get_ipython())")
    ran = k.run(ask)
    assert (ran.ename, len(ran.traceback)) == ("Interrupted", 1)
    assert ran.seconds < within_a_second()


def test_local_jobs_wait_for_their_turn(loaded: Kernel) -> None:
    # The second cannot share steps.
    for name, option in (("first", ""), ("second", "-p no_repeat_ngram_size=3")):
        # So long that neither has ended before it is stopped.
        length = f"-t 0 --max-new-tokens 2000 {option}"
        cell = (
            f"%%llm --bg -o {name} {length}\nWrite a very long story about a fox, with all details."
        )
        assert loaded.ok(cell).seconds < within_a_second()
    loaded.ok(
        "while 'waiting' in (first.state, second.state): __import__('time').sleep(0.01)\n"
        "states = first.state, second.state"
    )
    assert loaded.value("states") == ("running", "queued")
    assert "queued" in loaded.ok("%llm_jobs").text
    loaded.ok(f"%llm_stop {loaded.value('first.number')}")
    loaded.ok("while second.state != 'running': __import__('time').sleep(0.01)")
    assert loaded.value("(first.state, first.text != '')") == ("stopped", True)
    cell = loaded.send("%llm --max-new-tokens 4 Hello")
    loaded.wait_for_output(cell, "queued behind job")
    loaded.interrupt()
    assert loaded.wait(cell).ename == "Interrupted", "■ ends the cell that waits, not the job"
    assert loaded.value("second.state") == "running"
    loaded.ok("%llm_stop")
    assert loaded.ok("%llm -t 0 --max-new-tokens 2 Hello").status == "ok"


def test_local_answers_are_computed_together(loaded: Kernel) -> None:
    ask = "llm.agenerate(f'Write a story about {n} foxes.', temperature=0, max_new_tokens=48)"
    loaded.ok("%%llm --bg -o job -t 0 --max-new-tokens 400\nWrite a very long story.")
    loaded.ok(f"import asyncio\nreplies = await asyncio.gather(*({ask} for n in range(12)))")
    assert loaded.value("{reply.usage.completion_tokens for reply in replies}") == {48}
    loaded.ok("first = [reply.timing.first_token_s for reply in replies]")
    loaded.ok("total = [reply.timing.total_s for reply in replies]")
    assert loaded.value("max(first) < min(total)"), "all had a token before the first one ended"
    assert loaded.value("job.state") != "queued"
    loaded.ok("%llm_stop")


def test_interrupt_of_local_answers_keeps_the_one_that_has_text(loaded: Kernel) -> None:
    loaded.ok("import asyncio\nllm.generate('Hello', max_new_tokens=1)")
    cell = loaded.send(
        "async def ask(n): return await llm.agenerate("
        "f'Write a story about {n} foxes.', temperature=0, max_new_tokens=400)\n"
        "asks = asyncio.gather(*(ask(n) for n in range(3)))\n"
        "while not any(draft.text for draft in llm.answering): await asyncio.sleep(0.01)\n"
        "__import__('tests.interrupt_points', fromlist=['x']).announce_await()\n"
        "await asks"
    )
    loaded.wait_for_announcement(cell)
    loaded.interrupt()
    ran = loaded.wait(cell)
    assert (ran.ename, len(ran.traceback)) == ("Interrupted", 1)
    assert ran.error.startswith("Stopped after ")
    assert loaded.value("llm.last.text") != ""
    assert loaded.value("__import__('sys').last_value.reply.text == llm.last.text")
