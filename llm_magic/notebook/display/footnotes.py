"""Footnotes in an answer: ``[^1]`` in the text, and ``[^1]: the note``.

A note is shown where the model wrote it, under its own label. So nothing moves while an answer grows, and
a note that is never referenced is shown as well. Labels are not links: a link within a page needs an id,
two answers in one notebook would share it, and JupyterLab and VS Code drop ids or do not follow such links.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llm_magic.notebook.display.tables import escape_text

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

_LABEL = r"\[\^([^\s\[\]]{1,30})\]"
_REFERENCE = re.compile(_LABEL)
_DEFINITION = re.compile(rf"{_LABEL}:")
# Of labels that are numbers, it is shown early that they are notes: the notes come at the end.
_NUMBER = re.compile(r"[0-9]{1,3}", re.ASCII)
_NOTE_STYLE = "font-size:0.9em;opacity:0.85"


def add_rules(parser: MarkdownIt) -> None:
    """Add the rules for footnotes to a parser."""
    alt = ["paragraph", "reference"]
    parser.block.ruler.before("reference", "footnote", _define, {"alt": alt})
    parser.inline.ruler.before("link", "footnote", _refer)
    parser.core.ruler.push("footnote_labels", _label_notes)
    parser.add_render_rule("footnote_ref", _render_reference)


def defined(tokens: Iterable[Token]) -> Iterator[tuple[str, int]]:
    """Yield the labels of the notes in a text, with their lines."""
    for token in tokens:
        if token.type == "footnote_reference_open":
            yield token.meta["label"], (token.map or [0])[0]


def _label_notes(state: StateCore) -> None:
    """Add the label of each note to its first paragraph."""
    state.tokens = list(_labelled(state.tokens))


def _labelled(tokens: Sequence[Token]) -> Iterator[Token]:
    from markdown_it.token import Token

    for index, token in enumerate(tokens):
        yield token
        if token.type == "footnote_reference_close":
            token.tag, token.block = "div", True
        if token.type != "footnote_reference_open":
            continue
        token.tag, token.block, token.attrs = "div", True, {"style": _NOTE_STYLE}
        label = Token("footnote_ref", "", 0, meta={**token.meta, "is_defined": True})
        if tokens[index + 1].type == "paragraph_open":
            space = Token("text", "", 0, content=" ")
            tokens[index + 2].children = [label, space, *(tokens[index + 2].children or ())]
        else:
            level = token.level + 1
            yield Token("paragraph_open", "p", 1, level=level, block=True)
            yield Token("inline", "", 0, level=level + 1, children=[label], block=True)
            yield Token("paragraph_close", "p", -1, level=level, block=True)


def _define(state: StateBlock, start_line: int, end_line: int, only_check: bool) -> bool:
    from mdit_py_plugins.footnote.index import footnote_def

    start = state.bMarks[start_line] + state.tShift[start_line]
    if not _DEFINITION.match(state.src, start, state.eMarks[start_line]):
        return False
    return footnote_def(state, start_line, end_line, only_check)


def _refer(state: StateInline, only_check: bool) -> bool:
    if state.src[state.pos] != "[":
        return False
    match = _REFERENCE.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    label = match[1]
    is_defined = f":{label}" in state.env.get("footnotes", {}).get("refs", {})
    is_link = state.src.startswith("(", match.end())
    if not is_defined and (is_link or not _NUMBER.fullmatch(label)):
        return False
    if not only_check:
        token = state.push("footnote_ref", "", 0)
        token.meta = {"label": label, "is_defined": is_defined}
    state.pos = match.end()
    return True


def _render_reference(
    _renderer: object, tokens: Sequence[Token], index: int, _options: object, _env: object
) -> str:
    meta = tokens[index].meta
    return f"<sup>[{'' if meta['is_defined'] else '^'}{escape_text(meta['label'])}]</sup>"
