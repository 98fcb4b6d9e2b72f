"""Parse the lines of magics; errors suggest the nearest option."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.notebook.arguments import HelpRequested, unknown_options, variables
from llm_magic.notebook.arguments.magic_options import (
    HELP,
    MAGICS,
    Argument,
    arguments,
    option_specs,
)
from llm_magic.notebook.arguments.params import json_end

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionSpec

_BLANKS = " \t\r\n"
_BLANK = re.compile(rf"[{_BLANKS}]*")
# Quotes group a word; backslashes are kept (Windows paths), and so are quotes in {d["key"]}.
_REFERENCE = r"""\{(?:[^{}"'\n]|"[^"\n]*+"|'[^'\n]*+')*+\}"""
_WORD = re.compile(rf"""(?:[^{_BLANKS}"'{{]|"[^"]*+"|'[^']*+'|{_REFERENCE}|\{{)++""")
_QUOTED = re.compile(rf""""([^"]*)"|'([^']*)'|({_REFERENCE})""")
_KEY = re.compile(r"""[^\s"'=]+=""")
_KEY_WORDS = frozenset({"api-key", "apikey", "api_key", "key", "token", "password"})
_KEY_ADVICE = (
    "A key in a cell is saved with the notebook. Remove it, store it in an environment variable, and"
    " pass the name of the variable: --key-env NAME."
)
_BELOW = "Put the prompt below the first line, and the name of a model after -m."
# Brackets in brackets, with texts: df[df.stars < 3], reviews["text"].head(9), range(0, 10)
_IN_BRACKETS = r"""[^()\[\]{}"'\n]|"[^"\n]*+"|'[^'\n]*+'"""
_BRACKETS = rf"[(\[{{](?:{_IN_BRACKETS})*+[)\]}}]"
for _ in range(4):
    _BRACKETS = rf"[(\[{{](?:{_IN_BRACKETS}|{_BRACKETS})*+[)\]}}]"
_TEXT = r"""(?:"[^"\n]*+"|'[^'\n]*+')"""
# A text in it is Python where something of it is called or read: 'a b'.split()
_BRACKETED = rf"(?:[\w.]*+{_BRACKETS}|{_TEXT}(?=\.\w++\(|\[))++[\w.]*+"
# What follows an operator: ["a", "b"]*2, df["city"] + "!"; a minus after a space starts an option.
_OPERAND = rf"(?:[ \t]*+[+*/%|&]{{1,2}}[ \t]*+(?:{_BRACKETED}|{_TEXT}|\d++)|[+*/%|&-][\w.]++)"
_CODE = re.compile(rf"(?:{_BRACKETED}{_OPERAND}*+|[^\W\d][\w.]*+{_OPERAND}++)(?=[{_BLANKS}]|\Z)")
_WHOLE = re.compile(rf"{_TEXT}")  # quotes around all of an expression group it
# A list of quoted texts, as Python writes it: stop=["END", "STOP"]
_LIST = re.compile(rf"""([\w-]++=)?\[(?:\s*+{_TEXT}\s*+,?)*+\s*+\](?=[{_BLANKS}]|\Z)""")
# Where options at the end of a prompt may begin: in its last characters.
_OPTION = re.compile(r"(?<=\s)--?[a-zA-Z]")
_LAST_OPTION = re.compile(r"(?<=\s)(--[a-zA-Z][\w-]*|-[a-zA-Z][\w-]+)(?:[=\s]\s*[^\s-]\S*)?$")
_MAX_END = 300


class Parsed(dict[str, Any]):
    """The values of a magic's own arguments by name; None for those that are not given.

    `options` has the options of its set that are given; `prompt` is what follows all of them, and
    `notes` are about that.
    """

    options: dict[str, Any]
    prompt = ""
    notes: tuple[str, ...] = ()


def parse(name: str, line: str, names: variables.Names | None = None, *, sign: str = "%") -> Parsed:
    """Parse the line of a magic; raises `OptionError`.

    `names` returns the notebook's variables, whose values replace the {references} in the line. As in
    Python, a # outside of quotes starts a comment, but only at the start of a word: ``model#2`` is a name.
    Errors name the magic with its `sign`.
    """
    parser = _line_parser(name, sign)
    found: list[str] = []
    position = _blanks_end(line, 0)
    while position < len(line) and line[position] != "#":
        position = _blanks_end(line, parser.read(line, position, found))
    return parser.parsed(found, names)


def parse_with_cell(
    name: str, line: str, cell: str, names: variables.Names | None = None
) -> Parsed:
    """Parse the line of a cell magic; the prompt is the rest of the cell.

    A note reports that the first line of the prompt has options; ``--dry-run`` there is an `OptionError`.
    """
    parsed = parse(name, line, names, sign="%%")
    parsed.prompt = cell.strip("\n")
    first = parsed.prompt.partition("\n")[0].strip()
    if first.startswith("-"):
        try:
            options = parse(name, first)
        except (OptionError, HelpRequested):
            return parsed
        where = f"write them on the first line: %%{name} {first}"
        if options.get("dry_run"):
            # Its purpose is that nothing is sent.
            raise OptionError(f"{first} follows the first line. To use options, {where}")
        parsed.notes = (f"{first} is sent as part of the prompt. To use options, {where}",)
    return parsed


def parse_with_prompt(name: str, line: str, names: variables.Names | None = None) -> Parsed:
    """Parse the options at the start of a line; the prompt that follows is returned unchanged.

    Raises `OptionError` if options follow the prompt. Where these may be a part of it, as in
    ``%llm What is tail -c 5``, a note reports that they were sent. After ``--``, all is prompt.
    """
    parser = _line_parser(name)
    found: list[str] = []
    position, start, only_text = 0, _blanks_end(line, 0), False
    while line.startswith("-", start):
        position = parser.read(line, start, found)
        start = _blanks_end(line, position)
        if only_text := found[-1] == "--":
            found.pop()
            break
        if found[-1] in parser.takes_value and start < len(line):
            position = parser.read(line, start, found)
            start = _blanks_end(line, position)
    parsed = parser.parsed(found, names)
    parsed.prompt = line[position:].strip()
    if not only_text:
        first = parsed.prompt.partition(" ")[0]
        has_dash = first.startswith(unknown_options.DASHES)
        if has_dash and (advice := unknown_options.with_hyphen(first, parser.names)):
            raise OptionError(f"{advice} To send it as text: %{name} -- PROMPT")
        parsed.notes = (
            *parser.notes(parsed.prompt, line[:position].strip()),
            *_quotes_note(parsed.prompt),
        )
    return parsed


def _quotes_note(prompt: str) -> Iterator[str]:
    """Yield that the quotes around a whole prompt are sent, as a shell would not do."""
    quote, inner = prompt[:1], prompt[1:-1]
    if quote in {'"', "'"} and prompt.endswith(quote) and inner and quote not in inner:
        yield "the quotes around the prompt are part of it, and are sent."


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
        raise OptionError(
            f"Missing closing quote. Add it or remove the opening one: {line[start:].strip()}"
        )
    return _QUOTED.sub(lambda quoted: quoted[quoted.lastindex or 0], found[0]), end


_parsers: dict[str, _LineParser] = {}


def _line_parser(name: str, sign: str = "%") -> _LineParser:
    """Return the parser of a magic; a new one if a package with a backend was installed."""
    specs = option_specs(MAGICS[name].options)
    parser = _parsers.get(sign + name)
    if parser is None or parser.specs is not specs:
        parser = _parsers[sign + name] = _LineParser(name, specs, sign)
    return parser


class _LineParser(argparse.ArgumentParser):
    """Parses the lines of one magic; raises `OptionError` and never exits."""

    def __init__(self, name: str, specs: Mapping[str, OptionSpec], sign: str) -> None:
        super().__init__(prog=f"{sign}{name}", add_help=False, allow_abbrev=False)
        self.magic, self.specs = MAGICS[name], specs
        options = arguments(name)
        self.names = frozenset(n for option in options for n in option.names)
        self.takes_value = frozenset(n for o in options if o.kind != "switch" for n in o.names)
        self._code = frozenset(n for o in options if o.is_code for n in o.names)
        self._data = frozenset(n for o in options if o.complete == "data" for n in o.names)
        self._pairs = frozenset(n for o in options if o.kind == "pairs" for n in o.names)
        self._lists = {
            name.lstrip("-")
            for spec in specs.values()
            if spec.kind == "repeated"
            for name in (spec.name, *spec.flags)
        }
        for option in options:
            self._add(option)
        if (positional := self.magic.positional) is not None:
            self.add_argument(
                positional.names[0], nargs="*" if positional.kind == "repeated" else "?"
            )

    def _add(self, option: Argument) -> None:
        if option is HELP:
            self.add_argument(*option.names, action=_Help, nargs=0)
            return
        if option.kind == "switch":
            self.add_argument(*option.names, action="store_true", default=None, dest=option.dest)
            return
        spec = self.specs.get(option.dest)
        read = spec.parse if spec is not None else str
        is_list = option.kind == "repeated"
        self.add_argument(
            *option.names,
            action=_Once if option.kind == "value" else "extend" if is_list else "append",
            metavar=option.metavar,
            dest=option.dest,
            type=self._pair
            if option.kind == "pairs"
            else functools.partial(_texts, read)
            if is_list
            else _choice(option) or read,
        )

    def _pair(self, text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        if not equals or not name:
            missing = "key" if equals else "value"
            raise OptionError(f"-p {text} has no {missing}. Write -p key=value.")
        text = value.strip(_BLANKS)
        return name, json.loads(text) if json_end(text, 0, name) == len(text) else value

    def read(self, line: str, start: int, found: list[str]) -> int:
        """Append the word that starts at `start` to those that were found, and return its end.

        JSON after ``-p key=`` is kept unchanged, and so is a list for an option with several values.
        """
        listed = _LIST.match(line, start)
        if listed is not None and variables.option_of([*found, listed[0]]) in self._lists:
            found.append(listed[0])
            return listed.end()
        previous = found[-1] if found else ""
        attached = next((f"{n}=" for n in self._code if line.startswith(f"{n}=", start)), "")
        value = start + len(attached)
        code = _CODE.match(line, value)
        if code is not None and (attached or previous in self._code):
            found.append(f"{attached}{code[0]}")
            return code.end()
        key = start if previous in self._pairs else None
        for option in self._pairs:
            before = f"{option}=" if option.startswith("--") else option
            if line.startswith(before, start):
                key = start + len(before)
        pair = _KEY.match(line, key) if key is not None else None
        end = json_end(line, pair.end(), pair[0][:-1]) if pair is not None else None
        word, end = (line[start:end], end) if end is not None else _word(line, start)
        if (attached[:-1] or previous) in self._data and not _WHOLE.fullmatch(line, value, end):
            word = line[start:end]
        if previous in self.takes_value and word.startswith("-") and line[start] in "\"'":
            # A quoted word is a value, which argparse would take for an option.
            found[-1] = f"{previous}={word}"
        else:
            found.append(word)
        return end

    def parsed(self, tokens: Sequence[str], names: variables.Names | None = None) -> Parsed:
        """Return the values of the tokens of a line."""
        if names is not None and any(map(variables.MARK.search, tokens)):
            tokens = variables.fill(tokens, self.takes_value, names)
        self._tokens = tokens
        for word in tokens:
            has_dash = word.startswith(unknown_options.DASHES)
            if has_dash and (advice := unknown_options.with_hyphen(word, self.names)):
                raise OptionError(advice)
            option = word.partition("=")[0]
            # argparse parses -model as -m odel.
            ours = f"-{option.replace('_', '-')}"
            if len(option) > 2 and option[1] != "-" and ours in self.names:
                raise OptionError(f'{self.prog} has no option {option}. Did you mean "{ours}"?')
        several = self.magic.positional is not None and self.magic.positional.kind == "repeated"
        # Options may stand between them.
        parse = self.parse_intermixed_args if several else self.parse_args
        values = vars(parse(list(tokens)))
        options = {n: values.pop(n) for n in self.specs.keys() & values.keys()}
        as_type: dict[str, Callable[[Any], object]] = {"repeated": _texts_or_none, "pairs": _unique}
        found = Parsed(values)
        found.options = {
            name: as_type[kind](value) if (kind := self.specs[name].kind) in as_type else value
            for name, value in options.items()
            if value is not None
        }
        return found

    def notes(self, prompt: str, given: str) -> tuple[str, ...]:
        """Return a note if a prompt ends with what may be options; raises `OptionError` if it is.

        `given` are the options before the prompt.
        """
        for found in _OPTION.finditer(prompt, max(0, len(prompt) - _MAX_END)):
            end = prompt[found.start() :]
            try:
                parsed = parse(self.magic.name, end)
            except HelpRequested:
                continue
            except OptionError as error:
                self._check_before_unknown(end, given, error)
                continue
            if _is_certain(parsed):
                raise self._follows(end, given)
            return (f"{end} is sent as part of the prompt. {self._in_place(end, given)}",)
        return self._unknown_at_end(prompt)

    def _in_place(self, options: str, given: str) -> str:
        """Return where options belong that stand after the prompt."""
        all_options = f"{given} {options}".strip()
        return f"Write options before the prompt: %{self.magic.name} {all_options} PROMPT"

    def _follows(self, options: str, given: str, reason: str = "") -> OptionError:
        """Return the error for options after the prompt; `reason` is a sentence about what follows them."""
        return OptionError(
            f"{options} follows the prompt. {self._in_place(options, given)}.{reason}"
            f" To send it as text: %{self.magic.name} -- PROMPT"
        )

    def _check_before_unknown(self, end: str, given: str, error: OptionError) -> None:
        """Raise `OptionError` if the end of a prompt has options of ours before an unknown one."""
        starts = [found.start() for found in _OPTION.finditer(end)]
        known = end[: starts[-1] if starts else 0].rstrip()
        try:
            parsed = parse(self.magic.name, known)
        except (OptionError, HelpRequested):
            return
        if _is_certain(parsed):
            raise self._follows(known, given, f" {error}")

    def _unknown_at_end(self, prompt: str) -> tuple[str, ...]:
        """Return a note if a prompt ends with an invalid option, or with one that resembles ours."""
        found = _LAST_OPTION.search(prompt, max(0, len(prompt) - _MAX_END))
        if found is None:
            return ()
        if found[1] in self.names:
            advice = f"Write options before the prompt. See {self.prog} -h"
        else:
            advice = unknown_options.equivalent(self.magic, found[1])
        return (f"{found[0]} is sent as part of the prompt. {advice}",) if advice else ()

    def error(self, message: str) -> NoReturn:
        """Raise `OptionError` with the nearest option."""
        prefix, _, unknown = message.partition(": ")
        if prefix == "unrecognized arguments":
            self._raise_unexpected(unknown.split(" ")[0])
        names = prefix.removeprefix("argument ").split("/")
        found = next(one for one in arguments(self.magic.name) if one.names[-1] == names[-1])
        if found.kind == "switch":
            raise OptionError(
                f"{self.prog}: {names[-1]} takes no value. Write {names[-1]} or omit it."
            )
        following = zip(self._tokens, self._tokens[1:], strict=False)
        value = next((word for option, word in following if option in found.names), "")
        is_value = value.startswith("-") and value.partition("=")[0] not in self.names
        advice = f'Put it in quotes: {names[0]} "{value}".' if is_value else f"See {self.prog} -h"
        raise OptionError(
            f"{self.prog}: {names[0]} needs a value: {names[0]} {found.metavar}. {advice}"
        )

    def _raise_unexpected(self, word: str) -> NoReturn:
        if word == "\\":
            raise OptionError(
                f"A backslash continues no line. Write all options of {self.prog} on one."
            )
        from llm_magic.config.redaction import is_key

        name, equals, _ = word.partition("=")
        is_option = bool(equals) or word.startswith("-")
        if (is_option and name.lstrip("-") in _KEY_WORDS) or is_key(word):
            raise OptionError(_KEY_ADVICE)
        if not word.startswith("-"):
            quotes = unknown_options.in_quotes(self.magic, self._tokens, word)
            if self.magic.takes_prompt:
                option = f"--{word.partition('=')[0].replace('_', '-')}"
                advice = f"Write options with hyphens: {option}." if option in self.names else ""
                raise OptionError(
                    f"{word!r} is not an option of %%{self.magic.name}. {quotes or advice or _BELOW}"
                )
            advice = unknown_options.of_server(self.names, word) or quotes
            usage = f"Usage: {self.magic.usage}"
            raise OptionError(f"{self.prog}: unexpected argument {word!r}. {advice or usage}")
        self._raise_unknown(name)

    def _raise_unknown(self, option: str) -> NoReturn:
        advice = unknown_options.equivalent(self.magic, option)
        if not advice and (other := unknown_options.owner(option)):
            advice = f"It is an option of %{other}.{unknown_options.for_session(other, option)}"
        if not advice and self.prog == "%llm":
            advice = "Write -- before a prompt that starts with -."
        raise OptionError(f"{self.prog} has no option {option}. {advice or f'See {self.prog} -h'}")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return ``-p`` pairs as a dict; raises `OptionError` for a name that is given twice."""
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise OptionError(f"-p {name} is given twice. Keep one of them.")
        unique[name] = value
    return unique


def _is_certain(parsed: Parsed) -> bool:
    """Return whether the options at the end of a prompt are no part of it.

    Other programs have options of the same names, ``tail -c 5``, but not with the values of ours.
    """
    from llm_magic.config.settings import GenerationConfig

    try:
        GenerationConfig().replace(**parsed.options)
    except OptionError:
        return False
    given = {name for name, value in parsed.items() if value is not None} | parsed.options.keys()
    return not given <= {"model", "system", "chat", "output", "extra"}


class _Once(argparse.Action):
    """Stores the value of an option that may be given once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            label = ", ".join(self.option_strings)
            raise OptionError(f"{parser.prog}: {label} is given twice. Keep one of them.")
        setattr(namespace, self.dest, values)


class _Help(argparse.Action):
    """Ends the parsing for ``--help``."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise HelpRequested


def _choice(option: Argument) -> Callable[[str], str] | None:
    """Return a function that checks a value, if the option has choices."""
    if not option.choices:
        return None

    def checked(text: str) -> str:
        if text not in option.choices:
            from llm_magic.config.option_spec import alternatives

            advice = did_you_mean(text, option.choices) or f" Use {alternatives(option.choices)}."
            raise OptionError(f"{option.names[-1]} {text} is invalid.{advice}")
        return text

    return checked


def assignments(tokens: Sequence[str]) -> dict[str, object]:
    """Return the settings that words change, by name; raises `OptionError` for any other word.

    An option with several values, such as `stop`, may occur several times.
    """
    from llm_magic.config.option_spec import none_word

    known = option_specs("session")
    pairs: dict[str, object] = {}
    repeated: dict[str, list[object]] = {}
    text = ""
    for name, value in named_settings(tokens):
        spec = known.get(name)
        if spec is None:
            _raise_no_setting(name, known, text)
        text = "" if spec.is_number else name
        if value is None:
            continue
        if spec.kind == "repeated":
            repeated.setdefault(name, []).extend(_texts(spec.parse, value))
        elif name in pairs:
            raise OptionError(f"{name} is given twice. Keep one of its values.")
        elif spec.kind == "pairs" and none_word(value) is not None:
            raise OptionError(f"Write {spec.flags[0]} KEY=VALUE for each value of {name}.")
        else:
            pairs[name] = value.removesuffix(",") if spec.is_number else spec.parse(value)
    # One value may be the word none.
    return pairs | {n: v[0] if len(v) == 1 else v for n, v in repeated.items()}


def _texts_or_none(values: Sequence[object]) -> tuple[object, ...]:
    """Return the values of an option that may be repeated; none of them for the word none alone."""
    from llm_magic.config.option_spec import none_word

    return () if len(values) == 1 and none_word(values[0]) is None else tuple(values)


def _texts(read: Callable[[str], object], text: str) -> list[object]:
    """Return what the texts of a list stand for, or the text itself if it is no list."""
    found = _LIST.fullmatch(text)
    if found is None or found[1]:
        return [read(text)]
    return [read(quoted[1:-1]) for quoted in re.findall(_TEXT, text)]


def named_settings(tokens: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each setting that the tokens of a line name, with its value; None for a name alone.

    ``name=value``, ``name = value`` and ``name value`` are the same.
    """
    known, waiting = option_specs("session"), deque(tokens)
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
    if name == "reset":
        raise OptionError(f'{name!r} is not a setting. Did you mean "--reset"?')
    if (setting := name.partition(":")[0]) in known:
        raise OptionError(f"{name!r} is not a setting. Write {setting}=VALUE.")
    if not name:
        raise OptionError("A value has no name. Write NAME=VALUE.")
    loads = {"model": "MODEL", "timeout": "MODEL --idle-timeout S"}
    loads |= {
        n: f"MODEL {s.flags[-1]} {s.metavar}" for n, s in option_specs("loading").items() if s.flags
    }
    if name in loads:
        raise OptionError(f"{name} is not a setting of answers. Run %llm_load {loads[name]}.")
    raise OptionError(unknown_option(name, known, "a setting"))
