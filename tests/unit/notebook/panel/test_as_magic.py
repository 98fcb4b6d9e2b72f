"""The line below a panel: run in another notebook, it does what was done with the mouse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from llm_magic.config.settings import GenerationConfig
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.magics import register, unregister
from llm_magic.notebook.panel.as_magic import ask_cell, config_line, load_line
from llm_magic.session import Session
from tests.panels import Scripted, is_idle, press, put, send
from tests.scripted import ScriptedBackend
from tests.scripted import settings as settings_of
from tests.shell import ipython
from tests.until import until

# What people write, what shells and IPython take for their own, and everything else of one line.
AWKWARD = st.sampled_from([*"'\"\\|{}$?!;#%= \té", "?", "--keep", "-q", "x=1", "\\n", "{x}", "a b"])
LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=6)
NAMES = (
    st.lists(AWKWARD | LINE, min_size=1, max_size=5)
    .map(lambda parts: "".join(parts).strip())
    .filter(lambda name: name and not name.startswith("-"))
)
PROMPTS = st.lists(AWKWARD | LINE | st.just("\n"), min_size=1).map("".join)


def _trimmed(prompt: str) -> str:
    """Return what IPython leaves of a cell: no blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in prompt.strip().split("\n")).strip()


class Notebook:
    """Another notebook: a shell with the magics, and a session of its own."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.backend = ScriptedBackend()
        self.session = Session(settings_of(), create=lambda _name: self.backend)
        register(shell, self.session)
        self.run("%llm_load org/tiny")

    def run(self, cell: str) -> None:
        self.shell.run_cell(cell).raise_error()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def one_notebook() -> Iterator[Notebook]:
    with ipython() as shell:
        yield Notebook(shell)
        unregister(shell)


@pytest.fixture
def notebook(one_notebook: Notebook) -> Notebook:
    one_notebook.session.generation.reset()
    return one_notebook


def config(session: Session) -> GenerationConfig:
    return session.generation.config


def test_a_load_can_be_repeated(scripted: Scripted, notebook: Notebook) -> None:
    put(scripted.panel.loading.model, "org/it's a model")
    put(scripted.panel.loading.options["device"], "cuda:1")
    put(scripted.panel.loading.options["quantization"], "4bit")
    put(scripted.panel.loading.keep, True)
    press(scripted.panel.loading.load)
    until(lambda: scripted.session.status().status == "Ready")
    line = scripted.panel.magic.value
    assert line == '%llm_load "org/it\'s a model" -d cuda:1 -q 4bit --keep'
    notebook.run(line)
    ours, theirs = scripted.session.loaded_model(), notebook.session.loaded_model()
    assert (ours.requested, ours.config) == (theirs.requested, theirs.config)
    press(scripted.panel.loading.unload)
    assert scripted.panel.magic.value == "%llm_unload"
    notebook.run(scripted.panel.magic.value)
    assert len(notebook.session.status().models) == len(scripted.session.status().models)


def test_a_load_from_a_server_can_be_repeated(scripted: Scripted, notebook: Notebook) -> None:
    options = scripted.panel.loading.options
    put(scripted.panel.loading.backend, "ollama")
    put(options["base_url"], "localhost:11434")
    put(options["pull"], True)
    press(scripted.panel.loading.load)
    assert scripted.panel.magic.value == "%llm_load -b ollama --base-url localhost:11434 --pull"
    until(lambda: scripted.session.status().backend_type == "ollama")
    notebook.run(scripted.panel.magic.value)
    ours, theirs = scripted.session.loaded_model(), notebook.session.loaded_model()
    assert ours.config == theirs.config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.2), ("temperature", 1), ("temperature", 0), ("temperature", None),
        ("temperature", 0.123456789), ("repetition_penalty", 1234567.25), ("top_p", 1e-7),
        ("top_k", 40), ("seed", 123456789), ("seed", None), ("max_new_tokens", 1e15),
    ],
)  # fmt: skip
def test_a_setting_can_be_repeated(
    scripted: Scripted, notebook: Notebook, name: str, value: float | None
) -> None:
    put(scripted.panel.settings.numbers[name], value)
    notebook.session.generation.reset()
    if scripted.panel.magic.value:  # nothing was done where it was so before
        notebook.run(scripted.panel.magic.value)
    assert config(notebook.session) == config(scripted.session)


@pytest.mark.parametrize(
    "typed", ["END", "a b", "END|STOP", r"\n\n", "it's", "?", "what?", "x=1", "--reset", ""]
)
def test_stop_texts_can_be_repeated(scripted: Scripted, notebook: Notebook, typed: str) -> None:
    put(scripted.panel.settings.texts["stop"], "before")
    put(scripted.panel.settings.texts["stop"], typed)
    notebook.run("%llm_config stop=before")
    notebook.run(scripted.panel.magic.value)
    assert config(notebook.session).stop == config(scripted.session).stop


@pytest.mark.parametrize(
    "typed", ["Answer in one word.", 'Say "no".', "two\nlines", r"a\b", "it's", "  ", "{x} # y?"]
)
def test_system_prompt_can_be_repeated(scripted: Scripted, notebook: Notebook, typed: str) -> None:
    notebook.run("%llm_config system=before")
    put(scripted.panel.asking.system, "before")
    put(scripted.panel.asking.system, typed)
    notebook.run(scripted.panel.magic.value)
    ours, theirs = scripted.session.generation.system, notebook.session.generation.system
    assert ours == theirs == (typed if typed.strip() else None)


def test_reset_can_be_repeated(scripted: Scripted, notebook: Notebook) -> None:
    put(scripted.panel.settings.numbers["top_k"], 7)
    press(scripted.panel.settings.reset)
    notebook.run("%llm_config top_k=9")
    notebook.run(scripted.panel.magic.value)
    assert config(notebook.session) == config(scripted.session)


@pytest.mark.parametrize(
    "prompt",
    [
        "What is {x}?", "two\nlines\n", "why?", "In [1]: x", "    indented",
        "%llm_load x", "!ls", "-t 0", "a\n\n\nb", "{", "x # y",
    ],
)  # fmt: skip
@pytest.mark.parametrize("chat", [False, True])
def test_a_question_can_be_repeated(
    scripted: Scripted, notebook: Notebook, prompt: str, chat: bool
) -> None:
    put(scripted.panel.asking.chat, chat)
    send(scripted.panel, prompt)
    until(lambda: is_idle(scripted.panel))
    notebook.run("%llm_load org/tiny")
    notebook.session.reset()
    notebook.run(scripted.panel.magic.value)
    ours, theirs = scripted.backend.requests[-1], notebook.backend.requests[-1]
    assert theirs.messages[-1].content == ours.messages[-1].content.strip("\n")
    assert theirs.config == ours.config
    assert bool(notebook.session.chats.all()) == chat


def test_clear_can_be_repeated(scripted: Scripted, notebook: Notebook) -> None:
    put(scripted.panel.asking.chat, True)
    send(scripted.panel, "hello")
    until(lambda: is_idle(scripted.panel) and bool(scripted.session.chats.all()))
    notebook.run("%llm_load org/tiny")
    notebook.run(scripted.panel.magic.value)
    press(scripted.panel.asking.clear)
    notebook.run(scripted.panel.magic.value)
    assert notebook.session.chats.all() == scripted.session.chats.all() == []


@settings(max_examples=300)
@example("""it's "big\"""")
@given(NAMES)
def test_the_line_of_a_load_names_any_model(model: str) -> None:
    parsed = parser.parse("llm_load", load_line(model, {"quantization": "4bit"}, keep=True)[10:])
    assert (parsed["model"], parsed["keep"]) == (model, True)
    assert parsed.options == {"quantization": "4bit"}


