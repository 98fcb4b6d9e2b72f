"""A model's Markdown as HTML that runs no script and fetches nothing.

What a model writes is hostile input: JupyterLab runs the scripts in the HTML and the Markdown of a
running cell, and a script controls the kernel. Here raw HTML is text but for a few elements without
attributes, links go to the web or nowhere, an image is a link to it, and no attribute but `href`
contains text of the model.

The HTML is the only form of an answer besides its plain text. There is no ``text/markdown``: JupyterLab
prefers HTML to it, but other frontends do not, and what they would make of Markdown is theirs to
choose. VS Code fetches its images, nbconvert hands its raw TeX to LaTeX, JupyterLab runs its scripts.
No rewritten Markdown is safe for all of their dialects.

The parser runs on the thread that interrupts stop, and some texts of 300,000 characters take it 5
seconds. So its work is limited. The limits count steps, not seconds: the same text becomes the same
HTML on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from html import escape
from time import monotonic
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display import footnotes, links, text_direction
from llm_magic.notebook.display.highlight import TEXT_SECONDS, highlight
from llm_magic.notebook.display.tables import MATH, NO_MATH, escape_text, one_block
from llm_magic.text import replace_surrogates
from llm_magic.text.code_blocks import TooMuchWork, count_line, fence_language, is_closed, spend

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token
    from markdown_it.utils import OptionsDict

MAX_MARKDOWN = 300_000  # characters
_STEPS_OF_LINK = 5
_TOKENS_OF_STEP = 500  # that the search for the list of a task passes in the time of a step
_MAX_HTML = 2_000_000  # longer HTML takes a page too long

_BOX = (
    "margin:0.5em 0;padding:0.5em 0.75em;border-radius:3px;"
    "border:1px solid rgba(128,128,128,0.25);background:rgba(128,128,128,0.08);"
)
_CODE_STYLE = _BOX + "overflow-x:auto;direction:ltr"
# JupyterLab gives the inner element its own background, and wraps its lines.
_INNER_STYLE = "background:none;padding:0;white-space:pre"
_COLLAPSED_STYLE = "opacity:0.75;font-size:0.9em;margin:0.2em 0"
# JupyterLab indents preformatted text, and breaks its lines within words.
_WRAPPED = "white-space:pre-wrap;word-break:normal;overflow-wrap:break-word"
_TEXT_STYLE = f"margin:0;{_WRAPPED};unicode-bidi:plaintext"
# A long word wraps, and what cannot wrap scrolls in its own box: the cell stays as wide as it is. Other
# values, such as `anywhere` and `start`, JupyterLab drops in a notebook that is not trusted.
_ANSWER_STYLE = "overflow-x:auto;overflow-wrap:break-word"
_TABLE_STYLE = "overflow-x:auto"
_FORMULA_STYLE = "overflow-x:auto;overflow-y:hidden"
# Only of a long one, because a box that scrolls moves the formula off the line of the text.
_LONG_FORMULA = 100
_LONG_FORMULA_STYLE = f"display:inline-block;max-width:100%;vertical-align:middle;{_FORMULA_STYLE}"
# Below this level, text keeps some width in a narrow cell.
_DEEP, _DEEP_STYLE = 6, "min-width:12em"
_QUOTE_STYLE = "margin:0.75em 0"
_DIGITS = 2  # for which JupyterLab leaves space beside the items of a list
# JupyterLab's are for the title of a document; this is an answer in a cell.
_HEADING_SIZES = {
    "h1": "1.45em", "h2": "1.3em", "h3": "1.15em", "h4": "1.05em", "h5": "1em", "h6": "0.9em",
}  # fmt: skip

_LINE_END = re.compile(r"\r\n?|\n")  # as Markdown defines it
# Every link and image has one of these, and every address in a text, which may be written as `&#119;ww.`.
_MAY_HAVE_LINK = re.compile(r"[\[<&\\]|://|www\.")
# The elements that models write most. They have no attributes.
_ELEMENT = re.compile(r"<br ?/?>|<(sub|sup|kbd)>([^<>\n]{1,80})</\1>", re.IGNORECASE)


def render(text: str) -> str:
    """Return a model's Markdown as a safe HTML fragment; as plain text where it is too much work."""
    return IncrementalMarkdown().render(text)


