r"""Put the notebook's values into a prompt, and leave every other brace as it is.

``{expression}`` becomes a value when all its names exist: ``{name}``, ``{obj.attr}``, ``{d["k"]}``,
``{df.head()}``, ``{len(df)}``, ``{price * 1.2:.2f}``, ``{max(xs)!r}``; `expressions` defines what is
evaluated. An expression that is not allowed stays as it is, with a note that has the reason.
``{{expression}}`` becomes ``{expression}``. These stay byte for byte, whatever names exist:

- what is not an expression: JSON, dict literals, comprehensions, ``{ x }``, ``{{{x}}}``, ``{x, y}``
- the inside of an f-string literal
- ``${name}`` and ``${expression}`` of shell and JavaScript; ``${price:.2f}`` and ``${price:,}`` are
  references, because neither language has such a format
- the arguments of a LaTeX command, ``\frac{a}{b}``, with all they contain; sub- and superscripts,
  ``x_{i}``, ``10^{n}``, and ``loss_{train}`` between dollars. ``report_{name}.csv`` is a reference,
  and so are ``{name}`` alone in a formula and after ``\n`` and ``\t``, which are no commands
"""

from __future__ import annotations

import ast
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from traceback import format_exc, format_exception_only
from typing import Any

from llm_magic.errors import PromptError, did_you_mean
from llm_magic.prompts import expressions
from llm_magic.prompts.allowed_operations import FUNCTIONS
from llm_magic.prompts.expressions import Expression, Inserted, NotFound
from llm_magic.prompts.trusted_types import (
    ARRAYS,
    BRACE_COST,
    CHARACTER_COST,
    PARSE_COST,
    Budget,
    NotAllowed,
    family,
)
from llm_magic.prompts.values_as_text import is_entry, is_word

