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

import re
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from traceback import format_exc, format_exception_only
from typing import Any, Self, TypeVar

from llm_magic.errors import NoAttribute, PromptError
from llm_magic.prompts import expressions
from llm_magic.prompts.allowed_operations import FUNCTIONS
from llm_magic.prompts.expressions import EvaluationError, Expression
from llm_magic.prompts.notes import (
    QUOTED,
    Mistyped,
    dollar_note,
    missing_note,
    not_allowed_note,
    printable,
    shortened_note,
    shown,
    unbalanced,
)
from llm_magic.prompts.trusted_types import (
    BRACE_COST,
    CHARACTER_COST,
    PARSE_COST,
    Budget,
    NotAllowed,
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
_BODY = re.compile(rf"(?P<body>(?:[^{{}}\n\"']++|{QUOTED})++)(?P<close>\}}++)")
_BODY_IN_BRACES = re.compile(rf"(?<!\{{)\{{{_BODY.pattern}")
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
_JOINED = re.compile(r"(?:[\w/.#>*)\]]|\w\()$")  # to the brace after it
# An f-string displays `{x=}` as `x=3`.
_ECHOED = re.compile(r"(?P<code>[^=]+)=(?:![rsa])?(?::[^{}]*)?")
_WITH_BRACKET = re.compile(r"(?P<code>(?P<name>[^\W\d]\w*)[.\[(][^{}\n]*)\}")
# `{df.head() and …`, `{df.head()) rows`: a reference without a closing brace on its line.
_NOT_CLOSED = re.compile(
    r"(?P<code>[^\W\d]\w*+(?:\.[^\W\d]\w*+|\[[^\[\](){}\n]*+\]|\([^\[\](){}\n]*+\))++(?<=[)\]])"
    r"(?:![rsa]|:(?:,?\.\d{1,2}[eEfFgG%]|,d?))?+)(?=[.,;:!?]?(?:\s|\Z)|[)\]])(?=[^{}\n]*+(?:[{\n]|\Z))"
)
# `Hello {name and …`: a name alone is noted before a word or at the end, not in code.
_NAME_NOT_CLOSED = re.compile(
    r"(?P<code>[^\W\d]\w*+)(?=[.,;!?]?(?:[ \t]++[^\W\d]\w*+(?![ \t]*[=(:.\[])|\s*+\Z))"
    r"(?=[^{}\n]*+(?:[{\n]|\Z))"
)
_OPENED_TWICE = re.compile(r"(?<!\w\{)(?P<code>[^\W\d]\w*+)\{(?=\s|\Z)")  # `{price{`
_DOUBLE_AT_END = re.compile(r"\{\w++\{$")
_BEFORE_TEXT = re.compile(r"[ \t]*+(?=\S)")
# What precedes or follows an f-string literal in code, but not in prose.
_CODE_AROUND = re.compile(
    r"[()\[\]{}=+,;#]|\b(?:and|assert|else|if|in|not|or|print|raise|return|yield)\s*$"
)
_CONTEXT = 200  # characters on each side that distinguish prose, code and formulas
_MAX_NOTES, _MAX_ALL_NOTES = 5, 1000
_MAX_PARSED = 200  # expressions whose syntax tree is cached
MAX_PROMPT = 20_000_000  # characters; more than any model reads
_CORRECT = "Correct the expression, or assign its value to a variable first"
_Found = tuple[int, int, str]  # start, end, text in its place
_Evaluated = TypeVar("_Evaluated")


@dataclass(frozen=True, slots=True)
class Filled:
    """A prompt with its values, the references in it (without braces), and notes about the others.

    `longest` is the reference with the most text, and the characters that it takes in the prompt.
    """

    text: str
    used: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    longest: tuple[str, int] = field(default=("", 0), compare=False)


class Reference(str):
    """A reference in a compiled template: the text in its braces, with its expression.

    `text_of` returns the text of its value in a namespace, and `value_of` the value.
    """

    expression: Expression

    def __new__(cls, code: str, expression: Expression) -> Self:
        """Create a reference of a text in braces."""
        reference = super().__new__(cls, code)
        reference.expression = expression
        return reference

    def text_of(self, namespace: Mapping[str, Any]) -> str:
        """Return the text of its value; raises what `value_of` raises."""
        return self._evaluated(expressions.evaluate, namespace).text

    def value_of(self, namespace: Mapping[str, Any]) -> Any:
        """Return its value.

        Raises:
            PromptError: The expression failed, or is not allowed for these values.
        """
        return self._evaluated(expressions.value_of, namespace)

    def _evaluated(
        self,
        evaluate: Callable[[Expression, Mapping[str, Any], Budget], _Evaluated],
        namespace: Mapping[str, Any],
    ) -> _Evaluated:
        try:
            return evaluate(self.expression, namespace, Budget())
        except NotAllowed as error:
            message = f"{shown(str(self))}: it {printable(str(error))}. {error.advice}"
            raise PromptError(message.strip()) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the user's own properties raise anything
            details, (reason, advice) = format_exc(), _reason_and_advice(error)
        raise PromptError(f"{shown(str(self))}: {reason}. {advice}", details=details) from None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A template whose references were found once: texts and references, in order.

    `notes` are about what looks like a reference and stays as it is.
    """

    parts: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[Reference, ...]:
        """The references, each as often as it occurs."""
        return tuple(part for part in self.parts if isinstance(part, Reference))


def compile_template(template: str, namespace: Mapping[str, Any]) -> Compiled:
    """Find the references in `template`, to fill it in for many namespaces.

    The names of `namespace` decide which braces are references, as in `fill`. Any other expression
    in single braces has a note, and in double braces it becomes one in single braces.
    """
    if "{" not in template:
        return Compiled((template,) if template else ())
    compiler = _Compiler(template, namespace, _MAX_ALL_NOTES, "")
    parts: list[str] = []
    position = 0
    for start, end, text in compiler.replacements():
        parts += template[position:start], text
        position = end
    parts.append(template[position:])
    return Compiled(tuple(part for part in parts if part), compiler.all_notes())


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


def first_reference(text: str, names: Mapping[str, Any]) -> str:
    """Return the first expression in braces in prose that `fill` would replace; evaluates nothing."""
    return next(_Filler(text, names, 0, "").references_in_prose(), "")


class _Filler:
    """Finds the references in one prompt and evaluates each once."""

    # Whether ``{{name}}`` becomes ``{name}`` also where the name does not exist.
    _unescapes_all = False

    def __init__(self, text: str, names: Mapping[str, Any], most_notes: int, escape: str) -> None:
        self._text, self._names, self._most_notes, self._escape = text, names, most_notes, escape
        self.used: dict[str, int] = {}
        self._notes: dict[str, str] = {}  # "" for those beyond the first
        self._shortened: list[str] = []
        self._unread_line = 0
        self._budget = Budget()
        self._length = len(text)
        self._parse = lru_cache(maxsize=_MAX_PARSED)(self._new)
        self._mistyped = Mistyped(names, self._is_defined)
        self._values: dict[str, str | NotAllowed] = {}
        # The references to tables and the like, whose text has several lines.
        self._blocks: set[str] = set()
        self._last: _Found = (0, 0, "")

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
            if match["fstring"]:
                self._note_f_string(match)
            elif match["latex"] or (match["subscript"] and _in_formula(text, position)):
                position = _after_groups(text, position, self._closing)
            elif match["open"] or match["dollar"]:
                find = self._reference if match["open"] else self._after_dollar
                found = find(position - match[0].count("{"), position)
                position = position if found is None else found[1]
                if found is not None and found[2] != text[found[0] : found[1]]:
                    yield found
                    self._last = found

    def references_in_prose(self) -> Iterator[str]:
        """Yield the expressions in single braces, outside of code, formulas and quotes."""
        text, position = self._text, 0
        while match := _TOKEN.search(text, position):
            self._budget.left -= BRACE_COST
            position = match.end()
            if match["latex"] or match["subscript"]:
                position = _after_groups(text, position, self._closing)
            elif match["open"] == "{" and (
                body := _BODY.match(text, position, position + _LONGEST)
            ):
                expression, missing = self._parse(body["body"])
                start, end = match.start(), body.end()
                before = text[max(0, start - _CONTEXT) : start].rpartition("\n")[2]
                is_code = before.endswith(("'", ">")) or before.count('"') % 2
                is_text = is_code or body["close"] != "}" or not expression or missing
                if not is_text and self._in_prose(start, end):
                    yield body["body"]
            if self._budget.left < 0:
                return

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
    def _closed(self) -> frozenset[int]:
        return frozenset(self._closing.values())

    @cached_property
    def _fences(self) -> list[int]:
        return [fence.start() for fence in _FENCE.finditer(self._text)]

    def _reference(self, start: int, opened: int) -> _Found | None:
        """Return the text for the braces that open here, or None if they hold no expression."""
        body = _BODY.match(self._text, opened, opened + _LONGEST)
        if opened - start > 2:
            self._note_three_braces(body, start, opened)
            return None
        if body is None:
            found = self._nested_spec(start, opened)
            if found is None and opened - start == 1 and not self._note_inner_braces(start, opened):
                self._note_unclosed(start, opened)
            return found
        width = 2 if opened - start == 2 and len(body["close"]) > 1 else 1
        code, first, end = body["body"], opened - width, body.end("body") + width
        expression, missing = self._parse(code)
        single = width == 1 and opened - start == 1
        if expression is None:
            note = self._note_syntax if single else self._note_spaced
            note(code, first, end)
            return None
        if missing:
            written = f"{{{code}}}"
            before = first - (self._text[first - 1 : first] == "$")
            single = single and written not in self._notes and not is_entry(expression.spec)
            if single and self._in_prose(before, end):
                about = code, missing, expression
                self._note(written, partial(missing_note, *about, self._names))
            if width == 2:
                return (first, end, f"{{{code}}}") if self._unescapes_all else None
            return first, end, self._text[first:end]
        if width == 2:
            return first, end, f"{{{code}}}"
        self._note_extra_brace(body, start, opened)
        found = first, end, self._inserted(code, expression)
        return self._on_own_lines(*found) if code in self._blocks else found

    def _on_own_lines(self, start: int, end: int, value: str) -> _Found:
        """Return where a value with several lines goes, with line breaks between it and other text."""
        _, last_end, last_value = self._last
        earliest = max(last_end, start - _CONTEXT)
        before = self._text[earliest:start].rstrip(" \t")
        above = before or (last_value if earliest == last_end else "")
        if above and not above.endswith("\n"):
            start, value = earliest + len(before), f"\n{value}"
        if (gap := _BEFORE_TEXT.match(self._text, end)) is not None and not value.endswith("\n"):
            end, value = gap.end(), f"{value}\n"
        return start, end, value

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
                self._note(f"${{{code}}}", partial(dollar_note, code, expression))
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
        if isinstance(value, str) and self._length + len(value) > MAX_PROMPT:
            reason = f"would make the prompt longer than {MAX_PROMPT:,} characters"
            value = NotAllowed(reason, advice="")
        self._values[code] = value
        if isinstance(value, NotAllowed):
            self._note(f"{{{code}}}", partial(not_allowed_note, code, value))
            return f"{{{code}}}"
        self._length += len(value)
        self.used[code] = self.used.get(code, 0) + len(value)
        return value

    def _evaluated(self, code: str, expression: Expression) -> str | NotAllowed:
        try:
            inserted = expressions.evaluate(expression, self._names, self._budget)
            if inserted.is_block:
                self._blocks.add(code)
            if inserted.lacks:
                self._shortened.append(shortened_note(code, expression, inserted))
            return inserted.text
        except NotAllowed as error:
            # A new one, which does not hold the frames.
            return NotAllowed(str(error), error.advice)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the user's own properties raise anything
            details, (reason, advice) = format_exc(), _reason_and_advice(error)
        # Raised outside of the except block, so that it does not hold the error and its frames.
        doubled = f"{{{shown(code)}}}"
        message = (
            f"{shown(code)}: {reason}. {advice} To send the braces unchanged, write {doubled}"
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
        self._note(f"{{{code}}}", partial(not_allowed_note, code, error))
        return start, match.end(), self._text[start : match.end()]

    def _note_syntax(self, code: str, start: int, end: int) -> None:
        """Add a note if braces contain a reference but for its syntax."""
        reason = self._unsupported(code, start)
        if not reason:
            self._note_unclosed(start, start + 1)
        elif self._in_prose(start, end) and not (code[-1] == ";" and self._is_block(start)):
            self._note(f"{{{code}}}", lambda: f"{shown(code)} was not replaced: it {reason}")

    def _note_spaced(self, code: str, start: int, end: int) -> None:
        """Add a note about double braces with spaces, in which other templates have names."""
        name, written = code.strip(), self._text[start:end]
        is_double = written == f"{{{{{code}}}}}" and "{%" not in self._text  # Jinja
        if is_double and name != code and self._is_defined(name) and self._in_prose(start, end):
            reason = f"has double braces with spaces; write {shown(name)}"
            self._note(
                f"{{{{{code}}}}}", lambda: f"{{{shown(code)}}} was not replaced: it {reason}"
            )

    def _unsupported(self, code: str, start: int) -> str:
        """Return the reason that braces with an expression of existing names are no reference."""
        inner, echoed = code.strip(), _ECHOED.fullmatch(code)
        if inner != code:
            is_reference = not self._is_block(start) and self._is_defined(inner)
            return f"has spaces beside the braces; write {shown(inner)}" if is_reference else ""
        if echoed is not None and self._is_defined(echoed["code"]):
            return f"ends with =; write {echoed['code']}={shown(echoed['code'])}"
        if code.startswith("*") and self._is_defined(code.lstrip("*")):
            return "contains a star"
        head, _, word = code.rpartition(":")
        if head and is_word(word) and self._is_defined(head):
            # In a path, after a selector, or in a call.
            before = self._text[max(0, start - 2) : start]
            is_code = head.isidentifier() and _JOINED.search(before)
            return "" if is_code else self._mistyped.reason_of_word(head, word)
        if (names := self._mistyped.several(code)) and not _in_formula(self._text, start + 1):
            return f"has several names; write {' '.join(map(shown, names))}"
        return self._mistyped.reason(code)

    def _is_block(self, start: int) -> bool:
        """Return whether the text before a brace makes it the start of a block of code."""
        return _BLOCK_BEFORE.search(self._text, max(0, start - _CONTEXT), start) is not None

    def _is_defined(self, code: str) -> bool:
        expression, missing = self._parse(code)
        return expression is not None and not missing

    def _note_unclosed(self, start: int, opened: int) -> None:
        """Add a note if a reference to an existing name has a bracket, quote or brace that is not closed."""
        for pattern in (_NOT_CLOSED, _NAME_NOT_CLOSED, _OPENED_TWICE):
            found = pattern.match(self._text, opened, opened + _LONGEST)
            if found is not None and self._is_defined(found["code"]):
                self._note_without_brace(found, start)
                return
        found = _WITH_BRACKET.match(self._text, opened, opened + _LONGEST)
        if found is None or not (found["name"] in self._names or found["name"] in FUNCTIONS):
            return
        code, reason = found["code"], unbalanced(found["code"])
        if reason and self._in_prose(start, found.end()):
            self._note(f"{{{code}}}", lambda: f"{shown(code)} was not replaced: it {reason}")

    def _note_inner_braces(self, start: int, opened: int) -> bool:
        """Add a note if an expression of existing names has braces in it, as those of a dict."""
        end = self._closing.get(start, start)
        code = self._text[opened:end]
        if not 0 < len(code) <= _LONGEST or "\n" in code or not self._is_defined(code):
            return False
        expression, _ = self._parse(code)
        if expression is None or not self._in_prose(start, end + 1):
            return False
        with suppress(NotAllowed):
            expressions.check(expression, self._names)
            return False
        error = NotAllowed("contains braces, as those of a dict or a set")
        self._note(f"{{{code}}}", partial(not_allowed_note, code, error))
        return True

    def _note_without_brace(self, found: re.Match[str], start: int) -> None:
        code = found["code"]
        if not self._is_block(start) and self._in_prose(start, found.end()):
            reason = f"has no closing brace; write {shown(code)}"
            self._note(f"{{{code}", lambda: f"{shown(code)[:-1]} was not replaced: it {reason}")

    def _note_extra_brace(self, body: re.Match[str], start: int, opened: int) -> None:
        """Add a note if two braces open or close a reference on one side only, and are no code."""
        opens_twice, end = opened - start == 2, body.end()
        if opens_twice is (len(body["close"]) == 2) or len(body["close"]) > 2:
            return
        is_paired = start in self._closing if opens_twice else end - 1 in self._closed
        if not is_paired and self._in_prose(start, end):
            side, better = "opening" if opens_twice else "closing", shown(body["body"])
            braces = f"{{{better}" if opens_twice else f"{better}}}"
            reason = f"has one {side} brace too many, which is sent; write {better}"
            self._note(self._text[start:end], lambda: f"{braces} {reason}")

    def _note_three_braces(self, body: re.Match[str] | None, start: int, opened: int) -> None:
        """Add a note about three braces around an expression, which are no reference."""
        if body is None or opened - start != 3 or len(body["close"]) != 3:
            return
        code = body["body"]
        if self._is_defined(code) and self._in_prose(start, body.end()):
            braces = f"{{{{{shown(code)}}}}}"
            reason = f"has three braces on each side; write {shown(code)}"
            self._note(f"{{{{{{{code}}}}}}}", lambda: f"{braces} was not replaced: it {reason}")

    def _note_f_string(self, match: re.Match[str]) -> None:
        """Add a note about an f-string literal in prose with a reference to existing names."""
        literal, start, end = match[0], match.start(), match.end()
        before = self._text[max(0, start - _CONTEXT) : start].rpartition("\n")[2]
        after = self._text[end : end + _CONTEXT].partition("\n")[0]
        is_code = before.isspace() or _CODE_AROUND.search(before) or _CODE_AROUND.search(after)
        if is_code or not self._in_prose(start, end):
            return
        bodies = _BODY_IN_BRACES.finditer(literal[:_LONGEST])
        if any(self._is_defined(body["body"]) for body in bodies):
            literal_start = printable(literal if len(literal) <= 80 else f"{literal[:78]} …")
            reason = "is an f-string; omit the f to insert the values"
            self._note(literal, lambda: f"{literal_start} was not replaced: it {reason}")

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


class _Compiler(_Filler):
    """Finds the references in a template, and evaluates none.

    A name that does not exist is an error of its caller, so ``{{name}}`` is the way to send it.
    """

    _unescapes_all = True

    def _inserted(self, code: str, expression: Expression) -> str:
        """Return the reference itself; a text in braces if its syntax is not allowed."""
        try:
            expressions.check(expression, self._names)
        except NotAllowed as error:
            self._note(f"{{{code}}}", partial(not_allowed_note, code, error))
            return f"{{{code}}}"
        return Reference(code, expression)


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
    advice = ""
    if isinstance(error, EvaluationError) and error.__cause__ is not None:
        advice, error = error.advice, error.__cause__
    if isinstance(error, NoAttribute):
        # An attribute that an object of this package does not have.
        return error.problem.rstrip("."), error.advice or advice or _advice(error)
    # Not str(error), which may raise. A SyntaxError begins with indented lines of code.
    lines = "".join(format_exception_only(error)).splitlines()
    reason = next(line for line in lines if not line.startswith("  "))[:_CONTEXT]
    return printable(reason).rstrip(" .:"), advice or _advice(error)


def _advice(error: BaseException) -> str:
    """Return what to do about an error of an expression: which name or key to correct."""
    # Of these types alone, reading the name runs no code.
    if (
        type(error) in {NameError, AttributeError}
        and type(name := getattr(error, "name", 0)) is str
    ):
        return f"Correct the name {printable(name)}."
    return "Correct the key." if isinstance(error, KeyError) else f"{_CORRECT}."
