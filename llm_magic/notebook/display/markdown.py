"""A model's Markdown as HTML that runs no script and fetches nothing.

What a model writes is hostile input: JupyterLab runs the scripts in the HTML and the Markdown of a
running cell, and a script controls the kernel. Here raw HTML is text, links go to the web or
nowhere, an image is a link to it, and no attribute but `href` contains text of the model.

The parser runs on the thread that interrupts stop, and some texts of 300,000 characters take it 5
seconds. So its work is limited. The limits count steps, not seconds: the same text becomes the same
HTML on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from time import monotonic
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display.highlight import TEXT_SECONDS, escape_text, highlight
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.text import replace_surrogates

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

MAX_MARKDOWN = 300_000  # characters
_MAX_STEPS, _STEPS_OF_LINK = 30_000, 5
_MAX_TOKENS = 30_000
_TOKENS_OF_STEP = 500  # that the search for the list of a task passes in the time of a step
_MAX_HTML = 2_000_000  # longer HTML takes a page too long

# Typeset the formulas found here and nothing else: MathJax takes `$5 and $10` for one. The second
# name is the one of MathJax 2, in notebooks exported to HTML.
MATH = "mathjax_process tex2jax_process"

_BOX = (
    "margin:0.5em 0;padding:0.5em 0.75em;border-radius:3px;"
    "border:1px solid rgba(128,128,128,0.25);background:rgba(128,128,128,0.08);"
)
_CODE_STYLE = _BOX + "overflow-x:auto"
# JupyterLab gives the inner element its own background, and wraps its lines.
_INNER_STYLE = "background:none;padding:0;white-space:pre"
_COLLAPSED_STYLE = "opacity:0.75;font-size:0.9em;margin:0.2em 0"
_TEXT_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere"

# A relative link reaches the files and commands of the Jupyter server, and `http:path` is relative.
# `https://bank.example@evil.example` leads to evil.example.
_URL = re.compile(
    r"https?://([a-z0-9._:\[\]-]+)(?:[/?#]|\Z)|mailto:[^\s/]", re.ASCII | re.IGNORECASE
)
_LINE_END = re.compile(r"\r\n?|\n")  # as Markdown defines it


class TooMuchWork(Exception):
    """Raised where a text takes the parser, or a page, more work than is allowed."""


def render(text: str) -> str:
    """Return a model's Markdown as a safe HTML fragment; as plain text where it is too much work."""
    return IncrementalMarkdown().render(text)


@dataclass(frozen=True, slots=True)
class _Closed:
    """The blocks at the start of a text that no later text can change, and their HTML."""

    text: str = ""
    html: str = ""
    seconds: float = 0.0  # of their syntax highlighting
    targets: Mapping[str, Any] = field(default_factory=dict)  # of links, defined in these blocks


class IncrementalMarkdown:
    """Renders a text while it grows, and parses only its end again.

    The HTML of each state is that of the whole text, so nothing moves when the answer ends. Closed are
    the blocks before the last one that starts below an empty line: a formula may contain the starts of
    other blocks, but no empty line. A line without its end closes no block: the ``2`` below a list may
    become the list's second item.
    """

    def __init__(self) -> None:
        self._text = self._html = ""  # the latest text and its HTML
        self._costly = ""  # a text that was too much work, as is each that starts with it
        self._closed = _Closed()
        self._targets: Mapping[str, object] = {}  # of all links of the latest text

    def render(self, text: str) -> str:
        """Return the HTML of a text, which in most cases continues the one before."""
        if self._html and text == self._text:
            return self._html
        self._text = text
        try:
            if len(text) > MAX_MARKDOWN or (self._costly and text.startswith(self._costly)):
                raise TooMuchWork
            self._html = self._rendered(text)
        except TooMuchWork:
            self._costly, self._closed = text, _Closed()
            self._html = escape_pre(text)
        return self._html

    def _rendered(self, text: str) -> str:
        closed = self._closed if text.startswith(self._closed.text) else _Closed()
        while True:
            end = text[len(closed.text) :]
            env: dict[str, Any] = {"references": dict(closed.targets), "seconds": closed.seconds}
            made = parser(has_formulas="$" in end or "\\" in end)
            tokens = made.parse(replace_surrogates(end), env)
            links = env["references"].items()
            targets = {label: (one["href"], one["title"]) for label, one in links}
            if not closed.text or targets == self._targets:
                break
            # A target may be defined far below the links to it.
            closed = _Closed()
        self._targets = targets
        index, offset = _last_closed(tokens, end)
        html = closed.html + made.renderer.render(tokens[:index], made.options, env)
        if index:
            line = (tokens[index].map or [0])[0]
            above = {n: t for n, t in links if n in closed.targets or t["map"][0] < line}
            closed = _Closed(text[: len(closed.text) + offset], html, env["seconds"], above)
        self._closed = closed
        html += made.renderer.render(tokens[index:], made.options, env)
        if len(html) > _MAX_HTML:
            raise TooMuchWork
        # Of this element only the formulas found here are typeset.
        return f'<div class="{NO_MATH}">\n{html}</div>\n'


