"""The panel in a real kernel: what a click does while a cell runs, as far as the kernel lets it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels import ROOT, Kernel, kernel, within_a_second

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
    reply: dict[str, Any] = k.client.get_control_msg(timeout=10)
    return str(reply["content"]["subshell_id"])


def send_prompt(k: Kernel, text: str) -> None:
    """Send a text from the prompt box, as its page does once the kernel has answered."""
    comm_id = k.value("panel.asking.prompt.comm.comm_id")
    data = {"method": "custom", "content": {"do": "send", "id": "1", "text": text}}
    message = k.client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
    k.client.shell_channel.send(message)


def click(k: Kernel, comm_id: str, subshell_id: str | None = None) -> None:
    """Click on a button, as a frontend sends it."""
    data = {"method": "custom", "content": {"event": "click"}}
    message = k.client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
    if subshell_id is not None:
        message["header"]["subshell_id"] = subshell_id
    k.client.shell_channel.send(message)


def test_it_is_shown_with_words_for_where_no_kernel_runs(k: Kernel) -> None:
    ran = k.ok("%llm_panel")
    assert "llm_magic control panel" in ran.html
    kinds = [kind for output in ran.outputs for kind in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" in kinds


def test_a_click_while_a_cell_answers(k: Kernel) -> None:
    version = k.value("__import__('ipykernel').__version__")
    k.ok("backend.will('begun', Hang())")
    comm_id = k.value("panel.asking.stop.comm.comm_id")
    takes_clicks = version.startswith(("7.1", "7.2", "7.3"))
    other = subshell(k) if takes_clicks else None
    cell = k.send("%llm -o stopped Hello")
    k.wait_for_output(cell, "begun")
    pressed = time.monotonic()
    if takes_clicks:
        click(k, comm_id, other)
    else:
        k.interrupt()
    ran = k.wait(cell, timeout=20)
    assert ran.ename == "Interrupted"
    assert ran.finished - pressed < 2 * within_a_second()
    assert k.value("stopped.text") == "begun"
    assert k.ok("%llm --literal next one").text.startswith("next one")


def wait_until_idle(k: Kernel) -> None:
    """Wait until the panel shows that nothing is being answered."""
    deadline = time.monotonic() + 10
    while "Answering" in k.value("panel.status.value"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_panel_shows_what_stops_a_cell(k: Kernel) -> None:
    wait_until_idle(k)
    version = k.value("__import__('ipykernel').__version__")
    k.ok(
        "backend.will('begun', Hang())\nseen = []\n"
        "panel.asking.note.observe(lambda change: seen.append(change.new), 'value')"
    )
    cell = k.send("%llm Hello")
    k.wait_for_output(cell, "begun")
    # As long as the drawings may be apart.
    time.sleep(3)
    k.interrupt()
    k.wait(cell)
    notes = k.value("''.join(seen)")
    expected = "Stop ends it" if version.startswith(("7.1", "7.2", "7.3")) else "■ in the toolbar"
    assert expected in notes


def test_panel_answer_continues_while_cells_run(k: Kernel) -> None:
    send_prompt(k, "one two three")
    deadline = time.monotonic() + 10
    while "one two three" not in k.value("panel.asking.answer.value"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert k.value("panel.magic.value") == "%%llm\none two three"
    assert k.value("llm.last.text") == "one two three"


def test_a_reloaded_extension_retires_its_panels(k: Kernel) -> None:
    k.ok("llm.close()")
    assert "Run %llm_panel again" in k.value("panel.status.value")
    assert k.value("panel.asking.prompt.disabled")
