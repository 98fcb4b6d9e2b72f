"""Parse the lines of magics; errors suggest the nearest option."""

from __future__ import annotations

import argparse
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.notebook.arguments.magic_options import MAGICS, Argument, arguments, option_specs
from llm_magic.notebook.arguments.params import json_end

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec

_BLANKS = " \t\r\n"
_BLANK = re.compile(rf"[{_BLANKS}]*")
# Quotes group a word; backslashes are kept (Windows paths).
_WORD = re.compile(rf"""(?:[^{_BLANKS}"']|"[^"]*+"|'[^']*+')++""")
_QUOTED = re.compile(r""""([^"]*)"|'([^']*)'""")
_KEY = re.compile(r"""[^\s"'=]+=""")
_KEY_WORDS = frozenset({"api-key", "apikey", "api_key", "key", "token", "password"})
_KEY_ADVICE = (
    "A key in a cell is saved with the notebook. Remove it, store it in an environment variable, and"
    " pass the name of the variable: --key-env NAME."
)
# Options that other tools have for the same.
_OTHER_NAMES = {"raw": "--literal", "background": "--bg", "no-wait": "--bg"}


class Parsed(dict[str, Any]):
    """The values of a magic's own arguments by name; None for those that are not given.

    `options` has the options of its set that are given; `prompt` is what follows all of them.
    """

    def __init__(self, values: dict[str, Any], options: dict[str, Any], prompt: str = "") -> None:
        super().__init__(values)
        self.options, self.prompt = options, prompt


def parse(name: str, line: str) -> Parsed:
    """Parse the line of a magic; raises `OptionError`.

    As in Python, a # outside of quotes starts a comment, but only at the start of a word: ``model#2``
    is a name.
    """
    parser = _line_parser(name)
    found: list[str] = []
    position = _blanks_end(line, 0)
    while position < len(line) and line[position] != "#":
        word, position = parser.word(line, position, found[-1] if found else "")
        found.append(word)
        position = _blanks_end(line, position)
    return parser.parsed(found)


def parse_with_prompt(name: str, line: str) -> Parsed:
    """Parse the options at the start of a line; the prompt that follows is returned unchanged."""
    parser = _line_parser(name)
    found, position, start = [], 0, _blanks_end(line, 0)
    while line.startswith("-", start):
        word, position = parser.word(line, start, "")
        start = _blanks_end(line, position)
        if word == "--":
            break
        found.append(word)
        if word in parser.takes_value and start < len(line):
            value, position = parser.word(line, start, word)
            found.append(value)
            start = _blanks_end(line, position)
    parsed = parser.parsed(found)
    parsed.prompt = line[position:].strip()
    return parsed


def split_line(line: str) -> list[str]:
    """Split a line at spaces; quotes group tokens, backslashes are kept."""
    found: list[str] = []
    position = _blanks_end(line, 0)
    while position < len(line):
        word, position = _word(line, position)
        found.append(word)
        position = _blanks_end(line, position)
    return found


def _blanks_end(line: str, position: int) -> int:
    found = _BLANK.match(line, position)
    assert found is not None
    return found.end()


def _word(line: str, start: int) -> tuple[str, int]:
    """Return the word that starts at `start` without its quotes, and its end."""
    found = _WORD.match(line, start)
    end = found.end() if found is not None else start
    if found is None or line[end : end + 1].strip(_BLANKS):
        raise OptionError(f"A quote is not closed in: {line[start:].strip()}")
    return _QUOTED.sub(lambda quoted: quoted[1] or quoted[2] or "", found[0]), end


_parsers: dict[str, _LineParser] = {}


def _line_parser(name: str) -> _LineParser:
    """Return the parser of a magic; a new one if a package with a backend was installed."""
    specs = option_specs(MAGICS[name].options)
    parser = _parsers.get(name)
    if parser is None or parser.specs is not specs:
        parser = _parsers[name] = _LineParser(name, specs)
    return parser


