"""What a cell shows: at once, then not too often, and at the end everything."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import RichOutput, capture_output

from llm_magic.notebook.display import answer_view, live_output
from llm_magic.notebook.display.answer_view import PlainView, RichView
from llm_magic.notebook.display.live_output import LiveArea, LoadView
from llm_magic.types import Chunk, FinishReason, ModelInfo, Progress
from tests.scripted import make_reply, unstarted
from tests.shell import ipython

NOTEBOOK = cast(InteractiveShell, SimpleNamespace(kernel=object()))
TERMINAL = cast(InteractiveShell, SimpleNamespace())
INFO = ModelInfo("tiny", "local", size=1_000_000)
DEFAULTS = {"quiet": None, "format": None, "plain": None}


@pytest.fixture(scope="module", autouse=True)
def shell() -> Iterator[None]:
    """Give `display` a shell to publish to."""
    with ipython():
        yield


class Clock:
    """Replaces the module `time`; the test sets the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.busy = 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.busy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(answer_view, "time", clock)
    monkeypatch.setattr(live_output, "time", clock)
    return clock


class Shown:
    """A response and its view, as a cell has them."""

    def __init__(
        self, shell: InteractiveShell = NOTEBOOK, *, live: bool = True, **values: Any
    ) -> None:
        self.response = unstarted(INFO)
        self.view = answer_view.view(
            shell, self.response, {**DEFAULTS, **values}, LiveArea(live=live)
        )

    def add(self, text: str = "", **chunk: Any) -> None:
        """Add a chunk and call the view."""
        self.response.add(Chunk(text, tokens=1, **chunk))
        self.view.draw()

    def finish(self, finish: FinishReason = "stop") -> None:
        """End the response with fixed figures, and let the view show its end."""
        self.response.reply = make_reply(self.response.text, finish_reason=finish)
        self.view.finish()


def plain(output: RichOutput) -> str:
    return str(output.data["text/plain"])


def visible_text(output: RichOutput) -> str:
    return re.sub("<[^>]*>", "", str(output.data["text/html"])).strip()


def so_far(text: str) -> str:
    """Return what is visible of an answer that has not ended."""
    state = "incomplete so far · when complete: llm.last, unless the kernel restarts"
    return f"{text}\n\ntiny: {state}"


def test_first_text_is_shown_at_once_and_then_replaced(clock: Clock) -> None:
    with capture_output() as shown:
        answer = Shown()
        answer.add(" \n")  # nothing to see yet
        assert shown.outputs == []
        answer.add("Par")
        assert [plain(o) for o in shown.outputs] == [so_far("Par")]
        clock.now += 0.01
        answer.add("is")
        assert len(shown.outputs) == 1
        clock.now += 0.05
        answer.add(".")
        answer.finish()
        Shown().add("Another answer")
    outputs = shown.outputs[:3]
    assert shown.outputs[3].transient["display_id"] != outputs[0].transient["display_id"]
    assert [o.update for o in outputs] == [False, True, True]
    assert len({o.transient["display_id"] for o in outputs}) == 1
    assert visible_text(outputs[1]) == so_far("Paris.")
    assert plain(outputs[2]) == (
        "Paris.\n\ntiny · 3 → 2 tokens · first after 0.10 s · 30 tokens/s · 1 MB"
    )
    assert "Paris." in outputs[2].data["text/html"]
    assert "30 tokens/s" in outputs[2].data["text/html"]


def test_many_tokens_make_few_updates_and_a_complete_last_one() -> None:
    pieces = [f"word{n} " for n in range(2000)]
    began = time.monotonic()
    with capture_output() as shown:
        answer = Shown()
        for word in pieces:
            answer.add(word)
        elapsed = time.monotonic() - began
        answer.finish()
    assert 2 <= len(shown.outputs) <= 3 + elapsed / 0.05
    assert plain(shown.outputs[-1]).startswith("".join(pieces).strip())
    assert "word1999" in shown.outputs[-1].data["text/html"]


