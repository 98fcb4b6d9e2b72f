"""Complete magic lines and prompts through a matcher of IPython; `completions` has the candidates.

Frontends split words at ``:`` and ``/``, which occur in model names. So each result contains the part
of the line that it replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_magic.errors import SettingsError
from llm_magic.notebook.arguments.completions import Candidates, Completion
from llm_magic.notebook.arguments.magic_options import MAGICS, Argument, arguments
from llm_magic.text.terminal import visible_line

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session import Session

_NAME = "llm_magic_matcher"
# Also after an assignment: models = %llm_models -b …
_MAGIC = re.compile(r"\s*(?:[\w.]+\s*=\s*)?%%?(\w+)[ \t]+")
_CELL_MAGIC = re.compile(r"(?:[ \t]*\n)*%%(\w+)")


@dataclass(frozen=True, slots=True)
class Completions:
    """The end of the line that is replaced, and what can replace it."""

    fragment: str
    candidates: Sequence[Completion] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """A word of the line: its start, its text without quotes, and the quote that is still open."""

    start: int
    text: str
    quote: str = ""


def typed_tokens(line: str) -> list[Token]:
    """Split a line as `parser.split_line` does; the last word is the one being typed."""
    found: list[Token] = []
    start, text, quote = -1, "", ""
    for position, char in enumerate(line):
        if not quote and char in " \t\r\n":
            if start >= 0:
                found.append(Token(start, text))
            start, text = -1, ""
            continue
        start = position if start < 0 else start
        if char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote = char
        else:
            text += char
    return [*found, Token(start if start >= 0 else len(line), text, quote)]


def complete(before: str, after: str, cell: str, candidates: Candidates) -> Completions | None:
    """Return the completions at the cursor, between `before` and `after` on its line.

    `cell` is the text above that line. Returns None for a line of another magic or of Python.
    """
    if above := _CELL_MAGIC.match(cell):
        # The body of a cell magic: a prompt, or the text of another magic.
        magic = MAGICS.get(above[1])
        prompt = magic is not None and magic.takes_prompt
        return Completions(*candidates.in_prompt(before)) if prompt else None
    line = _MAGIC.match(before)
    if line is None or line[1] not in MAGICS:
        return None
    is_cell = before.lstrip().startswith("%%")
    return _Line(line[1], before[line.end() :], after, candidates, is_cell).completions()


class _Line:
    """A line of one magic, before and after the cursor."""

    def __init__(
        self, name: str, before: str, after: str, candidates: Candidates, is_cell: bool
    ) -> None:
        *self._done, self._typed = typed_tokens(before)
        self._before, self._after = before, after
        self._magic, self._arguments = MAGICS[name], arguments(name)
        self._candidates, self._is_cell = candidates, is_cell

    def completions(self) -> Completions:
        """Return the completions at the cursor."""
        if self._in_prompt():
            return Completions(*self._candidates.in_prompt(self._before))
        argument = self._argument_of(self._done[-1].text if self._done else "")
        if argument is not None:
            return self._value(argument, self._typed.text)
        if self._typed.text.startswith("-"):
            option, equals, value = self._typed.text.partition("=")
            if equals:
                argument = self._argument_of(option)
                return self._value(argument, value, skip="=") if argument else Completions("")
            return self._replacing(self._options())
        if self._magic.positional is not None:
            return self._positional(self._magic.positional)
        if self._magic.takes_prompt and not self._typed.text:
            return self._replacing(self._options())
        in_prompt = self._magic.takes_prompt and not self._is_cell
        return (
            Completions(*self._candidates.in_prompt(self._before)) if in_prompt else Completions("")
        )

    def _in_prompt(self) -> bool:
        """Return whether the prompt of a line magic starts before the word at the cursor."""
        if not self._magic.takes_prompt or self._is_cell:
            return False
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

    def _value(self, argument: Argument, typed: str, skip: str = "") -> Completions:
        if not argument.complete and not argument.choices and self._magic.takes_prompt:
            # Free text, in which {references} are filled in.
            return Completions(*self._candidates.in_prompt(self._before))
        return self._replacing(self._candidates.of(argument, typed, self._options_given()), skip)

    def _positional(self, argument: Argument) -> Completions:
        name, equals, value = self._typed.text.partition("=")
        if argument.complete == "settings" and equals:
            return self._replacing(self._candidates.setting(name, value), skip="=")
        candidates = self._candidates.of(argument, self._typed.text, self._options_given())
        given = {word.text.partition("=")[0] for word in self._done}
        return self._replacing([c for c in candidates if c.text.removesuffix("=") not in given])

    def _options(self) -> list[Completion]:
        """Return the options that can still be added: none twice, and none of another backend."""
        given = {word.text.partition("=")[0] for word in self._all_tokens()}
        backend = self._options_given().get("backend", "")
        return [
            Completion(name, "option")
            for argument in self._arguments
            if argument.kind in {"repeated", "pairs"} or not given & set(argument.names)
            if not backend or self._works_on(argument, backend)
            for name in argument.names
            if name.startswith(self._typed.text)
        ]

    def _works_on(self, argument: Argument, backend: str) -> bool:
        from llm_magic.backends.registry import load_specs

        spec = load_specs().get(argument.dest) if self._magic.options == "loading" else None
        return spec is None or spec.works_on(backend)

    def _all_tokens(self) -> list[Token]:
        return [*self._done, *typed_tokens(self._after)]

    def _options_given(self) -> Mapping[str, str]:
        """Return the option values on the rest of the line, by option name."""
        given: dict[str, str] = {}
        line = self._all_tokens()
        for word, following in zip(line, [*line[1:], Token(0, "")], strict=True):
            option, equals, value = word.text.partition("=")
            argument = self._argument_of(option)
            if argument is not None:
                given[argument.dest] = value if equals else following.text
        return given

    def _replacing(self, candidates: Sequence[Completion], skip: str = "") -> Completions:
        """Return completions of the word at the cursor, or of its part after the character `skip`."""
        fragment = self._before[self._typed.start :]
        if skip:
            fragment = fragment.partition(skip)[2]
        return Completions(fragment, list(self._quoted(candidates)))

    def _quoted(self, candidates: Sequence[Completion]) -> Iterator[Completion]:
        """Yield the candidates, quoted where they contain blanks; an existing end quote is kept.

        Omits text with control characters: a newline in a model name would add a line to the cell.
        """
        for candidate in candidates:
            text = candidate.text
            if visible_line(text) != text:
                continue
            quote = self._typed.quote or ("'" if '"' in text else '"')
            if quote in text:
                continue
            if self._typed.quote or any(char in text for char in " \t'\""):
                is_open = candidate.is_open or self._after.startswith(quote)
                text = f"{quote}{text}{'' if is_open else quote}"
            yield Completion(text, candidate.kind)


class _NoCompletions(Sequence[Any]):
    """An empty list of completions that suppresses those of other matchers, such as Python names.

    IPython suppresses other matchers only if the length is not 0.
    """

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise IndexError(index)


def register(shell: InteractiveShell, session: Session) -> None:
    """Add the matcher to IPython's completer."""
    from IPython.core.completer import SimpleCompletion, context_matcher

    candidates = Candidates(shell, session)

    @context_matcher(identifier=_NAME)  # type: ignore[untyped-decorator]
    def match(context: Any) -> dict[str, Any]:
        lines = context.full_text.split("\n")
        line, column = lines[context.cursor_line], context.cursor_position
        above = "\n".join(lines[: context.cursor_line])
        try:
            found = complete(line[:column], line[column:], above, candidates)
        except SettingsError:
            # The magic raises it; completion must not print anything.
            found = None
        if found is None:
            return {"completions": []}
        completions = [SimpleCompletion(text=c.text, type=c.kind) for c in found.candidates]
        return {
            "completions": completions or _NoCompletions(),
            "matched_fragment": found.fragment,
            "suppress": True,
            "ordered": True,
        }

    if shell.Completer is not None:
        shell.Completer.custom_matchers.append(match)


def unregister(shell: InteractiveShell) -> None:
    """Remove the matcher from IPython's completer."""
    if shell.Completer is not None:
        matchers = shell.Completer.custom_matchers
        matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != _NAME]
