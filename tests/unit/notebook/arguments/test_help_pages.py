"""The help of every magic names all it takes, in lines that fit, and its examples are right."""

from __future__ import annotations

import html
import re

import pytest

from llm_magic.backends import registry
from llm_magic.config.settings import SessionConfig, Settings
from llm_magic.notebook.arguments import magic_options, parser
from llm_magic.notebook.arguments.help_pages import HelpPage, page
from llm_magic.notebook.arguments.magic_options import MAGICS

UNLOAD = """\
Unload a model and show how much memory it released.

Usage:  %llm_unload [NAME | --all]

  NAME                        The model; all is the same as --all. Default: the active one.
      --all                   Unload every model.
  -h, --help                  Show this help.
"""


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", MAGICS)
def test_the_page_names_every_option_and_its_meaning(name: str) -> None:
    text, magic = page(name), MAGICS[name]
    assert text.startswith(f"{magic.summary}\n\nUsage:  {magic.usage}\n")
    positional = (magic.positional,) if magic.positional is not None else ()
    # The page of %llm_config lists settings, not the options with the same names.
    options = magic.arguments if magic.options == "session" else magic_options.arguments(name)
    for argument in (*positional, *options):
        names = argument.names if argument.names[0].startswith("-") else ()
        label = f"{', '.join(names)} {argument.metavar}".strip()
        assert f"{label} {flat(argument.help)}" in flat(text)
        for choice in argument.choices:
            assert choice in text
    for row in magic.example.splitlines():
        assert f"    {row}\n" in text or not row


@pytest.mark.parametrize("name", MAGICS)
def test_lines_fit_and_descriptions_are_aligned(name: str) -> None:
    for line in page(name).splitlines():
        assert len(line) <= 92, line
        assert line == line.rstrip()
    meanings = [
        line for line in page(name).partition("Example")[0].splitlines() if line[:3] == "   "
    ]
    assert all(line[28:30] == "  " and line[30:31].strip() for line in meanings)


def test_a_page_as_it_is_shown() -> None:
    assert page("llm_unload") == UNLOAD


@pytest.mark.parametrize("magic", ["llm", "llm_config"])
def test_ranges_defaults_and_backends_are_those_of_the_table(magic: str) -> None:
    text = flat(page(magic))
    for spec in registry.session_specs().values():
        if spec.name == "system" and magic == "llm":
            continue
        default = f"; default {spec.default}" if spec.default not in (None, (), {}) else ""
        others = [name for name in registry.names() if not spec.works_on(name)]
        backends = f"; not with -b {', '.join(others)}" if others else ""
        facts = f"{spec.range}{default}{backends}"
        assert f"{spec.help} ({facts})" in text if facts else spec.help in text
    assert "1 or more; default 50; not with -b openai" in text


def test_load_options_are_grouped_by_backend() -> None:
    text = page("llm_load")
    _, local, server, llamacpp, ollama = re.split("With -b |With any -b except local", text)
    for spec in registry.load_specs().values():
        flag = f"{spec.flags[-1]} "
        assert (flag in local) == (spec.backends == ("local",)), spec.name
        works = {name for name in registry.names() if spec.works_on(name)}
        assert (flag in server) == (works == {*registry.names()} - {"local", "llamacpp"}), spec.name
    assert "default auto" in local
    assert server.startswith(" and llamacpp:")
    assert "--context" in llamacpp
    assert "--pull" in ollama


@pytest.mark.parametrize("name", MAGICS)
def test_examples_are_valid_lines(name: str) -> None:
    for example in filter(None, MAGICS[name].example.split("\n\n")):
        first, _, body = example.partition("\n")
        sign = "%%" if body else "%"
        assert first.startswith(f"{sign}{name}")
        line = first.removeprefix(f"{sign}{name}")
        if MAGICS[name].takes_prompt and not body:
            is_optional = "[QUESTION]" in MAGICS[name].usage
            assert parser.parse_with_prompt(name, line).prompt or is_optional
        else:
            parsed = parser.parse(name, line)
            changes = parsed.get("changes")
            SessionConfig().replace(**parser.assignments(changes or []))
            if MAGICS[name].options == "loading":
                assert registry.load_config(Settings(), parsed.options)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", MAGICS)
def test_a_page_in_a_narrow_terminal_has_whole_words_in_lines_that_fit(
    name: str, width: int
) -> None:
    text = page(name, width)
    assert text.split() == page(name).split()
    # Examples are commands, which are not wrapped.
    options = text.partition("\nExample")[0]
    assert [line for line in options.splitlines() if len(line) > width] == []


@pytest.mark.parametrize("name", MAGICS)
def test_a_page_in_a_notebook_has_the_same_words(name: str) -> None:
    shown = html.unescape(re.sub(r"<[^>]+>", " ", HelpPage(name)._repr_html_()))
    assert sorted(set(page(name).split()) - {"Example:"} - set(shown.split())) == []