# Repetitions are possessive and end at a quote, a brace, the line or after 200 parts: the time grows
# with the length of the prompt. Nothing inside them may backtrack (python/cpython#106052).
_TOKEN = re.compile(
    r"""(?x)
    (?P<fstring> (?<!\w)(?:[fF][rR]?|[rR][fF])(?:
        (?P<triple>"{3}|'{3})(?:\\[\s\S]|(?!(?P=triple))[\s\S])*+(?P=triple)
      | "(?:[^"\\\n{]++|\\.|\{[^{}\n]*+\}|\{){0,200}+"
      | '(?:[^'\\\n{]++|\\.|\{[^{}\n]*+\}|\{){0,200}+'(?!\()   # not the f'(x) … f'(y) of calculus
    ))
  | (?P<latex> \\(?![nt]\{)[a-zA-Z]++\*?(?:\[[^\[\]\n]*+\])*+[_^]?(?=\{)
             | (?<=\S)\^(?=\{) | (?<=\b[^\W\d_])_(?=\{) )
  | (?P<subscript> _(?=\{) )
  | (?P<dollar> \$\{++ )
  | (?P<open> (?<!\{)\{++ )
"""
)
_QUOTED = r"""(?:"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+')"""
_BODY = re.compile(rf"(?P<body>(?:[^{{}}\n\"']++|{_QUOTED})++)(?P<close>\}}++)")
_NESTED_SPEC = re.compile(
    r"""(?P<head>[^{}\n"':]++):(?!\ )[^{}\n"']*+(?:\{[^{}\n"']*+\}[^{}\n"']*+)++\}"""
)
# A number format that is not a substitution of shell code (`${x:-5}`, `${x:1:2}`) or of make.
_AMOUNT = re.compile(r",?\.\d{1,2}[eEfFgG%]?|,d?")
_LONGEST = 400  # characters of an expression
_GROUP = re.compile(r"(?:\[[^\[\]\n]*+\])*+[_^]?\{")
_UNESCAPED_BRACE = re.compile(r"(?<!\\)[{}]")
_DOLLAR_AHEAD = re.compile(r"[^$\n]*(?<=\S)\$(?!\d)")
_FENCE = re.compile(r"```|~~~")
_CODE_BEFORE = re.compile(r"""[.\\$&|)\]]$|["']\s*:\s*$|^\s*(?:import|export|const|let|var)\b""")
_CODE_AFTER = re.compile(r"[\[(=]|\.\w+\(")
# The braces of a block of code or of an object: `function(x) { x }`, `=> { x }`.
_BLOCK_BEFORE = re.compile(r"(?:[)=>]|\b(?:do|else|try|return))\s*$")
# An f-string displays `{x=}` as `x=3`.
_ECHOED = re.compile(r"(?P<code>[^=]+)=(?:![rsa])?(?::[^{}]*)?")
_WITH_BRACKET = re.compile(r"(?P<code>(?P<name>[^\W\d]\w*)[.\[(][^{}\n]*)\}")
# `{df.head() and …`, `{df.head()) rows`: a reference without a closing brace on its line.
_NOT_CLOSED = re.compile(
    r"(?P<code>[^\W\d]\w*+(?:\.[^\W\d]\w*+|\[[^\[\](){}\n]*+\]|\([^\[\](){}\n]*+\))++)"
    r"(?<=[)\]])(?=[.,;:!?]?(?:\s|\Z)|[)\]])(?=[^{}\n]*+(?:[{\n]|\Z))"
)
_OPENED_TWICE = re.compile(r"(?<!\w\{)(?P<code>[^\W\d]\w*+)\{(?=\s|\Z)")  # `{price{`
_DOUBLE_AT_END = re.compile(r"\{\w++\{$")
# `{price :.2f}`, `{price: ,.2f}`: formats that are neither entries of a dict nor CSS.
_SPACED_SPEC = re.compile(r"(?P<code>[^:]*[^:\s])\s*+:\s*+(?P<spec>,?\.\d{1,2}[eEfFgG%]|,d?)")
_SPACED_KEY = re.compile(r"(?P<name>[^\W\d]\w*+)\.(?P<key>\w++(?: \w++)++)")  # `{df.GDP per head}`
_CONTEXT = 200  # characters on each side that distinguish prose, code and formulas
_MAX_NOTES, _MAX_ALL_NOTES = 5, 1000
# Numbers alone, as in an f-string: `{1/0}`. `{1,3}` and `{2-4}` are also ranges.
_ARITHMETIC = re.compile(r"[\d.]+(?: ?(?:[+*/%]|//|\*\*) ?[\d.]+)+")
_FORMATS = frozenset(("csv", "dict", "html", "json", "markdown", "string"))
_MAX_PARSED = 200  # expressions whose syntax tree is cached
_MAX_PROMPT = 20_000_000  # characters; more than any model reads
_CORRECT = "Correct the expression, or assign its value to a variable first"
_Found = tuple[int, int, str]  # start, end, text in its place


@dataclass(frozen=True, slots=True)
class Filled:
    """A prompt with its values, the references in it (without braces), and notes about the others.

    `longest` is the reference with the most text, and the characters that it takes in the prompt.
    """

    text: str
    used: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    longest: tuple[str, int] = field(default=("", 0), compare=False)


def fill(
    template: str, namespace: Mapping[str, Any], *, all_notes: bool = False, escape: str = ""
) -> Filled:
    """Replace the references in `template` by the text of their values in `namespace`.

    The notes are the first few, or all of them, up to a thousand. `escape` is how to send all braces
    unchanged, besides doubling them: a part of the error of a reference that fails.
    """
    if "{" not in template:
        return Filled(template)
    filler = _Filler(template, namespace, _MAX_ALL_NOTES if all_notes else _MAX_NOTES, escape)
    parts: list[str] = []
    position = 0
    for start, end, text in filler.replacements():
        parts += template[position:start], text
        position = end
    parts.append(template[position:])
    used = filler.used
    longest = max(used.items(), key=itemgetter(1), default=("", 0))
    return Filled("".join(parts), tuple(used), filler.all_notes(), longest)


