"""A model's Markdown as HTML that runs no script and fetches nothing.

What a model writes is hostile input: JupyterLab runs the scripts in a running cell's HTML and in
its Markdown, too, and whoever runs one owns the kernel. Here raw HTML is text, links go to the
web or nowhere, an image is a link to it, and no attribute but `href` carries the model's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from html import escape
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display import latex
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.text.surrogates import replace_surrogates

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

# Typeset the formulas found here and nothing else: MathJax has its own idea of what `$5 and $10`
# means. The second name is the one of MathJax 2, in notebooks exported to HTML.
_MATH = "mathjax_process tex2jax_process"

# A browser needs as long to typeset a formula as for this much other HTML (measured: 2 ms each).
_FORMULA_BYTES = 1000

_BOX = (
    "margin:0.5em 0;padding:0.5em 0.75em;border-radius:3px;"
    "border:1px solid rgba(128,128,128,0.25);background:rgba(128,128,128,0.08);"
)
_CODE_STYLE = _BOX + "overflow-x:auto"
# JupyterLab gives the inner element a background of its own, and wraps its lines.
_INNER_STYLE = "background:none;padding:0;white-space:pre"
_FOLD_STYLE = "opacity:0.75;font-size:0.9em;margin:0.2em 0"
_TEXT_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere"

# A relative link would reach the Jupyter server's own files and commands, and `http:path` is a
# relative one; `https://bank.example@evil.example` is a lie.
_URL = re.compile(
    r"https?://([a-z0-9._:\[\]-]+)(?:[/?#]|\Z)|mailto:[^\s/]", re.ASCII | re.IGNORECASE
)

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")

# Longer texts, and those that are more work than this, are shown as they are, without a parser: it
# runs on the thread that interrupts stop, and some texts of 300,000 characters take it 5 seconds.
# Steps, not seconds: the same text becomes the same HTML on every machine.
MAX_MARKDOWN = 300_000
_MAX_STEPS, _STEPS_OF_LINK = 30_000, 5
_MAX_TOKENS = 30_000
_MAX_HTML = 2_000_000

# Pygments' lexers slow down quadratically on input made for it, so besides the size there is a
# time limit, for one block and for a whole text; what is left then stays uncoloured.
_MAX_HIGHLIGHTED = 20_000
_BLOCK_SECONDS, _TEXT_SECONDS = 0.5, 1.0

# The languages that models write in notebooks. The model must not choose among all lexers of
# Pygments and its plugins; ini, make and console are left out because one match can take seconds.
_LANGUAGE_NAMES = """
bash c c# c++ cpp csharp css diff docker dockerfile go html java javascript js json julia kotlin
lua perl php powershell py python python3 r ruby rust scala sh shell sql swift toml ts typescript
xml yaml yml zsh
"""
_LANGUAGES = frozenset(_LANGUAGE_NAMES.split())

# Token type of Pygments -> JupyterLab's editor colour and what to use elsewhere: colours of
# middling lightness, readable on white and on black.
_COLOURS = {
    "Comment": ("comment", "#5f7f7f"),
    "Comment.Preproc": ("meta", "#a04fe0"),
    "Generic.Deleted": ("error", "#d93636"),
    "Generic.Inserted": ("string-2", "#1f8a3b"),
    "Keyword": ("keyword", "#158515"),
    "Keyword.Constant": ("atom", "#5d74e6"),
    "Keyword.Type": ("variable-3", "#0a8563"),
    "Literal.Number": ("number", "#158515"),
    "Literal.String": ("string", "#cf4747"),
    "Literal.String.Interpol": ("string-2", "#b04ab8"),
    "Name.Attribute": ("attribute", "#3b79d8"),
    "Name.Builtin": ("builtin", "#158515"),
    "Name.Class": ("def", "#3b79d8"),
    "Name.Decorator": ("meta", "#a04fe0"),
    "Name.Function": ("def", "#3b79d8"),
    "Name.Tag": ("tag", "#4c8a1a"),
    "Operator": ("operator", "#a04fe0"),
    "Operator.Word": ("keyword", "#158515"),
}


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One block of code in an answer, and the language that its fence names ("" if none).

    A block that is not `fenced` is indented; one that is not `closed` goes on to the end of the text.
    """

    language: str
    code: str
    fenced: bool = True
    closed: bool = True


