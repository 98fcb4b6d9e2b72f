"""The servers of the settings and the hub: is there one, does it answer, and if not, what is in the way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llm_magic.backends import registry
from llm_magic.backends.remote.base import RemoteBackend
from llm_magic.backends.remote.http_client import HttpServer
from llm_magic.backends.remote.limits import Limits
from llm_magic.backends.remote.server_errors import one_line
from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.certificates import certificate_problem
from llm_magic.config.server_address import (
    ServerAddress,
    parse_setting,
    parse_url,
    proxy_for,
    resolve_address,
)
from llm_magic.config.settings import LoadConfig, ServerLoadConfig, Settings
from llm_magic.doctor.finding import Finding, apart
from llm_magic.errors import (
    AuthenticationFailed,
    OptionError,
    RequestFailed,
    ServerError,
    SettingsError,
)
from llm_magic.types import ModelInfo

# The whole of the hub, and each step with a server: who waits longer has no server to work with.
_HUB_S, _CONNECT_S, _LIST_S, _VERSION_S = 3.0, 2.0, 5.0, 2.0
_VERSIONS = {"ollama": "/api/version", "vllm": "/version"}
_LOOPBACKS = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class _Server:
    """A server of the settings, or of a loaded model; `asked_for` where somebody configured it."""

    variable: str
    address: ServerAddress
    asked_for: bool
    config: ServerLoadConfig

    @property
    def backend(self) -> str:
        """The kind of server."""
        return self.config.backend

    def at(self, url: str) -> str:
        """Return what to type to have another address."""
        if self.config.base_url is not None:
            return f"%llm_load -b {self.backend} --base-url {url}"
        return f"{self.variable}={url} in .env or the environment, then %llm_config --reset"


async def servers(
    settings: Settings,
    keys: ApiKeys,
    used: Callable[[str], LoadConfig | None] = lambda _backend: None,
) -> list[Finding]:
    """Return how each server is that is configured, in use, or listens where one usually does.

    `used` returns what the latest model of a backend was loaded with, above all its key.
    """
    checks: list[Coroutine[Any, Any, Finding | None]] = []
    seen: set[str] = set()
    for name in registry.names():
        if f"{name}_base_url" not in Settings.model_fields:
            continue
        try:
            there = list(_servers_of(name, settings, used(name)))
        except OptionError as error:
            fix = f"set {_variable(name)} right"
            checks.append(_told(Finding(name, "problem", str(error), fix)))
            continue
        for server in there:
            # vLLM's and InstructLab's usual place is the same one.
            if server.asked_for or (server.address.is_local and server.address.url not in seen):
                checks.append(_check(server, settings, keys))
                seen.add(server.address.url)
    return [finding for finding in await asyncio.gather(*checks) if finding is not None]


def _servers_of(name: str, settings: Settings, used: LoadConfig | None) -> Iterator[_Server]:
    field, variable = f"{name}_base_url", _variable(name)
    address = parse_setting(name, settings)
    in_use = None
    if isinstance(used, ServerLoadConfig):
        in_use = resolve_address(used, settings)
        yield _Server(variable, in_use, True, used)
    if address != in_use:
        asked_for = (
            getattr(settings, field) != Settings.model_fields[field].default
            or settings.backend == name
            or (name == "openai" and bool(os.environ.get("OPENAI_API_KEY")))
        )
        yield _Server(variable, address, asked_for, ServerLoadConfig(backend=name))


def _variable(name: str) -> str:
    return str(Settings.model_fields[f"{name}_base_url"].validation_alias)


async def _told(finding: Finding) -> Finding | None:
    return finding


async def _check(server: _Server, settings: Settings, keys: ApiKeys) -> Finding | None:
    backend = registry.create(server.backend, lambda: settings, keys)
    assert isinstance(backend, RemoteBackend)
    proxy = proxy_for(server.address)
    if proxy is None:
        unreached = await _unreached(server, backend.start)
        if unreached is not None:
            return unreached if server.asked_for else None
    try:
        async with asyncio.timeout(_LIST_S):
            models = await backend.models(server.config)
    except (ServerError, OptionError, TimeoutError) as error:
        # What listens where nobody was sent to may be anything.
        return await _failed(server, error, proxy) if server.asked_for else None
    finally:
        await backend.aclose()
    return _lists(server, models, await _version(server.address), proxy)


# -- is there one ---------------------------------------------------------------------------------


async def _unreached(server: _Server, start: str) -> Finding | None:
    """Return why no connection comes about; None where one does."""
    parts = urlsplit(server.address.url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        addresses = await addresses_of(host)
    except (OSError, TimeoutError):
        text = f"there is no host {host}"
        return Finding(server.backend, "problem", text, f"set {server.variable} right")
    if await _any_listens(addresses, port):
        return None
    others = [a for a in _LOOPBACKS if a not in addresses] if server.address.is_local else []
    for other in others:
        if await _any_listens([other], port):
            literal = f"[{other}]" if ":" in other else other
            resolved = "" if addresses == [host] else f" ({', '.join(addresses)})"
            text = (
                f"nothing listens at {server.address.host_port}{resolved}, but at {literal} it does"
            )
            url = f"{parts.scheme}://{literal}:{port}{parts.path}"
            return Finding(server.backend, "problem", text, server.at(url))
    text = f"nothing listens at {server.address.host_port}"
    return Finding(server.backend, "problem", text, start or f"start it, or set {server.variable}")


async def addresses_of(host: str) -> list[str]:
    """Return the addresses of a host; raises `OSError` or `TimeoutError`."""
    found = await apart(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), _CONNECT_S)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def _any_listens(addresses: Sequence[str], port: int) -> bool:
    return any(await asyncio.gather(*(_listens(address, port) for address in addresses)))


async def _listens(address: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


# -- does it answer -------------------------------------------------------------------------------


def _lists(server: _Server, models: list[ModelInfo], version: str, proxy: str | None) -> Finding:
    names = one_line(", ".join(model.name for model in models[:4]))
    more = ", …" if len(models) > 4 else ""
    through = f", through the proxy {proxy}" if proxy else ""
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    text = f"{version}{server.address.host_port}{through}: {count}{f' ({names}{more})' if names else ''}"
    if models:
        return Finding(server.backend, "ok", text)
    pull = "%llm_load llama3.2 -b ollama --pull"
    fix = pull if server.backend == "ollama" else "load a model there"
    return Finding(server.backend, "warn", text, fix)


async def _version(address: ServerAddress) -> str:
    """Return the version of a server, where its kind tells; nobody's key is sent for it."""
    path = _VERSIONS.get(address.backend)
    if path is None:
        return ""
    told = await _get(dataclasses.replace(address, url=address.origin), path, _VERSION_S)
    version = told.get("version") if isinstance(told, dict) else None
    return f"{version} at " if isinstance(version, str) and len(version) < 40 else ""


