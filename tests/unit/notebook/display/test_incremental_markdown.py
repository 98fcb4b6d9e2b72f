"""The HTML of a text that is still incomplete equals that of the text at each moment."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llm_magic.notebook.display import markdown
from llm_magic.notebook.display.markdown import MAX_MARKDOWN, IncrementalMarkdown
from tests.benchmarks.producer import tokens
from tests.payloads import payloads, violations

_BLOCKS = [
    "# Head\n", "Setext\n===\n", "A paragraph\nof two lines\n", "- a\n- b\n", "- a\n\n  in it\n",
    "1. one\n\n   ```python\n   x = 1\n\n   y\n   ```\n\n2. two\n", "2", "2. two\n", "> a\nlazy\n",
    "> - nested\n>\n> more\n", "| a | b |\n|:--|--:|\n| 1 | 2 |\n", "| not yet |\n", "|---|\n",
    "```python\ndef f():\n\n    return 1\n```\n", "```\nopen\n\n# no heading\n", "~~~ c\nint x;\n",
    "    indented\n\n    code\n", "***\n", "$$\nx^2\n$$\n", "\\[ a\n# b\nc \\]\n", "$$ open\n", "- \n",
    "\\]\n", "$$\n", "- [ ] a\n- [x] b\n",
    "[x] \n", "\\begin{align}\na &= b\n", "\\end{align}\n", "\\begin{align}\n- c\n\\end{align}\n",
    "$$ a\n- b $$\n", "$x$ is 5", "$$a$$ b\n", "- $$\n", "[x]: http://i.j\n",
    "[see][r] and [s]\n", "[r]: http://a.b/\n", "[r]: http://c.d/ 'two'\n",
    "a[^1] b[^n]\n", "[^1]: one\n", "[^n]: two\n\n    more\n", "    - in it\n", "> [^n]: three\n",
    "\u05d0 `x`\n", "- \u05d0\n- b\n", "see https://a.b/c_d_e and www.x.y\n", "H<sub>2</sub>O<br>a\n",
    "```math\nx\n```\n", "100. a\n", "$$\n\\frac{a_1*b\n", "\\[\n- a\n",
    "[s]:\n", "http://e.f\n", "> [s]: http://g.h\n", "a  \nb\\\nc\n", "Costs $5 and $10\n", "*it*",
]  # fmt: skip
_BETWEEN = ["\n", "\n\n", "", " ", "  \n", "\r\n", "\r", "\r\n\r\n", "\t\n", "\n    ", "\n\u2028\n"]
_SURROGATES = ["\ud83d", "\ude00", "\n\n\ud83d\ude00\n\n", "\0"]
_PIECES = st.sampled_from([*_BLOCKS, *_BETWEEN * 3, *_SURROGATES, *payloads().values()])


def states(pieces: Iterable[str], *, by_letter: bool) -> Iterable[str]:
    """Yield what is there after every piece, or after every letter."""
    text = ""
    for piece in pieces:
        for part in piece if by_letter else [piece]:
            text += part
            yield text


@given(st.lists(_PIECES, max_size=12), st.booleans())
@example(["1. one", "\n\n", "2", ". two\n", "\n", "end\n"], False)
@example(["[a][r]\n\n", "b\n\n", "c\n\n", "[r]: http://x", ".y/", "z\n", "\nd\n\n[r]\n"], True)
@example(["$$ a\n", "# b\n", "c\n", "$$\n", "\n", "d\n"], True)
@example(["> [r]: http://a.b\n", "\n", "[r]\n", "\n", "[r]: http://c.d\n\n", "[r]\n"], False)
@example(["a[^n]\n\n", "b\n\n", "c\n\n", "[^n]: d\n", "\n", "e[^n]\n\n", "[^n]: f\n"], True)
@example(["$$\n", "a_1*b\n", "- c\n", "\\frac{1}{2}\n", "$$\n", "\nd"], True)
@settings(deadline=None, max_examples=60)
def test_html_of_each_state_equals_that_of_the_whole_text(
    pieces: list[str], by_letter: bool
) -> None:
    incremental, html = IncrementalMarkdown(), ""
    for text in states(pieces, by_letter=by_letter):
        html = incremental.render(text)
        assert html == markdown.render(text), text
    assert violations(html) == []


@pytest.mark.parametrize("name", payloads())
def test_a_hostile_text_is_harmless_while_it_is_written(name: str) -> None:
    incremental, payload = IncrementalMarkdown(), payloads()[name]
    step = 1 + len(payload) // 60
    parts = [payload[start : start + step] for start in range(0, len(payload), step)]
    for text in states(["Before.\n\n", *parts, "\n\nBehind.\n\n", "End.\n"], by_letter=False):
        assert violations(incremental.render(text)) == [], text


def test_replaced_text_is_rendered_anew() -> None:
    incremental = IncrementalMarkdown()
    first, second = "a\n\n[r]: http://a.b\n\nb\n\nc\n", "a\n\n[r]\n\nd\n"
    for text in (first, second, "", first, first[:4], second):
        assert incremental.render(text) == markdown.render(text)


def test_too_long_text_is_shown_without_markdown() -> None:
    incremental, text = IncrementalMarkdown(), "*a*" + " word" * ((MAX_MARKDOWN - 3) // 5) + "ab"
    assert len(text) == MAX_MARKDOWN
    assert "<em>a</em>" in incremental.render(text)
    assert incremental.render(text + "b") == markdown.escape_pre(text + "b")


def test_costly_text_is_plain_and_is_not_parsed_again() -> None:
    incremental, text = IncrementalMarkdown(), "![" * 20_000
    assert incremental.render(text) == markdown.escape_pre(text)
    began = time.thread_time()
    for count in range(1, 50):
        longer = text + "![" * count
        assert incremental.render(longer) == markdown.escape_pre(longer)
    # Each of them would take some tenths of a second.
    assert time.thread_time() - began < 2
    assert incremental.render("*a*") == markdown.render("*a*")


def parsed_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the texts that the parser gets from now on."""
    parse, parsed = MarkdownIt.parse, list[str]()

    def record(parser: MarkdownIt, text: str, env: dict[str, object]) -> object:
        parsed.append(text)
        return parse(parser, text, env)

    monkeypatch.setattr(MarkdownIt, "parse", record)
    return parsed


