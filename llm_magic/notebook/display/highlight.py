"""Code as HTML in the colors of JupyterLab's editor, by Pygments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import groupby
from time import monotonic

from llm_magic.notebook.display.tables import escape_text

# Pygments' lexers slow down quadratically on input made for it, so besides the size there is a
# time limit, for one block and for all blocks of a text; the code after that gets no colors.
_MAX_HIGHLIGHTED = 20_000
_BLOCK_SECONDS = 0.5
TEXT_SECONDS = 1.0

# The languages that models write in notebooks. The model must not choose among all lexers of
# Pygments and its plugins; ini, make and console are missing because one match can take seconds.
_LANGUAGE_NAMES = """
bash c c# c++ cpp csharp css diff docker dockerfile go html java javascript js json julia kotlin
lua perl php powershell py python python3 r ruby rust scala sh shell sql swift toml ts typescript
xml yaml yml zsh
"""
LANGUAGES = frozenset(_LANGUAGE_NAMES.split())

# Token type of Pygments -> JupyterLab's editor color and what to use elsewhere: colors of
# medium lightness, readable on white and on black.
COLORS = {
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


@lru_cache(maxsize=32)  # while an answer streams, its finished blocks are rendered repeatedly
def highlight(code: str, language: str) -> str:
    """Return code as HTML, colored if the language is one of `LANGUAGES` and the code not long."""
    if language not in LANGUAGES or len(code) > _MAX_HIGHLIGHTED:
        return escape_text(code)
    runs = groupby(_colored(code, language), key=lambda piece: piece[0])
    return "".join(_span(style, "".join(text for _, text in run)) for style, run in runs)


def _colored(code: str, language: str) -> Iterator[tuple[str, str]]:
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
    html = escape_text(text)
    return f'<span style="{style}">{html}</span>' if style else html


@cache
def _style(kind: str) -> str:
    """Return the style of a token type such as ``Token.Name.Function.Magic``, or its parent's."""
    kind = kind.removeprefix("Token.")
    while kind and kind not in COLORS:
        kind = kind.rpartition(".")[0]
    if not kind:
        return ""
    name, elsewhere = COLORS[kind]
    return f"color:var(--jp-mirror-editor-{name}-color, {elsewhere})"
