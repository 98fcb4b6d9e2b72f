"""The tokens of an answer, shaded by their probability, with the alternatives as tooltips; HTML alone.

JupyterLab removes style sheets from a notebook that it does not trust, so each token has its style. The
shades are transparent: the text keeps the color of the theme, and its contrast.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from llm_magic.notebook.display import markdown
from llm_magic.notebook.display.live_output import MUTED
from llm_magic.notebook.display.tables import NO_MATH, escape_text
from llm_magic.text import escape, replace_surrogates, visible
from llm_magic.types import TokenLogprob, tokens_of

# A token that is less likely than this has the color.
_SHADES = ((0.1, "#f808"), (0.3, "#f806"), (0.6, "#f804"), (0.9, "#f802"))
# What a token may take besides its text, on average: fewer alternatives are shown where they are long.
_BYTES_A_TOKEN, _LEAST_BYTES = 72, 10_000
_MAX_TOKENS = 5000  # that are shaded
_LISTED, _LISTED_CHARACTERS = 8, 40
# Smaller shares have a decimal, and those below the second number are shown as 0%.
_ROUNDED, _SMALLEST = 0.01, 0.0001


def shaded(tokens: Sequence[TokenLogprob], text: str) -> str:
    """Return a text as HTML with its tokens shaded; "" where the tokens do not make up the text."""
    tokens = tokens_of(text, tokens)
    if not text or "".join(token.text for token in tokens) != text:
        return ""
    first, others = tokens[:_MAX_TOKENS], tokens[_MAX_TOKENS:]
    count = _alternatives_that_fit(first)
    spans = "".join(_span(token, count) for token in first if token.text)
    remaining = _text("".join(token.text for token in others))
    return f"{markdown.preformatted(spans + remaining)}{_legend(count)}{_least_likely(first)}"


def _alternatives_that_fit(tokens: Sequence[TokenLogprob]) -> int:
    """Return how many alternatives of each token the size of the page allows."""
    allowed = max(_BYTES_A_TOKEN * len(tokens), _LEAST_BYTES)
    left = allowed - sum(_size(_span(t, 0)) - _size(t.text) for t in tokens)
    most = max(len(token.alternatives) for token in tokens)
    for count in range(most):
        left -= sum(_size(line) for token in tokens for line in _lines(token, count, count + 1))
        if left < 0:
            return count
    return most


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))


def _span(token: TokenLogprob, alternatives: int) -> str:
    shade = next((color for limit, color in _SHADES if token.probability < limit), "")
    title = _percent(token.probability) + "".join(_lines(token, 0, alternatives))
    return f'<span{_style(shade)} title="{title}">{_text(token.text)}</span>'


def _style(shade: str) -> str:
    return f' style="background:{shade}"' if shade else ""


def _lines(token: TokenLogprob, start: int, end: int) -> Iterator[str]:
    """Yield alternatives of a token as lines of a tooltip."""
    for text, logprob in token.alternatives[start:end]:
        yield f"\n{_percent(math.exp(logprob))} {html.escape(_in_line(text))}"


def _legend(alternatives: int) -> str:
    shades = (
        f"<span{_style(color)}>under {_percent(limit)}</span>" for limit, color in reversed(_SHADES)
    )
    tooltip = "its alternatives" if alternatives else "its value"
    text = f"Probability of a token: {' '.join(shades)} · point at a token for {tooltip}"
    return f'<div class="{NO_MATH}" style="{MUTED} margin-top: 0.4em;">{text}</div>'


def _least_likely(tokens: Sequence[TokenLogprob]) -> str:
    """Return the least likely tokens in a list that a keyboard opens, too."""
    unlikely = [token for token in tokens if token.probability < _SHADES[-1][0]]
    if not unlikely:
        return ""
    listed = sorted(unlikely, key=lambda token: token.logprob)[:_LISTED]
    lines = "\n".join(map(_line, listed))
    return markdown.collapsed("The least likely tokens", lines)


def _line(token: TokenLogprob) -> str:
    others = [
        f"{_percent(math.exp(logprob))} {_quoted(text)}" for text, logprob in token.alternatives[:3]
    ]
    likelier = f"; likeliest: {', '.join(others)}" if others else ""
    return f"{_percent(token.probability)} {_quoted(token.text)}{likelier}"


def _percent(share: float) -> str:
    """Return a probability as a percentage, with a digit that counts down to 0.01%."""
    if share >= _ROUNDED:
        return f"{share:.0%}"
    return f"{share * 100:.1g}%" if share >= _SMALLEST else "0%"


def _quoted(text: str) -> str:
    line = _in_line(text)
    cut = "…" if len(line) > _LISTED_CHARACTERS else ""
    return f"“{line[:_LISTED_CHARACTERS]}{cut}”"


def _text(text: str) -> str:
    return escape_text(replace_surrogates(text))


def _in_line(text: str) -> str:
    return visible(escape(replace_surrogates(text)))
