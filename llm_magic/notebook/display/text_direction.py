"""The direction of the text in an answer: Hebrew and Arabic are read from right to left.

``dir="auto"`` would not do for lists and tables: a browser then takes the direction from the code in
them, or from English in their first cell of many. Here the first letter outside of code decides.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it.token import Token

RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
# JupyterLab aligns all paragraphs to the left, and draws the line beside a quotation there.
_TEXT_STYLE = "text-align:right"
_QUOTE_STYLE = "margin:0.75em 0;border-left:0;border-right:5px solid rgba(128,128,128,0.3)"
_DIRECTIONS = {"L": "ltr", "R": "rtl", "AL": "rtl"}


def set_directions(tokens: Sequence[Token]) -> None:
    """Set the direction of each block, and of text in it that runs the other way.

    A list, a table or a quotation has one direction, that of its first text: bullets stay on one side.
    """
    block, direction = None, ""
    for index, token in enumerate(tokens):
        if not token.level and token.nesting > 0:
            block, direction = token, ""
        if token.type != "inline" or block is None:
            continue
        own = _direction(token)
        direction = direction or own
        if direction == "rtl":
            block.attrs["dir"] = direction
            if block.type == "blockquote_open":
                block.attrs["style"] = _QUOTE_STYLE
            _turn(token, tokens[index - 1])
        is_mixed = own == "ltr" and RIGHT_TO_LEFT.search(token.content)
        if own and own != direction and not is_mixed:
            _isolate(token, own)


def _direction(inline: Token) -> str:
    """Return the direction of the first letter that is not code, or nothing where there is none."""
    for token in inline.children or ():
        if token.type == "text":
            kinds = map(unicodedata.bidirectional, token.content)
            found = next((_DIRECTIONS[kind] for kind in kinds if kind in _DIRECTIONS), "")
            if found:
                return found
    return ""


def _turn(inline: Token, parent: Token) -> None:
    """Align text to the right, and keep the order of the letters of code in it."""
    is_cell = parent.type in ("th_open", "td_open")
    if parent.type == "paragraph_open" or (is_cell and parent.attrs["style"] == "text-align:left"):
        parent.attrs["style"] = _TEXT_STYLE
    for token in inline.children or ():
        if token.type == "code_inline":
            token.attrs["dir"] = "ltr"


def _isolate(inline: Token, direction: str) -> None:
    from markdown_it.token import Token

    opening = Token("span_open", "span", 1, attrs={"dir": direction})
    inline.children = [opening, *(inline.children or ()), Token("span_close", "span", -1)]
