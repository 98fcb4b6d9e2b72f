"""The panel in a real kernel: what a click does while a cell runs, as far as the kernel lets it."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels import ROOT, Kernel, Ran, kernel, within_a_second
from tests.until import until

REGISTER = """
from llm_magic.notebook.magics import register
from llm_magic.session import Session
from llm_magic.notebook.panel import ControlPanel
from tests.scripted import Hang, ScriptedBackend, whole_answer
backend = ScriptedBackend()
llm = Session(create=lambda _name: backend)
register(get_ipython(), llm)
%llm_load tiny
panel = ControlPanel(llm)
"""


@pytest.fixture(scope="module", params=["", "6.31.0", "7.3.0"], ids=lambda v: v or "installed")
def k(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    with kernel(request.param or None) as k:
        k.ok(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
        k.ok(REGISTER)
        yield k


def subshell(k: Kernel) -> str:
    """Make a subshell, as JupyterLab does for widgets."""
    message = k.client.session.msg("create_subshell_request", {})
    k.client.control_channel.send(message)
    reply: dict[str, Any] = k.client.get_control_msg(timeout=60)
    return str(reply["content"]["subshell_id"])


def send_prompt(k: Kernel, comm_id: str, text: str, subshell_id: str | None = None) -> None:
    """Send a text from a prompt box, as its page does once the kernel has answered."""
    send_custom(k, comm_id, {"do": "send", "id": "1", "text": text}, subshell_id)


def click(k: Kernel, comm_id: str, subshell_id: str | None = None) -> None:
    """Click on a button, as a frontend sends it."""
    send_custom(k, comm_id, {"event": "click"}, subshell_id)


def send_custom(
    k: Kernel, comm_id: str, content: dict[str, str], subshell_id: str | None = None
) -> None:
    """Send a message of a widget, as a frontend does."""
    data = {"method": "custom", "content": content}
    message = k.client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
    if subshell_id is not None:
        message["header"]["subshell_id"] = subshell_id
    k.client.shell_channel.send(message)


def views(ran: Ran) -> list[str]:
    """Return the widgets that a cell has displayed."""
    kind = "application/vnd.jupyter.widget-view+json"
    found = [output.get("data", {}).get(kind) for output in ran.outputs]
    return [view["model_id"] for view in found if view]


def test_it_is_shown_with_words_for_where_no_kernel_runs(k: Kernel) -> None:
    ran = k.ok("%llm_panel")
    assert "llm_magic control panel" in ran.html
    shown = views(ran)
    assert len(shown) == 1
    assert views(k.ok("%llm_panel")) == shown, "each cell shows the same panel"
    k.ok("import ipywidgets; ipywidgets.Widget.close_all(); panel = ControlPanel(llm)")
    anew = views(k.ok("%llm_panel"))
    assert (len(anew), anew == shown) == (1, False)


def click_until_end(k: Kernel, cell: str, comm_id: str, subshell_id: str | None) -> None:
    """Click, and once more where nothing happens: ipykernel 7.3 may lose a message of a subshell."""

    def is_over() -> bool:
        k.receive(0.05)
        return bool(k.state(cell).finished)

    for _ in range(6):
        click(k, comm_id, subshell_id)
        with contextlib.suppress(AssertionError):
            until(is_over, within=10)
            return


def test_a_click_while_a_cell_answers(k: Kernel) -> None:
    version = k.value("__import__('ipykernel').__version__")
    k.ok("backend.will('begun', Hang())")
    comm_id = k.value("panel.asking.stop.comm.comm_id")
    takes_clicks = version.startswith(("7.1", "7.2", "7.3"))
    other = subshell(k) if takes_clicks else None
    k.ok("import time\nhandled = []")
    k.ok("panel.asking.stop.on_click(lambda _: handled.append(time.monotonic()))")
    cell = k.send("%llm -o stopped Hello")
    k.wait_for_output(cell, "begun")
    pressed = time.monotonic()
    if takes_clicks:
        click_until_end(k, cell, comm_id, other)
    else:
        k.interrupt()
    ran = k.wait(cell)
    if takes_clicks:
        pressed = k.value("handled[0]")
    assert ran.ename == "Interrupted"
    assert ran.finished - pressed < 2 * within_a_second()
    assert k.value("stopped.text") == "begun"
    assert k.ok("%llm --literal next one").text.startswith("next one")


def wait_until_idle(k: Kernel) -> None:
    """Wait until the panel shows that nothing is being answered."""
    until_value(k, "'Answering' in panel.status.value", False)


def test_panel_shows_what_stops_a_cell(k: Kernel) -> None:
    wait_until_idle(k)
    version = k.value("__import__('ipykernel').__version__")
    k.ok(
        "from tests import interrupt_points\nbackend.will('begun', Hang())\nseen = []\n"
        "panel.asking.note.observe(lambda change: seen.append(change.new), 'value')"
    )
    expected = "Stop ends it" if version.startswith(("7.1", "7.2", "7.3")) else "■ in the toolbar"
    cell = k.send(
        f"interrupt_points.announce(lambda: any({expected!r} in one for one in seen))\n%llm Hello"
    )
    k.wait_for_announcement(cell)
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"


def test_panel_answer_continues_while_cells_run(k: Kernel) -> None:
    send_prompt(k, k.value("panel.asking.prompt.comm.comm_id"), "one two three")
    until_value(k, "'one two three' in panel.asking.answer.value", True)
    until_value(k, "panel.magic.value", "%%llm\none two three")
    until_value(k, "llm.last is not None and llm.last.text", "one two three")


PROMPT = "{price:.2f} {prize} {boom()} {thing} {{price}} {Out} {price.real}"


def test_prompt_is_filled_in_as_in_a_cell(k: Kernel) -> None:
    k.ok(
        "calls = []\nprice = 12\ndef boom(): calls.append(1)\n"
        "class Thing:\n    def __repr__(self): calls.append(2); return 'a thing'\n"
        "thing = Thing()\n%llm_panel\nimport ipywidgets"
    )
    comm_id = k.value(
        "[i for i, w in ipywidgets.Widget.get_manager_state()['state'].items()"
        " if w['state'].get('kind') == 'prompt'][-1]"
    )
    cell = k.ok(f"%%llm\n{PROMPT}")
    in_cell, calls = k.value("backend.requests[-1].messages[-1].content"), k.value("len(calls)")
    assert in_cell.startswith("12.00 {prize} {boom()} ")
    k.ok("calls.clear(); backend.requests.clear()")
    send_prompt(k, comm_id, PROMPT)
    until_value(k, "[r.messages[-1].content for r in backend.requests]", [in_cell])
    assert k.value("len(calls)") == calls
    shown = "ipywidgets.Widget.get_manager_state()['state'].values()"
    answers = f"' '.join(str(w['state'].get('value')) for w in {shown})"
    notes = [line for line in cell.text.splitlines() if line.startswith("Note: ")]
    assert len(notes) == 3

    def missing() -> list[str]:
        texts = html.unescape(k.value(answers))
        return [note for note in notes if note not in texts]

    until(lambda: not missing(), "a note is missing")


def test_references_wait_for_the_end_of_a_cell(k: Kernel) -> None:
    other = subshell(k) if k.value("__import__('ipykernel').version_info >= (7,)") else None
    k.ok(
        "backend.requests.clear()\nfull = ControlPanel(llm, lambda _text: get_ipython().user_ns)\n"
        "late = 'early'"
    )
    comm_id = k.value("full.asking.prompt.comm.comm_id")
    cell = k.send("import time; print('begun'); time.sleep(1); late = 'after the cell'")
    k.wait_for_output(cell, "begun")
    send_prompt(k, comm_id, "{late}", other)
    k.wait(cell)
    until_value(k, "[r.messages[-1].content for r in backend.requests]", ["after the cell"])
    k.ok("llm.generation.system = 'set in Python: {late}'")
    until_value(k, "full.asking.system.value", "set in Python: {late}")
    assert k.value("llm.generation.system") == "set in Python: {late}", "it was filled in"
    k.ok("llm.generation.reset()")


def until_value(k: Kernel, expression: str, expected: object) -> None:
    """Wait until an expression has a value."""
    deadline = time.monotonic() + 30
    while (found := k.value(expression)) != expected:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_reloaded_extension_retires_its_panels(k: Kernel) -> None:
    k.ok("llm.close()")
    until_value(k, "'Run %llm_panel again' in panel.status.value", True)
    assert k.value("panel.asking.prompt.disabled")
