r"""Formulas in an answer: the rules that parse them, and the commands that are typeset.

The delimiters are ``$…$``, ``$$…$$``, ``\(…\)``, ``\[…\]`` and ``\begin{align}…\end{align}`` with the
other environments of amsmath. JupyterLab's MathJax typesets whatever is TeX. Some of its commands
write links, styles and ids (``\href``, ``\style``, ``\bbox``, ``\fcolorbox``, ``\mmlToken``, …), load
code (``\require``) or change every later formula of the page (``\def``). So a formula is typeset only
if it is made of the commands in ``latex_commands.txt``; of any other its source is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline

    BlockRule = Callable[[StateBlock, int, int, bool], bool]

# A longer one would block the page while MathJax works on it.
_MAX_FORMULA = 5_000

# The plugins have no rule for brackets that takes linear time. The bodies exclude a second opening
# bracket: else thousands of unclosed ones would each be searched to the end.
_BRACKETS = re.compile(
    r"\\\( ((?: [^\\] | \\[^()] )++) \\\) | \\\[ ((?: [^\\] | \\[^][] )++) \\\]",
    re.VERBOSE | re.DOTALL,
)
_BRACKET_BLOCK = re.compile(r"\\\[((?:[^\\]|\\[^][])++)\\\][ \t]*(?:\n|\Z)")
# "from $5/month to 3$": words after a number and nothing of TeX.
_MONEY = re.compile(r"\d[^\\^_={}]*\Z")
_WORD = re.compile(r"[A-Za-z]{3}")
# MathJax complains about a label it has seen, and an answer is rendered again as it grows.
_LABEL = re.compile(r"(?<!\\)((?:\\\\)*)\\label\s*\{[^{}\\]*\}")
_COMMAND = re.compile(r"\\(?:([A-Za-z]+)|.)", re.DOTALL)
_ENVIRONMENT_TAGS = re.compile(r"\\(?:begin|end)(?![A-Za-z])(?:\{([A-Za-z]+\*?)\})?")
_CLOSINGS = {
    "$$": re.compile(r"\$\$"),
    "\\[": re.compile(r"\\\]"),
    "\\begin{": re.compile(r"\\end\{"),
}
_INTERRUPTED = ["paragraph", "reference", "blockquote", "list"]


def add_rules(parser: MarkdownIt) -> None:
    """Add the rules for formulas to a parser.

    Their tokens are ``math_inline``, ``math_inline_double``, ``math_block``, and ``math_open`` for the
    source of a formula that the text so far does not complete.
    """
    from mdit_py_plugins.amsmath import amsmath_block
    from mdit_py_plugins.dollarmath.index import math_block_dollar, math_inline_dollar

    dollars = math_inline_dollar(allow_space=False, allow_digits=False, allow_double=True)
    parser.inline.ruler.before("escape", "math_dollars", _inline_rule(dollars))
    parser.inline.ruler.before("escape", "math_brackets", _inline_brackets)
    blocks: dict[str, BlockRule] = {
        "$$": math_block_dollar(allow_labels=False, allow_blank_lines=False),
        "\\[": _block_brackets,
        "\\begin{": amsmath_block,
    }
    for opening, rule in blocks.items():
        parser.block.ruler.before(
            "fence", f"math {opening}", _block_rule(opening, rule), {"alt": _INTERRUPTED}
        )


def _inline_rule(
    rule: Callable[[StateInline, bool], bool],
) -> Callable[[StateInline, bool], bool]:
    """Return the plugin's rule for dollars, which does not take an amount of money for a formula."""

    def run(state: StateInline, only_check: bool) -> bool:
        start, source = state.pos, state.src
        if source[start] != "$":
            return False
        if start == 0:
            # The plugin reads the last character where it should read the one before the first.
            state.src += " "
        try:
            found = rule(state, True) and state.pos <= state.posMax
            tex, state.pos = source[start + 1 : state.pos - 1], start
            if not found or (_MONEY.match(tex) and _WORD.search(tex)):
                return False
            return rule(state, only_check)
        finally:
            state.src = source

    return run


