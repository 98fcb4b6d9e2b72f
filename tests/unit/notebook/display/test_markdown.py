"""The HTML made from a model's words: harmless whatever they are, and as they were meant."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_magic.notebook.display import highlight
from llm_magic.notebook.display.markdown import escape_pre, render, render_code
from llm_magic.text.code_blocks import code_blocks
from tests.payloads import payloads, violations

_FRAGMENTS = [*"`~*_[]()<>!#-+|\\$\"'&;:=/{}\n\t a1", "\n\n", "    ", "> ", "- ", "1. ", "|-|\n"]
_FRAGMENTS += [
    "```python\n",
    "~~~",
    "$$",
    "\\[",
    "\\]",
    "\\(",
    "\\)",
    "\\href{",
    "\\begin{",
    "&#60;",
    "&#10;",
]
_FRAGMENTS += [
    "[^1]",
    "[^1]: ",
    "[^a]",
    "[^a]: ",
    "\u05d0",
    "https://a.b/",
    "www.a.b",
    "<sub>",
    "</sub>",
    "<br>",
]
_FRAGMENTS += [
    "```math\n",
    "\n```\n",
    "\\begin{align}",
    "<script>",
    "onerror=x",
    "javascript:",
    "http://a.b/",
    "![a](http://x)",
    "[r]: ",
]
_FRAGMENTS += ["\0", "\ud800", "\udc00", "\u202e", "\x85", "\r\n", *payloads().values()]
_SOUP = st.lists(st.sampled_from(_FRAGMENTS), max_size=40).map("".join)


def _body(text: str) -> str:
    """Return what `render` puts into its frame."""
    start, _, body = render(text).partition("\n")
    assert start.startswith('<div class="mathjax_ignore tex2jax_ignore" ')
    return body.removesuffix("</div>\n")


def _formulas(text: str) -> list[str]:
    return re.findall(r'<(?:span|div) class="mathjax_process[^>]*>([^<]*)</', render(text))


# Safety


@pytest.mark.parametrize("name", payloads())
def test_a_hostile_text_becomes_harmless_html(name: str) -> None:
    text = payloads()[name]
    assert violations(render(text)) == []
    assert violations(escape_pre(text)) == []
    for language in ("html", "python", text):
        assert violations(render_code(text, language)) == []
    for block in code_blocks(text):
        assert re.fullmatch(r"[a-z0-9+#-]*", block.language)


@pytest.mark.parametrize(
    "html",
    [
        "<img>",
        "<p onclick='x'>",
        "<p class='x'>",
        "<a href='javascript:x'>",
        "<pre style='background:url(x)'>",
        "<p></div>",
        "<!-- x -->",
        r"<span class='mathjax_process tex2jax_process'>\(\href{x}{y}\)</span>",
    ],
)
def test_violations_are_found(html: str) -> None:
    assert violations(html)


@given(st.one_of(st.text(), _SOUP))
@settings(deadline=None)
def test_any_text_becomes_harmless_html(text: str) -> None:
    html = render(text)
    assert violations(html) == []
    assert html == render(text)
    html.encode()
    # In a notebook exported to Markdown, a blank line would end the HTML.
    assert re.search(r"[\r\n][ \t]*[\r\n]", html) is None


@given(st.one_of(st.text(), _SOUP), st.text())
@settings(deadline=None)
def test_any_code_becomes_harmless_html(code: str, language: str) -> None:
    html = render_code(code, language) + escape_pre(code)
    assert violations(html) == []
    assert re.search(r"[\r\n][ \t]*[\r\n]", html) is None
    for block in code_blocks(code):
        assert violations(render_code(block.code, block.language)) == []


@pytest.mark.parametrize(
    "unit", ["`", "[", "![", "[a](", "<", "*a_ ", "> ", "$$ a\n", "\\(", "\\[ a\n", "|\n", "```\n"]
)
def test_the_time_grows_no_faster_than_the_text(unit: str) -> None:
    def once(size: int) -> float:
        # Of this thread alone: others, left over from other tests, spin on the same clock.
        started = time.thread_time()
        render(unit * (size // len(unit)))
        return time.thread_time() - started

    # The best of three: a garbage collection of everything that torch imports takes half a second.
    most = 12 * min(once(10_000) for _ in range(3)) + 0.05
    assert any(once(40_000) < most for _ in range(3))


_COSTLY = {
    "pictures": "![", "brackets": "[", "links": "[a](", "emphasis": "*_*_", "declarations": "<![CDATA[",
    "definitions": "a\n: b\n", "headings": "a\n===\n", "rules": "---\n", "lines": "a\n",
    "paragraphs": "a\n\n", "items": "- a\n", "nested items": "- - - - - - - a\n",
    "nested quotes": "> > > > > > a\n", "quotes and items": "> - > - a\n", "numbers": "1. 1. 1. a\n\n",
    "references": "[a\n", "targets": "[a]:\n", "addresses": "<http://a.b>", "escapes": "\\\n",
    "notes": "[^1]: a\n\n", "nested notes": "[^1]: [^1]: [^1]: [^1]: a\n", "references of notes": "[^1]",
    "brackets of an address": "http://a.b/(((((((((((((((((((((((((((((())))))))))))))))))))))))))))) ",
    "subscripts": "<sub>a</sub>", "items in both directions": "- \u05d0\n- a\n",
    "fences": "```\n```\n", "formulas": "$$ a\n", "entities": "&#x41;", "links to sites": "[a](http://b.c) ",
}  # fmt: skip
_COSTLY_STARTS = {
    "table": ("|a|b|\n|-|-|\n", "|x|y|\n"),
    "table of short rows": ("a|b\n-|-\n", "a\n"),
    "wide table": ("|a" * 7000 + "|\n" + "|-" * 7000 + "|\n", "|\n"),
    "very wide table": ("|a" * 60_000 + "|\n" + "|-" * 60_000 + "|\n", "|\n"),
    "lazy lines": ("> " * 19 + "a\n", "b\n"),
}
_ALL_COSTLY = {name: ("", unit) for name, unit in _COSTLY.items()} | _COSTLY_STARTS


def _rendered(text: str) -> tuple[float, str]:
    """Return the seconds of this thread alone, and the HTML."""
    started = time.thread_time()
    html = render(text)
    return time.thread_time() - started, html


@pytest.fixture(scope="module")
def usual() -> float:
    """Return the seconds that a long ordinary text takes here."""
    ordinary = "The quick brown fox jumps over the **lazy** dog.\n\n- one item of it\n- two\n\n"
    return min(_rendered(ordinary * (100_000 // len(ordinary)))[0] for _ in range(3))


@pytest.mark.parametrize("name", _ALL_COSTLY)
def test_costly_text_takes_no_longer_than_long_ordinary_text(name: str, usual: float) -> None:
    start, unit = _ALL_COSTLY[name]
    costly = start + unit * ((290_000 - len(start)) // len(unit))
    seconds, html = _rendered(costly)
    most = 8 * usual + 0.1
    # A garbage collection may come in between, once.
    assert seconds < most or _rendered(costly)[0] < most
    assert len(html) < 2_500_000


def test_costly_text_is_shown_without_markdown() -> None:
    text = "![<b>" * 50_000
    assert render(text) == escape_pre(text)


def test_slow_lexer_is_stopped() -> None:
    code = "\n " * 9_000  # Pygments' Python lexer needs about 10 s for this
    started = time.thread_time()
    html = render(f"```python\nx = 1{code}\ny = 2\n```\n" + "```c\n" + "\n" * 9_000 + "```")
    assert time.thread_time() - started < 5
    assert "y = 2" in html


def test_importing_it_imports_no_parser() -> None:
    code = (
        "import sys, llm_magic.notebook.display.markdown as m; print(*sys.modules)\n"
        "m.render('x'); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = (line.split() for line in run.stdout.splitlines())
    assert not {"markdown_it", "mdit_py_plugins", "pygments", "IPython"} & set(before)
    assert "markdown_it" in after


# Links and pictures


def test_only_web_addresses_become_links() -> None:
    html = _body("[a](https://a.b/c?d=1&e#f) <mailto:me@a.b> [b](/lab/tree/x) [c](//evil.example)")
    assert html.count("<a ") == 2
    assert (
        '<a href="https://a.b/c?d=1&amp;e#f" rel="noopener noreferrer nofollow" target="_blank">a</a>'
        in html
    )
    assert "[b](/lab/tree/x) [c](//evil.example)" in html
    assert "href=" not in _body("[a](http://'/x) [b](https://bank.example@evil.example/)")
    assert 'href="http://xn--bcher-kva.example/"' in _body("<http://bücher.example/>")
    assert _body("[a]() //a.b") == "<p>a //a.b</p>\n"


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("See https://a.b/c_d_e?f=1&g=2#h.", ["https://a.b/c_d_e?f=1&g=2#h"]),
        ("(https://a.b/c_(d)), http://e.f!", ["https://a.b/c_(d)", "http://e.f"]),
        ('**https://a.b/**, "http://c.d:80/e"', ["https://a.b/", "http://c.d:80/e"]),
        ("www.a.b/c and mail@www.a.b or x.www.a", ["http://www.a.b/c"]),
        ("\u8bf7\u770bhttps://a.b\uff0c\u8c22\u8c22", ["https://a.b"]),
        ("| https://a.b |\n|---|\n| https://c.d |", ["https://a.b", "https://c.d"]),
        ("https://bank.example@evil.example https://b\u0430nk.example https://a.b%2f", []),
        ("`https://a.b` [x](https://c.d/https://e.f)", ["https://c.d/https://e.f"]),
        ("[https://bank.example](https://a.b) [https://c.d](/e)", ["https://a.b", "https://c.d"]),
        (f"https://a.b/{'x' * 2_000} ftp://a.b file:///a http:a http://", []),
    ],
)
def test_addresses_in_the_text_become_links(text: str, addresses: list[str]) -> None:
    assert [unescape(url) for url in re.findall('<a href="([^"]*)"', _body(text))] == addresses


@pytest.mark.parametrize(
    "text", ["![a cat](http://evil.example/x?q=1)", "![a cat][r]\n\n[r]: http://evil.example/x?q=1"]
)
def test_a_picture_becomes_a_link_that_names_its_host(text: str) -> None:
    html = _body(text)
    assert '<a href="http://evil.example/x?q=1" ' in html
    assert ">a cat (image: evil.example)</a>" in html


def test_a_picture_in_a_link_becomes_text() -> None:
    html = _body("[![logo](http://i.example/x.png)](http://a.example)")
    assert html.count("<a ") == 1
    assert ">logo (image: i.example)</a>" in html


# Formulas


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        (r"Let $a_1*b_2*c_3 < d$ be", [r"\(a_1*b_2*c_3 &lt; d\)"]),
        (r"Let \(a_i \\ b_i\) be", [r"\(a_i \\ b_i\)"]),
        (r"So $$x_1 * y * z$$ follows", [r"\[x_1 * y * z\]"]),
        (r"So \[ x_1 * y * z \] follows", [r"\[ x_1 * y * z \]"]),
        ("Then\n\\[\na\n=\nb \\\\[2pt]\n- c\n\\]\nand", ["\\[\na\n=\nb \\\\[2pt]\n- c\n\\]"]),
        ("$$\na\n---\n& b\n$$", ["\\[\na\n---\n&amp; b\n\\]"]),
        ("> $$\n> a\n> $$", ["\\[\na\n\\]"]),
        ("- so\n  \\[\n  a\n  \\]\n- $b$", ["\\[\na\n\\]", r"\(b\)"]),
        ("| $a$ | \\(b\\) |\n|---|---|", [r"\(a\)", r"\(b\)"]),
        (r"$\text{for } \mathbb{R}^n \,\{x\}$", [r"\(\text{for } \mathbb{R}^n \,\{x\}\)"]),
        (
            r"$$\begin{aligned} a &= b \end{aligned} \label{x}$$",
            [r"\[\begin{aligned} a &amp;= b \end{aligned} \]"],
        ),
        (r"**$x$** and *\(y\)*", [r"\(x\)", r"\(y\)"]),
        ("It costs $5 and $10, or $7/month, 3$ and 4$ (US$).", []),
        (r"It costs \$5 or \$6, $ x $, $$$$ and $", []),
        ("`$x$` and ``\\(y\\)``\n\n    $z$\n\n```\n$w$\n```", []),
        ("$$\nunclosed\n\nnext $$", []),
        (r"\\(x\\) and \[y", []),
        ("$x$ is 5", [r"\(x\)"]),
        ("$x$ and \\", [r"\(x\)"]),
        ("Then\n$$\na\n- c\n$$\nand", ["\\[\na\n- c\n\\]"]),
        ("$$a$$ and $$b$$", [r"\[a\]", r"\[b\]"]),
        ("- $$ a\n- b $$", []),
        ("- \\begin{align}\na\n\\end{align}", []),
        ("- \\[ a\n- b \\]", []),
        (
            "\\begin{align}\na &= b \\\\\n- c\n\\end{align}",
            ["\\[\\begin{align}\na &amp;= b \\\\\n- c\n\\end{align}\\]"],
        ),
        ("Then\n\\begin{gather*}a\\end{gather*}\nand", [r"\[\begin{gather*}a\end{gather*}\]"]),
        ("> \\begin{cases}\n> a\n> \\end{cases}", []),
        (
            "> \\begin{pmatrix}\n> a\n> \\end{pmatrix}",
            ["\\[\\begin{pmatrix}\na\n\\end{pmatrix}\\]"],
        ),
        (
            "1. so\n\n   \\begin{equation}\n   a\n   \\end{equation}",
            ["\\[\\begin{equation}\na\n\\end{equation}\\]"],
        ),
        ("\\begin{align}\na\n\nb\n\\end{align}", []),
        ("    \\begin{align}a\\end{align}\n\n```\n\\begin{align}a\\end{align}\n```", []),
    ],
)
def test_formulas_survive_markdown(text: str, formulas: list[str]) -> None:
    assert _formulas(text) == formulas


@pytest.mark.parametrize(
    "tex",
    [
        r"\href{javascript:x}{y}",
        r"\begin{html}x\end{html}",
        r"\begin {align}x\end {align}",
        r"\unknown x",
        r"\\\def\x{y}",
        "x" * 6_000,
    ],
)
def test_a_formula_of_unknown_commands_is_shown_as_its_source(tex: str) -> None:
    assert _body(f"Let ${tex}$ be") == f"<p>Let <code>\\({tex}\\)</code> be</p>\n"
    assert _formulas(f"$$\n{tex}\n$$") == []
    assert f"\n{tex}\n" in _body(f"$$\n{tex}\n$$")


def test_a_formula_may_be_a_block_of_code() -> None:
    assert _formulas("```math\nx\n\ny\n```") == ["\\[x&#10;\ny\\]"]
    for text in ("```math\nx", "```latex\nx\n```", "```math\n\\href{a}{b}\n```"):
        assert _formulas(text) == []
        assert _body(text).startswith("<pre")


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a\n$$\n\\frac{a_1*b_2\n- c", "$$\n\\frac{a_1*b_2\n- c"),
        ("\\[ a_1\n# b", "\\[ a_1\n# b"),
        ("- a\n\n  \\begin{align}\n  a &= b\n  1. c\n", "\\begin{align}\na &amp;= b\n1. c"),
        ("\\begin{itemize}\n- a", ""),
        ("$$ a\n\nb", ""),
        ("$$a$$ b", ""),
    ],
)
def test_a_formula_without_its_end_is_shown_as_its_source(text: str, source: str) -> None:
    found = re.findall(r"<code[^>]*>([^<]*)</code>", _body(text))
    assert found == ([source] if source else [])
    assert _formulas(f"{text}\n$$\n") == [] or "$$a$$" in text or text.startswith(("$$", "a\n$$"))


# Notes


def test_notes_are_shown_where_they_are_with_their_labels() -> None:
    html = _body(
        "a[^1] b[^long]\n\n[^1]: *One*.\n[^long]:\n    ```\n    x\n    ```\n\n    two\n\nc[^1]\n"
    )
    assert "<p>a<sup>[1]</sup> b<sup>[long]</sup></p>" in html
    assert "<p><sup>[1]</sup> <em>One</em>.</p>\n</div>" in html
    assert (
        html.index("<p><sup>[long]</sup></p>")
        < html.index("<pre")
        < html.index("<p>two</p>\n</div>")
    )
    assert html.endswith("<p>c<sup>[1]</sup></p>\n")
    assert "id=" not in html
    assert "<a " not in html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a[^1]", "a<sup>[^1]</sup>"),
        ("[^0-9] [^abc] [^1234] [^]", "[^0-9] [^abc] [^1234] [^]"),
        (r"a \[^1] `[^1]` [^1](http://a.b)", None),
    ],
)
def test_what_is_no_note_keeps_its_letters(text: str, html: str | None) -> None:
    shown = unescape(re.sub("<[^>]+>", "", _body(text)))
    assert shown.strip() == re.sub(r"[\\`]", "", text).replace("[^1](http://a.b)", "^1")
    assert html is None or _body(text) == f"<p>{html}</p>\n"


def test_a_note_that_is_never_referenced_is_shown() -> None:
    assert "unused</p>" in _body("a\n\n[^x]: unused")


# Directions


def test_blocks_have_the_direction_of_their_text() -> None:
    html = _body(
        "# \u05d0\n\n`x` \u05d0 b\n\n- \u05d0\n- b (c)\n- d \u05d0\n\n> \u05d0\n\n"
        "|\u05d0|b|\n|-|-|\n|c|1|\n\nb \u05d0\n\n- b\n- \u05d0\n\n```\n\u05d0\n```\n\n1. 2\n"
    )
    assert '<p dir="rtl" style="text-align:right"><code dir="ltr">x</code> \u05d0 b</p>' in html
    items = (
        '<ul dir="rtl">\n<li>\u05d0</li>\n<li><span dir="ltr">b (c)</span></li>\n<li>d \u05d0</li>'
    )
    assert items in html
    assert re.search('<blockquote [^>]*dir="rtl"', html)
    assert '<table dir="rtl">' in html
    assert '<td style="text-align:right"><span dir="ltr">c</span></td>' in html
    assert "<p>b \u05d0</p>" in html
    assert '<ul>\n<li>b</li>\n<li><span dir="rtl">\u05d0</span></li>' in html
    assert "direction:ltr" in html
    assert "dir=" not in _body("# a\n\n- b\n\n> c\n\n|d|\n|-|\n")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("<br>\na", "<p><br />\na</p>\n"),
        ("- <br>\n  - a", "<ul>\n<li><br />\n<ul>\n<li>a</li>\n</ul>\n</li>\n</ul>\n"),
        ("a&#10;&#xD;&#10;&#33;&#91;b&#93;(//c.d)", "<p>a  ![b](//c.d)</p>\n"),
    ],
)
def test_no_blank_line_ends_the_html_of_an_exported_notebook(text: str, html: str) -> None:
    assert _body(text) == html


# Text and code


def test_markdown_becomes_elements() -> None:
    html = _body("# T\n\na **b** ~~c~~\n\n3. d\n\n|e|f|\n|-|-:|\n|g|h|\n\n> i\n\n---\n")
    for part in (
        '<h1 style="font-size:1.45em;font-weight:600">T</h1>',
        "<strong>b</strong> <s>c</s>",
        '<ol start="3">',
        '<th style="text-align:left">e</th>',
        '<td style="text-align:right">h</td>',
        "<p>i</p>\n</blockquote>",
        "<hr />",
    ):
        assert part in html


def test_tasks_have_check_boxes_with_labels() -> None:
    html = _body("- [ ] *a*\n- [x] b\n  1. [X] c\n- [ ]d\n- \\[ ] e\n- f\n")
    boxes = re.findall(r"<li([^>]*)>(?:<p>)?<label><input ([^>]*)>(.*)</label>", html)
    item = ' style="list-style:none"'
    assert [(style, "checked" in box, text) for style, box, text in boxes] == [
        (item, False, " <em>a</em>"), (item, True, " b"), (item, True, " c"),
    ]  # fmt: skip
    assert all("disabled" in box for _, box, _ in boxes)
    assert "<li>[ ]d</li>\n<li>[ ] e</li>\n<li>f</li>" in html


def test_check_box_that_is_also_a_link_leads_to_the_web_safely() -> None:
    assert 'rel="noopener noreferrer nofollow"' in _body("[x]: https://a.b\n\n- [x] c\n")


def test_a_few_elements_without_attributes_are_rendered() -> None:
    html = _body("H<sub>2</sub>O, <SUP>3</SUP>, <kbd>C</kbd><br>a<br />b")
    assert html == "<p>H<sub>2</sub>O, <sup>3</sup>, <kbd>C</kbd><br />a<br />b</p>\n"
    others = "<sub>a <sub onclick=x>b</sub> <b>c</b> <sub></sub>"
    assert unescape(_body(others)) == f"<p>{others}</p>\n"


def test_numbers_of_a_long_list_have_space() -> None:
    assert "padding-left:3em" in _body("99. a\n100. b\n")
    assert "padding" not in _body("98. a\n99. b\n")


def test_what_is_wide_has_its_own_box() -> None:
    text = f"|a|\n|-|\n|b|\n\n$$\nx\n$$\n\n$y{'+y' * 60}$ $z$\n\n{'> ' * 8}deep\n"
    html = render(text)
    assert html.startswith('<div class="mathjax_ignore tex2jax_ignore" style="overflow-x:auto;')
    assert '<div style="overflow-x:auto"><table>' in html
    boxes = re.findall(r'tex2jax_process" style="([^"]*)overflow-x:auto', html)
    assert len(boxes) == 2
    assert "max-width:100%" in boxes[1]
    assert html.count("min-width:12em") == 2


def test_code_is_colored_by_jupyterlabs_theme() -> None:
    html = render_code("def f(x):\n    return '<b>' # c\n", "Python")
    assert '<code class="language-python" ' in html
    assert '<span style="color:var(--jp-mirror-editor-keyword-color, #158515)">def</span>' in html
    assert "&lt;b&gt;" in html
    assert render("```python\ndef f(x):\n    return '<b>' # c\n```").count(html) == 1


@pytest.mark.parametrize("language", sorted(highlight.LANGUAGES))
def test_every_language_has_a_lexer_and_keeps_the_code(language: str) -> None:
    code = '\n\n<?php x = "a" + 1; # b\n/* c */ if (d) { e(f); }\n\n'
    html = render_code(code, language)
    text = unescape(re.sub("<[^>]+>", "", html))
    assert text == f"{code}\n"


@pytest.mark.parametrize("language", ["", "klingon", "mermaid", "python" * 9, "x y", 'a"b'])
def test_an_unknown_language_is_plain(language: str) -> None:
    assert "<span" not in render_code("def f(): pass", language)


def test_very_long_code_is_plain() -> None:
    assert "<span" not in render_code("x = 1\n" * 10_000, "python")
    assert render("*a* " * 100_000).startswith("<pre")


def test_unclosed_fence_is_a_block() -> None:
    html = render("Look:\n```python\n# x")
    assert html.count("<pre") == 1
    assert "# x</span></code></pre>" in html


def test_the_colours_are_readable_on_white_and_on_black() -> None:
    for _, colour in highlight.COLORS.values():
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
        ]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) > 4, colour
        assert (luminance + 0.05) / 0.05 > 4, colour


def test_plain_text_is_unchanged() -> None:
    assert ">\n\n  *a*  <b>\n</pre>" in unescape(escape_pre("\n  *a*  <b>\n"))
