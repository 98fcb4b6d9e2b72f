"""Masks secrets in texts.

A secret is a value with a telltale name (``password=…``), a value that has such a name elsewhere (in
the environment, in the notebook), or a word in the format of a key (``hf_…``, random letters).
Uncertain cases are masked: an explanation is less precise without a word, but a key that was sent
must be revoked. Secrets that meet none of these criteria are not found.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from json import dumps
from typing import Any
from urllib.parse import quote

MASK = "•••"
# Shorter values occur in texts for other reasons.
_MIN_LENGTH = 6
_MAX_ITEMS, _MAX_DEPTH = 1000, 3

_NAME_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_TERMS = frozenset({
    "password", "passwords", "passwd", "pwd", "pass", "passphrase", "passcode", "pin", "secret", "secrets",
    "credential", "credentials", "creds", "auth", "authorization", "authentication", "oauth", "bearer",
    "cookie", "cookies", "apikey", "apikeys", "apitoken", "jwt", "otp", "signature", "sessionid", "csrf",
    "xsrf", "dsn",
})  # fmt: skip
# `key` and `token` are secrets; `keys` and `tokens` are counts unless an access word precedes them.
_KEY_TERMS = {"key", "token"}
_ACCESS_TERMS = frozenset({
    "api", "access", "secret", "private", "auth", "ssh", "signing", "session", "refresh", "service",
})  # fmt: skip
# Tokens of a tokenizer and keys of a table are not secrets.
_HARMLESS_TERMS = frozenset({
    "pad", "eos", "bos", "unk", "sep", "cls", "mask", "special", "max", "min", "num", "count", "new", "n",
    "id", "ids", "index", "type", "primary", "foreign", "sort", "column", "public",
})  # fmt: skip
# KeyError, AuthenticationError
_EXCEPTION_TERMS = frozenset({"error", "exception", "warning"})

_LITERAL = (
    r"""[rbfuRBFU]{0,2}+(?:"{3}(?:\\[\s\S]|(?!"{3})[\s\S])*+"{3}|'{3}(?:\\[\s\S]|(?!'{3})[\s\S])*+'{3}"""
    r"""|"(?:\\.|[^"\\\n])*+"?|'(?:\\.|[^'\\\n])*+'?)"""
)
# A name and what separates it from its value: name = "…", name: str = "…", "name": "…", ["name"] = "…",
# ("NAME", "…"), NAME=… and --name … of a shell
_ASSIGNMENT = re.compile(
    r"""(?x) (?<!\w) (?: (?P<flag> (?<!\S) --?+ )?+ (?P<name> [A-Za-z_][\w-]{0,80}+ ) )
    (?: ["']?+ \]?+ \s*+
        (?: : \s*+ [\w.\[\], |]{1,60}? = (?!=) | := | == | != | [:=] | (?<=["']) , (?=\s*+["']) )
        \s*+ \(?+ \s*+
      | (?(flag) [ \t]++ (?!-) | (?!) ) )"""
)
_VALUE = re.compile(rf"""{_LITERAL}|(?P<bare>[^\s"'(){{}}\[\],;=]{{1,2000}}+)(?![(\[])""")
# An unquoted word that is a name or an operator in a program.
_CODE = re.compile(r"[A-Za-z_][\w.]*[:.]?|[-+*/%<>|&!:.]+")

