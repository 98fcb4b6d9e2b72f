"""Answers as plain text: for terminals, logs and ``--plain``."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from IPython.core.interactiveshell import InteractiveShell

from llm_magic.notebook.display import answer_view
from llm_magic.notebook.display.answer_view import PlainView
from llm_magic.notebook.display.live_output import LiveArea
from llm_magic.types import Chunk, FinishReason, ModelInfo
from tests.scripted import make_reply, unstarted

NOTEBOOK = cast(InteractiveShell, SimpleNamespace(kernel=object()))
TERMINAL = cast(InteractiveShell, SimpleNamespace())
INFO = ModelInfo("tiny", "local", size=1_000_000)
DEFAULTS = {"quiet": None, "format": None, "plain": None}


def test_plain_text_streams(capsys: pytest.CaptureFixture[str]) -> None:
    answer = unstarted(INFO)
    view = answer_view.view(TERMINAL, answer, DEFAULTS, LiveArea(live=True))
    answer_view.show_notes(TERMINAL, ("{x} was not replaced: x is not defined",))
    for text in ("Par", "is"):
        answer.add(Chunk(text=text))
        view.draw()
    assert capsys.readouterr().out == "Note: {x} was not replaced: x is not defined.\nParis"
    answer.reply = make_reply("Paris")
    view.finish()
    assert capsys.readouterr().out == (
        "\n[tiny · 3 → 2 tokens · first after 0.10 s · 30 tokens/s · 1 MB]\n"
    )


@pytest.mark.parametrize(
    ("values", "finish", "end"),
    [
        ({"plain": True, "quiet": True}, "stop", "\n"),
        ({"plain": True, "quiet": True}, "cancelled", "\n[stopped by you; incomplete]\n"),
        ({"plain": True, "quiet": True}, "truncated", "\n[ended early; incomplete]\n"),
    ],
)
def test_quiet_hides_the_footer_of_plain_text(
    values: dict[str, Any], finish: FinishReason, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = unstarted(INFO)
    view = answer_view.view(NOTEBOOK, answer, {**DEFAULTS, **values}, LiveArea(live=True))
    assert isinstance(view, PlainView)
    answer.add(Chunk(text="<b>Paris</b>"))
    answer.reply = make_reply("<b>Paris</b>", finish_reason=finish)
    view.finish()
    assert capsys.readouterr().out == f"<b>Paris</b>{end}"


def test_text_is_flushed_to_a_terminal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        """What was flushed is what is seen."""

        seen = ""

        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            self.seen = self.getvalue()

    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    answer = unstarted(INFO)
    view = answer_view.view(TERMINAL, answer, DEFAULTS, LiveArea(live=True))
    for text in ("Par", "is"):
        answer.add(Chunk(text=text))
        view.draw()
        assert terminal.seen.endswith(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"a":[1,2]}', '{\n  "a": [\n    1,\n    2\n  ]\n}\n'),
        ("no json", "no json\n"),
    ],
)
def test_complete_json_is_checked_and_indented(
    capsys: pytest.CaptureFixture[str], text: str, shown: str
) -> None:
    values = {**DEFAULTS, "format": "json", "plain": True, "quiet": True}
    answer = unstarted(INFO)
    view = answer_view.view(NOTEBOOK, answer, values, LiveArea(live=True))
    for letter in text:
        answer.add(Chunk(text=letter))
        view.draw()
    assert capsys.readouterr().out == ""
    answer.reply = make_reply(text)
    view.finish()
    assert capsys.readouterr().out == shown