def _inline_brackets(state: StateInline, only_check: bool) -> bool:
    match = _BRACKETS.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not only_check:
        token = state.push("math_inline" if match[1] else "math_inline_double", "math", 0)
        token.content = match[match.lastindex or 0]
    state.pos = match.end()
    return True


def _block_rule(opening: str, rule: BlockRule) -> BlockRule:
    """Return a rule that takes a formula to the end of its paragraph, list item or quotation at most.

    The rules of the plugins do not stop there, and push a token where they should only search.
    """

    def run(state: StateBlock, start_line: int, end_line: int, only_check: bool) -> bool:
        start = state.bMarks[start_line] + state.tShift[start_line]
        if not state.src.startswith(opening, start) or state.is_code_block(start_line):
            return False
        end = start_line + 1
        while end < end_line and not state.isEmpty(end) and state.sCount[end] >= state.blkIndent:
            end += 1
        state.env["steps"] += end - start_line  # `markdown` counts and limits them
        line, count = state.line, len(state.tokens)
        found = rule(state, start_line, end, False)
        tex = state.getLines(start_line, state.line, state.blkIndent, False).strip()
        if opening != "\\begin{":
            tex = tex[2:-2]
        found = found and bool(tex.strip()) and not (opening == "$$" and "$$" in tex)
        if only_check or not found:
            del state.tokens[count:]
            state.line = line
        else:
            token = state.tokens[-1]
            token.type, token.content, token.map = "math_block", tex, [start_line, state.line]
        return found or _open_formula(state, (start_line, end), opening, only_check)

    return run


def _open_formula(
    state: StateBlock, lines: tuple[int, int], opening: str, only_check: bool
) -> bool:
    """Parse a formula at the end of the text that has no end yet.

    Its source is shown as code: as Markdown it would become lists and emphasis for a moment.
    """
    start, end = lines
    source = state.getLines(start, end, state.blkIndent, False).strip()
    if state.eMarks[end - 1] + 1 < len(state.src) or _CLOSINGS[opening].search(source, 2):
        return False
    name = _ENVIRONMENT_TAGS.match(source) if opening == "\\begin{" else None
    if opening == "\\begin{" and (name is None or name[1] not in _ENVIRONMENTS):
        return False
    if not only_check:
        token = state.push("math_open", "math", 0)
        token.content, token.map, token.block = source, [start, end], True
        state.line = end
    return True


def _block_brackets(state: StateBlock, start_line: int, end_line: int, _only_check: bool) -> bool:
    text = state.getLines(start_line, end_line, state.blkIndent, False).lstrip()
    match = _BRACKET_BLOCK.match(text)
    if match is None:
        return False
    state.push("math_block", "math", 0).block = True
    state.line = start_line + match[0].rstrip("\n").count("\n") + 1
    return True


def delimited(tex: str, display: bool) -> str:
    """Return the formula (not escaped) with the delimiters that every typesetter supports."""
    tex = _LABEL.sub(r"\1", tex)
    return f"\\[{tex}\\]" if display else f"\\({tex}\\)"


def is_harmless(tex: str) -> bool:
    """Return whether a formula can only draw itself."""
    if len(tex) > _MAX_FORMULA:
        return False
    tex = _LABEL.sub(r"\1", tex)
    commands, environments = set(_COMMAND.findall(tex)), set(_ENVIRONMENT_TAGS.findall(tex))
    return commands <= _known_commands() and environments <= _ENVIRONMENTS


@cache
def _known_commands() -> frozenset[str]:
    lines = Path(__file__).with_name("latex_commands.txt").read_text(encoding="utf-8").splitlines()
    listed = " ".join(line for line in lines if not line.startswith("#")).split()
    # "" stands for the commands of one character, as in `\{` and `\,`.
    return frozenset({"", "begin", "end", *listed})


_ENVIRONMENT_NAMES = """
align align* alignat alignat* aligned alignedat array Bmatrix bmatrix cases dcases drcases eqnarray
eqnarray* equation equation* flalign flalign* gather gather* gathered matrix multline multline*
pmatrix rcases smallmatrix split subarray Vmatrix vmatrix
"""
_ENVIRONMENTS = frozenset(_ENVIRONMENT_NAMES.split())
