"""Parse the lines of magics; errors suggest the nearest option."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.notebook.arguments.magic_options import (
    MAGICS,
    Argument,
    Magic,
    arguments,
    dest,
    option_arguments,
    option_specs,
)
from llm_magic.notebook.arguments.params import json_end

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed line: the magic's own arguments, the given options of its set, and the prompt."""

    values: dict[str, Any]
    options: dict[str, Any]
    prompt: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def parse(name: str, line: str) -> Parsed:
    """Parse the line of a magic; raises `OptionError`."""
    return _parsed(name, split_arguments(name, line))


def parse_with_prompt(name: str, line: str) -> Parsed:
    """Parse the options at the start of a line; the prompt that follows is returned unchanged."""
    options, prompt = _leading_options(name, line)
    parsed = _parsed(name, options)
    return Parsed(parsed.values, parsed.options, prompt)


_BLANKS = " \t\r\n"
_BLANK = re.compile(rf"[{_BLANKS}]*")
# Quotes group a word; backslashes are kept (Windows paths).
_WORD = re.compile(rf"""(?:[^{_BLANKS}"']|"[^"]*+"|'[^']*+')++""")
_QUOTED = re.compile(r""""([^"]*)"|'([^']*)'""")


def split_line(line: str) -> list[str]:
    """Split a line at spaces; quotes group words, backslashes are kept."""
    found: list[str] = []
    position = _after_blanks(line, 0)
    while position < len(line):
        word, position = _word(line, position)
        found.append(word)
        position = _after_blanks(line, position)
    return found


def split_arguments(name: str, line: str) -> list[str]:
    """Split the line of a magic; the value of ``-p key=value`` may be JSON with spaces.

    As in Python, a # outside of quotes starts a comment, but only at the start of a word: ``model#2``
    is a name.
    """
    params = _params(name)
    found: list[str] = []
    position = _after_blanks(line, 0)
    while position < len(line) and line[position] != "#":
        word, position = _option_word(line, position, params, found[-1] if found else "")
        found.append(word)
        position = _after_blanks(line, position)
    return found


def _after_blanks(line: str, position: int) -> int:
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


@functools.cache
def _params(name: str) -> frozenset[str]:
    """Return the options of a magic whose value is ``key=value``."""
    return frozenset(n for a in arguments(name) if a.kind == "pairs" for n in a.names)


_KEY = re.compile(r"""[^\s"'=]+=""")


def _option_word(line: str, start: int, params: frozenset[str], previous: str) -> tuple[str, int]:
    """Return the word that starts at `start` and its end; JSON after ``-p key=`` is kept unchanged."""
    key = start if previous in params else None
    for option in params:
        attached = f"{option}=" if option.startswith("--") else option
        if line.startswith(attached, start):
            key = start + len(attached)
    found = _KEY.match(line, key) if key is not None else None
    if found is None:
        return _word(line, start)
    end = json_end(line, found.end(), found[0][:-1])
    return (line[start:end], end) if end is not None else _word(line, start)


def _leading_options(name: str, line: str) -> tuple[list[str], str]:
    takes_value = {n for a in arguments(name) if a.kind != "switch" for n in a.names}
    params, found = _params(name), [""]
    position = 0
    while (remaining := line[position:].lstrip()).startswith("-"):
        position = len(line) - len(remaining)
        word, position = _option_word(line, position, params, "")
        if word == "--":
            break
        found.append(word)
        start = _after_blanks(line, position)
        if word in takes_value and start < len(line):
            value, position = _option_word(line, start, params, word)
            found.append(value)
    return found[1:], line[position:].strip()


def _parsed(name: str, tokens: Sequence[str]) -> Parsed:
    _check_dashes(name, tokens)
    values = vars(_parser(name, arguments(name)).parse_args(list(tokens)))
    option_names = {dest(a) for a in option_arguments(MAGICS[name].options)}
    options = {n: values.pop(n) for n in option_names & values.keys() if values[n] is not None}
    known = option_specs(MAGICS[name].options)
    return Parsed(values, {n: _option(known[n], value, name) for n, value in options.items()})


def _option(spec: OptionSpec, value: Any, magic: str) -> object:
    """Return the value of an option, parsed by its flag."""
    assert spec.flag is not None
    if spec.kind == "pairs":
        return dict(_pair(text, magic) for text in value)
    if spec.kind == "repeated":
        return tuple(map(spec.flag.parse, value))
    return value if spec.kind == "switch" else spec.flag.parse(value)


