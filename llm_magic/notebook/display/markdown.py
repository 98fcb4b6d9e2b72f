"""A model's Markdown as HTML that runs no script and fetches nothing.

What a model writes is hostile input: JupyterLab runs the scripts in the HTML and the Markdown of a
running cell, and a script controls the kernel. Here raw HTML is text, links go to the web or
nowhere, an image is a link to it, and no attribute but `href` contains text of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from time import monotonic
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display import latex, markdown_limits
from llm_magic.notebook.display.highlight import TEXT_SECONDS, escape_text, highlight
from llm_magic.notebook.display.markdown_limits import MAX_MARKDOWN, TooMuchWork
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.text.surrogates import replace_surrogates

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_core import StateCore
    from markdown_it.token import Token

# Typeset the formulas found here and nothing else: MathJax takes `$5 and $10` for one. The second
# name is the one of MathJax 2, in notebooks exported to HTML.
_MATH = "mathjax_process tex2jax_process"

# A browser needs as long to typeset a formula as for this much other HTML (measured: 2 ms each).
_FORMULA_BYTES = 1000

_BOX = (
    "margin:0.5em 0;padding:0.5em 0.75em;border-radius:3px;"
    "border:1px solid rgba(128,128,128,0.25);background:rgba(128,128,128,0.08);"
)
_CODE_STYLE = _BOX + "overflow-x:auto"
# JupyterLab gives the inner element its own background, and wraps its lines.
_INNER_STYLE = "background:none;padding:0;white-space:pre"
_COLLAPSED_STYLE = "opacity:0.75;font-size:0.9em;margin:0.2em 0"
_TEXT_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere"

# A relative link reaches the Jupyter server's own files and commands, and `http:path` is relative;
# `https://bank.example@evil.example` leads to evil.example.
_URL = re.compile(
    r"https?://([a-z0-9._:\[\]-]+)(?:[/?#]|\Z)|mailto:[^\s/]", re.ASCII | re.IGNORECASE
)

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")

# Longer HTML takes a page too long.
_MAX_HTML = 2_000_000


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One block of code in an answer, and the language that its fence names ("" if none).

    A block that is not `fenced` is indented; one that is not `closed` goes on to the end of the text.
    """

    language: str
    code: str
    fenced: bool = True
    closed: bool = True


def render(text: str) -> str:
    """Return a model's Markdown as a safe HTML fragment; as plain text where it is too much work."""
    if len(text) > MAX_MARKDOWN:
        return escape_pre(text)
    try:
        return wrap(parser().render(replace_surrogates(text)))
    except TooMuchWork:
        return escape_pre(text)


def display_cost(html: str) -> int:
    """Return how much work a browser has with HTML, in bytes of ordinary HTML."""
    return len(html.encode()) + html.count(_MATH) * _FORMULA_BYTES


def wrap(body: str) -> str:
    """Return rendered Markdown as one element, in which only the formulas found here are typeset.

    Raises `TooMuchWork` where it is too much for a page.
    """
    if len(body) > _MAX_HTML:
        raise TooMuchWork
    return f'<div class="{NO_MATH}">\n{body}</div>\n'


def render_code(code: str, language: str = "") -> str:
    """Return code as one block, highlighted if the language is a known one."""
    language = _language(language)
    html = highlight(replace_surrogates(code), language)
    name = f' class="language-{language}"' if language else ""
    return f'<pre style="{_CODE_STYLE}"><code{name} style="{_INNER_STYLE}">{html}</code></pre>\n'


def escape_pre(text: str) -> str:
    """Return plain text as it is, in a block that wraps long lines."""
    # HTML drops a newline right after the tag: this one, not the first of the text.
    return f'<pre style="{_TEXT_STYLE}">\n{escape_text(replace_surrogates(text))}</pre>\n'