def test_slow_frontend_gets_fewer_updates(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[float] = []

    def slow(_bundle: object, **_options: object) -> None:
        costs.append(clock.now)
        clock.now += 0.1  # ten times this until the next one

    monkeypatch.setattr("IPython.display.display", slow)
    answer = Shown()
    for _ in range(210):
        answer.add("x ")
        clock.now += 0.01
    # Once it may have been something else that was slow.
    assert costs == pytest.approx([100.0, 100.16, 101.27, 102.38], abs=0.03)


def test_updates_take_little_of_the_processor_from_the_model(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def busy(_bundle: object, **_options: object) -> None:
        drawn.append(clock.now)
        clock.busy += 0.0004  # 0.4% of 0.1 s

    monkeypatch.setattr("IPython.display.display", busy)
    answer = Shown()
    for _ in range(50):
        answer.add("x ")
        clock.now += 0.01
    assert drawn == pytest.approx([100.0, 100.05, 100.15, 100.25, 100.35, 100.45], abs=0.03)


@pytest.mark.parametrize(
    ("text", "seconds"), [("x" * 50_000, 0.33), (r"\(x\) " * 200, 1.4), ("x", 0.05)]
)
def test_large_html_is_updated_less_often(clock: Clock, text: str, seconds: float) -> None:
    with capture_output():
        answer = Shown()
        answer.add(text)
    assert answer.view.pause() == pytest.approx(seconds, rel=0.2)


def test_text_form_has_the_first_text_and_the_whole_answer(clock: Clock) -> None:
    with capture_output() as shown:
        answer = Shown(quiet=True)
        for text in ("a", "b", "c"):
            answer.add(text)
            clock.now += 1
        answer.finish()
    assert [output.data.get("text/plain") for output in shown.outputs] == [
        so_far("a"), None, None, "abc",
    ]  # fmt: skip


def test_reasoning_is_one_line_while_the_answer_grows(clock: Clock) -> None:
    with capture_output() as shown:
        answer = Shown(quiet=True)
        assert answer.view.pause() == 0
        answer.add(reasoning="secret <b>plans</b>")
        clock.now += 0.01
        answer.add("Yes")  # at once, although there was an update a moment ago
        answer.finish()
    first, second, last = (str(output.data["text/html"]) for output in shown.outputs)
    assert "thinking, 19 characters so far" in first
    assert "secret" not in first + second
    assert "Yes" in second
    assert "secret &lt;b&gt;plans" in last
    assert "<details" in last


def test_pending_text_is_drawn_without_new_chunks(clock: Clock) -> None:
    with capture_output() as shown:
        answer = Shown()
        answer.add("a")
        answer.add("b")
        answer.view.draw()
        assert len(shown.outputs) == 1
        clock.now += 0.1
        answer.view.draw()
        clock.now += 1
        answer.view.draw()  # nothing new
    assert [visible_text(output) for output in shown.outputs] == [so_far("a"), so_far("ab")]


def test_waiting_is_shown_after_a_moment(clock: Clock) -> None:
    with capture_output() as shown:
        answer = Shown()
        clock.now += 0.2
        answer.view.draw()
        assert shown.outputs == []
        for _ in range(3):
            clock.now += 1
            answer.view.draw()
        answer.add("Yes")
    assert [visible_text(output) for output in shown.outputs] == [
        "tiny · waiting for the first token",
        "tiny · waiting for the first token … 3 s",
        so_far("Yes"),
    ]
    assert shown.outputs[1].update


def test_a_wait_is_shown_as_what_it_is(clock: Clock) -> None:
    reading = Progress("reading the prompt", 0.25, "512 of 2,048 tokens")
    with capture_output() as shown:
        answer = Shown()
        for chunk in (
            Chunk(queued=True),
            Chunk(progress=reading),
            Chunk(notice="429, attempt 2 of 3 after 1 s"),
            Chunk(reasoning="Hm."),
            Chunk("So"),
        ):
            answer.response.add(chunk)
            clock.now += 1
            answer.view.draw()
    texts = [visible_text(output) for output in shown.outputs]
    assert texts == [
        "tiny · queued",
        "tiny · reading the prompt (512 of 2,048 tokens)",
        "tiny · 429, attempt 2 of 3 after 1 s … 3 s",
        "thinking, 3 characters so far",
        so_far("Reasoning · 3 characters (reply.reasoning)\nSo"),
    ]
    assert 'value="0.250"' in shown.outputs[1].data["text/html"]


def test_without_live_output_only_the_whole_answer_is_shown() -> None:
    with capture_output() as shown:
        answer = Shown(live=False)
        for text in ("Par", "is"):
            answer.add(text)
        answer.finish()
    (output,) = shown.outputs
    assert plain(output).startswith("Paris\n\n")
    assert "display_id" not in (output.transient or {})


@pytest.mark.parametrize(
    ("finish", "label"),
    [("stop", ""), ("length", "\n\ncut off at 2 tokens (--max-new-tokens)"),
     ("cancelled", "\n\nstopped by you; incomplete"), ("truncated", "\n\nended early; incomplete")],
)  # fmt: skip
def test_quiet_hides_the_footer_and_shows_why_an_answer_is_incomplete(
    finish: FinishReason, label: str
) -> None:
    with capture_output() as shown:
        answer = Shown(quiet=True)
        answer.add("Paris")
        answer.finish(finish)
    assert plain(shown.outputs[-1]) == f"Paris{label}"


@pytest.mark.parametrize(
    ("text", "shown_text"),
    [
        ('{"a": [1]}', '{\n  "a": [\n    1\n  ]\n}'),
        ('Here:\n```json\n{"a": "é"}\n```\n', '{\n  "a": "é"\n}'),
        ('{\n\n    "a": 1\n}', '{\n  "a": 1\n}'),
    ],
)
def test_json_is_indented(text: str, shown_text: str) -> None:
    with capture_output() as shown:
        answer = Shown(format="json", quiet=True)
        answer.add(text)
        answer.finish()
    assert plain(shown.outputs[-1]) == shown_text


def test_invalid_json_is_shown_unchanged() -> None:
    with capture_output() as shown:
        answer = Shown(format="json", quiet=True)
        answer.add('{"a": ')
        answer.finish("length")
    text = '{"a":\n\ncut off at 2 tokens (--max-new-tokens)'
    assert plain(shown.outputs[-1]) == text


@pytest.mark.parametrize("form", ["markdown", "text", "code", "json"])
def test_every_form_escapes_html(form: str) -> None:
    with capture_output() as shown:
        answer = Shown(format=form)
        text = "**a** <script>alert(1)</script> <img src=x onerror=alert(1)>"
        answer.add(text)
        answer.finish()
    for output in shown.outputs:
        assert "<script" not in output.data["text/html"]
        assert "<img" not in output.data["text/html"]
        assert ("<strong>" in output.data["text/html"]) == (form in {"markdown", "code"})


def test_a_terminal_gets_text_and_a_notebook_html() -> None:
    assert isinstance(Shown().view, RichView)
    assert isinstance(Shown(format="json").view, RichView)
    assert isinstance(Shown(plain=True, format="json").view, PlainView)
    assert isinstance(Shown(TERMINAL).view, PlainView)


# -- loading --------------------------------------------------------------------------------------


def test_a_load_shows_a_bar_and_then_its_lines(clock: Clock) -> None:
    with capture_output() as shown:
        load = LoadView(NOTEBOOK, LiveArea(live=True))
        load.progress("org/<m>", None)
        assert shown.outputs == []
        load.progress("org/<m>", Progress("reading the weights", 0.5, "2 of 4"))
        load.progress("org/<m>", Progress("reading the weights", 0.6))  # too soon
        clock.now += 3
        load.progress("org/<m>", Progress("warming up"))
        clock.now += 0.3
        load.progress("org/<m>", Progress("warming up"))  # the same again
        load.finish(["m · ready in 3.0 s", "Unloaded <old>"])
    assert [plain(output) for output in shown.outputs] == [
        "Loading org/<m>: reading the weights (2 of 4) … 0 s",
        "Loading org/<m>: warming up … 3 s",
        "m · ready in 3.0 s\nUnloaded <old>",
    ]
    bars = [output.data["text/html"] for output in shown.outputs]
    assert ['value="0.500"' in bar for bar in bars] == [True, False, False]
    assert ["<progress" in bar for bar in bars] == [True, True, False]
    assert not any("<m>" in bar or "<old>" in bar for bar in bars)
    assert [output.update for output in shown.outputs] == [False, True, True]


def test_a_load_in_a_terminal_shows_only_its_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = LoadView(TERMINAL, LiveArea(live=True))
    load.progress("m", Progress("reading", 0.5))
    load.waiting("m", None)
    load.waiting("m", Progress("reading", 0.6))
    load.finish(["ready", "gone"])
    assert capsys.readouterr().out == "Loading m …\nready\ngone\n"
    with capture_output() as shown:
        still = LoadView(NOTEBOOK, LiveArea(live=False))
        still.progress("m", Progress("reading", 0.5))
        still.finish(["ready"])
    assert [plain(output) for output in shown.outputs] == ["ready"]
    assert LiveArea(live=False).wait > 0


def test_waiting_line_is_cleared_without_an_answer(clock: Clock) -> None:
    with capture_output() as captured:
        waiting = Shown()
        clock.now += 1.0
        waiting.view.draw()
        waiting.view.clear()
        answered = Shown()
        answered.add("Paris.")
        answered.finish()
        answered.view.clear()
    shown = captured.outputs
    assert "waiting for the first token" in plain(shown[0])
    assert (plain(shown[1]), visible_text(shown[1])) == ("", "")
    assert visible_text(shown[-1]).startswith("Paris.")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": "\\ud83d"}', '```json\n["\\ud83d"]\n```'],
    ids=["deep", "half a character", "in a block"],
)  # fmt: skip
def test_json_that_cannot_be_indented_is_shown(text: str) -> None:
    with capture_output() as shown:
        answer = Shown(format="json")
        answer.add(text)
        answer.finish()
    for output in shown.outputs:
        json.dumps(output.data, ensure_ascii=False).encode()
    assert shown.outputs
