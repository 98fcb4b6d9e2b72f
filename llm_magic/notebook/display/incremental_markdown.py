"""Render a model's Markdown while its text grows; only the end is parsed again.

The HTML of each state is what `markdown.render` returns for its text, so nothing moves when the answer
ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display import markdown, markdown_limits
from llm_magic.text.surrogates import replace_surrogates

if TYPE_CHECKING:
    from markdown_it.token import Token

# The ends of lines as Markdown defines them.
_LINE_END = re.compile(r"\r\n?|\n")


class IncrementalMarkdown:
    """Renders one text in all its states; the blocks that no later text can change only once.

    These are the blocks before the last one that starts below an empty line: a formula may contain
    the starts of other blocks, but no empty line. A line without its end closes no block: the ``2``
    below a list may become the list's second item.
    """

    def __init__(self) -> None:
        self._last = ("", "")  # the latest text and its HTML
        self._costly = ""  # a text that was too much work, as is each that starts with it
        self._reset()

    def _reset(self) -> None:
        self._closed = ""  # the text whose blocks are closed
        self._html: list[str] = []  # of these blocks
        self._seconds = 0.0  # that their syntax highlighting took
        self._defined: dict[str, Any] = {}  # link targets that are defined in them
        self._targets: dict[str, object] = {}  # all link targets of the latest text

    def render(self, text: str) -> str:
        """Return the HTML of a text, which in most cases continues the one before."""
        if not self._last[1] or text != self._last[0]:
            self._last = text, self._render(text)
        return self._last[1]

    def _render(self, text: str) -> str:
        is_costly = bool(self._costly) and text.startswith(self._costly)
        if is_costly or len(text) > markdown_limits.MAX_MARKDOWN:
            return markdown.escape_pre(text)
        try:
            return self._render_end(text)
        except markdown_limits.TooMuchWork:
            self._costly = text
            self._reset()
            return markdown.escape_pre(text)

    def _render_end(self, text: str) -> str:
        if not text.startswith(self._closed):
            self._reset()
        tokens, env = self._parse(text)
        if self._closed and _targets(env) != self._targets:
            # A target may be defined far below the links to it.
            self._reset()
            tokens, env = self._parse(text)
        index, offset = _last_closed(tokens, text[len(self._closed) :])
        if index:
            self._html.append(_html(tokens[:index], env))
            self._closed = text[: len(self._closed) + offset]
            self._seconds = env["seconds"]
            self._defined = _defined_above(tokens[index], env["references"], self._defined)
        self._targets = _targets(env)
        return markdown.wrap("".join(self._html) + _html(tokens[index:], env))

    def _parse(self, text: str) -> tuple[list[Token], dict[str, Any]]:
        env: dict[str, Any] = {"references": dict(self._defined), "seconds": self._seconds}
        end = replace_surrogates(text[len(self._closed) :])
        return markdown.parser().parse(end, env), env


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


def _html(tokens: Sequence[Token], env: dict[str, Any]) -> str:
    parser = markdown.parser()
    html: str = parser.renderer.render(tokens, parser.options, env)
    return html


def _targets(env: Mapping[str, Any]) -> dict[str, object]:
    return {label: (one["href"], one["title"]) for label, one in env["references"].items()}


def _defined_above(
    token: Token, references: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the targets that are defined above a block, and those `before` (of other lines)."""
    assert token.map is not None
    line = token.map[0]
    return {
        label: one for label, one in references.items() if label in before or one["map"][0] < line
    }