def _check_dashes(name: str, tokens: Sequence[str]) -> None:
    """Raise `OptionError` for -model, which argparse parses as -m odel."""
    known = {option for argument in arguments(name) for option in argument.names}
    for word in tokens:
        option = word.partition("=")[0]
        if len(option) > 2 and option[1] != "-" and f"-{option}" in known:
            raise OptionError(f'%{name} has no option {option}. Did you mean "-{option}"?')


def assignments(tokens: Sequence[str]) -> dict[str, object]:
    """Parse ``name=value`` words; raises `OptionError` for any other word.

    An option with several values, such as `stop`, may occur several times.
    """
    known = option_specs("generation")
    pairs: dict[str, object] = {}
    repeated: dict[str, list[object]] = {}
    for word in tokens:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise OptionError(f"{word!r} is not a setting. Write name=value, without spaces.")
        name = name.replace("-", "_")
        spec = known.get(name)
        pairs[name] = value
        if spec is not None and spec.kind == "repeated" and spec.flag is not None:
            repeated.setdefault(name, []).append(spec.flag.parse(value))
    # One value may be the word none.
    return pairs | {n: v if len(v) > 1 else v[0] for n, v in repeated.items()}


def _pair(text: str, magic: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"-p {text}: write -p key=value (see %{magic}?).")
    text = value.strip(_BLANKS)
    return name, json.loads(text) if json_end(text, 0, name) == len(text) else value


_KEY_WORDS = frozenset({"api-key", "apikey", "api_key", "key", "token", "password"})


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises `OptionError` and never exits."""

    magic: Magic

    def error(self, message: str) -> NoReturn:
        """Raise `OptionError` with the nearest option."""
        prefix, _, unknown = message.partition(": ")
        if prefix == "unrecognized arguments":
            raise OptionError(self._unknown_argument(unknown.split(" ")[0]))
        name = self.magic.name
        raise OptionError(f"%{name} {message.removeprefix('argument ')}. See %{name}?")

    def _unknown_argument(self, word: str) -> str:
        if not word.startswith("-"):
            if self.magic.name == "llm":
                return (
                    f"{word!r} is not an option of %%llm. Put the prompt below the first line; select a"
                    " model with -m."
                )
            return f"%{self.magic.name}: unexpected argument {word!r}. Usage: {self.magic.usage}"
        word = word.partition("=")[0]
        if word.lstrip("-") in _KEY_WORDS:
            return (
                "A key in a cell is saved with the notebook. Remove it, store it in an environment"
                " variable, and pass the name of the variable: --key-env NAME."
            )
        if any(word.swapcase() in argument.names for argument in arguments(self.magic.name)):
            return f'%{self.magic.name} has no option {word}. Did you mean "{word.swapcase()}"?'
        # Compared without dashes, which all options share.
        known = [n.lstrip("-") for a in arguments(self.magic.name) for n in a.names if n[1] == "-"]
        near = did_you_mean(word.lstrip("-"), known, prefix="--")
        prompt = self.magic.name == "llm" and not near
        dash = " Write -- before a prompt that starts with -." if prompt else ""
        return f"%{self.magic.name} has no option {word}.{near}{dash} See %{self.magic.name}?"


@functools.cache
def _parser(name: str, options: tuple[Argument, ...]) -> _Parser:
    magic = MAGICS[name]
    parser = _Parser(prog=f"%{name}", add_help=False, allow_abbrev=False)
    parser.magic = magic
    for argument in options:
        _add(parser, argument)
    if magic.positional is not None:
        many = magic.positional.kind == "repeated"
        parser.add_argument(
            magic.positional.names[0], nargs="*" if many else "?", help=magic.positional.help
        )
    return parser


def _add(parser: _Parser, argument: Argument) -> None:
    if argument.kind == "switch":
        parser.add_argument(*argument.names, action="store_true", default=None, dest=dest(argument))
        return
    repeated = argument.kind in {"repeated", "pairs"}
    parser.add_argument(
        *argument.names,
        action="append" if repeated else "store",
        metavar=argument.metavar,
        choices=argument.choices or None,
        dest=dest(argument),
    )