class _Filler:
    """Finds the references in one prompt and evaluates each once."""

    def __init__(self, text: str, names: Mapping[str, Any], most_notes: int, escape: str) -> None:
        self._text, self._names, self._most_notes, self._escape = text, names, most_notes, escape
        self.used: dict[str, int] = {}
        self._notes: dict[str, str] = {}  # "" for those beyond the first
        self._shortened: list[str] = []
        self._unread_line = 0
        self._budget = Budget()
        self._length = len(text)
        self._parse = lru_cache(maxsize=_MAX_PARSED)(self._new)
        self._values: dict[str, str | NotAllowed] = {}

    def _note(self, written: str, note: Callable[[], str]) -> None:
        """Add a note about a text in braces, unless there is one."""
        if written not in self._notes:
            self._notes[written] = note() if len(self._notes) < self._most_notes else ""

    def all_notes(self) -> tuple[str, ...]:
        """Return the notes, then the number of those that are not shown, and where reading ended."""
        notes = [note for note in self._notes.values() if note]
        if more := len(self._notes) - len(notes):
            what = "1 more was not replaced" if more == 1 else f"{more} more were not replaced"
            is_cell = self._escape and self._most_notes == _MAX_NOTES
            hint = "; --dry-run shows their notes" if is_cell else ""
            notes.append(f"{what}{hint}")
        notes = self._shortened + notes
        if self._unread_line:
            notes.append(
                f"The braces from line {self._unread_line} on were not replaced: the expressions"
                " above them took too long. Assign their values to variables first, and use those"
            )
        return tuple(notes)

    def replacements(self) -> Iterator[_Found]:
        """Yield the parts of the text that change, in order."""
        text, position = self._text, 0
        while match := _TOKEN.search(text, position):
            self._budget.left -= BRACE_COST
            if self._budget.left < 0:
                self._unread_line = text.count("\n", 0, match.start()) + 1
                return
            position = match.end()
            if match["latex"] or (match["subscript"] and _in_formula(text, position)):
                position = _after_groups(text, position, self._closing)
            elif match["open"] or match["dollar"]:
                find = self._reference if match["open"] else self._after_dollar
                found = find(position - match[0].count("{"), position)
                position = position if found is None else found[1]
                if found is not None and found[2] != text[found[0] : found[1]]:
                    yield found

    @cached_property
    def _closing(self) -> dict[int, int]:
        """Map each opening brace to the one that closes it."""
        pairs: dict[int, int] = {}
        opened: list[int] = []
        for brace in _UNESCAPED_BRACE.finditer(self._text):
            if brace[0] == "{":
                opened.append(brace.start())
            elif opened:
                pairs[opened.pop()] = brace.start()
        return pairs

    @cached_property
    def _fences(self) -> list[int]:
        return [fence.start() for fence in _FENCE.finditer(self._text)]

    def _reference(self, start: int, opened: int) -> _Found | None:
        """Return the text for the braces that open here, or None if they hold no expression."""
        body = _BODY.match(self._text, opened, opened + _LONGEST)
        if opened - start > 2:
            return None
        if body is None:
            found = self._nested_spec(start, opened)
            if found is None and opened - start == 1:
                self._note_unclosed(start, opened)
            return found
        width = 2 if opened - start == 2 and len(body["close"]) > 1 else 1
        code, first, end = body["body"], opened - width, body.end("body") + width
        expression, missing = self._parse(code)
        single = width == 1 and opened - start == 1
        if expression is None:
            if single:
                self._note_syntax(code, first, end)
            return None
        if missing:
            written = f"{{{code}}}"
            before = first - (self._text[first - 1 : first] == "$")
            single = single and written not in self._notes and not is_entry(expression.spec)
            if single and self._in_prose(before, end):
                about = code, missing, expression
                self._note(written, partial(_missing_note, *about, self._names))
            return None if width == 2 else (first, end, self._text[first:end])
        return first, end, f"{{{code}}}" if width == 2 else self._inserted(code, expression)

    def _after_dollar(self, start: int, opened: int) -> _Found | None:
        """Return the text for braces after a dollar if they hold a number format, else None."""
        body = _BODY.match(self._text, opened, opened + _LONGEST)
        if body is None:
            return None
        expression, missing = self._parse(body["body"])
        if expression is None:
            return None
        if _AMOUNT.fullmatch(expression.spec):
            return self._reference(start, opened)
        if opened - start == 1 and not missing and self._in_prose(start - 1, body.end()):
            with suppress(NotAllowed):
                expressions.check(expression, self._names)
                code = body["body"]
                self._note(f"${{{code}}}", partial(_dollar_note, code, expression))
        return None

    def _new(self, code: str) -> tuple[Expression | None, str]:
        """Return the expression in a text, and the first of its names that does not exist."""
        self._budget.left -= PARSE_COST + CHARACTER_COST * len(code)
        if self._budget.left < 0:
            return None, ""
        expression = expressions.parse(code)
        used = expression.names if expression else ()
        return expression, next((name for name in used if name not in self._names), "")

    def _inserted(self, code: str, expression: Expression) -> str:
        """Return the text of a reference; the reference itself if it is not allowed."""
        value = self._values[code] if code in self._values else self._evaluated(code, expression)
        if isinstance(value, str) and self._length + len(value) > _MAX_PROMPT:
            reason = f"would make the prompt longer than {_MAX_PROMPT:,} characters"
            value = NotAllowed(reason, advice="")
        self._values[code] = value
        if isinstance(value, NotAllowed):
            self._note(f"{{{code}}}", partial(_not_allowed_note, code, value))
            return f"{{{code}}}"
        self._length += len(value)
        self.used[code] = self.used.get(code, 0) + len(value)
        return value

    def _evaluated(self, code: str, expression: Expression) -> str | NotAllowed:
        try:
            inserted = expressions.evaluate(expression, self._names, self._budget)
            if inserted.lacks:
                self._shortened.append(_shortened_note(code, expression, inserted))
            return inserted.text
        except NotAllowed as error:
            # A new one, which does not hold the frames.
            return NotAllowed(str(error), error.advice)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the user's own properties raise anything
            details, (reason, advice) = format_exc(), _reason_and_advice(error)
        # Raised outside of the except block, so that it does not hold the error and its frames.
        doubled = f"{{{_shown(code)}}}"
        message = (
            f"{_shown(code)}: {reason}. {advice} To send the braces unchanged, write {doubled}"
            f"{self._escape}."
        )
        raise PromptError(message, details=details) from None

    def _nested_spec(self, start: int, opened: int) -> _Found | None:
        """Return the position of a format spec that contains braces, which is not allowed."""
        match = _NESTED_SPEC.match(self._text, opened, opened + _LONGEST)
        if match is None or opened - start != 1:
            return None
        head, missing = self._parse(match["head"])
        if head is None or missing:
            return None
        code = match[0][:-1]
        error = NotAllowed("has braces in its format spec")
        self._note(f"{{{code}}}", partial(_not_allowed_note, code, error))
        return start, match.end(), self._text[start : match.end()]

    def _note_syntax(self, code: str, start: int, end: int) -> None:
        """Add a note if braces contain a reference but for its syntax."""
        reason = self._unsupported(code, start)
        if not reason:
            self._note_unclosed(start, start + 1)
        elif self._in_prose(start, end):
            self._note(f"{{{code}}}", lambda: f"{_shown(code)} was not replaced: it {reason}")

    def _unsupported(self, code: str, start: int) -> str:
        """Return the reason that braces with an expression of existing names are no reference."""
        inner, echoed = code.strip(), _ECHOED.fullmatch(code)
        if inner != code:
            is_block = _BLOCK_BEFORE.search(self._text, max(0, start - _CONTEXT), start)
            is_reference = not is_block and self._is_defined(inner)
            return f"has spaces beside the braces; write {_shown(inner)}" if is_reference else ""
        if echoed is not None and self._is_defined(echoed["code"]):
            return f"ends with =; write {echoed['code']}={_shown(echoed['code'])}"
        if code.startswith("*") and self._is_defined(code.lstrip("*")):
            return "contains a star"
        head, _, word = code.rpartition(":")
        if head and is_word(word) and self._is_defined(head):
            return self._unsupported_word(head, word)
        if (spaced := _SPACED_SPEC.fullmatch(code)) and self._is_defined(spaced["code"]):
            better = _shown(f"{spaced['code']}:{spaced['spec']}")
            return f"has a space beside the colon; write {better}"
        if (named := _SPACED_KEY.fullmatch(code)) and self._is_key(named["name"], named["key"]):
            better = _shown(f'{named["name"]}["{named["key"]}"]')
            return f"has a name with spaces; write {better}"
        if _ARITHMETIC.fullmatch(code):
            return "contains no variable"
        return "contains :=" if self._is_defined(code.partition(":=")[0]) else ""

    def _unsupported_word(self, head: str, word: str) -> str:
        """Return the reason that a word after a colon is no format spec, but not for CSS: ``{a:red}``."""
        if head.isidentifier() and family(self._names[head]) not in ARRAYS:
            return ""
        better = f"; write {_shown(f'{head}.to_{word}()')}" if word in _FORMATS else ""
        return f'has the format spec "{word}", which Python does not support{better}'

    def _is_defined(self, code: str) -> bool:
        expression, missing = self._parse(code)
        return expression is not None and not missing

    def _is_key(self, name: str, key: str) -> bool:
        return name in self._names and expressions.has_key(self._names[name], key)

    def _note_unclosed(self, start: int, opened: int) -> None:
        """Add a note if a reference to an existing name has a bracket, quote or brace that is not closed."""
        for pattern in (_NOT_CLOSED, _OPENED_TWICE):
            found = pattern.match(self._text, opened, opened + _LONGEST)
            if found is not None and self._is_defined(found["code"]):
                self._note_without_brace(found, start)
                return
        found = _WITH_BRACKET.match(self._text, opened, opened + _LONGEST)
        if found is None or not (found["name"] in self._names or found["name"] in FUNCTIONS):
            return
        code, unclosed = found["code"], _unclosed(found["code"])
        if unclosed and self._in_prose(start, found.end()):
            reason = f"has a {unclosed} that is not closed"
            self._note(f"{{{code}}}", lambda: f"{_shown(code)} was not replaced: it {reason}")

    def _note_without_brace(self, found: re.Match[str], start: int) -> None:
        code = found["code"]
        is_block = _BLOCK_BEFORE.search(self._text, max(0, start - _CONTEXT), start)
        if not is_block and self._in_prose(start, found.end()):
            reason = f"has no closing brace; write {_shown(code)}"
            self._note(f"{{{code}", lambda: f"{_shown(code)[:-1]} was not replaced: it {reason}")

    def _in_prose(self, start: int, end: int) -> bool:
        """Return whether prose surrounds a part, and not code, JSON or a fenced block."""
        text = self._text
        before = text[max(0, start - _CONTEXT) : start].rpartition("\n")[2]
        after = text[end : end + _CONTEXT].partition("\n")[0]
        line = before + after.rstrip()
        return not (
            bisect(self._fences, start) % 2
            or (before.count("`") % 2 and "`" in after)
            or before.count("{") > before.count("}")
            or _CODE_BEFORE.search(before)
            or _CODE_AFTER.match(after)
            or line.endswith(";")
            or (line.endswith("{") and not _DOUBLE_AT_END.search(line))
            or (before.endswith("=") and "<" in line)
        )


