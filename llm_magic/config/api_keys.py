"""API keys of servers: taken from the environment or asked for, bound to one origin, shown nowhere."""

from __future__ import annotations

import getpass
import hmac
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from llm_magic.config.env_file import read_env_file
from llm_magic.config.server_address import parse_setting, parse_url
from llm_magic.errors import OptionError

if TYPE_CHECKING:
    from llm_magic.config.server_address import ServerAddress
    from llm_magic.config.settings import ServerLoadConfig, Settings

_MASK = "•••"
_OPENAI = "OPENAI_API_KEY"
# What a server may repeat of a key, and what it may put in the place of the rest.
_WORD, _HIDDEN = re.compile(r"""[^\s"'`(){}\[\]<>,:;=]+"""), re.compile(r"[*•·…xX]{2,}|\.{2,}|…")
# So many letters in a row are no accident.
_PIECE = 8


class ApiKey:
    """A secret for one origin; it prints as a mask, and it cannot be pickled."""

    __slots__ = ("_secret", "is_typed", "origin", "variable")

    def __init__(self, secret: str, origin: str, variable: str, *, is_typed: bool = False) -> None:
        """`variable` is what it is called, `is_typed` says that it was typed in under that name."""
        self._secret, self.origin, self.variable = secret, origin, variable
        self.is_typed = is_typed

    def bearer(self, origin: str) -> str:
        """Return the value of an ``Authorization`` header, for the origin it was given for only."""
        if origin != self.origin:
            raise OptionError(f"The key for {self.origin} is not sent to {origin}.")
        return f"Bearer {self._secret}"

    def scrub(self, text: str) -> str:
        """Return `text` without the secret, and without parts of it: servers repeat it in messages.

        A part is a longer piece, or a word with stars or dots for the rest (``sk-12****ab``).
        """
        text = text.replace(self._secret, _MASK)
        return _WORD.sub(lambda word: _MASK if self._is_part(word[0]) else word[0], text)

    def _is_part(self, word: str) -> bool:
        secret, size = self._secret, _PIECE
        if any(word[at : at + size] in secret for at in range(len(word) - size + 1)):
            return True
        shown = _HIDDEN.split(word)
        if len(shown) == 1:
            return False
        first, last = shown[0], shown[-1]
        return bool(first and secret.startswith(first)) or bool(last and secret.endswith(last))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ApiKey) or self.origin != other.origin:
            return False
        return hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash((self.origin, self._secret))

    def __repr__(self) -> str:
        return f"ApiKey({_MASK}, for {self.origin})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A key cannot be pickled.")


class ApiKeys:
    """The keys of a session: whose they are, and those that were typed in."""

    def __init__(self, ask: Callable[[str], str] | None = None) -> None:
        """`ask` reads a line that is not shown; the notebook's own way to, if left away."""
        self._ask = ask or _ask
        self._typed: dict[tuple[str, str], str] = {}
        # Whose a variable is, once a server has accepted what is in it; and all that were named.
        self._origins: dict[str, str] = {}
        self._named: dict[str, None] = {}

    def obtain(
        self, config: ServerLoadConfig, address: ServerAddress, settings: Settings
    ) -> ApiKey | None:
        """Return the key of a load, asking for it where its variable is not set; None for no key."""
        key = self.find(config, address, settings)
        if key is not None or config.key_env is None:
            return key
        secret = _checked(self._ask(_question(config.key_env, address)), config.key_env)
        self._typed[config.key_env, address.origin] = secret
        return self.find(config, address, settings)

    def variables(self) -> list[str]:
        """Return the names of the variables that loads have named."""
        return list(self._named)

    def secrets(self) -> list[str]:
        """Return the keys that were typed in, and those in variables that loads have named."""
        named = (os.environ.get(name, "") for name in self.variables())
        return [*tuple(self._typed.values()), *filter(None, named)]

    def find(
        self, config: ServerLoadConfig, address: ServerAddress, settings: Settings
    ) -> ApiKey | None:
        """Return the key of a load, from the environment or from what was typed in."""
        name = config.key_env
        # Only where it is about that server: its address may be one that is no address.
        is_usual = name == _OPENAI or (name is None and address.backend == "openai")
        own = _own(settings) if is_usual else None
        if name is None and address.origin == own:
            name = _OPENAI
        if name is None:
            return None
        self._named[name] = None
        set_to = os.environ.get(name)
        secret = set_to or self._typed.get((name, address.origin))
        if not secret:
            return None
        # A notebook from somebody else must not send one server's key to another.
        bound = own if name == _OPENAI else self._origins.get(name, address.origin)
        if bound != address.origin:
            where = " (or set OPENAI_BASE_URL in the environment)" if name == _OPENAI else ""
            raise OptionError(
                f"{name} is the key for {bound} and is not sent to {address.origin}."
                f" Put that server's key into another variable and name that{where}."
            )
        return ApiKey(_checked(secret, name), address.origin, name, is_typed=not set_to)

    def accepted(self, key: ApiKey | None) -> None:
        """A server has accepted a key: its variable is for that server alone from now on.

        Not before, or a mistyped address would keep it from the right one.
        """
        if key is not None and key.variable != _OPENAI:
            self._origins.setdefault(key.variable, key.origin)

    def refused(self, key: ApiKey | None) -> None:
        """A server has refused a key: one that was typed in is asked for again."""
        if key is not None and key.is_typed:
            self._typed.pop((key.variable, key.origin), None)


def _own(settings: Settings) -> str:
    """Return the server whose key `OPENAI_API_KEY` is.

    Not one that only a file of the folder names: a folder of somebody else's must not get it.
    """
    if _is_from_file("OPENAI_BASE_URL"):
        url = type(settings).model_fields["openai_base_url"].default
        return parse_url("openai", url).origin
    return parse_setting("openai", settings).origin


def _is_from_file(variable: str) -> bool:
    """Return whether a variable is set by ``.env`` alone: who wrote that may be somebody else."""
    if any(name.upper() == variable and value for name, value in os.environ.items()):
        return False
    return any(name.upper() == variable for name in read_env_file())


def _question(name: str, address: ServerAddress) -> str:
    return f"Key for {address.origin} ({name} is not set): "


def _checked(secret: str, name: str) -> str:
    secret = secret.strip()
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise OptionError(
            f"What {name} holds is no key: empty, or with blanks or line breaks in it."
        )
    return secret


def _ask(question: str) -> str:
    """Ask as the frontend does it; raises `OptionError` where nobody can be asked."""
    name = question.partition("(")[2].partition(" ")[0]
    nobody = OptionError(f"{name} is not set, and nobody can be asked for it here. Set it first.")
    if threading.current_thread() is not threading.main_thread():
        raise nobody
    # A kernel puts its own getpass there; elsewhere only a terminal can hide what is typed.
    in_kernel = getpass.getpass.__module__ != "getpass"
    if not in_kernel and not (sys.stdin and sys.stdin.isatty()):
        raise nobody
    try:
        return getpass.getpass(question)
    except (NotImplementedError, EOFError, OSError):
        raise nobody from None