@dataclass(frozen=True, slots=True)
class _Closed:
    """The blocks at the start of a text that no later text can change, and their HTML."""

    text: str = ""
    html: str = ""
    seconds: float = 0.0  # of their syntax highlighting
    # What is defined in these blocks: targets of links, labels of notes.
    targets: Mapping[str, Any] = field(default_factory=dict)
    notes: Set[str] = frozenset()


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
        self._targets: Mapping[object, object] = {}  # of all links and notes of the latest text

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
            env: dict[str, Any] = {
                "references": dict(closed.targets),
                "footnotes": {"refs": {f":{label}": -1 for label in closed.notes}},
                "seconds": closed.seconds,
            }
            has_formulas = "$" in end or "\\" in end
            made = parser(has_formulas=has_formulas, has_brackets="[" in end)
            tokens = made.parse(replace_surrogates(end), env)
            found = env["references"].items()
            targets: dict[object, object] = {
                label: (one["href"], one["title"]) for label, one in found
            }
            targets |= {("note", label): None for label in env["footnotes"]["refs"]}
            if not closed.text or targets == self._targets:
                break
            # A target may be defined far below the links to it.
            closed = _Closed()
        self._targets = targets
        index, offset = _last_closed(tokens, end)
        html = closed.html + made.renderer.render(tokens[:index], made.options, env)
        if index:
            line = (tokens[index].map or [0])[0]
            above = {n: t for n, t in found if n in closed.targets or t["map"][0] < line}
            notes = {label for label, at in footnotes.defined(tokens) if at < line} | closed.notes
            text = text[: len(closed.text) + offset]
            closed = _Closed(text, html, env["seconds"], above, notes)
        self._closed = closed
        html += made.renderer.render(tokens[index:], made.options, env)
        if len(html) > _MAX_HTML:
            raise TooMuchWork
        # Of this element only the formulas found here are typeset.
        return f'<div class="{NO_MATH}" style="{_ANSWER_STYLE}">\n{html}</div>\n'


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
    html = one_block(html)
    return f'<pre style="{_CODE_STYLE}"><code{name} style="{_INNER_STYLE}">{html}</code></pre>\n'


def escape_pre(text: str) -> str:
    """Return plain text unchanged, in a block that wraps long lines."""
    return preformatted(escape_text(replace_surrogates(text)))


def preformatted(html: str) -> str:
    """Return HTML of a text in a block that keeps its line breaks, and wraps long lines."""
    # HTML drops a newline right after the tag: this one, not the first of the text.
    block = one_block(f"\n{html}")
    return f'<pre style="{_TEXT_STYLE}">{block}</pre>\n'


def collapsed(summary: str, text: str) -> str:
    """Return plain text below a summary; a click shows it."""
    return (
        f'<details class="{NO_MATH}" style="{_COLLAPSED_STYLE}">'
        f'<summary style="cursor:pointer">{escape(summary)}</summary>{escape_pre(text)}</details>\n'
    )


@cache
def parser(*, has_formulas: bool, has_brackets: bool) -> MarkdownIt:
    """Return the parser, which makes tokens of a text and safe HTML of tokens.

    Only a text with brackets can have footnotes and tasks.
    """
    from markdown_it import MarkdownIt

    # This preset stops at 20 levels of nesting; more only makes "[[[[[…" slow.
    made = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    made.disable(["html_block", "html_inline"])
    made.validateLink = links.is_safe  # type: ignore[method-assign]
    if has_formulas:
        from llm_magic.notebook.display import latex

        latex.add_rules(made)
        for kind in ("math_inline", "math_inline_double", "math_block", "math_open"):
            made.add_render_rule(kind, _math_rule)
    if has_brackets:
        from mdit_py_plugins.tasklists import tasklists_plugin

        footnotes.add_rules(made)
        # A check box without a label has no name for a screen reader.
        made.use(tasklists_plugin, label=True)
        made.core.ruler.after("inline", "count_tasks", _count_tasks)
    # Rules that match nothing and count how often the rules are tried.
    alt = ["paragraph", "reference", "blockquote", "list"]
    made.inline.ruler.before("autolink", "element", _element)
    made.block.ruler.before("table", "count", count_line, {"alt": alt})
    made.inline.ruler.before("text", "count", _count_step)
    made.core.ruler.push("sanitize", _sanitize)
    made.add_render_rule("text", _text_rule)
    for kind in ("fence", "code_block"):
        made.add_render_rule(kind, _code_rule)
    for kind in ("table_open", "table_close"):
        made.add_render_rule(kind, _table_rule)
    return made


def _count_step(state: StateInline, _only_check: bool) -> bool:
    """Count a step; what may be a link takes several, because its address is parsed twice."""
    spend(state.env, _STEPS_OF_LINK + 1 if state.src[state.pos] == "<" else 1)
    return False


