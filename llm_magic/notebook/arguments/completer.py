"""Completion of magic lines and prompts, by IPython's matchers; see `candidates` for what is offered.

Frontends split words at ``:`` and ``/``, which models have in their names. So each answer says
itself which part of the line it is for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_magic.errors import SettingsError
from llm_magic.notebook.arguments.completions import Candidates, Offer
from llm_magic.notebook.arguments.table import MAGICS, Argument, arguments, dest
from llm_magic.text.terminal import visible_line

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session import Session

_NAME = "llm_magic_matcher"
# Also behind an assignment: found = %llm_models -b …
_MAGIC = re.compile(r"\s*(?:[\w.]+\s*=\s*)?%%?(\w+)[ \t]+")
_CELL_MAGIC = re.compile(r"(?:[ \t]*\n)*%%(\w+)")


@dataclass(frozen=True, slots=True)
class Found:
    """The end of the line that is replaced, and by what."""

    fragment: str
    offers: Sequence[Offer] = ()


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a line: where it begins, its text without quotes, and the quote that is still open."""

    start: int
    text: str
    quote: str = ""


def typed_words(line: str) -> list[Word]:
    """Split a line as `arguments.split` does; the last word is the one that is being typed."""
    words: list[Word] = []
    start, text, quote = -1, "", ""
    for position, char in enumerate(line):
        if not quote and char in " \t\r\n":
            if start >= 0:
                words.append(Word(start, text))
            start, text = -1, ""
            continue
        start = position if start < 0 else start
        if char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote = char
        else:
            text += char
    return [*words, Word(start if start >= 0 else len(line), text, quote)]


def find(before: str, after: str, cell: str, candidates: Candidates) -> Found | None:
    """Return what may stand at the cursor, between `before` and `after` on its line.

    `cell` is what is above that line. None where it is no line of ours.
    """
    if above := _CELL_MAGIC.match(cell):
        # Below the first line of a cell magic is its text: a prompt, a shell script.
        magic = MAGICS.get(above[1])
        prompt = magic is not None and magic.takes_prompt
        return Found(*candidates.in_prompt(before)) if prompt else None
    line = _MAGIC.match(before)
    if line is None or line[1] not in MAGICS:
        return None
    is_cell = before.lstrip().startswith("%%")
    return _Line(line[1], before[line.end() :], after, candidates, is_cell).found()