class TooMuchWork(Exception):
    """Raised where a text takes the parser, or a page, more work than is allowed."""


def render(text: str) -> str:
    """Return a model's Markdown as a safe HTML fragment; as plain text where it is too much work."""
    if len(text) > MAX_MARKDOWN:
        return escape_pre(text)
    try:
        return framed(parser().render(whole(text)))
    except TooMuchWork:
        return escape_pre(text)


def weight(html: str) -> int:
    """Return how much work it is to show, in bytes: MathJax takes as long for a formula as for many."""
    return len(html.encode()) + html.count(_MATH) * _FORMULA_BYTES


def framed(body: str) -> str:
    """Return rendered Markdown as one element, in which only the formulas found here are typeset.

    Raises `TooMuchWork` where it is too much for a page.
    """
    if len(body) > _MAX_HTML:
        raise TooMuchWork
    return f'<div class="{NO_MATH}">\n{body}</div>\n'


def render_code(code: str, language: str = "") -> str:
    """Return code as one block, highlighted if the language is a known one."""
    language = _language(language)
    html = _highlighted(whole(code), language) if language in _LANGUAGES else _plain(whole(code))
    name = f' class="language-{language}"' if language else ""
    return f'<pre style="{_CODE_STYLE}"><code{name} style="{_INNER_STYLE}">{html}</code></pre>\n'


def escape_pre(text: str) -> str:
    """Return plain text as it is, in a block that wraps long lines."""
    # HTML drops a newline right after the tag; this one spares the text's own.
    return f'<pre style="{_TEXT_STYLE}">\n{_plain(whole(text))}</pre>\n'


def folded(summary: str, text: str) -> str:
    """Return plain text that a click unfolds."""
    return (
        f'<details class="{NO_MATH}" style="{_FOLD_STYLE}">'
        f'<summary style="cursor:pointer">{escape(summary)}</summary>{escape_pre(text)}</details>\n'
    )


def code_blocks(text: str) -> list[CodeBlock]:
    """Return the fenced blocks of an answer or, if it has none, the indented ones."""
    text = whole(text)
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
    begin, end = token.map or [0, 0]
    lines = code.count("\n") + (code[-1:] not in {"", "\n"})
    closed = not fenced or end - begin == lines + 2
    return CodeBlock(_language(token.info), code.removesuffix("\n"), fenced, closed)


def whole(text: str) -> str:
    """Replace lone surrogates, which no message to the browser can carry."""
    return replace_surrogates(text)


def _plain(text: str) -> str:
    return escape(text, quote=False)


def _language(info: str) -> str:
    """Return the language of a fence's info string, in letters fit for an attribute."""
    words = re.split(r"[\s,:{]", info.strip().lstrip("{.").rstrip("}").lower(), maxsplit=1)
    return words[0] if re.fullmatch(r"[a-z0-9+#-]{1,30}", words[0]) else ""


