"""A model's Markdown rendered again and again while it grows: only its end is parsed again.

At every moment the HTML is that of `markdown.render`, so nothing jumps when the answer ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display import markdown

if TYPE_CHECKING:
    from markdown_it.token import Token

# The ends of lines as Markdown knows them.
_LINE_END = re.compile(r"\r\n?|\n")


class Growing:
    """Renders one text in all its states; what no later word can change is rendered once.

    That is all before the last block that begins below an empty line: a formula may swallow other
    blocks, but no empty line. A line that is not yet whole closes nothing: the ``2`` below a list
    may become the list's second item.
    """

    def __init__(self) -> None:
        self._shown = ("", "")  # the latest text and its HTML
        self._costly = ""  # a text that was too much work, as are those that begin with it
        self._forget()

    def _forget(self) -> None:
        self._closed = ""  # the text that is rendered once and for all
        self._parts: list[str] = []  # what it became
        self._seconds = 0.0  # that its colours took
        self._defined: dict[str, Any] = {}  # targets of links that it names
        self._used: dict[str, object] = {}  # and all targets that its links could go to

    def render(self, text: str) -> str:
        """Return the HTML of a text that begins, as a rule, with the one before."""
        if not self._shown[1] or text != self._shown[0]:
            self._shown = text, self._made(text)
        return self._shown[1]

    def _made(self, text: str) -> str:
        is_costly = bool(self._costly) and text.startswith(self._costly)
        if is_costly or len(text) > markdown.MAX_MARKDOWN:
            return markdown.escape_pre(text)
        try:
            return self._parsed_anew(text)
        except markdown.TooMuchWork:
            self._costly = text
            self._forget()
            return markdown.escape_pre(text)

    def _parsed_anew(self, text: str) -> str:
        if not text.startswith(self._closed):
            self._forget()
        tokens, env = self._parsed(text)
        if self._closed and _targets(env) != self._used:
            # A target may be named far below the links to it.
            self._forget()
            tokens, env = self._parsed(text)
        index, offset = _cut(tokens, text[len(self._closed) :])
        if index:
            self._parts.append(_rendered(tokens[:index], env))
            self._closed = text[: len(self._closed) + offset]
            self._seconds = env["seconds"]
            self._defined = _named_above(tokens[index], env["references"], self._defined)
        self._used = _targets(env)
        return markdown.framed("".join(self._parts) + _rendered(tokens[index:], env))

    def _parsed(self, text: str) -> tuple[list[Token], dict[str, Any]]:
        env: dict[str, Any] = {"references": dict(self._defined), "seconds": self._seconds}
        return markdown.parser().parse(markdown.whole(text[len(self._closed) :]), env), env


def _cut(tokens: Sequence[Token], text: str) -> tuple[int, int]:
    """Return where the last block begins that closes those before it: its token, its offset."""
    starts = [0, *(match.end() for match in _LINE_END.finditer(text))]
    for index in range(len(tokens) - 1, 0, -1):
        token = tokens[index]
        if token.level or token.nesting < 0 or not token.map:
            continue
        line = token.map[0]
        is_whole = line + 1 < len(starts)
        if line and is_whole and not text[starts[line - 1] : starts[line]].strip(" \t\r\n"):
            return index, starts[line]
    return 0, 0


def _rendered(tokens: Sequence[Token], env: dict[str, Any]) -> str:
    parser = markdown.parser()
    html: str = parser.renderer.render(tokens, parser.options, env)
    return html


def _targets(env: Mapping[str, Any]) -> dict[str, object]:
    return {label: (one["href"], one["title"]) for label, one in env["references"].items()}


def _named_above(
    token: Token, references: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the targets that are named above a block, and those `before` (of other lines)."""
    assert token.map is not None
    line = token.map[0]
    return {
        label: one for label, one in references.items() if label in before or one["map"][0] < line
    }
