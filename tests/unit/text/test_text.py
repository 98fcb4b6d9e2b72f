"""Control characters from models and servers: what a terminal receives of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from llm_magic.errors import LLMMagicError
from llm_magic.notebook.arguments.magic_options import MAGICS
from llm_magic.notebook.display import answer_view
from llm_magic.notebook.display.live_output import LiveArea
from llm_magic.notebook.display.messages import error_line
from llm_magic.notebook.display.tables import Table
from llm_magic.notebook.magics import register, unregister
from llm_magic.session import Session
from llm_magic.text import (
    VisibleStream,
    unstyled,
    visible,
    visible_but_styled,
    visible_line,
)
from llm_magic.types import Chunk, ModelInfo
from tests.hostile import ESCAPES, MODEL, HostileServer, assert_harmless, walk
from tests.scripted import make_reply, scripted_session, settings, unstarted
from tests.shell import ipython

TERMINAL = cast(InteractiveShell, SimpleNamespace())
NOTEBOOK = cast(InteractiveShell, SimpleNamespace(kernel=object()))

hostile_text = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\x1b[]2J;m\r\n\t\x07\x08\x9b\x9d\u202e\u2066\u2028\U000e0041 ab"),
    )
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "␛[2Jgone"),
        ("\x1b]52;c;aGk=\x07", "␛]52;c;aGk=␇"),
        ("a\rb\x08\x7f\x00\x0c", "a␍b␈␡␀␌"),
        ("a\r\nb\r\r\nc", "a\nb␍\nc"),
        ("\x9b2J\x85", "\\u009b2J\\u0085"),
        ("user\u202egnp.exe\u2069", "user\\u202egnp.exe\\u2069"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("half\ud83d", "half\\ud83d"),
        ("\tkept\nas it is: é 日本 👩‍👩‍👧 עברית", "\tkept\nas it is: é 日本 👩‍👩‍👧 עברית"),
    ],
)
def test_control_characters_become_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(hostile_text)
def test_visible_text_has_no_controls_and_stays_as_it_is(text: str) -> None:
    shown = visible(text)
    assert_harmless(shown)
    assert visible(shown) == shown
    assert "\n" not in visible_line(text)
    shown.encode()  # lone surrogates cannot be encoded


@given(st.lists(hostile_text))
def test_pieces_of_a_stream_become_what_the_whole_text_becomes(pieces: list[str]) -> None:
    stream = VisibleStream()
    assert "".join([*map(stream.feed, pieces), stream.flush()]) == visible("".join(pieces))


def test_styles_of_tracebacks_stay_or_are_removed() -> None:
    text = "\x1b[31mError\x1b[0m: \x1b[2J"
    assert visible_but_styled(text) == "\x1b[31mError\x1b[0m: ␛[2J"
    assert unstyled(text) == "Error: ␛[2J"


@given(st.lists(hostile_text), hostile_text, st.sampled_from(["text", "json", "markdown"]))
def test_answer_in_a_terminal_has_no_controls(pieces: list[str], name: str, form: str) -> None:
    values = {"quiet": None, "format": form, "plain": True}
    text = "".join(pieces)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        response = unstarted(ModelInfo(name, "vllm"))
        view = answer_view.view(TERMINAL, response, values, LiveArea(live=True))
        answer_view.show_notes(TERMINAL, (name,))
        for piece in pieces:
            response.add(Chunk(text=piece, notice=name))
            view.draw()
        response.reply = make_reply(text, model=name, reasoning=text)
        view.finish()
    assert_harmless(out.getvalue())


def test_line_end_that_is_cut_in_two_is_one_line_end(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"quiet": True, "format": None, "plain": True}
    response = unstarted(ModelInfo("tiny", "local"))
    view = answer_view.view(TERMINAL, response, values, LiveArea(live=True))
    for piece in ("one\r", "\ntwo\r"):
        response.add(Chunk(text=piece))
        view.draw()
    response.reply = make_reply("one\r\ntwo\r")
    view.finish()
    assert capsys.readouterr().out == "one\ntwo␍\n"


def test_values_keep_every_character() -> None:
    with scripted_session() as (session, backend):
        backend.will(ESCAPES, Chunk(finish_reason="stop"))
        answer = session.generate("Hello", chat="one")
        assert answer.text == str(answer) == ESCAPES
        assert session.chats.get("one").turns[0].answer.content == ESCAPES
        assert_harmless(repr(answer))


@given(hostile_text)
def test_tables_and_errors_have_no_controls(text: str) -> None:
    table = Table((text, "b", "c"), [[text, text, text]], text)
    for width in (None, 40):
        assert_harmless(table.fitted(width))
    assert_harmless(table._repr_html_())
    error = LLMMagicError(text)
    assert_harmless(str(error.append(text)))
    (shown,) = error._render_traceback_()
    assert "\n" not in shown
    assert_harmless(shown)
    assert_harmless(error_line(ValueError(text)))


def test_completion_offers_no_name_with_controls() -> None:
    with HostileServer() as server:
        server.models = {MODEL: {}, "two\nimport os": {}, "good": {}}
        session = Session(settings(vllm_base_url=server.url))
        try:
            with ipython() as shell:
                register(shell, session)
                session.models("vllm")
                line = "%llm_load -b vllm "
                with provisionalcompleter():
                    assert shell.Completer is not None
                    offered = [one.text for one in shell.Completer.completions(line, len(line))]
                assert offered == ["good"]
                unregister(shell)
        finally:
            session.close()


@pytest.fixture
def terminal() -> Iterator[tuple[InteractiveShell, HostileServer]]:
    """Return a shell without a kernel, with the magics on a hostile server."""
    with HostileServer() as server, ipython() as shell:
        session = Session(settings(vllm_base_url=server.url, backend="vllm"))
        register(shell, session)
        shell.user_ns["llm"] = session
        try:
            yield shell, server
        finally:
            unregister(shell)
            session.close()


def test_every_magic_in_a_terminal_shows_no_controls(
    terminal: tuple[InteractiveShell, HostileServer],
) -> None:
    shell, server = terminal
    used = shown = ""
    for code, error in walk(server.url):
        with capture_output() as captured:
            ran = shell.run_cell(code)  # type: ignore[no-untyped-call]
        shown = f"{captured.stdout}{captured.stderr}"
        failed = ran.error_before_exec or ran.error_in_exec
        assert (type(failed).__name__ if failed else "") == error, shown
        assert_harmless(shown)
        used += code
    assert {name for name in MAGICS if f"%{name}" not in used} == set()
    assert shown.startswith("Unloaded evil␛[2J")