_SHAPES = re.compile(
    r"""(?x)
    -----BEGIN\ [A-Z0-9 ]*(?:PRIVATE\ KEY|CERTIFICATE)[A-Z ]*-----[\s\S]*?(?:-----END\ [A-Z0-9 ]+-----|\Z)
  | (?<![A-Za-z0-9]) (?:
        sk-[A-Za-z0-9_-]{12,} | [spr]k_(?:live|test)_\w{8,}     # OpenAI, Anthropic, Stripe
      | hf_[A-Za-z0-9]{12,} | r8_[A-Za-z0-9]{12,} | nvapi-[\w-]{12,} | gsk_[A-Za-z0-9]{12,}
      | gh[opusr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{12,}
      | xox[a-z]-[\w-]{10,} | xapp-[\w-]{10,}
      | (?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,} | AIza[\w-]{20,} | ya29\.[\w-]{12,}
      | npm_[A-Za-z0-9]{16,} | pypi-[\w-]{16,} | dop_v1_[a-f0-9]{16,} | SG\.[\w-]{12,}\.[\w-]{12,}
      | eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?                   # a JWT
      )
  | (?<=\b[Bb]earer[ ]) [A-Za-z0-9._~+/=-]{6,} | (?<=\b[Bb]asic[ ]) [A-Za-z0-9+/=]{8,}
    """
)
_USERINFO = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{1,20}+://)[^\s/@\"'<>]{1,300}+@")
_LONG = re.compile(r"(?<!\w)[A-Za-z0-9+/_-]{24,}+={0,2}")
_KINDS = re.compile(r"[a-z]+|[A-Z]+|[0-9]+|[^A-Za-z0-9]+")
_HEX = re.compile(r"[0-9a-fA-F]{32,}")
_LETTER = re.compile(r"\w")
_SCHEME = re.compile(r"(?:bearer|basic|token|apikey)\s+(\S+)", re.IGNORECASE)
# Keys of mappings, and environment variables. A word with digits may be a password.
_NAME, _VARIABLE = re.compile(r"[A-Za-z_]+"), re.compile(r"[A-Z]+(?:_[A-Z]+)+")
# A source line in a traceback; exception groups print bars before it.
_SOURCE_LINE = re.compile(r"(?:[ ]{2}[|][ ]+)*[ ]{4}")


def is_secret_name(name: str) -> bool:
    """Return whether values of this name are secrets."""
    parts = [word.lower() for word in _NAME_PARTS.findall(name)]
    if not parts or parts[-1] in _EXCEPTION_TERMS:
        return False
    found = set(parts)
    if found & _SECRET_TERMS:
        return True
    if found & _KEY_TERMS:
        return not found & _HARMLESS_TERMS
    return bool(found & {"keys", "tokens"} and found & _ACCESS_TERMS)


def is_key(word: str) -> bool:
    """Return whether a word has the format of a key: a provider's prefix, or random letters."""
    found = _SHAPES.fullmatch(word) or (_LONG.fullmatch(word) and _looks_random(word))
    return bool(found)


class Redactor:
    """Masks secrets in texts: those that were added, and those that have a typical name or format."""

    def __init__(self, environment: Mapping[str, str], known: Iterable[str] = ()) -> None:
        """Add the values of `environment` with a secret name, and all of `known`."""
        self._secrets: set[str] = set()
        for value in known:
            self._add(value)
        for name, value in environment.items():
            if is_secret_name(name):
                self._add(value)

    def add_values(self, names: Mapping[str, object]) -> None:
        """Add the values that have a secret name, without running their code."""
        # A copy, because another thread may define names during the loop.
        for name, value in list(names.items()):
            if type(name) is str and not name.startswith("__"):
                self._add_value(value, is_secret_name(name), _MAX_DEPTH)

    def _add_value(self, value: Any, secret: bool, depth: int) -> None:
        # `isinstance` would run the `__class__` property of the object.
        kind: type = type(value)
        if kind is str and secret:
            self._add(value)
        elif kind is bytes and secret:
            self._add(value.decode("latin-1"))
        elif depth and kind is dict and len(value) <= _MAX_ITEMS:
            for key, item in list(value.items()):
                is_named = type(key) is str and is_secret_name(key)
                self._add_value(item, secret or is_named, depth - 1)
        elif depth and kind in {list, tuple} and secret:
            for item in value[:_MAX_ITEMS]:
                self._add_value(item, True, depth - 1)

    def add_source(self, source: str) -> None:
        """Add the literals that Python code assigns to, or compares with, a secret name."""
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
        for node in ast.walk(tree):
            for name, value in _assignments(node):
                if is_secret_name(name):
                    looked_up = isinstance(node, ast.Compare)
                    for literal in _literals(value, looked_up):
                        self._add(literal)

    def _add(self, value: str) -> None:
        value = value.strip()
        if len(value) < _MIN_LENGTH:
            return
        if scheme := _SCHEME.fullmatch(value):
            self._add(scheme[1])
        self._secrets |= {value, quote(value, safe=""), repr(value)[1:-1], dumps(value)[1:-1]}
        # Tracebacks display a secret of several lines line by line.
        self._secrets |= {line for line in value.splitlines() if len(line) >= 2 * _MIN_LENGTH}

    def mask(self, text: str, *, is_program: bool = False) -> str:
        """Return `text` with every secret masked.

        With `is_program`, the value in ``password=entered`` is a variable and not the password.
        """
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, MASK)
        text = _SHAPES.sub(MASK, text)
        text = _USERINFO.sub(rf"\g<scheme>{MASK}@", text)
        text = "".join(_without_values(text, is_program))
        return _LONG.sub(lambda word: MASK if _looks_random(word[0]) else word[0], text)


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names and values of assignments, keyword arguments, dictionaries and comparisons."""
    match node:
        case ast.Assign(targets=targets, value=value):
            yield from ((_name(target), value) for target in targets)
        case ast.AnnAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
            if value is not None:
                yield _name(target), value
        case ast.keyword(arg=str(name), value=value):
            yield name, value
        case ast.Dict(keys=keys, values=values):
            yield from ((_name(k), v) for k, v in zip(keys, values, strict=True) if k is not None)
        case ast.Compare(left=left, comparators=others):
            yield from ((_name(left), other) for other in others)
        case ast.Call(args=args):
            # setattr(o, "password", "…"), environ.setdefault("API_KEY", "…")
            pairs = pairwise(args)
            yield from ((_name(a), b) for a, b in pairs if isinstance(a, ast.Constant))
        case ast.arguments(args=names, defaults=defaults):
            # Defaults belong to the last names.
            named = zip(reversed(names), reversed(defaults), strict=False)
            yield from ((argument.arg, value) for argument, value in named)


def _name(node: ast.expr) -> str:
    """Return the last name of an expression: ``self.key``, ``environ["key"]``, ``"key"``."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return name
        case ast.Subscript(slice=key):
            return _name(key)
    return ""