class _LineParser(argparse.ArgumentParser):
    """Parses the lines of one magic; raises `OptionError` and never exits."""

    def __init__(self, name: str, specs: Mapping[str, OptionSpec]) -> None:
        super().__init__(prog=f"%{name}", add_help=False, allow_abbrev=False)
        self.magic, self.specs = MAGICS[name], specs
        options = arguments(name)
        self.names = frozenset(n for option in options for n in option.names)
        self.takes_value = frozenset(n for o in options if o.kind != "switch" for n in o.names)
        self._pairs = frozenset(n for o in options if o.kind == "pairs" for n in o.names)
        for option in options:
            self._add(option)
        if (positional := self.magic.positional) is not None:
            self.add_argument(
                positional.names[0], nargs="*" if positional.kind == "repeated" else "?"
            )

    def _add(self, option: Argument) -> None:
        if option.kind == "switch":
            self.add_argument(*option.names, action="store_true", default=None, dest=option.dest)
            return
        spec = self.specs.get(option.dest)
        read = spec.parse if spec is not None else str
        self.add_argument(
            *option.names,
            action="store" if option.kind == "value" else "append",
            metavar=option.metavar,
            choices=option.choices or None,
            dest=option.dest,
            type=self._pair if option.kind == "pairs" else read,
        )

    def _pair(self, text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"-p {text}: write -p key=value (see %{self.magic.name}?).")
        text = value.strip(_BLANKS)
        return name, json.loads(text) if json_end(text, 0, name) == len(text) else value

    def word(self, line: str, start: int, previous: str) -> tuple[str, int]:
        """Return the word that starts at `start` and its end; JSON after ``-p key=`` is kept unchanged."""
        key = start if previous in self._pairs else None
        for option in self._pairs:
            attached = f"{option}=" if option.startswith("--") else option
            if line.startswith(attached, start):
                key = start + len(attached)
        found = _KEY.match(line, key) if key is not None else None
        end = json_end(line, found.end(), found[0][:-1]) if found is not None else None
        return (line[start:end], end) if end is not None else _word(line, start)

    def parsed(self, tokens: Sequence[str]) -> Parsed:
        """Return the values of the tokens of a line."""
        for word in tokens:
            option = word.partition("=")[0]
            # argparse parses -model as -m odel.
            if len(option) > 2 and option[1] != "-" and f"-{option}" in self.names:
                self._raise_unknown(option, f"-{option}")
        several = self.magic.positional is not None and self.magic.positional.kind == "repeated"
        # Options may stand between them.
        parse = self.parse_intermixed_args if several else self.parse_args
        values = vars(parse(list(tokens)))
        options = {n: values.pop(n) for n in self.specs.keys() & values.keys()}
        as_type = {"repeated": tuple, "pairs": dict}
        return Parsed(
            values,
            {
                name: as_type[kind](value) if (kind := self.specs[name].kind) in as_type else value
                for name, value in options.items()
                if value is not None
            },
        )

    def error(self, message: str) -> NoReturn:
        """Raise `OptionError` with the nearest option."""
        prefix, _, unknown = message.partition(": ")
        if prefix == "unrecognized arguments":
            self._raise_unexpected(unknown.split(" ")[0])
        name = self.magic.name
        raise OptionError(f"%{name} {message.removeprefix('argument ')}. See %{name}?")

    def _raise_unexpected(self, word: str) -> NoReturn:
        name, is_prompt = self.magic.name, self.magic.takes_prompt
        if not word.startswith("-"):
            if is_prompt:
                raise OptionError(
                    f"{word!r} is not an option of %%llm. Put the prompt below the first line; select a"
                    " model with -m."
                )
            raise OptionError(f"%{name}: unexpected argument {word!r}. Usage: {self.magic.usage}")
        word = word.partition("=")[0]
        text = word.lstrip("-")
        if text in _KEY_WORDS:
            raise OptionError(_KEY_ADVICE)
        other = word.swapcase() if word.swapcase() in self.names else _OTHER_NAMES.get(text)
        if other in self.names:
            self._raise_unknown(word, other)
        # Compared without dashes, which all options share.
        near = did_you_mean(text, [n[2:] for n in self.names if n[1] == "-"], prefix="--")
        dash = " Write -- before a prompt that starts with -." if is_prompt and not near else ""
        raise OptionError(f"%{name} has no option {word}.{near}{dash} See %{name}?")

    def _raise_unknown(self, option: str, other: str) -> NoReturn:
        raise OptionError(f'%{self.magic.name} has no option {option}. Did you mean "{other}"?')


def assignments(tokens: Sequence[str]) -> dict[str, object]:
    """Return the settings that words change, by name; raises `OptionError` for any other word.

    An option with several values, such as `stop`, may occur several times.
    """
    from llm_magic.config.option_spec import none_word

    known = option_specs("session")
    pairs: dict[str, object] = {}
    repeated: dict[str, list[object]] = {}
    text = ""
    for name, value in setting_words(tokens):
        spec = known.get(name)
        if spec is None:
            _raise_no_setting(name, known, text)
        text = "" if spec.is_number else name
        if value is None:
            continue
        if spec.kind == "repeated":
            repeated.setdefault(name, []).append(spec.parse(value))
        elif name in pairs:
            raise OptionError(f"{name} occurs twice. Remove one of its values.")
        elif spec.kind == "pairs" and none_word(value) is not None:
            raise OptionError(f"Write {spec.flags[0]} KEY=VALUE for each value of {name}.")
        else:
            pairs[name] = value.removesuffix(",") if spec.is_number else value
    # One value may be the word none.
    return pairs | {n: v if len(v) > 1 else v[0] for n, v in repeated.items()}


def setting_words(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each setting that words name, with its value; None for a name alone.

    ``name=value``, ``name = value`` and ``name value`` are the same.
    """
    known, waiting = option_specs("session"), deque(words)
    while waiting:
        name, equals, value = waiting.popleft().partition("=")
        name = name.replace("-", "_")
        if not equals and waiting and waiting[0].startswith("="):
            equals, value = "=", waiting.popleft()[1:]
        if not value and waiting and not _is_setting(waiting[0], known.get(name)):
            equals, value = "=", waiting.popleft()
        yield name, value if equals else None


def _is_setting(word: str, before: OptionSpec | None) -> bool:
    """Return whether a word starts a setting, and is not the value of the setting before it."""
    name, equals, _ = word.partition("=")
    is_name = name.replace("-", "_") in option_specs("session")
    return is_name and bool(equals or (before is not None and before.is_number))


def _raise_no_setting(name: str, known: Mapping[str, OptionSpec], text: str) -> NoReturn:
    """Raise the error for a word that names no setting; `text` is the text setting before it."""
    if name in _KEY_WORDS:
        raise OptionError(_KEY_ADVICE)
    from llm_magic.config.option_spec import unknown_option

    if text:
        raise OptionError(f'{name!r} is not a setting. Put a text in quotes: {text}="…".')
    if not name:
        raise OptionError("A value has no name. Write NAME=VALUE.")
    raise OptionError(unknown_option(name, known))
