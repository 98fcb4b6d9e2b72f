"""Complete magic lines and prompts; `matcher` registers this, `completions` has the candidates.

Frontends split words at ``:`` and ``/``, which occur in model names. So each result contains the part
of the line that it replaces.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import HelpRequested
from llm_magic.notebook.arguments.completions import Candidates, Completion
from llm_magic.notebook.arguments.magic_options import MAGICS, Argument, arguments, option_specs
from llm_magic.notebook.arguments.parser import named_settings, parse_with_prompt
from llm_magic.text import visible_line

# Also after an assignment: models = %llm_models -b …
_MAGIC = re.compile(r"\s*(?:[\w.]+\s*=\s*)?%%?(\w+)[ \t]+")
_CELL_MAGIC = re.compile(r"(?:[ \t]*\n)*%%(\w+)")
# The last quote may still be open.
_TOKEN = re.compile(r"""(?:[^ \t\r\n"']|"[^"]*"?|'[^']*'?)+""")
_QUOTED = re.compile(r"""(["'])(.*?)(\1|\Z)""", re.DOTALL)


class Completions(NamedTuple):
    """The end of the line that is replaced, and what can replace it."""

    fragment: str
    candidates: Sequence[Completion] = ()


class Token(NamedTuple):
    """A word of the line: its start, its text without quotes, and the quote that is still open."""

    start: int
    text: str
    quote: str = ""


def typed_tokens(line: str) -> list[Token]:
    """Split a line as `parser.split_line` does; the last token is the one being typed."""
    found = []
    for token in _TOKEN.finditer(line):
        *_, last = [None, *_QUOTED.finditer(token[0])]
        quote = last[1] if last is not None and not last[3] and last.end() == len(token[0]) else ""
        found.append(Token(token.start(), _QUOTED.sub(r"\2", token[0]), quote))
    if not found or (not found[-1].quote and line[-1] in " \t\r\n"):
        found.append(Token(len(line), ""))
    return found


def complete(before: str, after: str, cell: str, candidates: Candidates) -> Completions | None:
    """Return the completions at the cursor, between `before` and `after` on its line.

    `cell` is the text above that line. Returns None for a line of another magic or of Python.
    """
    if above := _CELL_MAGIC.match(cell):
        # The body of a cell magic: a prompt, or the text of another magic.
        magic = MAGICS.get(above[1])
        if magic is None or not magic.takes_prompt:
            return None
        options = cell[above.end() :].partition("\n")[0]
        return Completions(*candidates.in_prompt(before, _data(magic.name, options)))
    line = _MAGIC.match(before)
    if line is None or line[1] not in MAGICS:
        return None
    is_cell = before.lstrip().startswith("%%")
    return _Line(line[1], before[line.end() :], after, candidates, is_cell).completions()


def _data(magic: str, line: str) -> str:
    """Return the text after ``--over``, or an empty string; `line` may contain the start of a prompt."""
    if "over" not in line:
        return ""
    with contextlib.suppress(OptionError, HelpRequested):
        return str(parse_with_prompt(magic, line).get("over") or "")
    return ""


class _Line:
    """A line of one magic, before and after the cursor."""

    def __init__(
        self, name: str, before: str, after: str, candidates: Candidates, is_cell: bool
    ) -> None:
        *self._done, self._typed = typed_tokens(before)
        self._before, self._after = before, after
        self._magic, self._arguments = MAGICS[name], arguments(name)
        self._candidates = candidates
        self._may_have_prompt = self._magic.takes_prompt and not is_cell
        self._all = [*self._done, *typed_tokens(after)]

    def completions(self) -> Completions:
        """Return the completions at the cursor."""
        typed, positional = self._typed.text, self._magic.positional
        if self._may_have_prompt and self._prompt_started():
            return self._references()
        if argument := self._argument_of(self._done[-1].text if self._done else ""):
            return self._value(argument, typed)
        if typed.startswith("-"):
            option, equals, value = typed.partition("=")
            if not equals:
                return self._replacing(self._options())
            argument = self._argument_of(option)
            return self._value(argument, value, skip="=") if argument else Completions("")
        if positional is not None:
            return self._positional(positional)
        if self._magic.takes_prompt and not typed:
            return self._replacing(self._options())
        return self._references() if self._may_have_prompt else Completions("")

    def _prompt_started(self) -> bool:
        """Return whether the prompt of a line magic starts before the word at the cursor."""
        remaining = iter(self._done)
        for word in remaining:
            if not word.text.startswith("-") or word.text == "--":
                return True
            if self._argument_of(word.text) is not None:
                next(remaining, None)
        return False

    def _argument_of(self, option: str) -> Argument | None:
        """Return the argument whose value follows `option`, if there is one."""
        return next((a for a in self._arguments if option in a.names and a.kind != "switch"), None)

    def _references(self) -> Completions:
        data = _data(self._magic.name, self._before) if self._may_have_prompt else ""
        return Completions(*self._candidates.in_prompt(self._before, data))

    def _value(self, argument: Argument, typed: str, skip: str = "") -> Completions:
        if not argument.complete and not argument.choices and self._magic.takes_prompt:
            # Free text, in which {references} are filled in.
            return self._references()
        return self._replacing(self._candidates.of(argument, typed, self._values()), skip)

    def _positional(self, argument: Argument) -> Completions:
        if argument.complete == "settings":
            return self._setting(argument)
        candidates = self._candidates.of(argument, self._typed.text, self._values())
        given = {word.text for word in self._done}
        return self._replacing([c for c in candidates if c.text not in given])

    def _setting(self, argument: Argument) -> Completions:
        """Return the values of the setting whose value is typed, else the names of others."""
        if any(word.text == "--reset" for word in self._all):
            offered = self._candidates.of(argument, self._typed.text, self._values())
            return self._replacing(
                c._replace(text=name)
                for c in offered
                if (name := c.text.removesuffix("=")) not in set(self._positional_tokens())
            )
        name, equals, value = self._typed.text.partition("=")
        if equals and name:
            return self._replacing(self._candidates.setting(name, value), skip="=")
        given = list(named_settings(list(self._positional_tokens())))
        if given and not given[-1][1]:
            values = self._candidates.setting(given[-1][0], value or name)
            return self._replacing(values, skip="=" if equals else "")
        names = {f"{name}=" for name in (*(name for name, _ in given), *self._values())}
        candidates = self._candidates.of(argument, name, self._values())
        return self._replacing([c for c in candidates if c.text not in names])

    def _positional_tokens(self) -> Iterator[str]:
        """Yield the words before the cursor that are neither options nor their values."""
        tokens = iter(self._done)
        for token in tokens:
            if token.text.startswith("-"):
                if self._argument_of(token.text) is not None:
                    next(tokens, None)
            else:
                yield token.text

    def _options(self) -> list[Completion]:
        """Return the options that can still be added: none twice, and none of another backend."""
        given = {word.text.partition("=")[0] for word in self._all}
        backend = self._values().get("backend", "") if self._magic.options == "loading" else ""
        specs = option_specs("loading") if backend else {}
        return [
            Completion(name, "option")
            for argument in self._arguments
            if argument.kind in {"repeated", "pairs"} or not given & set(argument.names)
            if argument.option not in specs or specs[argument.option].works_on(backend)
            for name in argument.names
            if name.startswith(self._typed.text)
        ]

    def _values(self) -> Mapping[str, str]:
        """Return the values on the line except the typed one, by the names of their options."""
        given: dict[str, str] = {}
        for word, following in zip(self._all, [*self._all[1:], Token(0, "")], strict=True):
            option, equals, value = word.text.partition("=")
            argument = self._argument_of(option)
            if argument is not None:
                given[argument.dest] = value if equals else following.text
        return given

    def _replacing(self, candidates: Iterable[Completion], skip: str = "") -> Completions:
        """Return completions of the word at the cursor, or of its part after the character `skip`."""
        fragment = self._before[self._typed.start :]
        if skip:
            fragment = fragment.partition(skip)[2]
        return Completions(fragment, list(self._quoted(candidates)))

    def _quoted(self, candidates: Iterable[Completion]) -> Iterator[Completion]:
        """Yield the candidates, quoted where they contain blanks; an existing end quote is kept.

        Omits text with control characters: a newline in a model name would add a line to the cell.
        """
        for text, kind, is_open in candidates:
            quote = self._typed.quote or ("'" if '"' in text else '"')
            if quote in text or visible_line(text) != text:
                continue
            if self._typed.quote or any(char in text for char in " \t'\""):
                end = "" if is_open or self._after.startswith(quote) else quote
                text = f"{quote}{text}{end}"
            yield Completion(text, kind)