def _last_closed(tokens: Sequence[Token], text: str) -> tuple[int, int]:
    """Return where the last block starts that closes those before it: its token, its offset."""
    starts = [0, *(match.end() for match in _LINE_END.finditer(text))]
    for index in range(len(tokens) - 1, 0, -1):
        token = tokens[index]
        if token.level or token.nesting < 0 or not token.map:
            continue
        line = token.map[0]
        is_complete = line + 1 < len(starts)
        if line and is_complete and not text[starts[line - 1] : starts[line]].strip(" \t\r\n"):
            return index, starts[line]
    return 0, 0


def render_code(code: str, language: str = "") -> str:
    """Return code as one block, highlighted if the language is a known one."""
    language = fence_language(language)
    html = highlight(replace_surrogates(code), language)
    name = f' class="language-{language}"' if language else ""
    return f'<pre style="{_CODE_STYLE}"><code{name} style="{_INNER_STYLE}">{html}</code></pre>\n'


def escape_pre(text: str) -> str:
    """Return plain text unchanged, in a block that wraps long lines."""
    # HTML drops a newline right after the tag: this one, not the first of the text.
    return f'<pre style="{_TEXT_STYLE}">\n{escape_text(replace_surrogates(text))}</pre>\n'


def collapsed(summary: str, text: str) -> str:
    """Return plain text below a summary; a click shows it."""
    return (
        f'<details class="{NO_MATH}" style="{_COLLAPSED_STYLE}">'
        f'<summary style="cursor:pointer">{escape(summary)}</summary>{escape_pre(text)}</details>\n'
    )


def fence_language(info: str) -> str:
    """Return the language of a fence's info string, in letters fit for an attribute."""
    parts = re.split(r"[\s,:{]", info.strip().lstrip("{.").rstrip("}").lower(), maxsplit=1)
    return parts[0] if re.fullmatch(r"[a-z0-9+#-]{1,30}", parts[0]) else ""


