"""API keys: read from the environment or typed in, bound to one origin, never displayed."""

from __future__ import annotations

import getpass
import hmac
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from llm_magic.config.commands import command, either, option
from llm_magic.config.env_file import read_env_file
from llm_magic.config.providers import PROVIDERS, Provider, of_variable
from llm_magic.config.server_address import parse_setting, parse_url
from llm_magic.errors import Interrupted, OptionError

if TYPE_CHECKING:
    from llm_magic.config.server_address import ServerAddress
    from llm_magic.config.settings import ServerLoadConfig, Settings

_MASK = "•••"
# Servers repeat keys in messages, whole or with stars or dots for a part (``sk-12****ab``).
_WORD = re.compile(r"""[^\s"'`(){}\[\]<>,:;=]+""")
_ELLIPSIS = re.compile(r"[*•·…xX]{2,}|\.{2,}|…")
# The length from which a substring of a key is unlikely to be a coincidence.
_MIN_FRAGMENT = 8


class ApiKey:
    """A secret for one origin. Its `repr` is masked, and it cannot be pickled."""

    __slots__ = ("_secret", "is_typed", "origin", "variable")

    def __init__(self, secret: str, origin: str, variable: str, *, is_typed: bool = False) -> None:
        """`variable` names the key; `is_typed` is whether the user typed it in."""
        self._secret, self.origin, self.variable = secret, origin, variable
        self.is_typed = is_typed

    def header(self, origin: str, form: str = "Bearer {key}") -> str:
        """Return the value of a header with the key; raises `OptionError` for other origins."""
        if origin != self.origin:
            raise OptionError(f"The key for {self.origin} is not sent to {origin}.")
        return form.replace("{key}", self._secret)

    def scrub(self, text: str) -> str:
        """Return `text` with the secret, and every recognizable part of it, masked."""
        text = text.replace(self._secret, _MASK)
        return _WORD.sub(lambda word: _MASK if self._is_part(word[0]) else word[0], text)

    def _is_part(self, word: str) -> bool:
        secret, size = self._secret, _MIN_FRAGMENT
        if any(word[at : at + size] in secret for at in range(len(word) - size + 1)):
            return True
        parts = _ELLIPSIS.split(word)
        if len(parts) == 1:
            return False
        first, last = parts[0], parts[-1]
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
        raise TypeError("An API key cannot be pickled.")


