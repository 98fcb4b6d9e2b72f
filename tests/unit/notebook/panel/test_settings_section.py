"""The settings of a panel: in step with ``%llm_config`` both ways, and never wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_magic.config.option_spec import specs
from llm_magic.config.settings import GenerationConfig, GenerationOptions
from llm_magic.errors import OptionError
from llm_magic.notebook.panel import ControlPanel
from llm_magic.session import Session
from tests.panels import (
    Scripted,
    close_widgets,
    press,
    put,
    send,
    shown_error,
    visible_text,
)
from tests.scripted import ScriptedBackend, scripted_session
from tests.scripted import settings as settings_of
from tests.until import until

NUMBERS = [name for name in specs(GenerationOptions) if name not in {"stop", "extra"}]


def shown(panel: ControlPanel) -> dict[str, object]:
    return {name: control.value for name, control in panel.settings.numbers.items()}


def test_every_setting_has_control_with_range_and_help(scripted: Scripted) -> None:
    controls = scripted.panel.settings.numbers
    assert list(controls) == NUMBERS
    for name, control in controls.items():
        spec = specs(GenerationOptions)[name]
        assert spec.help in control.help
        assert spec.range in control.help
        assert control.label == name.replace("_", " ")
        assert control.minimum == spec.minimum
        assert control.bounded == (spec.maximum is not None)
        if spec.maximum is not None:
            assert control.maximum == spec.maximum
    assert scripted.panel.settings.texts["stop"].tooltip == specs(GenerationOptions)["stop"].help


@pytest.mark.parametrize("name", NUMBERS)
def test_number_is_read_and_written_and_may_be_none(scripted: Scripted, name: str) -> None:
    panel, session = scripted.panel, scripted.session
    control, before = panel.settings.numbers[name], getattr(session.generation, name)
    put(control, 2)
    assert getattr(session.generation, name) == 2 or shown_error(panel)
    put(control, 1)
    assert getattr(session.generation, name) == 1
    assert type(getattr(session.generation, name)) is (float if name in FLOATS else int)
    assert shown_error(panel) == ""
    put(control, None)
    assert getattr(session.generation, name) is None
    session.generation.update(**{name: 1})
    until(lambda: control.value == 1)
    session.generation.update(**{name: None})
    until(lambda: control.value is None)
    assert control.changed == (before is not None)
    session.generation.reset()
    until(lambda: control.value == before)
    assert not control.changed


def test_limit_above_the_context_has_a_note_at_its_field(scripted: Scripted) -> None:
    limit = scripted.panel.settings.numbers["max_new_tokens"]
    assert limit.note == ""
    put(limit, 99_999_999)
    assert limit.note == "More than the context: 8,192 tokens."
    scripted.session.generation.max_new_tokens = 8192
    until(lambda: limit.note == "")


FLOATS = {"temperature", "top_p", "repetition_penalty"}


def test_changed_setting_is_marked_until_reset(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    assert panel.settings.reset.disabled
    put(panel.settings.numbers["temperature"], 0.2)
    assert [n for n, c in panel.settings.numbers.items() if c.changed] == ["temperature"]
    put(panel.settings.numbers["temperature"], 0.7)
    assert not panel.settings.numbers["temperature"].changed
    put(panel.settings.numbers["top_k"], 7)
    press(panel.settings.reset)
    assert session.generation.config == session.settings.defaults(GenerationConfig)
    assert shown(panel)["top_k"] == 50.0
    assert panel.settings.reset.disabled


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 9), ("temperature", -0.1), ("top_p", 1.5), ("top_k", 0), ("top_k", 2.5),
        ("max_new_tokens", 0), ("seed", -1), ("seed", 0.5), ("repetition_penalty", 0.9),
        ("temperature", 1e308), ("top_k", 1.5),
    ],
)  # fmt: skip
def test_refused_number_stays_with_its_error_at_the_field(
    scripted: Scripted, name: str, value: float
) -> None:
    panel, session = scripted.panel, scripted.session
    before, config = shown(panel), session.generation.config
    control, reset = panel.settings.numbers[name], panel.settings.reset
    put(control, value)
    assert control.error.startswith(f"{control.label}: ")
    session.generation.update(**{"top_p" if name != "top_p" else "top_k": 1})
    until(lambda: not panel.draw())
    assert shown_error(panel) == control.error, "it is shown at its field"
    assert (control.value, session.generation.config.model_dump()[name]) == (
        value,
        config.model_dump()[name],
    )
    assert panel.magic.value == ""
    press(reset)
    assert (shown(panel), shown_error(panel), reset.disabled) == (before, "", True)
    put(control, value)
    put(control, 1)
    assert (control.value, shown_error(panel)) == (1, "")


def test_a_prompt_is_not_sent_with_a_value_that_was_refused(scripted: Scripted) -> None:
    panel = scripted.panel
    temperature = panel.settings.numbers["temperature"]
    put(temperature, 9)
    send(panel, "hello")
    shown = visible_text(panel.asking.message.value)
    assert shown == f"Nothing was sent. {temperature.error}"
    assert scripted.backend.requests == []
    put(temperature, 0.5)
    send(panel, "hello")
    until(lambda: len(scripted.backend.requests) == 1)
    assert shown_error(panel) == ""


def test_setting_changed_in_a_cell_replaces_what_was_refused(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    top_k, stop = panel.settings.numbers["top_k"], panel.settings.texts["stop"]
    put(top_k, 0)
    session.generation.update(top_k=7)
    until(lambda: (top_k.value, top_k.error) == (7, ""))
    put(stop, "'half")
    session.generation.update(stop=("END",))
    until(lambda: (stop.value, shown_error(panel)) == ("END", ""))


def test_two_refused_settings_both_stay(scripted: Scripted) -> None:
    panel = scripted.panel
    top_k, top_p = panel.settings.numbers["top_k"], panel.settings.numbers["top_p"]
    put(top_k, 0)
    put(top_p, 7)
    assert (top_k.value, top_p.value) == (0, 7)
    assert top_k.error.startswith("top k: 0 is out of range.")
    assert top_p.error.startswith("top p: 7 is out of range.")


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("END", ("END",)),
        ("END STOP", ("END", "STOP")),
        (r"\n\n ###", ("\n\n", "###")),
        ("' END '", (" END ",)),
        ("", ()),
    ],
)
def test_stop_texts_are_read_and_written(
    scripted: Scripted, typed: str, texts: tuple[str, ...]
) -> None:
    panel, session = scripted.panel, scripted.session
    put(panel.settings.texts["stop"], typed)
    assert session.generation.stop == texts
    session.generation.update(stop=("other",))
    until(lambda: panel.settings.texts["stop"].value == "other")
    session.generation.update(stop=texts)
    until(lambda: panel.settings.texts["stop"].value == typed)


def test_wrong_stop_text_stays_with_its_error_at_the_field(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    field, error = panel.settings.texts["stop"], panel.settings.errors["stop"]
    put(field, "END")
    assert "llm-changed" in field.get_state()["_dom_classes"]
    for empty in ('""', "END ''"):
        put(field, empty)
        assert shown_error(panel) == "A stop text is empty. Clear the field for none."
    put(field, "END 'half")
    assert visible_text(error.value) == shown_error(panel) != ""
    put(panel.settings.numbers["top_k"], 3)
    assert visible_text(error.value).startswith("Missing closing quote.")
    assert (field.value, session.generation.stop) == ("END 'half", ("END",))
    press(panel.settings.reset)
    assert (field.value, session.generation.stop, shown_error(panel)) == ("", (), "")
    assert "llm-changed" not in field.get_state()["_dom_classes"]


def test_comma_in_a_stop_text_has_a_note_at_the_field(scripted: Scripted) -> None:
    field, note = scripted.panel.settings.texts["stop"], scripted.panel.settings.notes["stop"]
    for typed, found in (("fox, dog", "fox,"), ("dog fox,owl", "fox,owl")):
        put(field, typed)
        expected = f"The comma is part of the stop text “{found}”. Separate stop texts by a space."
        assert visible_text(note.value) == expected
    for typed in ("fox dog", "',' ', '", ""):
        put(field, typed)
        assert note.value == ""


@pytest.mark.parametrize("text", ["<|im_end|>", "a|b", "|", r"C:\new", "\\", "\t", "a\r"])
def test_shown_stop_texts_can_be_typed_again(scripted: Scripted, text: str) -> None:
    panel, session = scripted.panel, scripted.session
    session.generation.update(stop=(text, "END"))
    until(lambda: "END" in panel.settings.texts["stop"].value)
    written = panel.settings.texts["stop"].value
    put(panel.settings.texts["stop"], "")
    assert session.generation.stop == ()
    put(panel.settings.texts["stop"], written)
    assert session.generation.stop == (text, "END")


def test_unsupported_setting_is_hidden() -> None:
    with scripted_session(load=False) as (session, _backend):
        panel = ControlPanel(session)
        top_k = panel.settings.numbers["top_k"]
        assert top_k.layout.display != "none"
        session.load("tiny", backend="openai", base_url="http://localhost:1")
        until(lambda: top_k.layout.display == "none")
        assert panel.settings.numbers["temperature"].layout.display != "none"
    close_widgets()


def test_number_beyond_a_slider_is_drawn(scripted: Scripted) -> None:
    panel, session = scripted.panel, scripted.session
    session.generation.update(top_k=10**400)
    session.generation.update(temperature=0.25)
    until(lambda: shown(panel)["temperature"] == 0.25)
    assert session.generation.top_k == 10**400


WHOLE = st.integers(1, 10**30)
VALUES = {
    "max_new_tokens": WHOLE, "top_k": WHOLE, "seed": st.integers(0, 2**32 - 1),
    "temperature": st.floats(0, 2), "top_p": st.floats(0, 1),
    "repetition_penalty": st.floats(1, 1e300),
}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional={n: s | st.none() for n, s in VALUES.items()}))
def test_drawing_any_valid_setting_changes_nothing(
    values: dict[str, object],
) -> None:
    backend = ScriptedBackend()
    session = Session(settings_of(), create=lambda _name: backend)
    panel = ControlPanel(session)
    try:
        session.generation.update(**values)
        before = session.generation.config
        panel.draw()
        assert session.generation.config == before
        assert shown_error(panel) == ""
        for name, value in values.items():
            drawn = panel.settings.numbers[name].value
            assert drawn == (None if value is None else pytest.approx(value))
    except OptionError:
        return
    finally:
        session.close()
        close_widgets()
