"""The model section of a panel: choose, load, stop and unload models."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

from llm_magic.backends.base import Capabilities
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.manager import LoadResult, Status
from llm_magic.backends.registry import load_specs, names
from llm_magic.errors import (
    AuthenticationFailed,
    Interrupted,
    LLMMagicError,
    LoadFailed,
    ModelNotFound,
    OptionError,
    OutOfMemory,
    ServerUnreachable,
)
from llm_magic.notebook.panel import ControlPanel
from llm_magic.session.requests import Request
from llm_magic.types import ModelInfo, Progress
from tests.panels import (
    Scripted,
    press,
    put,
    scripted_panel,
    send,
    shown_error,
    visible_text,
)
from tests.scripted import Hang, scripted_session, whole_answer
from tests.until import until


@pytest.fixture
def empty() -> Iterator[Scripted]:
    with scripted_panel(load=False) as scripted:
        yield scripted


def result_text(panel: ControlPanel) -> str:
    return visible_text(panel.loading.result.value)


def is_shown(panel: ControlPanel, name: str) -> bool:
    return bool(panel.loading.options[name].layout.display != "none")


def test_unload_is_refused_while_the_model_answers(empty: Scripted) -> None:
    panel, session = empty.panel, empty.session
    session.load("tiny")
    empty.backend.will("one", hang := Hang(), *whole_answer(" two"))
    job = session.ask(Request("Count."), background=True)
    press(panel.loading.unload)
    expected = f"tiny is still answering (job {job.number}). Stop it first, or wait for its end."
    assert expected in shown_error(panel)
    hang.go.set()
    assert job.result().text == "one two"
    until(lambda: shown_error(panel) == "", "it is not answering any more")
    press(panel.loading.unload)
    until(lambda: panel.loading.unload.disabled)


def test_load_loads_the_selected_model_and_unload_unloads_it(empty: Scripted) -> None:
    panel, session = empty.panel, empty.session
    assert (panel.loading.unload.disabled, panel.loading.load.disabled) == (True, False)
    put(panel.loading.model, " org/big ")
    press(panel.loading.load)
    until(lambda: session.status().active_model == "big")
    until(lambda: re.search(r"ready in 0\.\d s", result_text(panel)) is not None)
    until(
        lambda: (
            "Ready" in visible_text(panel.status.value)
            and "big" in visible_text(panel.status.value)
        )
    )
    press(panel.loading.unload)
    assert session.status().models == ()
    assert "Unloaded big" in result_text(panel)
    assert "Inactive" in visible_text(panel.status.value)
    assert panel.loading.unload.disabled


def test_an_empty_name_loads_the_default_model(empty: Scripted) -> None:
    press(empty.panel.loading.load)
    until(lambda: empty.session.status().active_model == "default")


def test_keep_leaves_the_other_models_loaded() -> None:
    with scripted_panel() as scripted:
        put(scripted.panel.loading.model, "org/big")
        put(scripted.panel.loading.keep, True)
        press(scripted.panel.loading.load)
        until(lambda: len(scripted.session.status().models) == 2)
        until(lambda: "also loaded: tiny" in visible_text(scripted.panel.status.value))


@pytest.mark.parametrize("backend", names())
def test_only_options_of_the_backend_are_shown_and_sent(backend: str, empty: Scripted) -> None:
    panel, table = empty.panel, load_specs()
    put(panel.loading.options["device"], "cpu")
    put(panel.loading.backend, backend)
    put(panel.loading.options["base_url"], "http://localhost:1")
    for name in panel.loading.options:
        assert is_shown(panel, name) == table[name].works_on(backend), name
    given = panel.loading.given()
    assert given.pop("backend") == backend
    expected: dict[str, set[str]] = {"local": {"device"}, "llamacpp": set()}
    assert set(given) == expected.get(backend, {"base_url"})


def test_a_load_in_the_background_shows_its_progress_and_can_be_stopped(empty: Scripted) -> None:
    panel, backend = empty.panel, empty.backend
    stages = [Progress("fetching", 0.25, "1 of 4 <GB>"), Progress("reading")]
    backend.reports["load"] = stages[:1]
    hang = backend.hang("load")
    press(panel.loading.load)
    assert hang.reached.wait(5)
    until(lambda: 'value="0.250"' in panel.loading.result.value)
    assert "fetching (1 of 4 <GB>)" in result_text(panel)
    assert (panel.loading.load.disabled, panel.loading.unload.disabled) == (True, True)
    until(lambda: "Loading" in visible_text(panel.status.value))
    press(panel.loading.stop)
    until(lambda: result_text(panel) == "Stopped loading.")
    until(lambda: "Inactive" in visible_text(panel.status.value))
    until(lambda: not panel.loading.load.disabled)
    until(lambda: panel.loading.stop.layout.display == "none")
    assert "load default cancelled" in backend.events


def test_progress_without_a_share_is_a_bar_without_a_value(empty: Scripted) -> None:
    empty.backend.reports["load"] = [Progress("reading")]
    hang = empty.backend.hang("load")
    press(empty.panel.loading.load)
    until(lambda: result_text(empty.panel) == "reading")
    assert "<progress" in empty.panel.loading.result.value
    assert "value=" not in empty.panel.loading.result.value
    hang.go.set()


@pytest.mark.parametrize("error", [ModelNotFound("There is no such model."), OSError("disk full")])
def test_failed_load_shows_error_and_no_bar(empty: Scripted, error: Exception) -> None:
    panel, backend = empty.panel, empty.backend
    backend.reports["check"] = [Progress("reading", 0.5)]
    hang = backend.hang("check")
    backend.trouble["load"] = error
    press(panel.loading.load)
    until(lambda: "<progress" in panel.loading.result.value)
    hang.go.set()
    until(lambda: "Failed" in visible_text(panel.status.value))
    until(
        lambda: (
            str(error)
            in " ".join([shown_error(panel), result_text(panel), visible_text(panel.status.value)])
        )
    )
    until(lambda: "<progress" not in panel.loading.result.value, "the bar stays")
    assert not panel.loading.load.disabled


def test_another_backend_has_fields_of_its_own(
    empty: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    panel = empty.panel
    loading = panel.loading
    fields = (loading.options["base_url"], loading.options["key_env"], loading.model)

    def shown() -> list[str]:
        return [field.value for field in fields]

    put(loading.backend, "openai")
    theirs = ["http://localhost:8123", "MY_KEY", "e401"]
    for field, value in zip(fields, theirs, strict=True):
        put(field, value)
    until(lambda: result_text(panel) == "2 models.")
    for backend in ("anthropic", "ollama", "local"):
        put(loading.backend, backend)
        assert shown() == ["", "", ""], "they belong to another server"
    assert loading.given() == {"backend": "local"}
    put(loading.model, "mine")
    put(loading.backend, "openai")
    assert shown() == theirs
    until(lambda: len(loading.model.options) == 2)
    put(loading.backend, "anthropic")
    assert loading.model.options == ()
    until(lambda: "models" not in result_text(panel))
    put(loading.backend, "local")
    assert shown() == ["", "", "mine"]


def test_model_stays_when_the_advised_backend_is_chosen(empty: Scripted) -> None:
    panel = empty.panel
    wrong = ModelNotFound("b is a model of Ollama.").advise("Run …", "backend", "ollama")
    empty.backend.trouble["check"] = wrong
    put(panel.loading.model, "b")
    press(panel.loading.load)
    until(lambda: "Choose ollama" in shown_error(panel))
    put(panel.loading.backend, "ollama")
    assert panel.loading.model.value == "b"


def test_second_load_of_a_model_keeps_its_notes(empty: Scripted) -> None:
    panel, empty.backend.notes = empty.panel, ("Not sent: top_k.",)
    press(panel.loading.load)
    until(lambda: "Not sent: top_k." in result_text(panel))
    press(panel.loading.load)
    until(lambda: "already loaded" in result_text(panel))
    assert "Not sent: top_k." in result_text(panel)


def test_long_load_shows_its_seconds(empty: Scripted) -> None:
    empty.backend.reports["load"] = [Progress("reading")]
    hang = empty.backend.hang("load")
    press(empty.panel.loading.load)
    until(lambda: result_text(empty.panel) == "reading … 4 s", result_text(empty.panel))
    hang.go.set()
    until(lambda: "ready in" in result_text(empty.panel))


def test_error_of_a_load_stays_beside_that_of_the_waiting_prompt(empty: Scripted) -> None:
    panel, hang = empty.panel, empty.backend.hang("check")
    empty.backend.trouble["load"] = LoadFailed("Broken.")
    press(panel.loading.load)
    assert hang.reached.wait(5)
    send(panel, "?")
    hang.go.set()
    until(lambda: "Broken." in visible_text(panel.asking.message.value))
    until(lambda: "Broken." in visible_text(panel.loading.message.value))
    assert "no model loaded: Broken." in visible_text(panel.status.value)
    assert panel.as_magic.layout.display == "none", "it offers what has just failed"
    del empty.backend.trouble["load"]
    press(panel.loading.load)
    until(lambda: "ready in" in result_text(panel) and shown_error(panel) == "")


def test_status_of_an_answer_that_continues_after_an_unload(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a server, which continues without the model here.
    monkeypatch.setattr(type(scripted.backend), "capabilities", Capabilities(in_process=False))
    panel, hang = scripted.panel, Hang()
    send(panel, "with a speed")
    until(lambda: "last answer" in visible_text(panel.status.value))
    scripted.backend.will("one", hang, *whole_answer(" two"))
    send(panel, "?")
    assert hang.reached.wait(5)
    scripted.session.unload()
    expected = "Answering tiny finishes its answer · no model loaded"
    until(lambda: expected in visible_text(panel.status.value), visible_text(panel.status.value))
    hang.go.set()
    until(lambda: "Inactive no model loaded" in visible_text(panel.status.value))
    assert "last answer" not in visible_text(panel.status.value), "it is of no loaded model"


def test_next_load_clears_the_error(empty: Scripted) -> None:
    panel = empty.panel
    empty.backend.trouble["check"] = ModelNotFound("There is no such model.")
    press(panel.loading.load)
    until(lambda: shown_error(panel) == "There is no such model.")
    del empty.backend.trouble["check"]
    press(panel.loading.load)
    until(lambda: "ready" in result_text(panel))
    assert shown_error(panel) == ""


def test_error_of_a_load_that_fails_at_once_stays(
    empty: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel, session = empty.panel, empty.session
    load_later = session.load_later

    def start_and_end(model: str | None, **about: Any) -> Future[LoadResult]:
        future = load_later(model, **about)
        wait([future], timeout=5)
        return future

    monkeypatch.setattr(session, "load_later", start_and_end)
    empty.backend.trouble["check"] = ModelNotFound("There is no such model.")
    press(panel.loading.load)
    assert shown_error(panel) == "There is no such model."
    assert panel.as_magic.layout.display == "none", "it offers what has just failed"


def test_drawing_that_started_during_a_load_does_not_hide_its_result(
    empty: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel, session, backend = empty.panel, empty.session, empty.backend
    backend.reports["load"] = [Progress("reading")]
    hang = backend.hang("load")
    press(panel.loading.load)
    until(lambda: "<progress" in panel.loading.result.value)
    look = session.status

    def look_and_wait() -> Status:
        seen = look()
        hang.go.set()
        until(lambda: look().status == "Ready")
        time.sleep(0.1)  # for its message
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(session, "status", look_and_wait)
        panel.loading.draw()
    until(lambda: "ready in" in result_text(panel))
    time.sleep(0.5)  # for a drawing that takes it away
    assert "ready in" in result_text(panel)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("base_url", "ftp://x", "is not a server address"),
        ("base_url", "http://a:secret@host", "must not contain a user name"),
        ("base_url", "http://host?a=secret", "Check “API key variable”."),
        (
            "key_env",
            "sk-secret-secret",
            "API key variable: This is a key. Enter the name of an environment variable that holds the key,"
            " such as VLLM_API_KEY.",
        ),
        (
            "key_env",
            "my key",
            "This is not the name of a variable. Enter the name of an environment",
        ),
    ],
)
def test_invalid_address_is_reported_and_cleared(
    empty: Scripted, name: str, value: str, complaint: str
) -> None:
    panel = empty.panel
    put(panel.loading.backend, "vllm")
    put(panel.loading.options[name], value)
    assert complaint in shown_error(panel)
    assert "secret" not in shown_error(panel)
    assert panel.loading.options[name].value == "", "it would be saved with the notebook"


def test_invalid_device_is_reported_and_loads_nothing(empty: Scripted) -> None:
    panel = empty.panel
    put(panel.loading.options["device"], "gpu")
    press(panel.loading.load)
    assert "Device: gpu is invalid. Use auto, cpu" in shown_error(panel)
    assert empty.session.status().status == "Inactive"
    assert panel.magic.value == ""


def test_load_of_a_cell_shows_a_bar_until_it_ends(empty: Scripted) -> None:
    panel, backend = empty.panel, empty.backend
    backend.reports["load"] = [Progress("reading", 0.5)]
    hang = backend.hang("load")
    cell = threading.Thread(target=empty.session.load, args=("org/tiny",))
    cell.start()
    until(lambda: "reading" in result_text(panel))
    hang.go.set()
    cell.join(5)
    until(lambda: "Ready" in visible_text(panel.status.value))
    until(lambda: "<progress" not in panel.loading.result.value, "the bar stays")


def test_load_of_waiting_cell_can_be_stopped_or_shows_hint(
    empty: Scripted,
) -> None:
    hang = empty.backend.hang("load")
    finished = threading.Event()

    def cell() -> None:
        with pytest.raises(Interrupted, match="Stopped"):
            empty.session.load("org/tiny")
        finished.set()

    thread = threading.Thread(target=cell)
    thread.start()
    assert hang.reached.wait(5)
    until(lambda: empty.panel.loading.load.disabled)
    stop = empty.panel.loading.stop

    def is_listed() -> bool:
        return not stop.disabled and stop.layout.display != "none"

    until(lambda: is_listed() or "■" in result_text(empty.panel), "neither a button nor a hint")
    stopped = True
    if is_listed():
        press(stop)
        stopped = finished.wait(10)
    if not finished.is_set():
        empty.session.interrupt()
    thread.join(5)
    assert not thread.is_alive()
    assert stopped, "the button is there and does nothing"


def test_choice_that_differs_from_the_environment_is_in_the_magic() -> None:
    with scripted_panel(load=False, backend="vllm", device="cpu") as scripted:
        put(scripted.panel.loading.backend, "local")
        put(scripted.panel.loading.options["device"], "auto")
        press(scripted.panel.loading.load)
        assert scripted.panel.magic.value == "%llm_load -b local -d auto"


def test_default_of_the_environment_can_be_replaced() -> None:
    with scripted_panel(load=False, device="cpu", quantization="4bit") as scripted:
        options = scripted.panel.loading.options
        assert (options["device"].value, options["quantization"].value) == ("cpu", "4bit")
        put(options["device"], "auto")
        put(options["quantization"], "none")
        press(scripted.panel.loading.load)
        until(lambda: scripted.session.status().status == "Ready")
        config = scripted.session.used("local")
        assert isinstance(config, LocalLoadConfig)
        assert (config.device, config.quantization) == ("auto", "none")


def test_invalid_default_backend_is_one_line() -> None:
    with (
        scripted_session(load=False, backend="olama") as (session, _backend),
        pytest.raises(LLMMagicError, match="olama"),
    ):
        ControlPanel(session)


def test_fields_show_what_a_cell_loaded(empty: Scripted) -> None:
    panel, session = empty.panel, empty.session
    session.load("org/tiny", backend="vllm", base_url="http://localhost:1")
    until(lambda: panel.loading.model.value == "org/tiny")
    assert panel.loading.backend.value == "vllm"
    assert panel.loading.options["base_url"].value == "http://localhost:1"
    session.load("org/big")
    until(lambda: panel.loading.model.value == "org/big")
    assert panel.loading.backend.value == "local"
    put(panel.loading.backend, "ollama")
    assert panel.loading.model.value == "", "it is a model of another backend"
    put(panel.loading.model, "typed")
    session.load("org/tiny")
    until(lambda: "tiny" in visible_text(panel.status.value))
    assert (panel.loading.backend.value, panel.loading.model.value) == ("ollama", "typed")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (LoadFailed("Broken. Repair it."), "Broken. Repair it."),
        (ServerUnreachable("No server.").advise("Check --base-url.", "base_url"),
         "No server. Check “Server address”."),
        (AuthenticationFailed("It needs a key.").advise("Add --key-env NAME.", "key_env"),
         "It needs a key. Check “API key variable”."),
        (OptionError("3 is too hot.").advise("Use -t 2 or less.", "temperature"),
         "3 is too hot. Check “temperature”."),
        (OptionError("It lists 2 models: a, b.").advise("Name one: %llm_load MODEL.", "model"),
         "It lists 2 models: a, b. Check “Model”."),
        (ModelNotFound("No a.").advise("run %llm_load a -b ollama --pull.", "pull"),
         "No a. Check “Download the model to the server first”."),
        (ModelNotFound("b is a model of Acme.").advise("Run %llm_load b -b acme.", "backend", "acme"),
         "b is a model of Acme. Choose acme in “Backend”."),
        (LoadFailed("It has code.").advise("Add --trust-remote-code.", "trust_remote_code"),
         "It has code. Add --trust-remote-code."),
        (OptionError("gpu is invalid.", option="device"), "Device: gpu is invalid."),
        (OutOfMemory("Full.").advise("Try -q 4bit.").append("a was unloaded for it."),
         "Full. a was unloaded for it. Try another quantization, a smaller model or a shorter"
         " prompt, or Unload."),
    ],
)  # fmt: skip
def test_errors_name_the_labels_of_the_panel(
    empty: Scripted, error: LLMMagicError, shown: str
) -> None:
    empty.backend.trouble["check"] = error
    press(empty.panel.loading.load)
    until(lambda: shown_error(empty.panel) == shown, shown_error(empty.panel))


def test_prompt_after_a_failed_load_shows_why_it_failed(empty: Scripted) -> None:
    unreachable = ServerUnreachable("No server.").advise("Check --base-url.", "base_url")
    empty.backend.trouble["check"] = unreachable
    with pytest.raises(ServerUnreachable):
        empty.session.load()
    send(empty.panel, "hello")
    expected = (
        "No model is loaded, because the last load failed. No server. Check “Server address”."
        " Choose a model and press Load."
    )
    until(lambda: shown_error(empty.panel) == expected, shown_error(empty.panel))
    assert empty.session.status().last_error == "No server. Check --base-url."


def test_status_after_an_unload_shows_no_earlier_error(empty: Scripted) -> None:
    empty.session.load("tiny")
    empty.backend.trouble["check"] = ModelNotFound("There is no smolm2.")
    with pytest.raises(ModelNotFound):
        empty.session.load("smolm2")
    press(empty.panel.loading.unload)
    line = "Inactive no model loaded this process"
    until(lambda: visible_text(empty.panel.status.value).startswith(line))


def test_prompt_after_a_failed_load_is_answered_by_the_ready_model() -> None:
    with scripted_panel() as scripted:
        panel, session = scripted.panel, scripted.session
        scripted.backend.trouble["check"] = ModelNotFound("There is no smolm2.")
        put(panel.loading.model, "smolm2")
        press(panel.loading.load)
        until(lambda: shown_error(panel) == "There is no smolm2.")
        assert session.status().status == "Ready"
        # While the button is pressed, other errors are shown in its place, and it returns.
        put(panel.loading.options["key_env"], "sk-secret-secret")
        assert "This is a key." in shown_error(panel)
        press(panel.loading.load)
        assert "This is a key." in shown_error(panel)
        press(panel.loading.load)
        until(lambda: shown_error(panel) == "There is no smolm2.")
        send(panel, "one two")
        note = "Note: smolm2 was not loaded; tiny answers."
        until(lambda: f"one two {note} one two" in visible_text(panel.asking.answer.value))
        assert shown_error(panel) == "There is no smolm2.", "the next action removes it"
        assert session.ask(Request("three")).result().model == "tiny"
        put(panel.loading.model, "smollm2")
        assert shown_error(panel) == ""
        send(panel, "four")
        until(lambda: "four four" in visible_text(panel.asking.answer.value))


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("base_url", "htp:/localhost:8765/v1", "'htp:/localhost:8765/v1' is not a server address."),
        ("key_env", "sk-secret-secret", "This is a key."),
    ],
)
def test_load_does_not_replace_a_cleared_value_by_the_default(
    empty: Scripted, name: str, value: str, shown: str
) -> None:
    panel = empty.panel
    put(panel.loading.backend, "openai")
    assert panel.loading.options["key_env"].placeholder == "such as OPENAI_API_KEY"
    # The click commits the field, too.
    for button in (panel.loading.load, panel.loading.list):
        put(panel.loading.options[name], value)
        press(button)
        assert shown in shown_error(panel)
    assert (empty.backend.events, panel.magic.value) == ([], "")
    put(panel.loading.model, "gpt-4o")
    press(panel.loading.load)
    assert "OPENAI_API_KEY is not set" in shown_error(panel)


def test_load_of_a_cell_clears_earlier_messages(empty: Scripted) -> None:
    panel, session = empty.panel, empty.session
    press(panel.loading.load)
    until(lambda: "ready in" in result_text(panel))
    session.load("org/big")
    until(lambda: "big" in visible_text(panel.status.value))
    assert result_text(panel) == ""
    press(panel.loading.unload)
    assert "Unloaded big" in result_text(panel)
    session.load("org/big")
    until(lambda: result_text(panel) == "")
    empty.backend.trouble["check"] = ModelNotFound("There is no such model.")
    put(panel.loading.model, "typo")
    press(panel.loading.load)
    until(lambda: shown_error(panel) == "There is no such model.")
    del empty.backend.trouble["check"]
    session.load("org/tiny")
    until(lambda: "tiny" in visible_text(panel.status.value) and shown_error(panel) == "")


def test_a_single_model_is_named(empty: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one(_config: object) -> list[ModelInfo]:
        return [ModelInfo("served", "vllm")]

    monkeypatch.setattr(empty.backend, "models", one)
    press(empty.panel.loading.list)
    until(lambda: result_text(empty.panel) == "1 model: served.")
