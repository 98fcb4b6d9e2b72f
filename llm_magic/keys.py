"""Keys of servers: taken from the environment or asked for, bound to one origin, shown nowhere."""

from __future__ import annotations

import getpass
import hmac
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from llm_magic.errors import OptionError
from llm_magic.places import parse_url

if TYPE_CHECKING:
    from llm_magic.config import LoadConfig, Settings
    from llm_magic.places import Place

_MASK = "•••"
_OPENAI = "OPENAI_API_KEY"


class Key:
    """A secret for one origin; it prints as a mask, and it cannot be pickled."""

    __slots__ = ("_secret", "origin", "variable")

    def __init__(self, secret: str, origin: str, variable: str) -> None:
        self._secret, self.origin, self.variable = secret, origin, variable

    def bearer(self, origin: str) -> str:
        """Return the value of an ``Authorization`` header, for the origin it was given for only."""
        if origin != self.origin:
            raise OptionError(f"The key for {self.origin} is not sent to {origin}.")
        return f"Bearer {self._secret}"

    def scrub(self, text: str) -> str:
        """Return `text` without the secret: servers repeat it in their messages."""
        return text.replace(self._secret, _MASK)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key) or self.origin != other.origin:
            return False
        return hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash((self.origin, self._secret))

    def __repr__(self) -> str:
        return f"Key({_MASK}, for {self.origin})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A key cannot be pickled.")


class Keys:
    """The keys of a session: whose they are, and those that were typed in."""

    def __init__(self, ask: Callable[[str], str] | None = None) -> None:
        """`ask` reads a line that is not shown; the notebook's own way to, if left away."""
        self._ask = ask or _ask
        self._typed: dict[tuple[str, str], str] = {}
        self._origins: dict[str, str] = {}

    def obtain(self, config: LoadConfig, place: Place, settings: Settings) -> Key | None:
        """Return the key of a load, asking for it where its variable is not set; None for no key."""
        key = self.find(config, place, settings)
        if key is not None or config.key_env is None:
            return key
        secret = _checked(self._ask(_question(config.key_env, place)), config.key_env)
        self._typed[config.key_env, place.origin] = secret
        return self.find(config, place, settings)

    def find(self, config: LoadConfig, place: Place, settings: Settings) -> Key | None:
        """Return the key of a load, from the environment or from what was typed in."""
        own = parse_url("openai", settings.openai_base_url).origin
        name = config.key_env
        if name is None and place.backend == "openai" and place.origin == own:
            name = _OPENAI
        secret = name and (os.environ.get(name) or self._typed.get((name, place.origin)))
        if not name or not secret:
            return None
        # A notebook from somebody else must not send one server's key to another.
        bound = own if name == _OPENAI else self._origins.setdefault(name, place.origin)
        if bound != place.origin:
            where = " (or set OPENAI_BASE_URL)" if name == _OPENAI else ""
            raise OptionError(
                f"{name} is the key for {bound} and is not sent to {place.origin}."
                f" Put that server's key into another variable and name that{where}."
            )
        return Key(_checked(secret, name), place.origin, name)


def _question(name: str, place: Place) -> str:
    return f"Key for {place.origin} ({name} is not set): "


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
