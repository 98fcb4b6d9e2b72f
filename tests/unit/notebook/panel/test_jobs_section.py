"""The jobs in a panel: listed while they run and after, stopped one by one."""

from __future__ import annotations

from llm_magic.errors import GenerationFailed
from llm_magic.session.requests import Request
from llm_magic.session.response import Response
from tests.panels import (
    Scripted,
    _arrives,
    harm,
    is_idle,
    press,
    send,
    visible_text,
)
from tests.payloads import payloads
from tests.scripted import Hang, Step, whole_answer
from tests.until import until


class NoView:
    """Stands for the cell of a job, and shows nothing."""

    origin = "cell [1]"

    def update(self) -> bool:
        """Send nothing."""
        return False

    def show_again(self, heading: str = "") -> None:
        """Show nothing."""

    def close(self) -> None:
        """Wait for nothing."""


def start(scripted: Scripted, prompt: str, *script: Step) -> Response:
    if script:
        scripted.backend.will(*script)
    response = scripted.session.ask(Request(prompt), background=True)
    response.view = NoView()
    return response


def rows(scripted: Scripted) -> list[str]:
    """Return the visible rows."""
    section = scripted.panel.jobs
    if section.box.layout.display == "none":
        return []
    shown = zip(section.rows, section.labels, section.stops, strict=True)
    return [
        visible_text(label.value) + (" [Stop]" if stop.layout.display != "none" else "")
        for row, label, stop in shown
        if row.layout.display != "none"
    ]


def test_section_is_hidden_without_jobs(scripted: Scripted) -> None:
    assert rows(scripted) == []
    send(scripted.panel, "A question of the panel's own")
    until(lambda: is_idle(scripted.panel) and scripted.session.last is not None)
    scripted.panel.draw()
    assert rows(scripted) == []


def test_finished_job_has_no_stop_button(scripted: Scripted) -> None:
    hang = Hang()
    job = start(scripted, "Count   to\n two.", "one", hang, *whole_answer(" two"))
    until(lambda: rows(scripted) == ["running job 1 · tiny · 1 token Count to two. [Stop]"])
    hang.go.set()
    job.result()
    until(lambda: rows(scripted)[0].startswith("done job 1 · tiny · 2 tokens · 0."))
    assert rows(scripted)[0].endswith(" s Count to two."), "nothing to stop any more"


def test_finished_jobs_can_be_cleared(scripted: Scripted) -> None:
    jobs, hang = scripted.panel.jobs, Hang()
    start(scripted, "One").result()
    start(scripted, "Two", "b", hang, *whole_answer("c"))
    until(lambda: len(rows(scripted)) == 2)
    press(jobs.clear)
    assert [row[:7] for row in rows(scripted)] == ["running"]
    assert jobs.clear.layout.display == "none"
    hang.go.set()
    until(lambda: [row[:4] for row in rows(scripted)] == ["done"])
    press(jobs.clear)
    assert rows(scripted) == []
    assert len(scripted.session.jobs.all) == 2, "%llm_jobs lists them"


def test_the_button_that_clears_is_below_the_rows(scripted: Scripted) -> None:
    start(scripted, "One").result()
    start(scripted, "Two").result()
    until(lambda: len(rows(scripted)) == 2)
    box = scripted.panel.jobs.box
    assert {child.layout.order for child in box.children} == {None}, (
        "they are shown as they are listed"
    )
    holder = next(
        child
        for child in box.children
        if scripted.panel.jobs.rows[0] in getattr(child, "children", ())
    )
    below = box.children[box.children.index(holder) + 1 :]
    assert any(scripted.panel.jobs.clear in getattr(child, "children", ()) for child in below)


def test_each_job_has_its_stop_button_and_magic(scripted: Scripted) -> None:
    first = start(scripted, "One", "a", Hang())
    second = start(scripted, "Two", "b", Hang())
    until(lambda: [row[:7] for row in rows(scripted)] == ["running", "running"])
    press(scripted.panel.jobs.stops[1])
    until(lambda: second.done)
    assert (first.state, second.state) == ("running", "stopped")
    assert scripted.panel.magic.value == "%llm_stop 2"
    until(lambda: rows(scripted)[1].startswith("stopped job 2"))


def test_running_jobs_come_first_and_the_list_is_short(scripted: Scripted) -> None:
    for number in range(5):
        start(scripted, f"quick {number}").result()
    running = [start(scripted, f"slow {number}", Hang()) for number in range(8)]
    until(lambda: len(rows(scripted)) == 6 and rows(scripted)[5].startswith("waiting job 11"))
    assert visible_text(scripted.panel.jobs.more.value) == "and 7 more: %llm_jobs"
    for job in running:
        job.cancel()
    until(lambda: {row[:7] for row in rows(scripted)} == {"stopped"})
    assert {row.split(" ·")[0] for row in rows(scripted)} == {
        f"stopped job {number}" for number in range(8, 14)
    }
    assert visible_text(scripted.panel.jobs.more.value) == "and 7 more: %llm_jobs"


def test_failed_job_with_hostile_text_is_harmless(scripted: Scripted) -> None:
    for text in payloads("http://127.0.0.1:1").values():
        start(scripted, text, GenerationFailed(text))
    until(lambda: all(job.done for job in scripted.session.jobs.all))
    scripted.panel.draw()
    assert [row.split()[0] for row in rows(scripted)] == ["failed"] * 6
    for label in scripted.panel.jobs.labels:
        assert harm(label.value) == []


def test_panel_of_a_closed_session_stops_no_job(scripted: Scripted) -> None:
    job = start(scripted, "One", "a", Hang())
    until(lambda: len(rows(scripted)) == 1)
    scripted.session.close()
    assert job.state == "stopped"
    assert all(stop.disabled for stop in scripted.panel.jobs.stops)


def test_stop_of_the_prompt_stops_no_job(scripted: Scripted) -> None:
    job = start(scripted, "One", "a", Hang())
    until(lambda: len(rows(scripted)) == 1)
    assert is_idle(scripted.panel), "it is about the panel's questions and those of cells"
    scripted.backend.will("b", Hang())
    send(scripted.panel, "Two")
    until(lambda: not scripted.panel.asking.stop.disabled)
    press(scripted.panel.asking.stop)
    until(lambda: is_idle(scripted.panel))
    scripted.session.interrupt()
    assert job.state == "running"


def test_late_click_stops_the_job_that_was_shown(scripted: Scripted) -> None:
    first, second = Hang(), Hang()
    one = start(scripted, "one", first, *whole_answer("a"))
    two = start(scripted, "two", second, *whole_answer("b"))
    section = scripted.panel.jobs
    until(lambda: len(rows(scripted)) == 2)
    button = next(stop for stop in section.stops if stop.description == f"Stop {one.number}")
    first.go.set()
    until(lambda: one.done and any("done" in row for row in rows(scripted)))
    # Sent before the page had heard of that.
    _arrives(button, {"method": "custom", "content": {"event": "click"}})
    assert not two.done
    second.go.set()
    until(lambda: two.done)
    assert two.state == "done"
