"""■ ends a cell whose server sends faster than an answer can be shown, or what is slow to show."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.fault_server import CHAT, FaultServer
from tests.kernels import Kernel, Ran, kernel, within_a_second
from tests.wire import SSE, Head, Hold, Repeat, Step, delta, sse


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture(scope="module")
def k(server: FaultServer) -> Iterator[Kernel]:
    with kernel() as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        k.ok(f"%llm_load tiny -b openai --base-url {server.url}")
        k.ok("%%llm\nHello")
        yield k


def flood(text: str) -> list[Step]:
    """Return an answer without an end that repeats `text`."""
    event = json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False)
    # Few chunks of the body: the server must not be the slow one.
    return [Head(200, SSE), Repeat(f"data: {event}\n\n".encode() * 1000, 1 << 30)]


def interrupted(k: Kernel, sent: str) -> Ran:
    """Interrupt a cell; it ends within a second."""
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(sent, timeout=60)
    assert ran.ename == "Interrupted"
    assert ran.finished - pressed < within_a_second()
    return ran


@pytest.mark.parametrize("options", ["", "--plain", "-f json"])
@pytest.mark.parametrize("text", ["word ", '{"a":['])
def test_interrupt_ends_flood_and_keeps_what_was_shown(
    k: Kernel, server: FaultServer, options: str, text: str
) -> None:
    server.will(CHAT, *flood(text))
    cell = k.send(f"%%llm {options}\nHello")
    time.sleep(5)
    ran = interrupted(k, cell)
    k.ok(f"text, unit = llm.last.text, {text!r}")
    whole, count = k.value("(text == unit * (len(text) // len(unit)), len(text))")
    assert whole
    assert count > 1000 * len(text)
    assert len("".join(ran.text.split())) >= count * len(text.strip()) // len(text)
    assert k.run("1").status == "ok"


@pytest.mark.parametrize("text", ["![" * 145_000, "|a|b|\n|-|-|\n" + "|x|y|\n" * 48_000])
def test_interrupt_ends_answer_that_is_costly_to_show(
    k: Kernel, server: FaultServer, text: str
) -> None:
    server.will(CHAT, *sse(delta(text), done=False), Hold())
    cell = k.send(
        "from tests import interrupt_points\n"
        "interrupt_points.announce(lambda: any(one.text for one in llm.answering))\n"
        "%llm Hello"
    )
    k.wait_for_announcement(cell)
    time.sleep(0.3)
    ran = interrupted(k, cell)
    assert text.strip() in ran.text
