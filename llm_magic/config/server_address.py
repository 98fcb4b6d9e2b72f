"""Parses, validates and compares the addresses of servers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from llm_magic.config.commands import option
from llm_magic.errors import OptionError, SettingsError
from llm_magic.text import is_plain_name

if TYPE_CHECKING:
    from llm_magic.config.settings import ServerLoadConfig, Settings

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Docker service names may contain underscores.
_HOST_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_MAX_HOST_LENGTH = 253
_BRACKETED_HOST = re.compile(r"(.*@)?\[[^\[\]]+\](:.*)?")
# Of the APIs of OpenAI and Ollama, below the address of a server.
_ENDPOINT = re.compile(
    r"(/+((chat/)?completions|(?<=/v1/)models|api/(chat|generate|tags))/*)+$", re.IGNORECASE
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The address of a server, without a trailing slash. API keys are bound to its `origin`.

    `options` are the options of a load that lead to this server, for messages.
    """

    backend: str
    url: str
    origin: str
    is_local: bool
    options: Mapping[str, str | None] = field(default_factory=dict, compare=False)

    @property
    def host_port(self) -> str:
        """The host, and the port unless it is the default of the scheme."""
        return self.origin.partition("://")[2]

    @property
    def is_private(self) -> bool:
        """Whether requests are encrypted or stay on this machine."""
        return self.is_local or self.url.startswith("https:")


def resolve_address(config: ServerLoadConfig, settings: Settings) -> ServerAddress:
    """Return the server address of a load; raises `OptionError` if it has none."""
    if config.base_url is not None:
        address = parse_url(config.backend, config.base_url)
        return replace(address, options=load_options(config, address.url))
    if not hasattr(settings, setting_name(config.backend)):
        error = OptionError(f"{config.backend} needs the address of a server.")
        raise error.advise(f"Add {option('base_url', 'URL')}.", "base_url")
    return replace(parse_setting(config.backend, settings), options=load_options(config, None))


def load_options(config: ServerLoadConfig, base_url: str | None) -> dict[str, str | None]:
    """Return the options of a load that lead to a server again, for messages."""
    return {"backend": config.backend, "base_url": base_url, "key_env": config.key_env}


def setting_name(backend: str) -> str:
    """Return the name of the setting that holds a backend's address."""
    return f"{backend.replace('-', '_')}_base_url"


def parse_setting(backend: str, settings: Settings) -> ServerAddress:
    """Return a backend's address from the settings.

    Raises:
        SettingsError: The address is invalid. The message contains the name of the variable.
    """
    name = setting_name(backend)
    try:
        return parse_url(backend, getattr(settings, name))
    except OptionError as error:
        variable = type(settings).model_fields[name].validation_alias
        where = f"The address is the value of {variable}."
        raise SettingsError.like(error).append(where) from None


def parse_url(backend: str, text: str) -> ServerAddress:
    """Return the address in `text`; raises `OptionError` if it is invalid.

    ``http://`` may be omitted for this machine only, because other hosts need encryption. The path of
    an endpoint, such as ``/chat/completions``, is removed: documentation of APIs shows the whole URL.
    """
    text = text.strip()
    if not _SCHEME.match(text) and _is_local(_host(_split(f"//{text}"))):
        text = f"http://{text}"
    parts = _split(text)
    host = _host(parts)
    if parts.scheme not in _DEFAULT_PORTS or not host or not is_plain_name(text):
        raise OptionError(
            f"{_displayed(parts, text)} is not a server address."
            " Use the form http://localhost:8000 or https://host/v1."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise OptionError(
            f"The address {_displayed(parts, text)} must not contain a user name, a password or a"
            " query."
        ).advise(
            f"Store the key in an environment variable and add {option('key_env', 'NAME')}.",
            "key_env",
        )
    netloc = f"[{host}]" if ":" in host else host
    port = _port(parts)
    if port != _DEFAULT_PORTS[parts.scheme]:
        netloc += f":{port}"
    origin = f"{parts.scheme}://{netloc}"
    path = _ENDPOINT.sub("", parts.path).rstrip("/")
    return ServerAddress(backend, origin + path, origin, _is_local(host))


def proxy_url(address: ServerAddress) -> str | None:
    """Return the URL of the proxy that the environment or the system names for a server.

    A server on this machine has none.
    """
    # Imported here because it takes long, and `%load_ext` imports this module.
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    url = proxies.get(address.url.partition(":")[0]) or proxies.get("all")
    if address.is_local or not url or proxy_bypass(urlsplit(address.url).hostname or ""):
        return None
    return url if "://" in url else f"http://{url}"


def proxy_for(address: ServerAddress) -> str | None:
    """Return the host and port of the proxy for a server, without its user name and password."""
    found = proxy_url(address)
    if found is None:
        return None
    return found.rpartition("@")[2].rpartition("://")[2].partition("/")[0]


def _split(text: str) -> SplitResult:
    """Return the parts of a URL, all empty if it cannot be parsed."""
    try:
        return urlsplit(text)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _host(parts: SplitResult) -> str:
    """Return the host in ASCII (IDNA), or "" if it is missing or invalid."""
    try:
        host = (parts.hostname or "").rstrip(".")
        if "[" in parts.netloc:
            if not _BRACKETED_HOST.fullmatch(parts.netloc):
                return ""
            # RFC 6874: the percent sign before an IPv6 zone is written as %25 in a URL.
            return str(ipaddress.IPv6Address(host.replace("%25", "%", 1)))
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        return ""
    is_valid = len(host) <= _MAX_HOST_LENGTH and all(map(_HOST_LABEL.fullmatch, host.split(".")))
    return host if is_valid else ""


def _port(parts: SplitResult) -> int:
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise OptionError(f"The port of {_host(parts)} is invalid. Use a port from 1 to 65535.")
    return port or _DEFAULT_PORTS[parts.scheme]


def _is_local(host: str) -> bool:
    """Return whether a host is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _displayed(parts: SplitResult, text: str) -> str:
    """Return an address for a message, without the parts that can contain a secret."""
    if "@" in text or "?" in text or "#" in text:
        scheme = f"{parts.scheme}://" if parts.scheme in _DEFAULT_PORTS else ""
        return f"{scheme}…{_host(parts)}"
    return repr(text)
