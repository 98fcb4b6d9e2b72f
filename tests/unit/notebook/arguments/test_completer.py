"""Completion of magic lines: from memory only, only on our lines, and the line reads right after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.completer import provisionalcompleter

from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import magic_options, matcher, parser
from llm_magic.notebook.arguments.completer import complete, typed_tokens
from llm_magic.notebook.arguments.completions import Candidates
from llm_magic.session.requests import Request
from tests.scripted import scripted_session
from tests.shell import ipython


class Frame:
    """Has what a reference may lead to."""

    def __init__(self) -> None:
        self.shape = SimpleNamespace(rows=3)
        self._secret = 1

    @property
    def slow(self) -> object:
        raise AssertionError("a key press runs no code")


class DataFrame(list[dict[str, int]]):
    """Has the name of a table, and code of its own that nothing may run."""

    @property
    def columns(self) -> object:
        raise AssertionError("a key press runs no code")

    def __iter__(self) -> Iterator[dict[str, int]]:
        raise AssertionError("a key press runs no code")


@pytest.fixture
def names() -> Iterator[Candidates]:
    values = {
        "reply": 1,
        "rows": 2,
        "_hidden": 3,
        "exit": 4,
        "df": Frame(),
        "d": {"key one": 1, 2: 3},
        "Frame": Frame,
        "towns": pd.DataFrame({"north side": ["York"], "river": ["Ouse"], "a{b": [1], 5: [2]}),
        "pl_towns": pl.DataFrame({"river": ["Ouse"]}),
        "listed": [{"river": "Ouse"}, {"rivulet": 1}],
        "of": SimpleNamespace(towns=pd.DataFrame({"river": ["Ouse"]})),
        "own": DataFrame([{"river": 1}]),
    }
    shell = SimpleNamespace(user_ns=values, user_ns_hidden={"exit": 4})
    with scripted_session(models_folder=Path("/nowhere")) as (session, backend):
        session.load("org/Qwen", name="qwen", keep=True)
        session.load("org/wide:7b", name="my model", keep=True)
        session.models()
        session.ask(Request("?", chat="notes")).result()
        session.ask(Request("?"), background=True).result()
        before = list(backend.events)
        yield Candidates(cast(Any, shell), session)
        assert backend.events == before  # no backend was called


def completed(line: str, names: Candidates, cell: str = "") -> list[str] | None:
    """Press Tab at the | in a line; returns how it reads with each choice."""
    before, _, after = line.partition("|")
    found = complete(before, after, cell, names)
    if found is None:
        return None
    assert before.endswith(found.fragment)
    unchanged = before.removesuffix(found.fragment)
    return [unchanged + candidate.text + after for candidate in found.candidates]


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("%llm_load ti|", ["%llm_load tiny"]),
        ("%%llm --schema |", ["%%llm --schema Frame", "%%llm --schema d"]),
        ("%%llm --schema=F|", ["%%llm --schema=Frame"]),
        ("%%llm --schema-by |", ["%%llm --schema-by backend", "%%llm --schema-by prompt"]),
        ("%%llm --choice ro|", ["%%llm --choice rows"]),
        ("%llm_load m -q b|", ["%llm_load m -q bnb-8bit", "%llm_load m -q bnb-4bit"]),
        ("%llm_load m --quantization 4|", ["%llm_load m --quantization 4bit"]),
        ("%llm_load m --quantization=4|", ["%llm_load m --quantization=4bit"]),
        ("%llm_load -q 4| tiny --keep", ["%llm_load -q 4bit tiny --keep"]),
        ("%llm_load -d c|", ["%llm_load -d cpu", "%llm_load -d cuda"]),
        ("%llm_load --dtype b|", ["%llm_load --dtype bfloat16"]),
        ("%llm_load -b o|", ["%llm_load -b ollama", "%llm_load -b openai", "%llm_load -b openrouter"]),
        ("%llm_load --bg|", ["%llm_load --bg"]),
        ("%llm_load --keep ti|", ["%llm_load --keep tiny"]),  # a switch takes no value
        ("%llm_load -b openai --base-url h|", ["%llm_load -b openai --base-url https://api.openai.com"]),
        ("%llm_load -b vllm --p|", []),  # --pull is Ollama's
        ("%llm_load --p| x -b ollama", ["%llm_load --pull x -b ollama"]),
        ("%llm_load --keep --k|", ["%llm_load --keep --key-env"]),  # not twice
        ("%%llm -m |", ["%%llm -m tiny", "%%llm -m qwen", '%%llm -m "my model"']),
        ("%%llm --model=q|", ["%%llm --model=qwen"]),
        ("%%llm -m my|", ['%%llm -m "my model"']),
        ("%%llm -m 'my|", ["%%llm -m 'my model'"]),
        ('%%llm -m "my m|" -t 0', ['%%llm -m "my model" -t 0']),  # frontends close quotes
        ("%%llm -c |", ["%%llm -c notes"]),
        ("%%llm -o r|", ["%%llm -o reply", "%%llm -o rows"]),
        ("%%llm -o e|", []),
        ("%%llm -f js|", ["%%llm -f json"]),
        ("%%llm --te|", ["%%llm --temperature"]),
        ("%%llm --stop a --st|", ["%%llm --stop a --stop"]),  # as often as you like
        ("%%llm -t |", ["%%llm -t 0.7", "%%llm -t none"]),
        ("%%llm hello|", []),
        ("%llm Give me |", []),
        ("%llm -t 0 Give me --te|", []),
        ("%llm -- --te|", []),
        ("%llm Which of {ro|", ["%llm Which of {rows"]),
        ("%llm Which of {ro|}?", ["%llm Which of {rows}?"]),
        ("%llm {df.|", ["%llm {df.shape", "%llm {df.slow"]),
        ("%llm {df.shape.r|", ["%llm {df.shape.rows"]),
        ("%llm {df.slow.|", []),
        ("%llm {own['r|", []),
        ("%llm {df._|", []),
        ("%llm {nothing.|", []),
        ('%llm {d["k|', ['%llm {d["key one']),
        ("%llm {{ro|", []),
        ("%llm ${ro|", []),
        ("%llm rows|", []),
        ('%%llm -s "You know {ro|', ['%%llm -s "You know {rows']),
        ("  %llm_unload q|", ["  %llm_unload qwen"]),
        ("%llm_reset n|", ["%llm_reset notes"]),
        ("%llm_config to|", ["%llm_config top_p=", "%llm_config top_k="]),
        ("%llm_config top_k=3 to|", ["%llm_config top_k=3 top_p="]),
        ("%llm_config temperature=|", ["%llm_config temperature=0.7", "%llm_config temperature=none"]),
        ("%llm_config seed=n|", ["%llm_config seed=none"]),
        ("%llm_config nonsense=|", []),
        ("%llm_config temperature |", ["%llm_config temperature 0.7", "%llm_config temperature none"]),
        ("%llm_config temperature = n|", ["%llm_config temperature = none"]),
        ("%llm_config temperature =n|", ["%llm_config temperature =none"]),
        ("%llm_config -t |", ["%llm_config -t 0.7", "%llm_config -t none"]),
        ("%llm_config top_k 3 to|", ["%llm_config top_k 3 top_p="]),
        ("%llm_config --top-k 3 to|", ["%llm_config --top-k 3 top_p="]),
        ("%llm_config top_k = 3 -t 0 se|", ["%llm_config top_k = 3 -t 0 seed="]),
        ("%llm_config sy|", ["%llm_config system="]),
        ("%llm_config system |", []),
        ("%llm_config --res|", ["%llm_config --reset"]),
        ("%llm_config --reset to|", ["%llm_config --reset top_p", "%llm_config --reset top_k"]),
        ("%llm_config --reset top_k to|", ["%llm_config --reset top_k top_p"]),
        ("%llm_config temp| --reset", ["%llm_config temperature --reset"]),
        ("%llm_models -b lo|", ["%llm_models -b local"]),
        ("found = %llm_models -b lo|", ["found = %llm_models -b local"]),
        ("%llm_stop |", ["%llm_stop 1", "%llm_stop all"]),
        ("%llm_status |", []),
    ],
)  # fmt: skip
def test_line_after_a_completion(line: str, read: list[str], names: Candidates) -> None:
    assert completed(line, names) == read


@pytest.mark.parametrize("typed", ["", "smol", "huggingfacetb/"])
def test_models_are_found_by_any_part_of_their_name(
    typed: str, names: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_magic.backends.local.files import sources
    from llm_magic.types import ModelInfo

    known = [ModelInfo("HuggingFaceTB/SmolLM2-1.7B", "local", "cache")]
    monkeypatch.setattr(sources, "names", lambda _folder: known)
    lines = completed(f"%llm_load {typed}|", names)
    assert lines is not None
    assert "%llm_load HuggingFaceTB/SmolLM2-1.7B" in lines


def test_files_and_folders(
    names: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder with spaces").mkdir()
    (tmp_path / "folder with spaces" / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert completed("%llm_load ./fol|", names) == ['%llm_load "./folder with spaces/']
    assert completed('%llm_load "./folder with spaces/|" -q 4bit', names) == [
        '%llm_load "./folder with spaces/x.gguf" -q 4bit'
    ]
    assert completed("%llm_load './folder with spaces/x|", names) == [
        "%llm_load './folder with spaces/x.gguf'"
    ]
    assert completed("%llm_load -b ollama ./fol|", names) == []


def test_incomplete_address_has_no_completions(names: Candidates) -> None:
    assert completed("%llm_load -b vllm --base-url http: a|", names) == []


def test_an_option_of_a_prompt_magic_is_offered_where_nothing_is_typed(names: Candidates) -> None:
    lines = completed("%%llm -t 0 |", names)
    assert lines is not None
    assert "%%llm -t 0 --system" in lines
    assert "%%llm -t 0 --temperature" not in lines


@pytest.mark.parametrize(
    ("data", "line", "read"),
    [
        ("towns", "Is {r|}?", ["Is {river}?", "Is {reply}?", "Is {rows}?"]),
        ("towns", "Is {no|", ["Is {north side"]),
        ("towns", "Is {north s|}", ["Is {north side}"]),
        ("towns", "{it|", ["{item"]),
        ("towns", "{in|", ["{index"]),
        ("towns", "{a|", []),  # not the column with a brace
        ("towns", "{item.r|", ["{item.river"]),
        ("towns", '{item["n|', ['{item["north side']),
        ("towns", "{riv} and {riv|", ["{riv} and {river"]),
        ("towns", "{df.sh|", ["{df.shape"]),
        ("towns", "{{riv|", []),
        ("towns", "${riv|", []),
        ("towns", "riv|", []),
        ("towns[towns.river != 'Aire'].head(2)", "{riv|", ["{river"]),
        ("towns.iloc[:5]", "{riv|", ["{river"]),
        ("towns[['river']]", "{|", None),
        ('towns["river"]', "{riv|", ["{river"]),
        ('towns["river"]', "{no|", []),
        ("towns.T", "{riv|", []),
        ("towns.groupby('river').size()", "{riv|", []),
        ("pl_towns.filter(True)", "{riv|", ["{river"]),
        ("listed[:1]", "{riv|", ["{river", "{rivulet"]),
        ("of.towns", "{riv|", ["{river"]),
        ("own", "{riv|", []),
        ("df.slow", "{riv|", []),
        ("range(3)", "{it|", ["{item"]),
        ("nothing", "{it|", ["{item"]),
    ],
)  # fmt: skip
def test_prompt_of_a_map_completes_columns(
    data: str, line: str, read: list[str] | None, names: Candidates
) -> None:
    found = completed(line, names, f"%%llm -t 0 --over {data} -o out\nThe first line.")
    assert found is not None
    if read is None:
        assert found[:3] == ["{river", "{item", "{index"]
        assert "{north side" not in found
    else:
        assert found == read
        in_one_line = completed((start := f"%llm --over {data} ") + line, names)
        assert in_one_line == [start + one for one in read]


@pytest.mark.parametrize("above", ["%%llm", "%%llm -t 0 -o x\nHello", "\n  \n%%llm"])
def test_prompt_completes_only_references(above: str, names: Candidates) -> None:
    assert completed("Compare {ro|", names, above) == ["Compare {rows"]
    assert completed("--te|", names, above) == []
    assert completed("%llm_load ti|", names, above) == []


@pytest.mark.parametrize("above", ["%%bash", "%%timeit -n 1"])
def test_cells_of_other_magics_have_no_completions(above: str, names: Candidates) -> None:
    assert completed("%llm_load ti|", names, above) is None


@pytest.mark.parametrize(
    "line",
    ["", "%", "llm_load ", "%llm", "%%llm_", "%matplotlib ", "x = 1 + %llm_load ", "print(", "%%lm -m "],
)  # fmt: skip
def test_other_lines_have_no_completions(line: str, names: Candidates) -> None:
    assert completed(line, names) is None


@pytest.mark.parametrize("name", magic_options.MAGICS)
def test_every_option_of_every_magic_is_offered(name: str, names: Candidates) -> None:
    found = complete(f"%{name} -", "", "", names)
    assert found is not None
    assert [c.text for c in found.candidates] == [
        n for a in magic_options.arguments(name) for n in a.names
    ]


def test_every_source_of_values_in_the_table_exists(names: Candidates) -> None:
    free = {
        "",
        "choices:revision",
        "choices:idle_timeout",
        "choices:concurrency",
        "choices:context",
        "choices:key_env",
        "choices:base_url",
    }
    generation = {a.complete for a in magic_options.option_arguments("session")}
    for name, magic in magic_options.MAGICS.items():
        listed = [
            *magic_options.arguments(name),
            *((magic.positional,) if magic.positional else ()),
        ]
        for argument in listed:
            if argument.kind != "switch" and argument.complete not in free | generation:
                assert names.of(argument, "", {}), (name, argument.names)


@given(st.text("ab \t'\"-={", max_size=20))
def test_typed_tokens_match_parsed_words(line: str) -> None:
    *done, last = typed_tokens(line)
    try:
        read = parser.split_line(line)
    except OptionError:
        assert last.quote
    else:
        is_typed = last.start < len(line)
        assert [word.text for word in (*done, *([last] if is_typed else ()))] == read
    assert last.start <= len(line)


def test_ipython_offers_completions_while_registered() -> None:
    with ipython() as shell, scripted_session() as (session, _):
        matcher.register(shell, session)
        shell.user_ns["answer"] = 1

        def offered(text: str) -> set[str]:
            with provisionalcompleter():
                return {found.text for found in shell.Completer.completions(text, len(text))}

        assert "--temperature" in offered("%%llm --te")
        assert "tiny" in offered("%llm_load ti")
        assert "answer" in offered("%%llm -o an")
        assert "tiny" in offered("x = 1\n%llm_load ti")
        assert offered("%%llm -t 0\n%llm_load ti") == set()  # a prompt, not a magic
        assert offered("%%llm -t 0\nansw") == set()  # and no Python
        assert "answer" in offered("%%llm -t 0\nIs {answ")
        assert "answer" in offered("answ")
        assert offered("%llm_load --revision answ") == set()
        matcher.unregister(shell)
        assert "--temperature" not in offered("%%llm --te")
