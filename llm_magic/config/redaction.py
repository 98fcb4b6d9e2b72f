"""Secrets in a text, masked: by the name they have, by the value they have elsewhere, by their look.

It errs on the side of masking: a word too few costs an explanation some of its worth, a key that
was sent has to be revoked. What is no secret by any of these three tests is not recognised.
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
# Shorter values are words that stand in a text for other reasons.
_SHORTEST = 6
_MOST_ITEMS, _DEPTH = 1000, 3

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET = frozenset({
    "password", "passwords", "passwd", "pwd", "pass", "passphrase", "passcode", "pin", "secret", "secrets",
    "credential", "credentials", "creds", "auth", "authorization", "authentication", "oauth", "bearer",
    "cookie", "cookies", "apikey", "apikeys", "apitoken", "jwt", "otp", "signature", "sessionid", "csrf",
    "xsrf", "dsn",
})  # fmt: skip
# Of these the plural counts things, unless a word before it says what they open.
_OPENERS = {"key", "token"}
_OPENED = frozenset({
    "api", "access", "secret", "private", "auth", "ssh", "signing", "session", "refresh", "service",
})  # fmt: skip
# The tokens of a tokenizer and the keys of a table are no secrets.
_HARMLESS = frozenset({
    "pad", "eos", "bos", "unk", "sep", "cls", "mask", "special", "max", "min", "num", "count", "new", "n",
    "id", "ids", "index", "type", "primary", "foreign", "sort", "column", "public",
})  # fmt: skip
# KeyError, AuthenticationError
_NO_VALUES = frozenset({"error", "exception", "warning"})

_LITERAL = (
    r"""[rbfuRBFU]{0,2}+(?:"{3}(?:\\[\s\S]|(?!"{3})[\s\S])*+"{3}|'{3}(?:\\[\s\S]|(?!'{3})[\s\S])*+'{3}"""
    r"""|"(?:\\.|[^"\\\n])*+"?|'(?:\\.|[^'\\\n])*+'?)"""
)
# What stands between a name and its value: name = "…", name: str = "…", "name": "…", ["name"] = "…",
# ("NAME", "…"), NAME=… and --name … of a shell
_NAMED = re.compile(
    r"""(?x) (?<!\w) (?: (?P<flag> (?<!\S) --?+ )?+ (?P<name> [A-Za-z_][\w-]{0,80}+ ) )
    (?: ["']?+ \]?+ \s*+
        (?: : \s*+ [\w.\[\], |]{1,60}? = (?!=) | := | == | != | [:=] | (?<=["']) , (?=\s*+["']) )
        \s*+ \(?+ \s*+
      | (?(flag) [ \t]++ (?!-) | (?!) ) )"""
)
_VALUE = re.compile(rf"""{_LITERAL}|(?P<bare>[^\s"'(){{}}\[\],;=]{{1,2000}}+)(?![(\[])""")
# An unquoted word that is a name, a number of a program or a part of an expression.
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
# Names as they are looked up, and those of the environment; one with digits may well be a password.
_NAME, _VARIABLE = re.compile(r"[A-Za-z_]+"), re.compile(r"[A-Z]+(?:_[A-Z]+)+")
# A line of a traceback that quotes a source; groups of errors draw bars before it.
_QUOTED = re.compile(r"(?:[ ]{2}[|][ ]+)*[ ]{4}")


def is_secret_name(name: str) -> bool:
    """Return whether what has this name is to be shown nowhere."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or words[-1] in _NO_VALUES:
        return False
    found = set(words)
    if found & _SECRET:
        return True
    if found & _OPENERS:
        return not found & _HARMLESS
    return bool(found & {"keys", "tokens"} and found & _OPENED)


def is_key(word: str) -> bool:
    """Return whether a word has the look of a secret: a provider's prefix, or random letters."""
    found = _SHAPES.fullmatch(word) or (_LONG.fullmatch(word) and _looks_random(word))
    return bool(found)