def _after_groups(text: str, position: int, closing: Mapping[int, int]) -> int:
    r"""Return where the LaTeX arguments end that begin here: ``{a}{b}``, ``{i=1}^{n}``."""
    while match := _GROUP.match(text, position):
        if (end := closing.get(match.end() - 1)) is None:  # only this brace is LaTeX then
            return match.end()
        position = end + 1
    return position


def _in_formula(text: str, position: int) -> bool:
    """Return whether dollars enclose the position on its line; prices do not, by Pandoc's rule."""
    before = text[max(0, position - _CONTEXT) : position].rpartition("\n")[2]
    ahead = _DOLLAR_AHEAD.match(text, position, position + _CONTEXT)
    return ahead is not None and before.replace("$$", "$").count("$") % 2 == 1


def _reason_and_advice(error: BaseException) -> tuple[str, str]:
    """Return the first line of an error of an expression, and what to do."""
    near = ""
    if isinstance(error, NotFound) and error.__cause__ is not None:
        near, error = error.near, error.__cause__
    # Not str(error), which may raise. A SyntaxError begins with indented lines of code.
    lines = "".join(format_exception_only(error)).splitlines()
    reason = next(line for line in lines if not line.startswith("  "))[:_CONTEXT]
    is_name = isinstance(error, (NameError, AttributeError, KeyError))
    advice = near or ("Fix the name." if is_name else f"{_CORRECT}.")
    return _printable(reason).rstrip(" .:"), advice