class ApiKeys:
    """The API keys of a session, and the origin that each variable is bound to."""

    def __init__(self, prompt: Callable[[str], str | None] | None = None) -> None:
        """`prompt` reads a secret from the user, or returns None if it cannot."""
        self._prompt = prompt or _prompt_user
        self._typed: dict[tuple[str, str], str] = {}
        # By variable, from the first request that a server accepted.
        self._origins: dict[str, str] = {}
        self._variables: dict[str, None] = {}

    def obtain(
        self,
        config: ServerLoadConfig,
        address: ServerAddress,
        settings: Settings,
        *,
        needs_model: bool = False,
    ) -> ApiKey | None:
        """Return the key of a load, or None if it has none; prompts the user if necessary.

        `needs_model`: a load names no model, which a hosted provider has many of.

        Raises:
            OptionError: The key is invalid, belongs to another server, or cannot be prompted for.
            Interrupted: The user stopped the prompt.
        """
        key = self.find(config, address, settings)
        variable = config.key_env or _required_variable(address, settings)
        if key is not None or not variable:
            return key
        provider = PROVIDERS.get(address.backend)
        if needs_model and provider is not None and _required_variable(address, settings):
            named = {"backend": provider.name}
            raise OptionError(f"{provider.title} has many models.").advise(
                f"Name one: {command('load', 'MODEL', **named)}{provider.key_note}."
                f" {command('models', **named)} lists them.",
                "model",
            )
        # The file can come with a notebook of another author, and refer to other variables.
        note = "Keys are not read from .env. " if variable in read_env_file() else ""
        retry = f"No key was entered. Run the cell again, or set {variable}."
        try:
            secret = self._prompt(
                f"{note}Key for {address.origin} ({variable} is not set; Enter without a key cancels): "
            )
        except KeyboardInterrupt:
            # Frontends keep the box, except for JupyterLab with the extension of this package.
            box = " An input box that is still shown is not read." if _is_in_kernel() else ""
            raise Interrupted(retry + box) from None
        if secret is None:
            in_notebook = (
                "Set it in the environment that starts Jupyter, or run %llm_load in a cell of JupyterLab."
                " A key in a cell, even with %env, is saved with the notebook."
            )
            raise OptionError(
                f"{variable} is not set, and you cannot be prompted for it here."
                f" {note}{either(in_notebook, 'Set it in the environment of this program.')}"
            )
        if not secret.strip():
            raise OptionError(retry)
        self._typed[variable, address.origin] = _validated(secret, "What you entered")
        return self.find(config, address, settings)

    def variables(self) -> list[str]:
        """Return the names of the variables that loads have used."""
        return list(self._variables)

    def secrets(self) -> list[str]:
        """Return the typed keys, and the values of the variables that loads have used."""
        values = (os.environ.get(name, "") for name in self.variables())
        return [*tuple(self._typed.values()), *filter(None, values)]

    def find(
        self, config: ServerLoadConfig, address: ServerAddress, settings: Settings
    ) -> ApiKey | None:
        """Return the key of a load from the environment or from what the user typed before."""
        name = config.key_env
        owner = PROVIDERS.get(address.backend) if name is None else of_variable(name)
        # The address in the settings may be invalid, and is needed only for these variables.
        owner_origin = _origin(owner, settings) if owner is not None else None
        if name is None and owner is not None and address.origin == owner_origin:
            name = owner.key_variable
        if not name:
            return None
        self._variables[name] = None
        value = os.environ.get(name)
        secret = value or self._typed.get((name, address.origin))
        if not secret:
            return None
        # A notebook of another author must not send the key of one server to another.
        bound = owner_origin or self._origins.get(name, address.origin)
        if bound != address.origin:
            hint = f", or set {owner.url_variable} in the environment" if owner is not None else ""
            raise OptionError(
                f"{name} is the key for {bound} and is not sent to {address.origin}."
            ).advise(
                "Store the key for that server in another variable and add"
                f" {option('key_env', 'NAME')}{hint}.",
                "key_env",
            )
        valid = _validated(secret, f"The value of {name}")
        return ApiKey(valid, address.origin, name, is_typed=not value)

    def bind(self, key: ApiKey | None) -> None:
        """Bind a key's variable to its server, after the server has accepted the key.

        An earlier binding would let a mistyped address claim the variable.
        """
        if key is not None and of_variable(key.variable) is None:
            self._origins.setdefault(key.variable, key.origin)

    def discard(self, key: ApiKey | None) -> None:
        """Discard a typed key that the server rejected, so that the next load prompts again."""
        if key is not None and key.is_typed:
            self._typed.pop((key.variable, key.origin), None)


def _required_variable(address: ServerAddress, settings: Settings) -> str:
    """Return the variable of the key that a provider requires; "" for any other server."""
    provider = PROVIDERS.get(address.backend)
    if provider is None or not address.origin == _default_origin(provider) == _origin(
        provider, settings
    ):
        return ""
    return provider.key_variable


def _default_origin(provider: Provider) -> str:
    return parse_url(provider.name, provider.url).origin


def _origin(provider: Provider, settings: Settings) -> str:
    """Return the origin that the key of a provider belongs to.

    An address that only ``.env`` sets does not count: the file can come with a notebook of another
    author, whose server must not get the key.
    """
    variable = provider.url_variable
    in_environment = any(n.upper() == variable and value for n, value in os.environ.items())
    is_in_file = not in_environment and any(n.upper() == variable for n in read_env_file())
    if is_in_file:
        return _default_origin(provider)
    return parse_setting(provider.name, settings).origin


def _validated(secret: str, what: str) -> str:
    """Return a key without the spaces around it; raises `OptionError` for what can be no key."""
    secret = secret.strip()
    if secret and secret.isascii() and secret.isprintable() and " " not in secret:
        return secret
    if not secret:
        reason = "is empty"
    elif " " in secret:
        reason = "contains spaces"
    else:
        reason = "contains line breaks or non-ASCII characters"
    raise OptionError(f"{what} is not an API key: it {reason}. Correct it and load again.")


def _prompt_user(question: str) -> str | None:
    """Read a secret from the user, without displaying it; returns None if that is not possible."""
    if threading.current_thread() is not threading.main_thread():
        return None
    # Outside of a kernel, only a terminal can hide the input.
    if not _is_in_kernel() and not (sys.stdin and sys.stdin.isatty()):
        return None
    try:
        return getpass.getpass(question)
    except (NotImplementedError, EOFError, OSError):
        return None


def _is_in_kernel() -> bool:
    """Return whether ipykernel has replaced getpass, which then asks the frontend."""
    return getpass.getpass.__module__ != "getpass"