class Redactor:
    """Masks secrets in texts; what it learned of one text it masks in all."""

    def __init__(self, environment: Mapping[str, str], known: Iterable[str] = ()) -> None:
        """`environment` is searched for values with telling names; `known` are secrets anyway."""
        self._secrets: set[str] = set()
        for value in known:
            self._add(value)
        for name, value in environment.items():
            if is_secret_name(name):
                self._add(value)

    def learn(self, names: Mapping[str, object]) -> None:
        """Remember the values that have a telling name; runs none of their code."""
        # A copy: another thread may define names meanwhile.
        for name, value in list(names.items()):
            if type(name) is str and not name.startswith("__"):
                self._learn(value, is_secret_name(name), _DEPTH)

    def _learn(self, value: Any, secret: bool, depth: int) -> None:
        # By the type alone: `isinstance` would ask the object for its class.
        kind: type = type(value)
        if kind is str and secret:
            self._add(value)
        elif kind is bytes and secret:
            self._add(value.decode("latin-1"))
        elif depth and kind is dict and len(value) <= _MOST_ITEMS:
            for key, item in list(value.items()):
                named = type(key) is str and is_secret_name(key)
                self._learn(item, secret or named, depth - 1)
        elif depth and kind in {list, tuple} and secret:
            for item in value[:_MOST_ITEMS]:
                self._learn(item, True, depth - 1)

    def read(self, source: str) -> None:
        """Remember the literals that a source gives to a telling name."""
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
        for node in ast.walk(tree):
            for name, value in _given(node):
                if is_secret_name(name):
                    looked_up = isinstance(node, ast.Compare)
                    for literal in _literals(value, looked_up):
                        self._add(literal)

    def _add(self, value: str) -> None:
        value = value.strip()
        if len(value) < _SHORTEST:
            return
        if scheme := _SCHEME.fullmatch(value):
            self._add(scheme[1])
        self._secrets |= {value, quote(value, safe=""), repr(value)[1:-1], dumps(value)[1:-1]}
        # A secret of several lines is shown line by line.
        self._secrets |= {line for line in value.splitlines() if len(line) >= 2 * _SHORTEST}

    def text(self, text: str, *, is_program: bool = False) -> str:
        """Return `text` with every secret masked.

        Where a program says ``password=entered``, that names a variable; elsewhere it is the password.
        """
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, MASK)
        text = _SHAPES.sub(MASK, text)
        text = _USERINFO.sub(rf"\g<scheme>{MASK}@", text)
        text = "".join(_without_values(text, is_program))
        return _LONG.sub(lambda word: MASK if _looks_random(word[0]) else word[0], text)


def _given(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names that a piece of a program gives values to, or compares with them."""
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
            yield from zip((a.arg for a in names[-len(defaults) or len(names) :]), defaults)  # noqa: B905


def _name(node: ast.expr) -> str:
    """Return the last name of an expression: ``self.key``, ``environ["key"]``, ``"key"``."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return name
        case ast.Subscript(slice=key):
            return _name(key)
    return ""


def _literals(node: ast.expr, looked_up: bool = False) -> Iterator[str]:
    """Yield the texts in an expression that are values.

    ``password = "auth"`` gives one; what is `looked_up`, as in ``password = ask("auth")`` or
    ``key == "auth"``, may be the name of a secret, which is none itself.
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
    """Return whether a literal is the name of a variable, of the environment or of a mapping."""
    shape = _NAME if looked_up else _VARIABLE
    return bool(shape.fullmatch(literal)) and is_secret_name(literal)


def _without_values(text: str, is_program: bool) -> Iterator[str]:
    """Yield a text in pieces, with masks for what telling names are given in it."""
    told = position = 0
    while named := _NAMED.search(text, position):
        # A name that tells nothing may stand right before one that does.
        position = named.end("name")
        if not is_secret_name(named["name"]):
            continue
        value = _VALUE.match(text, named.end())
        if value is not None and _is_secret(named, value, is_program):
            quoted = value["bare"] is None and value[0][-1:] in {'"', "'"}
            mark = value[0][-1] if quoted else ""
            yield f"{text[told : named.end()]}{mark}{MASK}{mark}"
            told = position = value.end()
    yield text[told:]


def _is_secret(named: re.Match[str], value: re.Match[str], is_program: bool) -> bool:
    """Return whether what a telling name is given is a value, and not a name itself."""
    if MASK in value[0] or not _LETTER.search(value[0]):
        return False
    if value["bare"] is None or named["flag"]:
        return True
    in_program = is_program or _is_quoted(named.string, named.start())
    is_name = in_program and _CODE.fullmatch(value["bare"])
    return not is_name and not _is_count(named["name"], value["bare"])


def _is_quoted(text: str, position: int) -> bool:
    """Return whether a line of a traceback quotes a program: it is indented."""
    return bool(_QUOTED.match(text, text.rfind("\n", 0, position) + 1))


def _is_count(name: str, bare: str) -> bool:
    words = {word.lower() for word in _WORDS.findall(name)}
    return bare.isdecimal() and len(bare) < 8 and not words & _SECRET


def _looks_random(word: str) -> bool:
    """Return whether a long word is random rather than written: kinds of letters change all the time."""
    if _HEX.fullmatch(word):
        return not word.isdecimal()
    digits = sum(letter.isdigit() for letter in word)
    mixed = any(c.islower() for c in word) and any(c.isupper() for c in word)
    return mixed and digits > 0 and len(_KINDS.findall(word)) >= 0.36 * len(word)