def test_same_text_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parsed_texts(monkeypatch)
    incremental = IncrementalMarkdown()
    assert incremental.render("*a*") == incremental.render("*a*")
    assert parsed == ["*a*"]


def test_closed_blocks_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parsed_texts(monkeypatch)
    incremental, text = IncrementalMarkdown(), "".join(tokens(8000))
    for end in range(200, len(text), 200):
        incremental.render(text[:end])
    assert sum(map(len, parsed)) < 4 * len(text)
    assert max(map(len, parsed)) < 1000


def test_notes_of_a_long_answer_are_parsed_with_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parsed_texts(monkeypatch)
    incremental, text = IncrementalMarkdown(), "".join(tokens(4000))
    text = (
        text[: text.rindex("## Step")]
        + "\\(x\\)[^1] and[^2]\n\n"
        + "".join(f"[^{n}]: {'word ' * 60}\n" for n in (1, 2, 3))
    )
    for end in range(200, len(text), 20):
        incremental.render(text[:end])
    # The whole text once for each new label, and not for each new word.
    assert sum(len(part) > len(text) / 2 for part in parsed) == 3


def test_what_is_shown_of_notes_and_formulas_stays_in_its_place() -> None:
    text = "a[^1] b\n\n$$\nx_1*y*\n$$\n\n[^1]: note\n"
    incremental = IncrementalMarkdown()
    states = [incremental.render(text[:end]) for end in range(1, len(text) + 1)]
    marked = [state for state in states if "<sup>" in state]
    assert states[states.index(marked[0]) :] == marked
    assert not any("<em>" in state or "<p>$$" in state for state in states)
    assert sum("math" in now and "math" not in after for now, after in pairwise(states)) == 0


def test_a_long_answer_costs_no_more_a_letter_than_a_short_one() -> None:
    def seconds(count: int) -> float:
        incremental, text = IncrementalMarkdown(), "".join(tokens(count))
        began = time.thread_time()
        for end in range(200, len(text), 200):
            incremental.render(text[:end])
        return time.thread_time() - began

    # Sixteen times as much if every state were rendered from its beginning.
    assert min(seconds(8000) for _ in range(2)) < 8 * min(seconds(2000) for _ in range(3)) + 0.05