def collapsed(summary: str, text: str) -> str:
    """Return plain text below a summary; a click shows it."""
    return (
        f'<details class="{NO_MATH}" style="{_COLLAPSED_STYLE}">'
        f'<summary style="cursor:pointer">{escape(summary)}</summary>{escape_pre(text)}</details>\n'
    )


def code_blocks(text: str) -> list[CodeBlock]:
    """Return the fenced blocks of an answer or, if it has none, the indented ones."""
    text = replace_surrogates(text)
    try:
        tokens = _blocks(text)
    except TooMuchWork:
        return list(_fences(text))
    fences = [token for token in tokens if token.type == "fence"]
    found = fences or [token for token in tokens if token.type == "code_block"]
    return [_code_block(token) for token in found]


def _blocks(text: str) -> list[Token]:
    """Return the blocks of a text; what is in its lines is not parsed."""
    from markdown_it.rules_core import StateCore, block, normalize

    state = StateCore(text, parser(), {})
    normalize(state)
    block(state)
    return state.tokens


def _fences(text: str) -> Iterator[CodeBlock]:
    """Yield the fenced blocks between the lines of a text that is too long to be parsed."""
    fence, language, code = "", "", list[str]()
    for line in re.split(r"\r\n?|\n", text):
        if not fence and (opening := _FENCE.match(line)):
            fence, language = opening[1], _language(opening[2])
        elif fence and line.strip() == fence[0] * max(len(fence), len(line.strip())):
            yield CodeBlock(language, "\n".join(code))
            fence, code = "", []
        elif fence:
            code.append(line)
    if fence:
        yield CodeBlock(language, "\n".join(code), closed=False)


def _code_block(token: Token) -> CodeBlock:
    """Return a block; a fence is closed if it has a line besides its first and those of its code."""
    fenced, code = token.type == "fence", token.content
    first, end = token.map or [0, 0]
    lines = code.count("\n") + (code[-1:] not in {"", "\n"})
    closed = not fenced or end - first == lines + 2
    return CodeBlock(_language(token.info), code.removesuffix("\n"), fenced, closed)


def _language(info: str) -> str:
    """Return the language of a fence's info string, in letters fit for an attribute."""
    parts = re.split(r"[\s,:{]", info.strip().lstrip("{.").rstrip("}").lower(), maxsplit=1)
    return parts[0] if re.fullmatch(r"[a-z0-9+#-]{1,30}", parts[0]) else ""


@cache
def parser() -> MarkdownIt:
    """Return the parser, which makes tokens of a text and safe HTML of tokens."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.tasklists import tasklists_plugin

    # This preset stops at 20 levels of nesting; more only makes "[[[[[…" slow.
    made = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    made.disable(["html_block", "html_inline"])
    made.validateLink = _is_safe_url  # type: ignore[method-assign]
    latex.add_rules(made)
    made.use(tasklists_plugin)
    markdown_limits.add_rules(made)
    made.core.ruler.push("sanitize", _sanitize)
    for kind in ("fence", "code_block"):
        made.add_render_rule(kind, _code_rule)
    for kind in ("math_inline", "math_inline_double", "math_block"):
        made.add_render_rule(kind, _math_rule)
    return made


def _is_safe_url(url: str) -> bool:
    return _URL.match(url) is not None


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
        if token.children:
            token.children = list(_sanitized(token.children))


def _sanitized(tokens: Sequence[Token]) -> Iterator[Token]:
    in_link = False
    for token in tokens:
        if token.type == "link_open":
            href = str(token.attrs["href"])
            if in_link := _is_safe_url(href):  # `[text]()` comes here with an empty one
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
    token = tokens[index]
    tex, is_block = token.content, token.type == "math_block"
    delimited = latex.delimited(tex, display=token.type != "math_inline")
    if not latex.is_harmless(tex):
        return render_code(delimited) if is_block else f"<code>{escape_text(delimited)}</code>"
    tag = "div" if is_block else "span"
    return f'<{tag} class="{_MATH}">{escape_text(delimited)}</{tag}>' + "\n" * is_block


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
