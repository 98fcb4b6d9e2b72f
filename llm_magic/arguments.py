"""Magic lines to values: split, parse, and errors that name the nearest option."""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llm_magic.catalog import MAGICS, Argument, Magic, arguments, dest, option_arguments
from llm_magic.errors import OptionError, did_you_mean


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed line: the magic's own arguments, and the options that were given of its set."""

    values: dict[str, Any]
    options: dict[str, Any]
    rest: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def parse(name: str, line: str) -> Parsed:
    """Parse the line of a magic; raises `OptionError` in one line."""
    return _parsed(name, split(without_comment(line)))


def parse_with_prompt(name: str, line: str) -> Parsed:
    """Parse options at the beginning of a line; the rest is the prompt, byte for byte."""
    words, rest = _leading_options(name, line)
    parsed = _parsed(name, words)
    return Parsed(parsed.values, parsed.options, rest)


def split(line: str) -> list[str]:
    """Split a line at spaces; quotes hold words together, backslashes are kept (Windows paths)."""
    try:
        return list(_lexer(line))
    except ValueError:
        raise OptionError(f"A quote is not closed in: {line.strip()}") from None


_BLANKS = " \t\r\n"
# Words, as `split` reads them, up to one that begins with a #.
_BEFORE_COMMENT = re.compile(
    rf"""(?:[{_BLANKS}]*+(?!\#)(?:[^{_BLANKS}"']|"[^"]*+"|'[^']*+')++)*+"""
)


def without_comment(line: str) -> str:
    """Return a line without the comment at its end: as in Python, a # outside of quotes begins it.

    Only where a word could begin, so that ``model#2`` is a name.
    """
    found = _BEFORE_COMMENT.match(line)
    assert found is not None
    return found[0] if line[found.end() :].lstrip(_BLANKS).startswith("#") else line


def _lexer(line: str) -> shlex.shlex:
    lexer = shlex.shlex(io.StringIO(line), posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    return lexer


def _leading_options(name: str, line: str) -> tuple[list[str], str]:
    takes_value = {n for a in arguments(name) if a.kind != "switch" for n in a.names}
    words: list[str] = []
    position = 0
    while (rest := line[position:].lstrip()).startswith("-"):
        stream = io.StringIO(rest)
        lexer = _lexer("")
        lexer.instream = stream
        try:
            word = lexer.get_token()
            if word == "--":
                return words, rest[stream.tell() :].strip()
            words.append(str(word))
            if word in takes_value and (value := lexer.get_token()) is not None:
                words.append(value)
        except ValueError:
            raise OptionError(f"A quote is not closed in: {rest}") from None
        position = len(line) - len(rest) + stream.tell()
    return words, rest.strip()


def _parsed(name: str, words: Sequence[str]) -> Parsed:
    _refuse_one_dash(name, words)
    values = vars(_parser(name).parse_args(list(words)))
    option_names = {dest(a) for a in option_arguments(MAGICS[name].options)}
    options = {n: values.pop(n) for n in option_names & values.keys() if values[n] is not None}
    if "extra" in options:
        options["extra"] = dict(_pair(text, name) for text in options["extra"])
    if "stop" in options:
        options["stop"] = tuple(map(unescaped, options["stop"]))
    return Parsed(values, options)


def _refuse_one_dash(name: str, words: Sequence[str]) -> None:
    """Raise for -model, which argparse reads as -m odel."""
    known = {option for argument in arguments(name) for option in argument.names}
    for word in words:
        option = word.partition("=")[0]
        if len(option) > 2 and option[1] != "-" and f"-{option}" in known:
            raise OptionError(f"%{name} has no option {option}. Did you mean -{option}?")


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def unescaped(text: str) -> str:
    """Read a text in which a line break is written as \\n: on one line there is no other way."""
    return re.sub(r"\\([nrt\\])", lambda found: _ESCAPES[found[1]], text)


def escaped(text: str) -> str:
    """Write a text so that `unescaped` reads it."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def assignments(words: Sequence[str]) -> dict[str, str | list[str]]:
    """Read ``name=value`` words; raises `OptionError` for a word that is none.

    `stop` may be there several times.
    """
    pairs: dict[str, str | list[str]] = {}
    stops: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise OptionError(f"{word!r} is not a setting. Write name=value, without spaces.")
        name = name.replace("-", "_")
        if name == "stop":
            stops.append(unescaped(value))
        pairs[name] = value
    if stops:
        pairs["stop"] = stops if len(stops) > 1 else stops[0]
    return pairs


def _pair(text: str, magic: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"-p {text}: write -p key=value (see %{magic}?).")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


_KEY_WORDS = frozenset({"api-key", "apikey", "api_key", "key", "token", "password"})


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises our errors and never exits."""

    magic: Magic

    def error(self, message: str) -> NoReturn:
        """Raise `OptionError` with the nearest option."""
        prefix, _, words = message.partition(": ")
        if prefix == "unrecognized arguments":
            raise OptionError(self._unknown(words.split(" ")[0]))
        raise OptionError(f"{message} (see %{self.magic.name}?).".replace("argument ", "", 1))

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            if self.magic.name == "llm":
                return (
                    f"{word!r} is no option of %%llm. The prompt goes below the first line;"
                    " a model is named with -m."
                )
            return f"%{self.magic.name} does not know what to do with {word!r}. Usage: {self.magic.usage}"
        word = word.partition("=")[0]
        if word.lstrip("-") in _KEY_WORDS:
            return (
                "A key on the line would be saved in the notebook. Take it out of the cell, put it into"
                " an environment variable, and name that: --key-env NAME."
            )
        if any(word.swapcase() in argument.names for argument in arguments(self.magic.name)):
            return f"%{self.magic.name} has no option {word}. Did you mean {word.swapcase()}?"
        # Without the dashes, which all of them share.
        known = [n.lstrip("-") for a in arguments(self.magic.name) for n in a.names if n[1] == "-"]
        near = (
            did_you_mean(word.lstrip("-"), known)
            .replace("mean ", "mean --")
            .replace(" or ", " or --")
        )
        prompt = self.magic.name == "llm" and not near
        dash = " A prompt that begins with - goes after --." if prompt else ""
        return f"%{self.magic.name} has no option {word}.{near}{dash} See %{self.magic.name}?"


@functools.cache
def _parser(name: str) -> _Parser:
    magic = MAGICS[name]
    parser = _Parser(prog=f"%{name}", add_help=False, allow_abbrev=False)
    parser.magic = magic
    for argument in arguments(name):
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