def _literals(node: ast.expr, looked_up: bool = False) -> Iterator[str]:
    """Yield the string literals of an expression that can be secrets.

    The literal of ``password = "auth"`` can be one. With `looked_up`, as in ``password = ask("auth")``
    and ``key == "auth"``, a literal that is itself a secret name is not.
    """
    if isinstance(node, ast.Subscript):
        return
    if isinstance(node, ast.Constant):
        value = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
        if isinstance(value, str) and not _names_a_secret(value, looked_up):
            yield value
    looked_up = looked_up or isinstance(node, ast.Call)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield from _literals(child, looked_up)
        elif isinstance(child, ast.keyword):
            yield from _literals(child.value, looked_up)


def _names_a_secret(literal: str, looked_up: bool) -> bool:
    """Return whether a literal is the name of a secret, in the environment or in a mapping."""
    shape = _NAME if looked_up else _VARIABLE
    return bool(shape.fullmatch(literal)) and is_secret_name(literal)


def _without_values(text: str, is_program: bool) -> Iterator[str]:
    """Yield a text in pieces, with the values of secret names masked."""
    copied = position = 0
    while named := _ASSIGNMENT.search(text, position):
        # A secret name may directly follow a harmless one.
        position = named.end("name")
        if not is_secret_name(named["name"]):
            continue
        value = _VALUE.match(text, named.end())
        if value is not None and _is_secret(named, value, is_program):
            quoted = value["bare"] is None and value[0][-1:] in {'"', "'"}
            quote_mark = value[0][-1] if quoted else ""
            yield f"{text[copied : named.end()]}{quote_mark}{MASK}{quote_mark}"
            copied = position = value.end()
    yield text[copied:]


def _is_secret(named: re.Match[str], value: re.Match[str], is_program: bool) -> bool:
    """Return whether the value of a secret name is a secret, and not itself a name."""
    if MASK in value[0] or not _LETTER.search(value[0]):
        return False
    if value["bare"] is None or named["flag"]:
        return True
    in_program = is_program or _is_source_line(named.string, named.start())
    is_name = in_program and _CODE.fullmatch(value["bare"])
    return not is_name and not _is_count(named["name"], value["bare"])


def _is_source_line(text: str, position: int) -> bool:
    """Return whether the line at `position` is a source line of a traceback, which is indented."""
    return bool(_SOURCE_LINE.match(text, text.rfind("\n", 0, position) + 1))


def _is_count(name: str, bare: str) -> bool:
    parts = {word.lower() for word in _NAME_PARTS.findall(name)}
    return bare.isdecimal() and len(bare) < 8 and not parts & _SECRET_TERMS


def _looks_random(word: str) -> bool:
    """Return whether a long word looks random: hexadecimal, or frequent changes of character class."""
    if _HEX.fullmatch(word):
        return not word.isdecimal()
    digits = sum(letter.isdigit() for letter in word)
    mixed = any(c.islower() for c in word) and any(c.isupper() for c in word)
    return mixed and digits > 0 and len(_KINDS.findall(word)) >= 0.36 * len(word)
