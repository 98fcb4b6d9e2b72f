"""Servers behind a panel, keys that nothing of it keeps, and hostile texts that do no harm."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from ipywidgets import Widget

from llm_magic.errors import GenerationFailed, MissingDependency
from llm_magic.notebook.magics import register, unregister
from llm_magic.notebook.panel import ControlPanel
from llm_magic.session import Session
from llm_magic.types import Chunk, Progress
from tests.fault_server import MODELS, FaultServer
from tests.panels import (
    Scripted,
    close_widgets,
    everything,
    harm,
    is_idle,
    press,
    put,
    scripted_panel,
    send,
    shown_error,
    visible_text,
)
from tests.payloads import payloads
from tests.scripted import ScriptedBackend, settings, whole_answer
from tests.shell import ipython
from tests.until import until
from tests.wire import Hold, error_answer, json_answer

KEY = "sk-test-4f9b27c1d8e3a650"
NAME = "PANEL_TEST_KEY"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(key=KEY) as running:
        yield running


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlPanel]:
    """Return a panel of the real backends."""
    for name in (NAME, "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    session = Session(settings(backend="openai"))
    panel = ControlPanel(session)
    yield panel
    session.close()
    close_widgets()


def shown_text(panel: ControlPanel) -> str:
    return visible_text(panel.loading.result.value)


def saved_state(panel: ControlPanel) -> str:
    """Return everything that a page or a saved notebook gets to know."""
    return json.dumps([Widget.get_manager_state(), panel.static_html()])


def test_models_of_a_server_are_listed_and_the_key_is_hidden(
    panel: ControlPanel, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    put(panel.loading.options["key_env"], NAME)
    put(panel.loading.options["base_url"], server.url)
    until(lambda: panel.loading.model.options == ("tiny", "big"))
    until(lambda: "2 models." in shown_text(panel))
    put(panel.loading.model, "tiny")
    press(panel.loading.load)
    until(lambda: "Ready" in visible_text(panel.status.value))
    assert panel.magic.value == (
        f"%llm_load tiny -b openai --base-url {server.url} --key-env {NAME}"
    )
    send(panel, "hello you")
    until(
        lambda: is_idle(panel) and "hello you hello you" in visible_text(panel.asking.answer.value)
    )
    assert NAME in saved_state(panel)
    assert KEY not in saved_state(panel)


def test_the_list_is_refreshed(panel: ControlPanel, server: FaultServer) -> None:
    server.key = None
    put(panel.loading.options["base_url"], server.url)
    until(lambda: panel.loading.model.options == ("tiny", "big"))
    server.models["new"] = {}
    press(panel.loading.list)
    until(lambda: "new" in panel.loading.model.options)
    put(panel.loading.model, "what I typed")
    press(panel.loading.list)
    assert panel.loading.model.value == "what I typed"


def test_unreachable_server_is_reported(panel: ControlPanel, server: FaultServer) -> None:
    server.stop()
    put(panel.loading.options["base_url"], server.url)
    until(lambda: str(server.port) in shown_error(panel))
    assert panel.loading.model.options == ()
    server.start()
    server.key = None
    press(panel.loading.list)
    until(lambda: "2 models." in shown_text(panel))


def test_missing_and_wrong_keys_are_reported_without_value(
    panel: ControlPanel, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(panel.loading.options["base_url"], server.url)
    until(lambda: "requires an API key" in shown_error(panel))
    put(panel.loading.options["key_env"], NAME)
    press(panel.loading.list)
    until(lambda: f"{NAME} is not set" in shown_error(panel))
    monkeypatch.setenv(NAME, "sk-wrong-000")
    server.will(MODELS, *error_answer(401, "Incorrect API key provided: sk-wrong-000."))
    press(panel.loading.list)
    until(lambda: "rejected the key" in shown_error(panel))
    assert "sk-wrong" not in saved_state(panel)


def test_late_list_is_not_shown_for_another_server(panel: ControlPanel) -> None:
    hold = Hold()
    with FaultServer({"slow": {}}) as slow, FaultServer({"fast": {}}) as fast:
        slow.will(MODELS, hold, *json_answer(200, {"object": "list", "data": [{"id": "slow"}]}))
        put(panel.loading.options["base_url"], slow.url)
        slow.wait_for(MODELS)
        put(panel.loading.options["base_url"], fast.url)
        until(lambda: panel.loading.model.options == ("fast",))
        hold.go.set()
        time.sleep(0.3)
        assert panel.loading.model.options == ("fast",)


@pytest.mark.parametrize(
    ("name", "typed"), [("key_env", KEY), ("base_url", f"http://me:{KEY}@localhost:1/v1")]
)
def test_key_in_wrong_field_is_cleared(panel: ControlPanel, name: str, typed: str) -> None:
    put(panel.loading.options[name], typed)
    assert shown_error(panel)
    assert KEY not in shown_error(panel)
    press(panel.loading.load)
    assert KEY not in shown_error(panel) + shown_text(panel)
    assert KEY not in saved_state(panel), "a saved notebook may have it"


# Hostile texts


@pytest.mark.parametrize("name", payloads())
def test_hostile_answer_prompt_and_reasoning_are_harmless(scripted: Scripted, name: str) -> None:
    panel, text = scripted.panel, payloads()[name]
    put(panel.asking.chat, True)
    for _ in range(2):
        scripted.backend.will(
            Chunk(reasoning=text, tokens=1, time=1.0), *whole_answer(f"{text}\n\n{text}")
        )
        send(panel, f"? {text}")
        until(lambda: is_idle(panel) and "token" in panel.asking.answer.value)
    assert panel.asking.turns.value
    assert [one for html in everything(panel) for one in harm(html)] == []
    typeset = panel.asking.turns.value + panel.asking.answer.value
    assert harm(typeset, typeset=True) == []


@pytest.mark.parametrize("name", ["script", "img onerror", "title", "tex href", "tex undelimited"])
def test_hostile_names_errors_notices_and_stages_are_harmless(name: str) -> None:
    text = payloads()[name].replace("/", "_")
    with scripted_panel(load=False) as scripted:
        panel, backend = scripted.panel, scripted.backend
        backend.notes = (text,)
        backend.reports["check"] = [Progress(text, 0.5, text)]
        hang = backend.hang("check")
        put(panel.loading.model, text)
        press(panel.loading.load)
        until(lambda: "<progress" in panel.loading.result.value)
        assert [one for html in everything(panel) for one in harm(html)] == []
        hang.go.set()
        until(lambda: "Ready" in panel.status.value)
        backend.will(Chunk(notice=text), "x", GenerationFailed(text))
        send(panel, "?")
        until(lambda: is_idle(panel) and shown_error(panel) != "")
        assert [one for html in everything(panel) for one in harm(html)] == []
        assert harm(panel.asking.answer.value, typeset=True) == []
        assert harm(panel.static_html()) == []


# %llm_panel


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    with ipython() as shell:
        # In a terminal there is no panel.
        monkeypatch.setattr(shell, "kernel", object(), raising=False)
        backend = ScriptedBackend()
        register(shell, Session(settings(), create=lambda _name: backend))
        yield shell
        unregister(shell)
        close_widgets()


def run(shell: InteractiveShell, cell: str) -> None:
    shell.run_cell(cell).raise_error()  # type: ignore[no-untyped-call]


def test_magic_shows_panel_and_static_text(shell: InteractiveShell) -> None:
    run(shell, "%llm_config temperature=0.25")
    with capture_output() as captured:
        run(shell, "%llm_panel")
    still, live = captured.outputs
    assert "The llm_magic control panel" in still.data["text/plain"]
    assert "temperature 0.25" in visible_text(still.data["text/html"])
    assert "Run %llm_panel to open it." in visible_text(still.data["text/html"])
    assert harm(still.data["text/html"]) == []
    assert "application/vnd.jupyter.widget-view+json" in live.data
    assert len(live.data["text/plain"]) < 200, "nobody reads the repr of a VBox"


@pytest.mark.parametrize("missing", ["ipywidgets", "anywidget"])
def test_panel_without_widgets_names_packages_to_install(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependency, match=rf"{missing}.*pip install 'llm_magic\[panel\]'"):
        shell.run_line_magic("llm_panel", "")
    run(shell, "%llm_load tiny")
    run(shell, "%llm hello")
    run(shell, "%llm_config top_k=3")