class _Line:
    """A line of one magic, up to the cursor and behind it."""

    def __init__(
        self, name: str, before: str, after: str, candidates: Candidates, is_cell: bool
    ) -> None:
        *self._done, self._word = typed_words(before)
        self._before, self._after = before, after
        self._magic, self._known = MAGICS[name], arguments(name)
        self._candidates, self._is_cell = candidates, is_cell

    def found(self) -> Found:
        """Return what may stand at the cursor."""
        if self._in_prompt():
            return Found(*self._candidates.in_prompt(self._before))
        taking = self._taking(self._done[-1].text if self._done else "")
        if taking is not None:
            return self._value(taking, self._word.text)
        if self._word.text.startswith("-"):
            option, equals, value = self._word.text.partition("=")
            if equals:
                taking = self._taking(option)
                return self._value(taking, value, skip="=") if taking else Found("")
            return self._found(self._options())
        if self._magic.positional is not None:
            return self._positional(self._magic.positional)
        if self._magic.takes_prompt and not self._word.text:
            return self._found(self._options())
        begun = self._magic.takes_prompt and not self._is_cell
        return Found(*self._candidates.in_prompt(self._before)) if begun else Found("")

    def _in_prompt(self) -> bool:
        """Say whether the prompt of a line magic has begun before the word at the cursor."""
        if not self._magic.takes_prompt or self._is_cell:
            return False
        words = iter(self._done)
        for word in words:
            if not word.text.startswith("-") or word.text == "--":
                return True
            if self._taking(word.text) is not None:
                next(words, None)
        return False

    def _taking(self, option: str) -> Argument | None:
        """Return the argument that takes a value after `option`."""
        return next((a for a in self._known if option in a.names and a.kind != "switch"), None)

    def _value(self, argument: Argument, typed: str, skip: str = "") -> Found:
        if not argument.complete and not argument.choices and self._magic.takes_prompt:
            # A free text: {references} are filled in there, too.
            return Found(*self._candidates.in_prompt(self._before))
        return self._found(self._candidates.of(argument, typed, self._options_given()), skip)

    def _positional(self, argument: Argument) -> Found:
        name, equals, value = self._word.text.partition("=")
        if argument.complete == "settings" and equals:
            return self._found(self._candidates.setting(name, value), skip="=")
        offers = self._candidates.of(argument, self._word.text, self._options_given())
        given = {word.text.partition("=")[0] for word in self._done}
        return self._found([o for o in offers if o.text.removesuffix("=") not in given])

    def _options(self) -> list[Offer]:
        """Return the options that may still come: none twice, and none of another backend."""
        given = {word.text.partition("=")[0] for word in self._all_words()}
        backend = self._options_given().get("backend", "")
        return [
            Offer(name, "option")
            for argument in self._known
            if argument.kind in {"repeated", "pairs"} or not given & set(argument.names)
            if not backend or self._works_on(argument, backend)
            for name in argument.names
            if name.startswith(self._word.text)
        ]

    def _works_on(self, argument: Argument, backend: str) -> bool:
        from llm_magic.backends.registry import load_specs

        spec = load_specs().get(dest(argument)) if self._magic.options == "loading" else None
        return spec is None or spec.works_on(backend)

    def _all_words(self) -> list[Word]:
        return [*self._done, *typed_words(self._after)]

    def _options_given(self) -> Mapping[str, str]:
        """Return the values that the line gives beside the cursor, by the names of their options."""
        given: dict[str, str] = {}
        words = self._all_words()
        for word, following in zip(words, [*words[1:], Word(0, "")], strict=True):
            option, equals, value = word.text.partition("=")
            argument = self._taking(option)
            if argument is not None:
                given[dest(argument)] = value if equals else following.text
        return given

    def _found(self, offers: Sequence[Offer], skip: str = "") -> Found:
        """Return offers for the word at the cursor, or for what is behind a character of it."""
        fragment = self._before[self._word.start :]
        if skip:
            fragment = fragment.partition(skip)[2]
        return Found(fragment, list(self._written(offers)))

    def _written(self, offers: Sequence[Offer]) -> Iterator[Offer]:
        """Put quotes around what has blanks in it, but for the end that is there already.

        What has control characters in it is left out: a newline in a server's model name would add a
        line to the cell.
        """
        for offer in offers:
            text = offer.text
            if visible_line(text) != text:
                continue
            quote = self._word.quote or ("'" if '"' in text else '"')
            if quote in text:
                continue
            if self._word.quote or any(char in text for char in " \t'\""):
                is_open = offer.goes_on or self._after.startswith(quote)
                text = f"{quote}{text}{'' if is_open else quote}"
            yield Offer(text, offer.kind)


class _Nothing(Sequence[Any]):
    """No completions, and none of other matchers either: in a prompt, Python's names only disturb.

    IPython lets only those suppress the others who have something to offer, and asks for the length.
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
            found = find(line[:column], line[column:], above, candidates)
        except SettingsError:
            # A magic reports it; a key press must not print anything.
            found = None
        if found is None:
            return {"completions": []}
        completions = [SimpleCompletion(text=o.text, type=o.kind) for o in found.offers]
        return {
            "completions": completions or _Nothing(),
            "matched_fragment": found.fragment,
            "suppress": True,
            "ordered": True,
        }

    if shell.Completer is not None:
        shell.Completer.custom_matchers.append(match)


def unregister(shell: InteractiveShell) -> None:
    """Take the matcher away."""
    if shell.Completer is not None:
        matchers = shell.Completer.custom_matchers
        matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != _NAME]