def _unclosed(code: str) -> str:
    """Return which of quotes and brackets is not closed in an expression, or an empty string."""
    unquoted = re.sub(_QUOTED, "", code)
    if '"' in unquoted or "'" in unquoted:
        return "quote"
    is_open = any(unquoted.count(left) != unquoted.count(right) for left, right in ("()", "[]"))
    return "bracket" if is_open else ""


def _dollar_note(code: str, expression: Expression) -> str:
    plain = not expression.spec and not expression.conversion
    number = f"${_shown(code + ':,')} or ${_shown(code + ':.2f')} for a number, else "
    return (
        f"${_shown(code)} was not replaced: shell and JavaScript code use this form. Write"
        f" {number if plain else ''}$ {_shown(code)}"
    )


def _not_allowed_note(code: str, error: NotAllowed) -> str:
    advice = f". {error.advice}" if error.advice else ""
    return f"{_shown(code)} was not replaced: it {_printable(str(error))}{advice}"


def _shortened_note(code: str, expression: Expression, inserted: Inserted) -> str:
    note = f"{_shown(code)} is sent {inserted.lacks}"
    if not inserted.complete and not inserted.part:
        return note
    value = code
    for mark, part in ((":", expression.spec), ("!", expression.conversion)):
        value = value.removesuffix(f"{mark}{part}") if part else value
    if not isinstance(expression.tree, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
        value = f"({value})"
    if inserted.complete:
        return f"{note}. To send all of it: {_shown(value + inserted.complete)}"
    return f"{note}. To send a part of it: {_shown(value + inserted.part)}"


def _missing_note(code: str, name: str, expression: Expression, names: Mapping[str, Any]) -> str:
    if name.startswith("__"):
        return _not_allowed_note(code, NotAllowed(expressions.private(name)))
    if expressions.is_unquoted_key(name, expression, names):
        quoted = code.replace(f"[{name}]", f'["{name}"]')
        near = f" Write {_shown(quoted)}"
    else:
        known = [one for one in names if one[:1] != "_"]
        near = did_you_mean(name, known, count=1) or did_you_mean(_stem(name), known, count=1)
    return f"{_shown(code)} was not replaced: {name} is not defined.{near}"


def _stem(name: str) -> str:
    """Return the start of a plural, by which a name in the singular is found."""
    return name.removesuffix("s").removesuffix("ie") if name.endswith("s") else ""


def _shown(code: str) -> str:
    """Return an expression in braces, short and without control characters."""
    return "{" + _printable(code if len(code) <= 80 else f"{code[:78]} …") + "}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