def _element(state: StateInline, only_check: bool) -> bool:
    """Parse one of the few HTML elements that are not shown as text."""
    if state.src[state.pos] != "<":
        return False
    match = _ELEMENT.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not only_check and match[1]:
        name = match[1].lower()
        state.push(f"{name}_open", name, 1)
        state.push("text", "", 0).content = match[2]
        state.push(f"{name}_close", name, -1)
    elif not only_check:
        # Not a `hardbreak`, which adds a line: with the end of this one it would be blank.
        state.push("br", "br", 0)
    state.pos = match.end()
    return True


def _count_tasks(state: StateCore) -> None:
    """Count the tokens between each task and its list, which the plugin passes one by one."""
    for index, token in enumerate(state.tokens):
        if token.type == "inline" and token.content.startswith("["):
            spend(state.env, 1 + index // _TOKENS_OF_STEP)


def _sanitize(state: StateCore) -> None:
    """Set the attributes of the elements, and replace links and images by safe links."""
    # Of the whole text: the content of a token lacks its check box, which may be a link, too.
    may_have_link = _MAY_HAVE_LINK.search(state.src)
    lists: list[Token] = []
    for token in state.tokens:
        if token.type in ("bullet_list_open", "ordered_list_open"):
            token.attrs.pop("class", "")
            lists.append(token)
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            lists.pop()
        elif token.type == "list_item_open" and len(token.info) > _DIGITS:
            lists[-1].attrs["style"] = f"padding-left:{len(token.info)}em"
        elif token.children and may_have_link:
            token.children = list(links.sanitized(token.children, state.md.normalizeLink))
        if style := _style_of(token):
            token.attrs["style"] = style
    if text_direction.RIGHT_TO_LEFT.search(state.src):
        text_direction.set_directions(state.tokens)


def _style_of(token: Token) -> str:
    """Return the style of an element that has one whatever is in it."""
    kind, styles = token.type, list[str]()
    if kind in ("th_open", "td_open"):
        # JupyterLab aligns the tables of HTML outputs to the right, for data frames.
        return str(token.attrs.get("style", "text-align:left"))
    if kind == "heading_open":
        return f"font-size:{_HEADING_SIZES[token.tag]};font-weight:600"
    if kind == "blockquote_open":
        styles.append(_QUOTE_STYLE)
    if kind == "list_item_open" and token.attrs.pop("class", ""):
        styles.append("list-style:none")  # a task has a check box
    if kind in ("blockquote_open", "list_item_open") and token.level >= _DEEP:
        styles.append(_DEEP_STYLE)
    return ";".join(styles)


def _text_rule(
    _renderer: object, tokens: Sequence[Token], index: int, _options: object, _env: object
) -> str:
    """Return text as HTML. The line ends in it are ``&#10;`` in the source: two would be a blank line."""
    return escape_text(_LINE_END.sub(" ", tokens[index].content))


def _math_rule(
    _renderer: object, tokens: Sequence[Token], index: int, _options: object, _env: object
) -> str:
    from llm_magic.notebook.display import latex

    token = tokens[index]
    tex = token.content
    if token.type == "math_open":
        return render_code(tex)
    if token.type == "math_block":
        return _formula_block(tex)
    delimited = latex.delimited(tex, display=token.type != "math_inline")
    if not latex.is_harmless(tex):
        return f"<code>{escape_text(delimited)}</code>"
    style = f' style="{_LONG_FORMULA_STYLE}"' if len(tex) > _LONG_FORMULA else ""
    return f'<span class="{MATH}"{style}>{escape_text(delimited)}</span>'


def _formula_block(tex: str) -> str:
    from llm_magic.notebook.display import latex

    delimited = latex.delimited(tex, display=True)
    if not latex.is_harmless(tex):
        return render_code(delimited)
    html = one_block(escape_text(delimited))
    return f'<div class="{MATH}" style="{_FORMULA_STYLE}">{html}</div>\n'


def _table_rule(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: OptionsDict,
    _env: object,
) -> str:
    """Return the start or the end of a table in a box that scrolls, from the side it starts on."""
    token = tokens[index]
    tag = renderer.renderToken(tokens, index, options, {})
    if token.nesting < 0:
        return f"{tag}</div>\n"
    return f'<div{renderer.renderAttrs(token)} style="{_TABLE_STYLE}">{tag}'


def _code_rule(
    _renderer: object,
    tokens: Sequence[Token],
    index: int,
    _options: object,
    env: MutableMapping[str, Any],
) -> str:
    token = tokens[index]
    if token.type == "fence" and fence_language(token.info) == "math" and is_closed(token):
        return _formula_block(token.content.strip())
    started, spent = monotonic(), float(env.get("seconds", 0))
    html = render_code(token.content, token.info if spent < TEXT_SECONDS else "")
    env["seconds"] = spent + monotonic() - started
    return html
