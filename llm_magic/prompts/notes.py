"""Why braces with existing names were not replaced: what is wrong with them, and what to write instead."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any

from llm_magic.errors import did_you_mean
from llm_magic.prompts import expressions
from llm_magic.prompts.allowed_operations import FUNCTIONS
from llm_magic.prompts.expressions import Expression, Inserted
from llm_magic.prompts.trusted_types import ARRAYS, TEXTS, NotAllowed, family

# Numbers alone, as in an f-string: `{1/0}`. `{1,3}` and `{2-4}` are also ranges.
_ARITHMETIC = re.compile(r"[\d.]+(?: ?(?:[+*/%]|//|\*\*) ?[\d.]+)+")
_FORMATS = frozenset(("csv", "dict", "html", "json", "markdown", "string"))
# `{price :.2f}`, `{price: ,.2f}`: formats that are neither entries of a dict nor CSS.
_SPACED_SPEC = re.compile(r"(?P<code>[^:]*[^:\s])\s*+:\s*+(?P<spec>,?\.\d{1,2}[eEfFgG%]|,d?)")
_SPACED_KEY = re.compile(r"(?P<name>[^\W\d]\w*+)\.(?P<key>\w++(?: \w++)++)")  # `{df.GDP per head}`
# `{len big}` and `{len(big) rows}`: a call without its brackets, and text after an expression.
_NOT_CALLED = re.compile(rf"(?P<function>{'|'.join(FUNCTIONS)}) (?P<argument>[^\W\d]\w*+)")
_TEXT_AFTER = re.compile(r"(?P<code>[^\W\d].*[)\]])(?P<text> ?[^\W\d]\w*+(?: \w++)*+)")
# `{df.price,mean()}`: a comma instead of a dot.
_COMMA = re.compile(r"(?P<code>[^\W\d][\w.]*+),(?P<method>[^\W\d]\w*+)(?P<call>\(.*\))")
# `{df !r}`, `{df.mean()!}`, `{df!x}`
_CONVERSION = re.compile(r"(?P<code>[^!]*[^!\s])\s*+!(?P<conversion>\w*+)(?P<spec>:[^{}]+)?")
# What IPython and Python define in each notebook, which a template does not read.
_SHELL_NAME = re.compile(r"_{1,3}|_i{0,3}|_i?\d+|_[iod]h|In|Out|exit|quit|get_ipython")
_TEXT_METHODS = frozenset(("capitalize", "lower", "strip", "title", "upper"))
_SEVERAL = re.compile(r"[^\W\d]\w++(?:[,;] ?[^\W\d]\w++)++")
# `{x, y}`: also a set of letters, unless they are the names of texts.
_LETTERS = re.compile(r"[^\W\d]\w*+(?:[,;] [^\W\d]\w*+)++")
# What follows a colon in types, paths and CSS: `{name:string}`, `{color:red}`.
_WORDS_OF_CODE = frozenset(
    ("any", "array", "auto", "black", "block", "blue", "bold", "bool", "boolean", "bytes", "center", "date",
     "datetime", "dict", "float", "gray", "green", "hidden", "inherit", "int", "integer", "italic", "left",
     "list", "none", "null", "number", "object", "path", "red", "right", "slug", "str", "string", "text",
     "uuid", "white", "yellow")
)  # fmt: skip
QUOTED = r"""(?:"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+')"""


class Mistyped:
    """Finds typing errors in what would be an expression of existing names."""

    def __init__(self, names: Mapping[str, Any], is_defined: Callable[[str], bool]) -> None:
        """`is_defined` returns whether a text is an expression whose names all exist."""
        self._names, self._is_defined = names, is_defined

    def reason(self, code: str) -> str:
        """Return the reason that an expression of existing names with a typing error is no reference."""
        if (spaced := _SPACED_SPEC.fullmatch(code)) and self._is_defined(spaced["code"]):
            better = shown(f"{spaced['code']}:{spaced['spec']}")
            return f"has a space beside the colon; write {better}"
        if (named := _SPACED_KEY.fullmatch(code)) and self._is_key(named["name"], named["key"]):
            better = shown(f'{named["name"]}["{named["key"]}"]')
            return f"has a name with spaces; write {better}"
        if reason := self._misplaced_mark(code):
            return reason
        if _ARITHMETIC.fullmatch(code):
            return "contains no variable"
        if (called := _NOT_CALLED.fullmatch(code)) and called["argument"] in self._names:
            better = shown(f"{called['function']}({called['argument']})")
            return f"has no brackets; write {better}"
        if (after := _TEXT_AFTER.fullmatch(code)) and self._is_defined(after["code"]):
            text = after["text"].strip()
            better = f"{shown(after['code'])} {text}"
            is_code = any(map(iskeyword, text.split()))
            return "" if is_code else f"has text after the expression; write {better}"
        return "contains :=" if self._is_defined(code.partition(":=")[0]) else ""

    def several(self, code: str) -> list[str]:
        """Return the names of variables in a list of names; none in another text, or a set of letters."""
        parts = re.split("[,;] ?", code)
        if _SEVERAL.fullmatch(code):
            return parts if all(map(self._is_defined, parts)) else []
        is_texts = all(family(self._names.get(part)) in TEXTS for part in parts)
        return parts if _LETTERS.fullmatch(code) and is_texts else []

    def _misplaced_mark(self, code: str) -> str:
        """Return the reason for a comma, a semicolon or an exclamation mark in the wrong place."""
        comma = _COMMA.fullmatch(code)
        if comma is not None and comma["method"] not in {*self._names, *FUNCTIONS}:
            better = f"{comma['code']}.{comma['method']}{comma['call']}"
            if self._is_defined(better):
                return f"has a comma in place of a dot; write {shown(better)}"
        if code.endswith(";") and self._is_defined(code[:-1]):
            return f"ends with a semicolon; write {shown(code[:-1])}"
        mark = _CONVERSION.fullmatch(code)
        if mark is None or not self._is_defined(mark["code"]):
            return ""
        if mark["conversion"] in {"r", "s", "a"}:
            better = f"{mark['code']}!{mark['conversion']}{mark['spec'] or ''}"
            return f"has a space before the conversion; write {shown(better)}"
        better = shown(f"{mark['code']}{mark['spec'] or ''}")
        return f"has !{mark['conversion']}, which is not a conversion; write {better}"

    def reason_of_word(self, head: str, word: str) -> str:
        """Return the reason that a word after a colon is not a format spec; none for ``{a:int}``."""
        if word in _TEXT_METHODS:
            better = f"; write {shown(f'{head}.{word}()')}"
        elif head.isidentifier() and family(self._names[head]) not in ARRAYS:
            if word in _WORDS_OF_CODE:
                return ""
            better = f"; write {shown(head)}"
        else:
            better = f"; write {shown(f'{head}.to_{word}()')}" if word in _FORMATS else ""
        return f'has the format spec "{word}", which Python does not support{better}'

    def _is_key(self, name: str, key: str) -> bool:
        return name in self._names and expressions.has_key(self._names[name], key)


def unbalanced(code: str) -> str:
    """Return what is wrong with the quotes and brackets of an expression, or an empty string."""
    unquoted = re.sub(QUOTED, "", code)
    if '"' in unquoted or "'" in unquoted:
        return "has a quote that is not closed"
    more = [unquoted.count(left) - unquoted.count(right) for left, right in ("()", "[]")]
    if not any(more):
        return ""
    is_open = max(more) > 0
    return "has a bracket that is not closed" if is_open else "has a closing bracket too many"


def dollar_note(code: str, expression: Expression) -> str:
    """Return the note about braces after a dollar, which shell and JavaScript code use."""
    plain = not expression.spec and not expression.conversion
    number = f"${shown(code + ':,')} or ${shown(code + ':.2f')} for a number, else "
    return (
        f"${shown(code)} was not replaced: shell and JavaScript code use this form. Write"
        f" {number if plain else ''}$ {shown(code)}"
    )


def not_allowed_note(code: str, error: NotAllowed) -> str:
    """Return the note about an expression that is not evaluated."""
    advice = f". {error.advice}" if error.advice else ""
    return f"{shown(code)} was not replaced: it {printable(str(error))}{advice}"


def shortened_note(code: str, expression: Expression, inserted: Inserted) -> str:
    """Return the note about a table of which only a part is sent."""
    note = f"{shown(code)} is sent {inserted.lacks}"
    if not inserted.complete and not inserted.part:
        return note
    value = code
    for mark, part in ((":", expression.spec), ("!", expression.conversion)):
        value = value.removesuffix(f"{mark}{part}") if part else value
    if not isinstance(expression.tree, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
        value = f"({value})"
    if inserted.complete:
        return f"{note}. To send all of it: {shown(value + inserted.complete)}"
    return f"{note}. To send a part of it: {shown(value + inserted.part)}"


def missing_note(code: str, name: str, expression: Expression, names: Mapping[str, Any]) -> str:
    """Return the note about a name that does not exist, with one that does."""
    if name.startswith("__"):
        return not_allowed_note(code, NotAllowed(expressions.private(name)))
    if expressions.is_unquoted_key(name, expression, names):
        quoted = code.replace(f"[{name}]", f'["{name}"]')
        near = f" Write {shown(quoted)}"
    else:
        known = [one for one in names if one[:1] != "_"]
        near = did_you_mean(name, known, count=1) or did_you_mean(_stem(name), known, count=1)
        if reason := _reserved(code, name):
            return f"{shown(code)} was not replaced: {reason}{near}"
    return f"{shown(code)} was not replaced: {name} is not defined.{near}"


def _reserved(code: str, name: str) -> str:
    """Return the reason that a name of IPython or of Python alone is no reference, or an empty string."""
    if name in FUNCTIONS and code == name:
        return f"{name} is a function; write {shown(f'{name}(…)')} with its argument."
    if name in {"In", "Out"}:
        return f"{name} as a whole is not read; write {shown(f'{name}[NUMBER]')}."
    if _SHELL_NAME.fullmatch(name):
        return f"{name} is a name of IPython. Assign the value to a variable first."
    return f"{name} is a name of Python, not a variable." if hasattr(builtins, name) else ""


def _stem(name: str) -> str:
    """Return the start of a plural, by which a name in the singular is found."""
    return name.removesuffix("s").removesuffix("ie") if name.endswith("s") else ""


def shown(code: str) -> str:
    """Return an expression in braces, short and without control characters."""
    return "{" + printable(code if len(code) <= 80 else f"{code[:78]} …") + "}"


def printable(text: str) -> str:
    """Return a text without control characters."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