async def _get(address: ServerAddress, path: str, seconds: float) -> object:
    """Return what a GET without a key answers, None where that is nothing of use."""
    server = HttpServer(address, None, Limits(seconds), "")
    try:
        async with asyncio.timeout(seconds):
            return await server.get(path)
    except (ServerError, TimeoutError):
        return None
    finally:
        await server.aclose()


async def _failed(server: _Server, error: Exception, proxy: str | None) -> Finding:
    """Return what is wrong with a server that listens, and what mends it."""
    address, name = server.address, server.backend
    if isinstance(error, TimeoutError):
        text = f"{address.host_port} listens, and says nothing within {_LIST_S:.0f} s"
        fix = "look at its log: it may be loading a model"
    else:
        text, fix = str(error), "look at its log"
    if isinstance(error, SettingsError):
        # Of the environment, not of the server.
        return Finding(name, "problem", text, "correct that variable")
    if isinstance(error, AuthenticationFailed) and (proxy is None or error.status == 401):
        # Without the server's own words: some repeat a part of the key.
        text = text.partition(f" ({error.status})")[0]
        fix = (
            "export OPENAI_API_KEY=…" if name == "openai" else f"%llm_load -b {name} --key-env NAME"
        )
    elif proxy is not None:
        host = urlsplit(address.url).hostname
        text, fix = f"{text} A proxy is in the way: {proxy}.", f"export NO_PROXY={host}"
    elif isinstance(error, RequestFailed) and error.status in {200, 404, 405}:
        fix = f"set {server.variable} right"
        if name != "ollama" and await _speaks_at(
            dataclasses.replace(address, url=f"{address.origin}/v1")
        ):
            text, fix = (
                f"there is no API at {address.url}, but at /v1",
                server.at(f"{address.origin}/v1"),
            )
        elif name != "ollama" and await _is_ollama(address):
            text, fix = (
                f"{address.host_port} is an Ollama",
                f"OLLAMA_BASE_URL={address.origin}, then %llm_config --reset",
            )
    return Finding(name, "problem", text, fix)


async def _speaks_at(address: ServerAddress) -> bool:
    told = await _get(address, "/models", _VERSION_S)
    return isinstance(told, dict) and isinstance(told.get("data"), list)


async def _is_ollama(address: ServerAddress) -> bool:
    root = dataclasses.replace(address, backend="ollama", url=address.origin)
    return bool(await _version(root))


# -- the hub --------------------------------------------------------------------------------------


async def hub() -> list[Finding]:
    """Return whether models can be fetched; no token is sent."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        text = "HF_HUB_OFFLINE is set: only what is in the cache is loaded"
        return [Finding("hub", "ok", text)]
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        address = parse_url("hub", url)
    except OptionError as error:
        return [Finding("hub", "problem", str(error), "set HF_ENDPOINT right")]
    why = await _why_unreached(address)
    if not why:
        return [Finding("hub", "ok", f"{address.host_port} answers")]
    text = f"{why}; what is in the cache can be loaded all the same"
    fix = "look at the network, or set HTTPS_PROXY (or HF_HUB_OFFLINE=1, to wait for nothing)"
    return [Finding("hub", "warn", text, fix)]


async def _why_unreached(address: ServerAddress) -> str:
    """Return why the hub does not answer, nothing if it does, after three seconds at most."""
    server = HttpServer(address, None, Limits(_HUB_S), "")
    try:
        async with asyncio.timeout(_HUB_S):
            if proxy_for(address) is None:
                # Not by the client: its look-up of a name cannot be given up.
                await addresses_of(urlsplit(address.url).hostname or "")
            async with server.stream("HEAD", "", None):
                return ""
    except (RequestFailed, AuthenticationFailed):
        return ""  # whatever it says, it is there
    except TimeoutError:
        return f"{address.host_port} does not answer within {_HUB_S:.0f} s"
    except socket.gaierror:
        return f"there is no host {address.host_port} (no network?)"
    except (ServerError, SettingsError) as error:
        return str(error).rstrip(" .")
    finally:
        await server.aclose()


def certificates() -> list[Finding]:
    """Return what is wrong with the certificates that the environment names, if anything."""
    problem = certificate_problem()
    fix = "correct or unset that variable"
    return [Finding("certificates", "problem", problem, fix)] if problem else []


def secrets(keys: ApiKeys) -> list[Finding]:
    """Return which keys there are, never what they are."""
    names = dict.fromkeys(("OPENAI_API_KEY", "HF_TOKEN", *keys.variables()))
    shown = [f"{name} {'set' if os.environ.get(name) else 'not set'}" for name in names]
    return [Finding("keys", "ok", ", ".join(shown))]