@settings(max_examples=300)
@given(NAMES)
def test_the_line_of_a_load_names_any_address(url: str) -> None:
    line = load_line(None, {"backend": "vllm", "base_url": url})
    assert parser.parse("llm_load", line[10:]).options == {"backend": "vllm", "base_url": url}


@settings(max_examples=300)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.none())
def test_the_line_of_a_setting_has_every_digit(value: float | None) -> None:
    tokens = parser.parse("llm_config", config_line({"seed": value})[12:])["changes"]
    found = parser.assignments(tokens)["seed"]
    assert isinstance(found, str)
    read = int if isinstance(value, int) else float
    assert (None if found == "none" else read(found)) == value


@settings(max_examples=200, deadline=None)
@given(prompt=PROMPTS.map(_trimmed).filter(bool))
def test_cell_of_a_prompt_sends_any_prompt(prompt: str, one_notebook: Notebook) -> None:
    found: dict[str, Any] = {}

    def llm(line: str, cell: str) -> None:
        found.update(parser.parse("llm", line), prompt=cell.strip("\n"))

    magics = one_notebook.shell.magics_manager.magics["cell"]
    usual, magics["llm"] = magics["llm"], llm
    try:
        one_notebook.run(ask_cell(prompt, "panel"))
    finally:
        magics["llm"] = usual
    assert found["prompt"] == prompt.strip("\n")
    assert found["chat"] == "panel"
    assert not found["literal"], "the panel fills in references, too"
