"""Drawing a panel: soon, seldom, always the last state, and nothing left running."""

from __future__ import annotations

import threading
import time

import pytest

from llm_magic.notebook.panel import ControlPanel
from llm_magic.notebook.panel.redraw import PERIOD_S, Refresher
from llm_magic.types import Chunk, Usage
from tests.kernels import within_a_second
from tests.panels import Scripted, is_idle, send, shown_error, visible_text
from tests.scripted import Hang, Pause, Step, whole_answer
from tests.until import until


def timers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


class Drawer:
    """Draws for a given time, and records the times and how many ran at once."""

    def __init__(self, cost: float = 0.0) -> None:
        self.cost, self.state = cost, 0
        self.drawn: list[tuple[float, int]] = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def draw(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self.drawn.append((time.monotonic(), self.state))
        time.sleep(self.cost)
        with self._lock:
            self._now -= 1


def request_for(refresher: Refresher, drawer: Drawer, seconds: float) -> int:
    """Change and request a drawing a thousand times a second; returns the most threads that drew."""
    most, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        drawer.state += 1
        refresher.request()
        most = max(most, len(timers()))
        time.sleep(0.001)
    return most


def test_the_first_change_is_drawn_at_once_and_the_last_one_always() -> None:
    drawer = Drawer()
    refresher = Refresher(drawer.draw)
    request_for(refresher, drawer, 1.0)
    until(lambda: drawer.drawn[-1][1] == drawer.state)
    assert drawer.drawn[0][1] < 500 * PERIOD_S, "before the changes of a period"
    assert len(drawer.drawn) <= 1 + 1.2 / PERIOD_S
    refresher.stop()


@pytest.mark.parametrize("cost", [0.05, 0.3])
def test_slow_drawings_do_not_overlap_and_are_less_frequent(cost: float) -> None:
    drawer = Drawer(cost)
    refresher = Refresher(drawer.draw)
    most = request_for(refresher, drawer, 1.5)
    refresher.stop()
    until(lambda: not timers())
    assert drawer.most == 1, "two threads draw at once"
    assert most <= 2, f"{most} threads wait for their turn"
    assert len(drawer.drawn) <= 1 + 1.5 / max(PERIOD_S, 5 * cost)


def test_a_drawing_that_fails_is_not_the_last_one() -> None:
    failed = threading.Event()
    drawn = threading.Event()

    def draw() -> None:
        if failed.is_set():
            drawn.set()
            return
        failed.set()
        raise ZeroDivisionError

    def ignore(_args: threading.ExceptHookArgs) -> None:
        """Ignore an expected error."""

    usual, threading.excepthook = threading.excepthook, ignore
    refresher = Refresher(draw)
    try:
        refresher.request()
        assert failed.wait(within_a_second())
        until(lambda: not timers())
        refresher.request()
        assert drawn.wait(within_a_second())
    finally:
        threading.excepthook = usual
        refresher.stop()


def test_nothing_is_drawn_after_the_stop() -> None:
    for _ in range(50):
        drawer = Drawer()
        refresher = Refresher(drawer.draw)
        refresher.request()
        refresher.stop()
        count = len(drawer.drawn)
        refresher.request()
        time.sleep(0.002)
        assert len(drawer.drawn) == count
    until(lambda: not timers())


def test_two_thousand_tokens_are_drawn_a_few_times_a_second(scripted: Scripted) -> None:
    panel, backend = scripted.panel, scripted.backend
    counts = {"status": 0, "answer": 0}
    panel.status.observe(lambda _c: counts.update(status=counts["status"] + 1), "value")
    panel.asking.answer.observe(lambda _c: counts.update(answer=counts["answer"] + 1), "value")
    script: list[Step] = []
    for number in range(2000):
        script += [Chunk(text=f"{number} ", tokens=1, time=time.perf_counter() + number / 1000)]
        script += [Pause(0.01)] if number % 20 == 0 else []
    backend.will(*script, Chunk(finish_reason="stop", usage=Usage(7, 2000, 0)))
    began = time.monotonic()
    send(panel, "count")
    until(lambda: is_idle(panel) and "1999" in panel.asking.answer.value, within=60)
    until(lambda: "Ready" in visible_text(panel.status.value))
    # One when it is sent, one when it ends, and at most one every `PERIOD_S` between.
    most = 3 + (time.monotonic() - began) / PERIOD_S
    assert counts["answer"] <= most
    assert counts["status"] <= most


def test_status_line_shows_state_model_device_memory_and_speed(scripted: Scripted) -> None:
    panel, hang = scripted.panel, Hang()
    shown = visible_text(panel.status.value)
    assert shown.startswith("Ready tiny · local cpu bf16 · 269 MB · 8,192 ctx")
    assert "this process 2 kB" in shown
    assert "free of" in shown
    assert "<meter" in panel.status.value
    assert "tokens/s" not in shown
    chunks = [Chunk(text="x", tokens=1, time=1.0), Chunk(text="y", tokens=4, time=2.0)]
    scripted.backend.will(*chunks, hang, *whole_answer())
    send(panel, "?")
    until(lambda: "4.0 tokens/s now" in visible_text(panel.status.value))
    assert visible_text(panel.status.value).startswith("Answering tiny")
    hang.go.set()
    until(lambda: "4.0 tokens/s last answer" in visible_text(panel.status.value))


def test_screen_readers_announce_the_state_but_no_figures(scripted: Scripted) -> None:
    aloud = scripted.panel.status.value.split('role="status"')[1].split("</span></span>")[0]
    assert "Ready" in aloud
    assert "free" not in aloud
    assert "tokens/s" not in aloud


def test_a_session_that_is_closed_leaves_no_thread(scripted: Scripted) -> None:
    hang = Hang()
    scripted.backend.will("a", hang)
    send(scripted.panel, "?")
    assert hang.reached.wait(5)
    scripted.session.close()
    until(lambda: not timers())
    assert not [t.name for t in threading.enumerate() if t.name == "llm_magic-loop"]


def test_panel_draws_the_changes_of_many_threads(scripted: Scripted) -> None:
    def change(number: int) -> None:
        for step in range(20):
            scripted.session.generation.update(top_k=1 + number * 20 + step)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    top_k = scripted.panel.settings.numbers["top_k"]
    until(lambda: top_k.value == scripted.session.generation.top_k)
    assert shown_error(scripted.panel) == ""


def test_new_panel_shows_current_session(scripted: Scripted) -> None:
    scripted.session.generation.update(top_k=3)
    other = ControlPanel(scripted.session)
    assert other.settings.numbers["top_k"].value == 3
    assert other.settings.numbers["top_k"].changed
    assert "Ready tiny" in visible_text(other.status.value)
