"""``%llm_config`` as a new user types it: every form of a line, and the system prompt of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels import Kernel


@pytest.fixture
def k(scripted: Kernel) -> Iterator[Kernel]:
    yield scripted
    scripted.ok("%llm_config --reset\n%llm_reset --all")


def sent(k: Kernel) -> list[tuple[str, str]]:
    """Return the messages of the last request."""
    messages: list[tuple[str, str]] = k.value(
        "[(m.role, m.content) for m in backend.requests[-1].messages]"
    )
    return messages


@pytest.mark.parametrize(
    "line",
    [
        "temperature 0.2", "temperature = 0.2", "temperature=0.2", "temperature= 0.2", "-t 0.2",
        "--temperature=0.2",
    ],
)  # fmt: skip
def test_every_form_of_a_change_shows_the_changed_row(k: Kernel, line: str) -> None:
    assert k.ok(f"%llm_config {line}").text == "temperature  0.7 → 0.2"
    assert k.value("llm.generation.temperature") == 0.2


def test_several_changes_at_once_and_one_setting_alone(k: Kernel) -> None:
    shown = k.ok("%llm_config temperature 0.2, top_k=5 -p known=1 --stop END").text
    assert shown.splitlines() == [
        "temperature  0.7 → 0.2",
        "top_k        50 → 5",
        'stop         none → "END"',
        "extra        none → known=1",
    ]
    assert k.ok("%llm_config -t 0.2").text == "temperature  0.2 (unchanged)"
    rows = k.ok("%llm_config top_k").text.splitlines()
    assert [row.split()[:3] for row in rows[:2]] == [
        ["setting", "value", "range"],
        ["top_k", "5", "*"],
    ]
    rows = k.ok("%llm_config").text.splitlines()
    assert len(rows) == 12
    assert (
        k.ok("%llm_config --reset temperature top_p").text.splitlines()[0]
        == "temperature  0.2 → 0.7"
    )
    assert k.value("'top_k' in llm.generation.changed")
    assert not k.value("'temperature' in llm.generation.changed")
    shown = k.ok("%llm_config --reset").text
    assert shown.splitlines()[:2] == ["top_k  5 → 50", 'stop   "END" → none']
    k.ok("%llm_config --stop END")
    assert 'stop "END"' in k.ok("%llm --dry-run Hello").text
    assert "stop" not in k.ok("%llm --stop none --dry-run Hello").text
    assert "A stop text is empty." in k.run('%llm --stop "" Hello').error
    assert k.ok("%llm_config stop=none").text == 'stop  "END" → none'
    assert k.ok("%llm_config --reset").text == "No setting has changed."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("top_k=3 temperature 9", "temperature=9 is out of range. It must be 0 to 2."),
        ("top_k=3 -t 9", "temperature=9 is out of range. It must be 0 to 2."),
        ("top_k=3 temperature = high", "temperature=high is not a number. It must be 0 to 2."),
        ("top_k 3 temprature 0.3", 'Did you mean "temperature"?'),
        ("top_k 3 --temprature 0.3", 'Did you mean "--temperature"?'),
        ("top_k 3 system Be brief.", 'Put a text in quotes: system="…".'),
        ("top_k 3 -t 0.2 temperature=0.3", "temperature is given twice."),
        ("model=slow", "model is not a setting of answers. Run %llm_load MODEL."),
        ("backend openai", "Run %llm_load MODEL --backend BACKEND."),
        ("timeout=3", "Run %llm_load MODEL --idle-timeout S."),
        ('top_k=3 --stop ""', "A stop text is empty. For none: %llm_config stop=none."),
        ('top_k=3 stop=""', "A stop text is empty. For none: %llm_config stop=none."),
        ("top_k 3 --reset", "--reset and new values cannot be combined."),
        ("--reset top_k=3", "--reset and new values cannot be combined."),
        ("--reset temperature top_kk", "'top_kk' is not an option. Did you mean \"top_k\""),
    ],
)
def test_wrong_line_changes_nothing(k: Kernel, line: str, message: str) -> None:
    ran = k.run(f"%llm_config {line}")
    assert (ran.ename, message in ran.error) == ("OptionError", True), ran.error
    assert k.value("(llm.generation.top_k, list(llm.generation.changed))") == (50, [])


def test_reset_takes_names_only(k: Kernel) -> None:
    k.ok("%llm_config system=Short stop=END top_k=3 seed=1")
    assert k.ok("%llm_config --reset system stop top-k").text.splitlines() == [
        "top_k   3 → 50", 'stop    "END" → none', "system  Short → none",
    ]  # fmt: skip
    assert k.value("list(llm.generation.changed)") == ["seed"]


def test_system_prompt_of_the_session(k: Kernel) -> None:
    k.ok("topic = 'colors'")
    shown = k.ok('%llm_config system="Answer about {topic}."').text
    assert shown == "system  none → Answer about colors."
    footer = "system: Answer about colors. (%llm_config)"
    system = ("system", "Answer about colors.")
    for ask, has_footer in (
        ("%%llm\nWhy?", True), ("%llm Why?", True), ("%llm --quiet Why?", False),
        ("llm.generate('Why?');", False),
    ):  # fmt: skip
        assert (footer in k.ok(ask).text) is has_footer, ask
        assert sent(k) == [system, ("user", "Why?")], ask
    dry = k.ok("%llm --dry-run Why?").text
    assert "system  Answer about colors." in dry.splitlines()
    assert footer in dry
    # A prompt that has its own; an empty one keeps the backend from adding one.
    assert footer not in k.ok('%llm -s "Be rude." Why?').text
    assert sent(k) == [("system", "Be rude."), ("user", "Why?")]
    assert footer not in k.ok('%llm -s "" Why?').text
    assert sent(k) == [("system", ""), ("user", "Why?")]
    assert k.ok('%llm --dry-run -s "" Why?').text.startswith("user  Why?\n")
    k.ok(
        "llm.generate([{'role': 'system', 'content': 'Own.'}, {'role': 'user', 'content': 'Why?'}]);"
    )
    assert sent(k) == [("system", "Own."), ("user", "Why?")]
    k.ok("%llm_config --reset")
    assert "system:" not in k.ok("%llm Why?").text
    assert sent(k) == [("user", "Why?")]


def test_unfilled_reference_in_the_system_prompt_is_reported(k: Kernel) -> None:
    shown = k.ok('%llm_config system="Answer about {topics}."').text
    assert shown.startswith("Note: {topics}")
    assert k.value("llm.generation.system") == "Answer about {topics}."


def test_system_prompt_of_the_session_in_a_chat(k: Kernel) -> None:
    k.ok("%llm -c zoo one")
    k.ok("%llm_config -s Formal")
    assert "system: Formal (%llm_config)" in k.ok("%llm -c zoo two").text
    assert [text for _, text in sent(k)] == ["Formal", "one", "one", "two"]
    assert "System prompt of the session: Formal" in k.ok("%llm_chats zoo").text
    k.ok("llm.generation.system = 'Rude'")
    assert "system: Rude" in k.ok("%llm -c zoo three").text
    assert "stale" not in k.ok("%llm_chats").text.splitlines()[1]
    # A system prompt of the chat is used until its end.
    k.ok("%llm -c zoo -s Own four")
    assert "system:" not in k.ok("%llm -c zoo five").text
    assert sent(k)[0] == ("system", "Own")
    assert "System prompt: Own" in k.ok("%llm_chats zoo").text


def test_use_makes_another_model_the_active_one(k: Kernel) -> None:
    k.ok("%llm_load org/big --keep")
    lines = k.ok("%llm_use tiny").text.splitlines()
    assert [line.split()[:2] for line in lines] == [["active", "tiny"], ["big", "·"]]
    k.ok("%llm hello")
    assert k.value("backend.requests[-1].name") == "tiny"
    assert k.value("llm.use('big').name") == "big"
    assert k.ok("%llm_use").text.splitlines()[1].startswith("active  big")
    assert k.complete("%llm_use t") == ["tiny"]
    wrong = k.run("%llm_use tinny")
    assert (wrong.ename, wrong.error) == (
        "ModelNotLoaded", 'tinny is not loaded. Did you mean "tiny"?',
    )  # fmt: skip
    assert k.value("llm.status().active_model") == "big"
    k.ok("%llm_unload")
    assert k.value("llm.status().active_model") == "tiny"
