"""``--logprobs`` in the cells of a real kernel: what is shown, what is stored, what is noted."""

from __future__ import annotations

import pytest

from tests.kernels import Kernel

_SETUP = """import math
from llm_magic.types import Chunk, TokenLogprob, Usage
from tests.scripted import Hang
def token(text, share, *others):
    logprobs = TokenLogprob(text, math.log(share), tuple((one, math.log(its)) for one, its in others))
    return Chunk(text=text, tokens=1, logprobs=(logprobs,))
def will(*chunks, **last):
    backend.will(*chunks, Chunk(finish_reason="stop", usage=Usage(7, len(chunks)), **last))
answer = (token("Hello", 0.95), token(" <b>", 0.04, (" there", 0.5), (" &you", 0.2)), token(" **x**", 0.4))
"""
SHADED = '<span style="background:#f808" title="4%\n50%  there\n20%  &amp;you"> &lt;b&gt;</span>'


@pytest.fixture(scope="module")
def k(scripted: Kernel) -> Kernel:
    scripted.ok(_SETUP)
    return scripted


def test_answer_is_shown_as_shaded_tokens(k: Kernel) -> None:
    k.ok("will(*answer)")
    ran = k.ok("%%llm --quiet --logprobs 2 -o reply\nHi")
    assert ran.text == "Hello <b> **x**"
    assert SHADED in ran.html
    assert '<span title="95%">Hello</span>' in ran.html
    assert "**x**</span>" in ran.html, "Markdown is not rendered"
    assert "<script" not in ran.html
    assert k.value("backend.requests[-1].config.logprobs") == 2
    assert k.value("[t.text for t in reply.tokens]") == ["Hello", " <b>", " **x**"]
    assert k.value("round(reply.tokens[0].probability, 3)") == 0.95


def test_answer_grows_as_plain_text(k: Kernel) -> None:
    k.ok("go = Hang()\nbackend.will(token('**Hello**', 0.5), go, token(' you', 0.5))")
    cell = k.send("%%llm --logprobs 0 -o partial\nHi")
    k.wait_for_output(cell, "**Hello**")
    k.interrupt()
    ran = k.wait(cell)
    assert ran.ename == "Interrupted"
    assert "**Hello**</span>" in ran.html
    assert k.value("[t.text for t in llm.last.tokens]") == ["**Hello**"]


def test_form_that_the_user_has_chosen_stays(k: Kernel) -> None:
    k.ok("will(*answer)")
    ran = k.ok("%%llm --quiet --logprobs 2 -f markdown -o reply\nHi")
    assert "<strong>x</strong>" in ran.html
    assert "title=" not in ran.html
    assert k.value("len(reply.tokens)") == 3
    k.ok("will(*answer)")
    ran = k.ok("%%llm --quiet --logprobs 2 --plain\nHi")
    assert ran.text == "Hello <b> **x**\n"


def test_value_is_shown_above_its_tokens(k: Kernel) -> None:
    k.ok("""will(token('{"name": "', 0.9), token('Ada', 0.3), token('"}', 0.99))""")
    ran = k.ok("%%llm --quiet --schema 'name str' --logprobs 1\nWho?")
    assert ran.text == "name  Ada"
    assert ran.html.index(">Ada</td>") < ran.html.index('title="30%">Ada</span>')


def test_setting_of_the_session_applies_to_all_answers(k: Kernel) -> None:
    k.ok("%llm_config logprobs=1")
    k.ok("will(*answer)")
    assert SHADED.split("20%")[0].rstrip() in k.ok("%%llm\nHi").html
    k.ok("%llm_config logprobs=none")
    k.ok("will(*answer)")
    assert "title=" not in k.ok("%%llm\nHi").html


def test_server_without_probabilities_is_noted(k: Kernel) -> None:
    k.ok("will('Hello', ' **you**')")
    ran = k.ok("%%llm --logprobs 2 -o reply\nHi")
    assert "sent no token probabilities." in ran.text
    assert ran.text.startswith("Hello **you**")
    assert k.value("reply.tokens") == ()
    k.ok("will(token('Hello', 0.5), 'you')")
    ran = k.ok("%%llm --logprobs 2 -o reply\nHi")
    assert "do not make up the answer, so they are only in reply.tokens." in ran.text
    assert k.value("len(reply.tokens)") == 1
    k.ok("will(*answer)")
    assert "Note" not in k.ok("%%llm --logprobs 2\nHi").text


def test_wrong_number_is_an_error(k: Kernel) -> None:
    ran = k.run("%%llm --logprobs 21\nHi")
    assert ran.error == "logprobs=21 is out of range. It must be 0 to 20."


def test_dry_run_and_help_show_the_option(k: Kernel) -> None:
    assert "logprobs 5" in k.ok("%%llm --dry-run --logprobs 5\nHi").text
    assert "--logprobs K" in k.ok("%llm -h").text


def test_background_answer_is_shaded(k: Kernel) -> None:
    k.ok("will(*answer)")
    cell = k.send("%%llm --bg --logprobs 2 -o job\nHi")
    assert k.wait(cell).status == "ok"
    k.ok("%llm_wait")
    assert k.value("len(job.reply.tokens)") == 3
    assert k.value("job.state") == "done"


def test_map_saves_the_tokens(k: Kernel) -> None:
    k.ok("will(*answer)\nwill(*answer)")
    k.ok("%%llm --over ['a', 'b'] --save tokens.jsonl --logprobs 2 -t 0.5 -o many\n{item}")
    assert k.value("[len(one.tokens) for one in many]") == [3, 3]
    k.ok("first = many[0].tokens")
    k.ok("%%llm --over ['a', 'b'] --save tokens.jsonl --logprobs 2 -t 0.5 -o again\n{item}")
    assert k.value("again[0].tokens == first")