@cache
def parser(*, has_formulas: bool) -> MarkdownIt:
    """Return the parser, which makes tokens of a text and safe HTML of tokens."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.tasklists import tasklists_plugin

    # This preset stops at 20 levels of nesting; more only makes "[[[[[…" slow.
    made = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    made.disable(["html_block", "html_inline"])
    made.validateLink = lambda url: _URL.match(url) is not None  # type: ignore[method-assign]
    if has_formulas:
        from llm_magic.notebook.display import latex

        latex.add_rules(made)
        for kind in ("math_inline", "math_inline_double", "math_block"):
            made.add_render_rule(kind, _math_rule)
    made.use(tasklists_plugin)
    # Rules that match nothing and count how often the rules are tried.
    alt = ["paragraph", "reference", "blockquote", "list"]
    made.block.ruler.before("table", "count", _count_line, {"alt": alt})
    made.inline.ruler.before("text", "count", _count_step)
    made.core.ruler.after("inline", "count_tasks", _count_tasks)
    made.core.ruler.push("sanitize", _sanitize)
    for kind in ("fence", "code_block"):
        made.add_render_rule(kind, _code_rule)
    return made


def _spend(env: MutableMapping[str, Any], steps: int) -> None:
    """Count steps of a text; raises `TooMuchWork` if there are too many."""
    env["steps"] = env.get("steps", 0) + steps
    if env["steps"] > _MAX_STEPS:
        raise TooMuchWork


def _count_line(state: StateBlock, _start: int, _end: int, _only_check: bool) -> bool:
    """Count a line where a block may start; rows of a table are such lines."""
    if len(state.tokens) > _MAX_TOKENS:
        raise TooMuchWork
    _spend(state.env, 1)
    return False


def _count_step(state: StateInline, _only_check: bool) -> bool:
    """Count a step; what may be a link takes several, because its address is parsed twice."""
    _spend(state.env, _STEPS_OF_LINK + 1 if state.src[state.pos] == "<" else 1)
    return False


def _count_tasks(state: StateCore) -> None:
    """Count the tokens between each task and its list, which the plugin passes one by one."""
    for index, token in enumerate(state.tokens):
        if token.type == "inline" and token.content.startswith("["):
            _spend(state.env, 1 + index // _TOKENS_OF_STEP)


def _sanitize(state: StateCore) -> None:
    """Set the attributes of the elements, and turn the images into links."""
    for token in state.tokens:
        if token.type in ("th_open", "td_open"):
            # JupyterLab aligns the tables of HTML outputs to the right, for data frames.
            token.attrs.setdefault("style", "text-align:left")
        if token.type == "list_item_open" and token.attrs.pop("class", ""):
            token.attrs["style"] = "list-style:none"  # a task has a check box
        if token.type in ("bullet_list_open", "ordered_list_open"):
            token.attrs.pop("class", "")
        if any(child.type in {"link_open", "image"} for child in token.children or ()):
            token.children = list(_sanitized(token.children or ()))


def _sanitized(tokens: Sequence[Token]) -> Iterator[Token]:
    in_link = False
    for token in tokens:
        if token.type == "link_open":
            href = str(token.attrs["href"])
            if in_link := _URL.match(href) is not None:  # `[text]()` has an empty address
                token.attrs = _link_attributes(href)
                yield token
        elif token.type == "link_close":
            if in_link:
                yield token
            in_link = False
        elif token.type == "image":
            yield from _image_as_link(token, in_link)
        else:
            yield token


def _link_attributes(href: str) -> dict[str, str | int | float]:
    return {"href": href, "rel": "noopener noreferrer nofollow", "target": "_blank"}


def _image_as_link(image: Token, in_link: bool) -> Iterator[Token]:
    """Name the image and its host: a request for it would send the host what the model wrote in it."""
    from markdown_it.token import Token

    url, alt = str(image.attrs["src"]), image.content or "image"
    match = _URL.match(url)
    host = f" (image: {match[1]})" if match and match[1] else ""
    text = Token("text", "", 0, content=alt + host)
    if in_link or match is None:  # links do not nest
        yield text
    else:
        yield Token("link_open", "a", 1, attrs=_link_attributes(url))
        yield text
        yield Token("link_close", "a", -1)


def _math_rule(
    _renderer: object, tokens: Sequence[Token], index: int, _options: object, _env: object
) -> str:
    from llm_magic.notebook.display import latex

    token = tokens[index]
    tex, is_block = token.content, token.type == "math_block"
    delimited = latex.delimited(tex, display=token.type != "math_inline")
    if not latex.is_harmless(tex):
        return render_code(delimited) if is_block else f"<code>{escape_text(delimited)}</code>"
    tag = "div" if is_block else "span"
    return f'<{tag} class="{MATH}">{escape_text(delimited)}</{tag}>' + "\n" * is_block


def _code_rule(
    _renderer: object,
    tokens: Sequence[Token],
    index: int,
    _options: object,
    env: MutableMapping[str, Any],
) -> str:
    token = tokens[index]
    started, spent = monotonic(), float(env.get("seconds", 0))
    html = render_code(token.content, token.info if spent < TEXT_SECONDS else "")
    env["seconds"] = spent + monotonic() - started
    return html
