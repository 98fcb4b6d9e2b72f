r"""Put the notebook's values into a prompt, and leave every other brace as it is.

``{ref}`` becomes a value when `ref` is a reference: a name that exists, then any chain of ``.attr``,
``[key]`` and ``(arguments)``; keys and arguments are constants, lists, slices and references.
``{{ref}}`` becomes ``{ref}``. These stay byte for byte, whatever names exist:

- what is no reference: JSON, comprehensions, ``{x:.2f}``, ``{x!r}``, ``{ x }``, ``{{{x}}}``
- the inside of an f-string literal, and ``${name}`` of shell and JavaScript
- the arguments of a LaTeX command, ``\frac{a}{b}``, with all they hold; sub- and superscripts,
  ``x_{i}``, ``10^{n}``, and ``loss_{train}`` between dollars. ``report_{name}.csv`` is a reference,
  and so are ``{name}`` alone in a formula and after ``\n`` and ``\t``, which are no commands
"""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from keyword import iskeyword
from math import prod
from pprint import pformat
from traceback import format_exc, format_exception_only
from typing import Any

from llm_magic.errors import PromptError, did_you_mean

# Repetitions are possessive and end at a quote, a brace, the line or after 200 parts: the time grows
# with the length of the prompt. Nothing inside them may backtrack (python/cpython#106052).
_TOKEN = r"""(?x)
    (?P<fstring> (?<!\w)(?:[fF][rR]?|[rR][fF])(?:
        (?P<triple>"{3}|'{3})(?:\\[\s\S]|(?!(?P=triple))[\s\S])*+(?P=triple)
      | "(?:[^"\\\n{]++|\\.|\{[^{}\n]*+\}|\{){0,200}+"
      | '(?:[^'\\\n{]++|\\.|\{[^{}\n]*+\}|\{){0,200}+'(?!\()   # not the f'(x) … f'(y) of calculus
    ))
  | (?P<latex> \\(?![nt]\{)[a-zA-Z]++\*?(?:\[[^\[\]\n]*+\])*+[_^]?(?=\{)
             | (?<=\S)\^(?=\{) | (?<=\b[^\W\d_])_(?=\{) )
  | (?P<subscript> _(?=\{) )
  | (?P<dollar> \$\{(?P<shell>[^\W\d]\w*+)\} | \$\{++ )
  | (?P<format> (?<!\{)\{ (?P<formatted>[^\W\d]\w*+) [\w.]*+
        (?:![rsa] | :[<>^+]?+[\d,]*+(?:\.\d++)?[a-zA-Z%]) \} )
  | (?P<open> (?<!\{)\{++ ) (?P<ref> (?P<root>[^\W\d]\w*+)(?!["']) (?:
        [^\W\d]\w*+
      | \d[\d_]*+(?:\.\d++)?+(?:[eE][-+]?+\d++)?+(?![\w.])
      | "(?:[^"\\\n]|\\["'\\nt])*+" | '(?:[^'\\\n]|\\["'\\nt])*+'
      | [.,()\[\]:=\-\ ]
    ){0,200}+ (?<!\ ) ) (?P<close> \}++ )
"""
_GROUP = re.compile(r"(?:\[[^\[\]\n]*+\])*+[_^]?\{")
_UNESCAPED_BRACE = re.compile(r"(?<!\\)[{}]")
_DOLLAR_AHEAD = re.compile(r"[^$\n]*(?<=\S)\$(?!\d)")
_PLAIN = re.compile(r"\{[^\W\d]\w*\}")
_CODE = re.compile(r"[{}=\\$`<>]|;$")
_WHOLES = (ast.Name, ast.Attribute, ast.Subscript, ast.Call)
_PARTS = (ast.keyword, ast.Constant, ast.UnaryOp, ast.USub, ast.Slice, ast.List, ast.Tuple)
_NEARBY = 200  # characters looked at on each side to tell prose and formulas
_MAX_NOTES = 3
_Found = tuple[int, int, str, ast.expr | None]  # start, end, reference, tree (none in {{ref}})


@dataclass(frozen=True, slots=True)
class Filled:
    """A prompt with its values, the references in it (without braces), and what to tell about it."""

    text: str
    used: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def fill(template: str, namespace: Mapping[str, Any]) -> Filled:
    """Replace the references in `template` by the text of their values in `namespace`."""
    parts: list[str] = []
    used: dict[str, None] = {}
    notes: dict[str, str] = {}
    position = 0
    for start, end, ref, tree in _scan(template, namespace, notes):
        parts += template[position:start], _value(ref, tree, namespace) if tree else f"{{{ref}}}"
        position = end
        if tree:
            used[ref] = None
    return Filled("".join(parts) + template[position:], tuple(used), tuple(notes.values()))


