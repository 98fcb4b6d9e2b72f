"""Completion of magic lines: from memory only, and only on our lines."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from IPython.core.completer import provisionalcompleter

from llm_magic import catalog, complete
from llm_magic.calls import Request
from llm_magic.complete import Candidates, candidates
from tests.scripted import ScriptedBackend, scripted_session
from tests.shell import ipython


@pytest.fixture
def offers() -> Iterator[tuple[Candidates, ScriptedBackend]]:
    shell = SimpleNamespace(user_ns={"reply": 1, "rows": 2, "_hidden": 3})
    with scripted_session() as (session, backend):
        session.load("org/Qwen", name="qwen", keep=True)
        session.models()
        session.answer(Request("?", chat="notes"))
        yield Candidates(cast(Any, shell), session), backend


@pytest.mark.parametrize(
    ("line", "word", "found"),
    [
        ("%llm_load ", "", ["big", "qwen", "tiny"]),
        ("%llm_load ti", "ti", ["tiny"]),
        ("%llm_load m -q ", "", ["none", "8bit", "4bit"]),
        ("%llm_load m --quantization 4", "4", ["4bit"]),
        ("%llm_load -d c", "c", ["cpu", "cuda"]),
        ("%llm_load --dtype b", "b", ["bfloat16"]),
        ("%llm_load -b ", "", ["instructlab", "local", "ollama", "openai", "vllm"]),
        ("%llm_load --no", "--no", ["--no-wait"]),
        ("%llm_load --keep ", "", ["big", "qwen", "tiny"]),  # a switch takes no value
        ("%%llm -m ", "", ["qwen", "tiny"]),
        ("%%llm --model q", "q", ["qwen"]),
        ("%%llm -c ", "", ["notes"]),
        ("%%llm -o r", "r", ["reply", "rows"]),
        ("%%llm -f js", "js", ["json"]),
        ("%%llm --te", "--te", ["--temperature"]),
        ("%%llm -t ", "", []),
        ("%llm Tell me ", "", []),
        ("  %llm_unload ", "", ["qwen", "tiny"]),
        ("%llm_reset n", "n", ["notes"]),
        ("%llm_config to", "to", ["top_p=", "top_k="]),
        ("%llm_config top_k=3 se", "se", ["seed="]),
        ("%llm_models -b lo", "lo", ["local"]),
        ("%llm_status ", "", []),
    ],
)
def test_what_may_stand_there(
    offers: tuple[Candidates, ScriptedBackend], line: str, word: str, found: list[str]
) -> None:
    before = list(offers[1].events)
    result = candidates(line, offers[0])
    assert result is not None
    assert (result[0], sorted(result[1])) == (word, sorted(found))
    assert offers[1].events == before  # nobody was asked


@pytest.mark.parametrize(
    "line",
    [
        "",
        "%",
        "llm_load ",
        "%llm",
        "%%llm_",
        "%matplotlib ",
        "x = %llm_load ",
        "print(",
        "%%lm -m ",
    ],
)
def test_other_lines_are_not_ours(offers: tuple[Candidates, ScriptedBackend], line: str) -> None:
    assert candidates(line, offers[0]) is None


@pytest.mark.parametrize("name", catalog.MAGICS)
def test_every_option_of_every_magic_is_offered(
    offers: tuple[Candidates, ScriptedBackend], name: str
) -> None:
    result = candidates(f"%{name} -", offers[0])
    assert result is not None
    assert result[1] == sorted(n for a in catalog.arguments(name) for n in a.names)


def test_every_kind_of_completion_that_the_table_names_is_known(
    offers: tuple[Candidates, ScriptedBackend],
) -> None:
    for name, magic in catalog.MAGICS.items():
        listed = [*catalog.arguments(name), *((magic.positional,) if magic.positional else ())]
        for argument in listed:
            if argument.complete in {
                "models",
                "loaded",
                "chats",
                "variables",
                "backends",
                "settings",
            }:
                assert offers[0].for_argument(argument), (name, argument.names)
            else:
                assert argument.complete.partition(":")[0] in {"", "choices"}


def test_ipython_offers_them_while_the_extension_is_registered() -> None:
    with ipython() as shell, scripted_session() as (session, _):
        complete.register(shell, session)
        shell.user_ns["answer"] = 1

        def offered(text: str) -> set[str]:
            with provisionalcompleter():
                return {found.text for found in shell.Completer.completions(text, len(text))}

        assert "--temperature" in offered("%%llm --te")
        assert "tiny" in offered("%llm_load ti")
        assert "answer" in offered("%%llm -o an")
        assert "tiny" in offered("x = 1\n%llm_load ti")
        assert "tiny" not in offered("%%llm -t 0\n%llm_load ti")  # a prompt, not a magic
        complete.unregister(shell)
        assert "--temperature" not in offered("%%llm --te")
