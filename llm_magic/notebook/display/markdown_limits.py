"""Limits on the work that a text takes the Markdown parser.

The parser runs on the thread that interrupts stop, and some texts of 300,000 characters take it 5
seconds. The limits count steps, not seconds: the same text becomes the same HTML on every machine.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline

MAX_MARKDOWN = 300_000  # characters
_MAX_STEPS, _STEPS_OF_LINK = 30_000, 5
_MAX_TOKENS = 30_000
_TOKENS_OF_STEP = 500  # that the search for the list of a task passes in the time of a step


class TooMuchWork(Exception):
    """Raised where a text takes the parser, or a page, more work than is allowed."""


def spend(env: MutableMapping[str, Any], steps: int) -> None:
    """Count steps of a text; raises `TooMuchWork` if there are too many."""
    env["steps"] = env.get("steps", 0) + steps
    if env["steps"] > _MAX_STEPS:
        raise TooMuchWork


def add_rules(parser: MarkdownIt) -> None:
    """Add rules to a parser that match nothing and count how often the rules are tried."""
    alt = ["paragraph", "reference", "blockquote", "list"]
    parser.block.ruler.before("table", "count", _count_line, {"alt": alt})
    parser.inline.ruler.before("text", "count", _count_step)
    parser.inline.ruler.before("autolink", "count_links", _count_links)
    parser.core.ruler.after("inline", "count_tasks", _count_tasks)


def _count_line(state: StateBlock, _start: int, _end: int, _only_check: bool) -> bool:
    """Count a line where a block may start; rows of a table are such lines."""
    if len(state.tokens) > _MAX_TOKENS:
        raise TooMuchWork
    spend(state.env, 1)
    return False


def _count_step(state: StateInline, _only_check: bool) -> bool:
    spend(state.env, 1)
    return False


def _count_links(state: StateInline, _only_check: bool) -> bool:
    """Count what may be a link as several steps: its address is parsed twice."""
    if state.src[state.pos] == "<":
        spend(state.env, _STEPS_OF_LINK)
    return False


def _count_tasks(state: StateCore) -> None:
    """Count the tokens between each task and its list, which the plugin passes one by one."""
    for index, token in enumerate(state.tokens):
        if token.type == "inline" and token.content.startswith("["):
            spend(state.env, 1 + index // _TOKENS_OF_STEP)