def _scan(text: str, namespace: Mapping[str, Any], notes: dict[str, str]) -> Iterator[_Found]:
    """Find the braces that count, and collect notes about those that only look like it."""
    token = re.compile(_TOKEN)
    closing: dict[int, int] | None = None
    position = 0
    while match := token.search(text, position):
        position = match.end()
        if match["latex"] or (match["subscript"] and _in_formula(text, position)):
            closing = _closing_braces(text) if closing is None else closing
            position = _after_groups(text, position, closing)
        elif found := _find(match, namespace):
            position = found[1]
            yield found
        else:
            position = match.end("open") if match["open"] else position
            if len(notes) < _MAX_NOTES and match[0] not in notes:
                notes.update(_note(match, namespace))


def _find(match: re.Match[str], namespace: Mapping[str, Any]) -> _Found | None:
    """Return what the match stands for if it is a reference in one or two pairs of braces."""
    opened, closed = len(match["open"] or ""), len(match["close"] or "")
    if opened not in (1, 2) or match["root"].startswith("__") or match["root"] not in namespace:
        return None
    if (tree := _parse(match["ref"], namespace)) is None:
        return None
    width = 2 if opened == 2 and closed > 1 else 1
    start, end = match.start("ref") - width, match.end("ref") + width
    return start, end, match["ref"], tree if width == 1 else None


def _closing_braces(text: str) -> dict[int, int]:
    """Map each opening brace to the one that closes it."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for brace in _UNESCAPED_BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            pairs[opened.pop()] = brace.start()
    return pairs


def _after_groups(text: str, position: int, closing: Mapping[int, int]) -> int:
    r"""Return where the LaTeX arguments end that begin here: ``{a}{b}``, ``{i=1}^{n}``."""
    while match := _GROUP.match(text, position):
        if (end := closing.get(match.end() - 1)) is None:  # only this brace is LaTeX then
            return match.end()
        position = end + 1
    return position


def _in_formula(text: str, position: int) -> bool:
    """Say whether dollars enclose the place on its line; prices do not, by Pandoc's rule."""
    before = text[max(0, position - _NEARBY) : position].rpartition("\n")[2]
    ahead = _DOLLAR_AHEAD.match(text, position, position + _NEARBY)
    return ahead is not None and before.replace("$$", "$").count("$") % 2 == 1


def _parse(ref: str, namespace: Mapping[str, Any]) -> ast.expr | None:
    """Return the syntax tree of `ref` if all of it may be in a reference."""
    try:
        tree = ast.parse(ref, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):  # ValueError: a null byte, half a surrogate
        return None
    nodes = list(ast.walk(tree))
    fits = (
        isinstance(tree, _WHOLES)
        and all(isinstance(node, (*_WHOLES, *_PARTS, ast.Load)) for node in nodes)
        and all(node.arg for node in nodes if isinstance(node, ast.keyword))  # None is **
        and all(node.id in namespace for node in nodes if isinstance(node, ast.Name))
    )
    return tree if fits else None


def _value(ref: str, tree: ast.expr, namespace: Mapping[str, Any]) -> str:
    """Return the text of a reference's value, or raise the one error of this module."""
    for node in ast.walk(tree):
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name.startswith("__") and name.endswith("__"):
            raise PromptError(
                f"{{{ref}}}: {name} is not read from a prompt. Put the value in a variable, "
                f"write {{{{{ref}}}}} for a literal, or use --raw"
            )
    try:
        return to_text(_evaluate(namespace, tree))
    except Exception as error:  # noqa: BLE001 - the user's own properties and calls raise anything
        details = format_exc()
        # Not str(error), which may raise. A SyntaxError begins with indented lines of code.
        lines = "".join(format_exception_only(error)).splitlines()
        reason = next(line for line in lines if not line.startswith("  "))[:_NEARBY].rstrip(" .:")
    # Raised out here, where it does not hold the error and the frames behind it.
    advice = "Fix the name, write {{…}} for a literal, or use --raw"
    raise PromptError(f"{{{ref}}}: {reason}. {advice}", details=details) from None


