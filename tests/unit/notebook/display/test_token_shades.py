"""Shaded tokens: safe, small, readable without a script, and made of the text alone."""

from __future__ import annotations

import html
import math
import random
import re
from html.parser import HTMLParser

import pytest

from llm_magic.notebook.display.token_shades import shaded
from llm_magic.types import TokenLogprob

WORDS = (
    " the",
    " of",
    "ing",
    " and",
    ",",
    " weather",
    " an",
    " is",
    "tion",
    " because",
    " that",
    ".",
)
HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</span></pre><b>", "' onclick='x",
    "\x1b[2J\u202e", "&lt;", "<!--", "]]>", "\ud800",
)  # fmt: skip


def token(text: str, probability: float, *alternatives: tuple[str, float]) -> TokenLogprob:
    others = tuple((one, math.log(share)) for one, share in alternatives)
    return TokenLogprob(text, math.log(probability), others)


class Reader(HTMLParser):
    """The elements and attributes of a page, and the text of its first block."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.titles: list[str] = []
        self.text, self._in_text = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_text = self._in_text or not self.tags
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        self._in_text = self._in_text and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_text:
            self.text += data


def test_tokens_are_shaded_by_their_probability() -> None:
    shares = (0.95, 0.89, 0.59, 0.29, 0.05)
    tokens = [token(f"w{n} ", share) for n, share in enumerate(shares)]
    page = shaded(tokens, "w0 w1 w2 w3 w4")
    assert re.findall(r'<span(?: style="background:(#\w+)")? title="(\d+%)">', page) == [
        ("", "95%"), ("#f802", "89%"), ("#f804", "59%"), ("#f806", "29%"), ("#f808", "5%"),
    ]  # fmt: skip
    assert page.index(">w4</span>") < page.index("Probability of a token")
    assert "least likely tokens</summary>" in page
    assert "least likely" not in shaded(tokens[:1], "w0")


def test_tooltip_has_the_alternatives() -> None:
    page = shaded([token("Hi", 0.3, ("Hello", 0.5), ("\n", 0.004), (" ", 1e-9))], "Hi")
    assert Reader(page).titles == ["30%\n50% Hello\n0.4% \\n\n0%  "]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_tokens_are_text(text: str) -> None:
    tokens = [token(text, 0.2, (text, 0.5)), token(" end", 0.5, (text, 0.2))]
    reader = Reader(shaded(tokens, f"{text} end"))
    assert set(reader.tags) <= {"pre", "span", "div", "details", "summary"}
    assert reader.attributes <= {"style", "title", "class"}
    assert reader.text.lstrip("\n") == f"{text} end".replace("\ud800", "\ufffd")
    assert not set("\x1b\u202e") & set("".join(reader.titles))


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.999, None])
@pytest.mark.parametrize("count", [0, 5, 20])
def test_500_tokens_take_at_most_40_kilobytes(probability: float | None, count: int) -> None:
    chance = random.Random(1)
    tokens = [
        token(
            chance.choice(WORDS),
            probability or chance.uniform(0.001, 1),
            *((chance.choice(WORDS), chance.uniform(0.001, 0.99)) for _ in range(count)),
        )
        for _ in range(500)
    ]
    text = "".join(one.text for one in tokens).strip()
    page = shaded(tokens, text)
    assert len(page.encode()) <= 40_000
    reader = Reader(page)
    assert reader.text.strip() == text
    assert len(reader.titles) == 500
    if count:
        assert all("\n" in title for title in reader.titles)


def test_tokens_around_the_text_are_not_shown() -> None:
    tokens = [token("\n\n ", 0.5), token(" Yes", 0.5), token("!\n", 0.5)]
    assert Reader(shaded(tokens, "Yes!")).text.strip("\n") == "Yes!"


def test_tokens_of_another_text_are_not_shown() -> None:
    assert shaded([token("No", 0.5)], "Yes") == shaded([], "Yes") == shaded([], "") == ""


def test_long_answer_is_shown_completely() -> None:
    tokens = [token(" a", 0.5) for _ in range(12_000)]
    reader = Reader(shaded(tokens, "a" + " a" * 11_999))
    assert len(reader.titles) == 5000
    assert html.unescape(reader.text).count("a") == 12_000


def test_page_has_no_blank_line() -> None:
    page = shaded([token("a\n\n\nb", 0.5), token("\n\n", 0.5), token("c", 0.5)], "a\n\n\nb\n\nc")
    assert not re.search(r"\n[ \t]*\n", page)
    assert Reader(page).text.strip("\n") == "a\n\n\nb\n\nc"