@cache
def parser() -> MarkdownIt:
    """Return what turns text into tokens, and tokens into safe HTML."""
    from markdown_it import MarkdownIt

    # This preset stops at 20 levels of nesting; more only makes "[[[[[…" slow.
    made = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    made.disable(["html_block", "html_inline"])
    made.validateLink = _is_safe_url  # type: ignore[method-assign]
    made.block.ruler.before(
        "fence",
        "math_block",
        latex.block_rule,
        {"alt": ["paragraph", "reference", "blockquote", "list"]},
    )
    made.inline.ruler.before("escape", "math_inline", latex.inline_rule)
    made.block.ruler.before(
        "table", "count", _count_line, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    made.inline.ruler.before("text", "count", _count_step)
    made.inline.ruler.before("autolink", "count_links", _count_links)
    made.core.ruler.push("tame", _tame)
    for kind in ("fence", "code_block"):
        made.add_render_rule(kind, _code_rule)
    for kind in ("math_inline", "math_block"):
        made.add_render_rule(kind, _math_rule)
    return made


def _count_line(state: StateBlock, _start: int, _end: int, _silent: bool) -> bool:
    """Count a line where a block may begin; rows of a table are such lines."""
    if len(state.tokens) > _MAX_TOKENS:
        raise TooMuchWork
    return _count_step(state)


def _count_step(state: StateBlock | StateInline, _silent: bool = False) -> bool:
    """Count a place that the rules are tried at, and match nothing."""
    steps = state.env["steps"] = state.env.get("steps", 0) + 1
    if steps > _MAX_STEPS:
        raise TooMuchWork
    return False


def _count_links(state: StateInline, _silent: bool) -> bool:
    """Count what may be a link as several steps: its address is parsed twice."""
    if state.src[state.pos] == "<":
        state.env["steps"] += _STEPS_OF_LINK
    return False


def _is_safe_url(url: str) -> bool:
    return _URL.match(url) is not None


def _tame(state: StateCore) -> None:
    """Set the attributes of what Markdown lets through, and turn the images into links."""
    for token in state.tokens:
        if token.type in ("th_open", "td_open"):
            # JupyterLab aligns the tables of HTML outputs to the right, for data frames.
            token.attrs.setdefault("style", "text-align:left")
        if token.children:
            token.children = list(_tamed(token.children))


def _tamed(tokens: Sequence[Token]) -> Iterator[Token]:
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
    """Name the picture and its host: to fetch it would tell the host what the model put in it."""
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
    tex = latex.delimited(token.content, token.block or bool(token.meta["display"]))
    if not latex.is_harmless(token.content):
        return render_code(tex) if token.block else f"<code>{_plain(tex)}</code>"
    tag = "div" if token.block else "span"
    return f'<{tag} class="{_MATH}">{_plain(tex)}</{tag}>' + "\n" * token.block


def _code_rule(
    _renderer: object,
    tokens: Sequence[Token],
    index: int,
    _options: object,
    env: MutableMapping[str, Any],
) -> str:
    token = tokens[index]
    started, spent = monotonic(), float(env.get("seconds", 0))
    html = render_code(token.content, token.info if spent < _TEXT_SECONDS else "")
    env["seconds"] = spent + monotonic() - started
    return html


@lru_cache(maxsize=32)  # while an answer streams, its finished blocks come again and again
def _highlighted(code: str, language: str) -> str:
    if len(code) > _MAX_HIGHLIGHTED:
        return _plain(code)
    runs = groupby(_coloured(code, language), key=lambda piece: piece[0])
    return "".join(_span(style, "".join(text for _, text in run)) for style, run in runs)


def _coloured(code: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield pieces of code with their styles; all of the code, whatever the lexer does."""
    from pygments.lexers import get_lexer_by_name

    end, deadline = 0, monotonic() + _BLOCK_SECONDS
    for position, kind, text in get_lexer_by_name(language).get_tokens_unprocessed(code):
        if position != end or monotonic() > deadline:
            break
        yield _style(str(kind)), text
        end += len(text)
    yield "", code[end:]


def _span(style: str, text: str) -> str:
    return f'<span style="{style}">{_plain(text)}</span>' if style else _plain(text)


@cache
def _style(kind: str) -> str:
    """Return the style of a token type such as ``Token.Name.Function.Magic``, or its parent's."""
    kind = kind.removeprefix("Token.")
    while kind and kind not in _COLOURS:
        kind = kind.rpartition(".")[0]
    if not kind:
        return ""
    name, elsewhere = _COLOURS[kind]
    return f"color:var(--jp-mirror-editor-{name}-color, {elsewhere})"