def _evaluate(namespace: Mapping[str, Any], node: ast.expr | None) -> Any:
    """Walk a tree that `_parse` accepted."""
    value = partial(_evaluate, namespace)
    match node:
        case ast.Name(id=name):
            return namespace[name]
        case ast.Attribute(value=inner, attr=name):
            return getattr(value(inner), name)
        case ast.Subscript(value=inner, slice=key):
            return value(inner)[value(key)]
        case ast.Call(func=inner, args=arguments, keywords=keywords):
            named = {keyword.arg: value(keyword.value) for keyword in keywords if keyword.arg}
            return value(inner)(*map(value, arguments), **named)
        case ast.Constant(value=constant):
            return constant
        case ast.UnaryOp(operand=operand):
            return -value(operand)
        case ast.Slice(lower=lower, upper=upper, step=step):
            return slice(value(lower), value(upper), value(step))
        case ast.List(elts=items):
            return [value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(value(item) for item in items)
    return None  # the open end of a slice


def _note(match: re.Match[str], namespace: Mapping[str, Any]) -> dict[str, str]:
    """Say about what looks meant why it was left as it is."""
    written, name = match[0], match["ref"] or ""
    if match["shell"] in namespace:
        return {written: f"{written} is left as it is, as in shell code; $ {written[1:]} is filled"}
    if match["formatted"] in namespace:
        return {written: f"{written} is left as it is: put the formatted value in a variable"}
    plain = name.isidentifier() and len(name) > 1 and name[0] != "_" and not iskeyword(name)
    if written != f"{{{name}}}" or not plain or name in namespace or not _in_prose(match):
        return {}
    near = did_you_mean(name, (known for known in namespace if known[:1] != "_"), count=1)
    return {written: f"{written} is not defined here; left as it is.{near}"}


def _in_prose(match: re.Match[str]) -> bool:
    """Say whether words surround the match, and not code, JSON or a fenced block."""
    text, (start, end) = match.string, match.span()
    before = text[max(0, start - _NEARBY) : start].rpartition("\n")[2]
    after = text[end : end + _NEARBY].partition("\n")[0]
    if before[-1:].strip(" \t([\"'*") or after[:1].strip(" \t\r)]\"'*.,;:!?"):
        return False
    line = _PLAIN.sub("", before + after)  # the other names of the line do not make it code
    return not _CODE.search(line.rstrip()) and text.count("```", 0, start) % 2 == 0


def to_text(value: Any) -> str:
    """Return what a model should read for `value`, by the first of its types that is known."""
    for base in type(value).__mro__:
        package = str(base.__module__).partition(".")[0]
        if render := _RENDERERS.get(f"{package}.{base.__name__}"):
            return render(value)
    return str(value)


def _frame(frame: Any, title: str = "", **options: Any) -> str:
    """Show the first and last ten rows and columns."""
    rows, columns = frame.shape
    title = title or f"{type(frame).__name__}, {rows} rows × {columns} columns"  # noqa: RUF001
    return f"{title}\n{frame.to_string(max_rows=20, max_cols=20, max_colwidth=60, **options)}"


def _series(series: Any) -> str:
    """Show a column as a frame of one, because only frames cut long cells."""
    name = "" if series.name is None else f" {series.name!r}"
    title = f"{type(series).__name__}{name}, {len(series)} values, {series.dtype}"
    return _frame(series.to_frame(), title, header=False)


def _array(array: Any) -> str:
    """Show a numpy array or a torch tensor, of a large one only a corner."""
    title = f"{type(array).__name__}, shape {tuple(array.shape)}, {array.dtype}"
    if prod(array.shape) <= 100:
        return f"{title}\n{array}" if array.shape else str(array.item())
    edge = {1: 20, 2: 6}.get(len(array.shape), 2)
    return f"{title}; the first values:\n{array[(slice(edge),) * len(array.shape)]}"


def _source(value: Any) -> str:
    """Show how a function or a class was written, if Python wrote it down."""
    try:
        return inspect.cleandoc("\n" + inspect.getsource(value))
    except (OSError, TypeError):
        return _cell_source(value) or repr(value)


def _cell_source(value: Any) -> str:
    """Find a class of the notebook, which inspect cannot, in the last cell that defines it."""
    cells = [entry[2] for entry in linecache.cache.values() if len(entry) == 4 and not entry[1]]
    for lines in reversed(cells if value.__module__ == "__main__" else []):
        source = "".join(lines)
        with suppress(SyntaxError):  # of cells that never ran
            for node in ast.parse(source).body if f"class {value.__name__}" in source else ():
                if isinstance(node, ast.ClassDef) and node.name == value.__name__:
                    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
                    return "".join(lines[first - 1 : node.end_lineno]).rstrip()
    return ""


_pretty = partial(pformat, width=100, compact=True, sort_dicts=False)
_RENDERERS: dict[str, Callable[[Any], str]] = {
    "builtins.str": lambda text: text,
    "builtins.bytes": repr,
    **{f"builtins.{kind}": _pretty for kind in ("dict", "list", "tuple", "set", "frozenset")},
    **{f"builtins.{kind}": _source for kind in ("function", "method", "type")},
    "pydantic.BaseModel": repr,
    "pandas.DataFrame": _frame,
    "pandas.Series": _series,
    "numpy.ndarray": _array,
    "torch.Tensor": _array,
}
