"""Where a server is: addresses as people write them, and as they are used."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from llm_magic.errors import OptionError, SettingsError
from llm_magic.text.surrogates import is_plain_name

if TYPE_CHECKING:
    from llm_magic.config.settings import ServerLoadConfig, Settings

_PORTS = {"http": 80, "https": 443}
# Names of Docker services may hold underscores.
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_MOST_HOST = 253
_BRACKETS = re.compile(r"(.*@)?\[[^\[\]]+\](:.*)?")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A server's address without a slash at its end; its `origin` is what a key is bound to."""

    backend: str
    url: str
    origin: str
    is_local: bool

    @property
    def host_port(self) -> str:
        """The host, and the port unless it is the default of the scheme."""
        return self.origin.partition("://")[2]

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent there."""
        return self.is_local or self.url.startswith("https:")


def resolve_address(config: ServerLoadConfig, settings: Settings) -> ServerAddress:
    """Return the server of a load; raises `OptionError` if neither load nor settings name one."""
    if config.base_url is not None:
        return parse_url(config.backend, config.base_url)
    if not hasattr(settings, f"{config.backend}_base_url"):
        raise OptionError(f"{config.backend} needs the address of a server: add --base-url URL.")
    return parse_setting(config.backend, settings)


def parse_setting(backend: str, settings: Settings) -> ServerAddress:
    """Return the server that the settings name; raises `SettingsError` that names the variable."""
    name = f"{backend}_base_url"
    try:
        return parse_url(backend, getattr(settings, name))
    except OptionError as error:
        variable = type(settings).model_fields[name].validation_alias
        raise SettingsError(f"{error} It is the value of {variable}.") from None


def parse_url(backend: str, text: str) -> ServerAddress:
    """Read an address; raises `OptionError` that says what it should look like."""
    text = text.strip()
    if not _SCHEME.match(text) and _is_local(_host(_split(f"//{text}"))):
        # `localhost:11434` is what people type; only this machine is spoken to in clear text unasked.
        text = f"http://{text}"
    parts = _split(text)
    if parts.scheme not in _PORTS or not _host(parts) or not is_plain_name(text):
        raise OptionError(
            f"{_shown(parts, text)} is no address of a server."
            " Write it like http://localhost:8000 or https://host/v1."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise OptionError(
            f"The address {_shown(parts, text)} must have no name, password or query in it."
            " Put the key into an environment variable and name that: --key-env NAME."
        )
    host, port = _host(parts), _port(parts)
    netloc = f"[{host}]" if ":" in host else host
    if port != _PORTS[parts.scheme]:
        netloc += f":{port}"
    origin = f"{parts.scheme}://{netloc}"
    return ServerAddress(backend, origin + parts.path.rstrip("/"), origin, _is_local(host))


def proxy_for(address: ServerAddress) -> str | None:
    """Return the proxy on the way, without the name and password that its address may hold.

    A proxy has no business between this machine and itself.
    """
    # Not at the top: it brings a web client and its certificates, and this is read by `%load_ext`.
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    found = proxies.get(address.url.partition(":")[0]) or proxies.get("all")
    if address.is_local or not found or proxy_bypass(urlsplit(address.url).hostname or ""):
        return None
    return found.rpartition("@")[2].rpartition("/")[2] or found.rpartition("@")[2].strip("/")


def _split(text: str) -> SplitResult:
    """Take an address apart; what cannot be taken apart has no parts."""
    try:
        return urlsplit(text)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _host(parts: SplitResult) -> str:
    """Return the host as it travels, international names in their ASCII form; "" where it is none."""
    try:
        host = (parts.hostname or "").rstrip(".")
        if "[" in parts.netloc:
            if not _BRACKETS.fullmatch(parts.netloc):
                return ""
            # In an address, the percent sign before the zone is written %25 (RFC 6874).
            return str(ipaddress.IPv6Address(host.replace("%25", "%", 1)))
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        return ""
    is_host = len(host) <= _MOST_HOST and all(map(_LABEL.fullmatch, host.split(".")))
    return host if is_host else ""


def _port(parts: SplitResult) -> int:
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise OptionError(f"{_host(parts)} has no such port. Use a port from 1 to 65535.")
    return port or _PORTS[parts.scheme]


def _is_local(host: str) -> bool:
    """Return whether a host is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _shown(parts: SplitResult, text: str) -> str:
    # Whatever stands before an @, or behind a question mark, may be a secret.
    if "@" in text or "?" in text or "#" in text:
        scheme = f"{parts.scheme}://" if parts.scheme in _PORTS else ""
        return f"{scheme}…{_host(parts)}"
    return repr(text)
