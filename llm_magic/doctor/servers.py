"""Checks the configured servers, the Hugging Face Hub, certificates and API keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from llm_magic.backends import registry
from llm_magic.backends.remote.base import RemoteBackend
from llm_magic.backends.remote.http_client import HttpServer
from llm_magic.backends.remote.limits import Limits
from llm_magic.backends.remote.server_errors import one_line
from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.certificates import certificate_problem
from llm_magic.config.providers import PROVIDERS, of_variable
from llm_magic.config.server_address import (
    ServerAddress,
    parse_setting,
    parse_url,
    proxy_for,
    resolve_address,
    setting_name,
)
from llm_magic.config.settings import LoadConfig, ServerLoadConfig, Settings
from llm_magic.doctor.finding import Finding, run_in_thread
from llm_magic.errors import (
    AuthenticationFailed,
    OptionError,
    RequestFailed,
    ServerError,
    SettingsError,
)
from llm_magic.text import counted
from llm_magic.types import ModelInfo

_HUB_S, _CONNECT_S, _LIST_S, _VERSION_S = 3.0, 2.0, 5.0, 2.0
_VERSION_PATHS = {"ollama": "/api/version", "vllm": "/version"}


@dataclass(frozen=True, slots=True)
class _Server:
    """A server of the settings or of a loaded model. `is_configured` is whether the user chose it."""

    variable: str
    address: ServerAddress
    is_configured: bool
    config: ServerLoadConfig

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self.config.backend

    @property
    def correction(self) -> str:
        """What to do if the address is wrong."""
        if self.config.base_url is not None:
            return "load it again with another --base-url"
        return f"correct {self.variable}"

    def fix_address(self, url: str) -> str:
        """Return what to do to use another address."""
        if self.config.base_url is not None:
            return f"%llm_load -b {self.backend} --base-url {url}"
        return f"{self.variable}={url} in .env or the environment, then %llm_config --reset"


async def check_servers(
    settings: Settings,
    keys: ApiKeys,
    used: Callable[[str], LoadConfig | None] = lambda _backend: None,
) -> list[Finding]:
    """Return a finding about each server that is configured, in use, or running at a default address.

    One more finding lists the programs that do not respond at their default address. `used` returns the
    options of the last load of a backend, which contain the name of its key.
    """
    invalid: list[Finding] = []
    checked: list[_Server] = []
    for name in registry.names():
        if setting_name(name) not in Settings.model_fields:
            continue
        try:
            servers = list(_servers_of(name, settings, used(name)))
        except OptionError as error:
            invalid.append(Finding(name, "problem", str(error), f"correct {_variable(name)}"))
            continue
        for server in servers:
            # vLLM and InstructLab have the same default address.
            is_new = server.address.url not in {other.address.url for other in checked}
            if server.is_configured or (server.address.is_local and is_new):
                checked.append(server)
    found = await asyncio.gather(*(_check_server(server, settings, keys) for server in checked))
    missing = [server for server, finding in zip(checked, found, strict=True) if finding is None]
    findings = [*invalid, *(finding for finding in found if finding is not None)]
    return [*findings, *([_not_running(missing)] if missing else [])]


def _not_running(servers: Sequence[_Server]) -> Finding:
    """Return the finding about server programs that do not respond."""
    names = ", ".join(f"{server.backend} ({server.address.host_port})" for server in servers)
    return Finding("servers", "ok", f"not running at their usual addresses: {names}")


def _servers_of(name: str, settings: Settings, used: LoadConfig | None) -> Iterator[_Server]:
    field, variable = setting_name(name), _variable(name)
    address = parse_setting(name, settings)
    in_use = None
    if isinstance(used, ServerLoadConfig):
        in_use = resolve_address(used, settings)
        yield _Server(variable, in_use, True, used)
    if address != in_use:
        is_configured = (
            getattr(settings, field) != Settings.model_fields[field].default
            or settings.backend == name
            or (name == "openai" and bool(os.environ.get("OPENAI_API_KEY")))
        )
        yield _Server(variable, address, is_configured, ServerLoadConfig(backend=name))


def _variable(name: str) -> str:
    return str(Settings.model_fields[setting_name(name)].validation_alias)


async def _check_server(server: _Server, settings: Settings, keys: ApiKeys) -> Finding | None:
    """Return a finding, or None for a default address where no server of that kind runs."""
    backend = registry.create(server.backend, lambda: settings, keys)
    assert isinstance(backend, RemoteBackend)
    proxy = proxy_for(server.address)
    if proxy is None:
        unreachable = await _check_connection(server, backend.start)
        if unreachable is not None:
            return unreachable if server.is_configured else None
    try:
        async with asyncio.timeout(_LIST_S):
            models = await backend.models(server.config)
    except (ServerError, OptionError, TimeoutError) as error:
        # Any other program can listen at a default address.
        return await _explain(server, error, proxy) if server.is_configured else None
    finally:
        await backend.aclose()
    version = await _version(server.address.origin, server.backend)
    return _summarize(server, models, version, proxy)


# -- connections ----------------------------------------------------------------------------------


async def _check_connection(server: _Server, start: str) -> Finding | None:
    """Return a finding if no connection can be opened; `start` is how to start the server."""
    parts = urlsplit(server.address.url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        resolved = await _resolve(host)
    except (OSError, TimeoutError) as error:
        provider = PROVIDERS.get(server.backend)
        is_known = provider is not None and host == urlsplit(provider.url).hostname
        is_offline = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        fix = "check the network" if is_known or is_offline else server.correction
        return Finding(server.backend, "problem", f"there is no host {host}", fix)
    if await _any_listens(resolved, port):
        return None
    text = f"no server is listening at {server.address.host_port}"
    others = {"127.0.0.1": "127.0.0.1", "::1": "[::1]"} if server.address.is_local else {}
    for other, literal in others.items():
        if other not in resolved and await _any_listens([other], port):
            addresses = "" if resolved == [host] else f" ({', '.join(resolved)})"
            url = f"{parts.scheme}://{literal}:{port}{parts.path}"
            text = f"{text}{addresses}, but a server listens at {literal}"
            return Finding(server.backend, "problem", text, server.fix_address(url))
    fix = start or f"start the server, or {server.correction}"
    return Finding(server.backend, "problem", text, fix)


async def _resolve(host: str) -> list[str]:
    """Return the IP addresses of a host; raises `OSError` or `TimeoutError`."""
    found = await run_in_thread(
        lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), _CONNECT_S
    )
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


# -- responses ------------------------------------------------------------------------------------


def _summarize(
    server: _Server, models: list[ModelInfo], version: str, proxy: str | None
) -> Finding:
    names = one_line(", ".join(model.name for model in models[:4]))
    more = ", …" if len(models) > 4 else ""
    listed = f" ({names}{more})" if names else ""
    count = counted(len(models), "model")
    prefix = f"{version} at " if version else ""
    through = f", through the proxy {proxy}" if proxy else ""
    text = f"{prefix}{server.address.host_port}{through}: {count}{listed}"
    if models:
        return Finding(server.backend, "ok", text)
    is_ollama = server.backend == "ollama"
    fix = "%llm_load llama3.2 -b ollama --pull" if is_ollama else "load a model on the server"
    return Finding(server.backend, "warn", text, fix)


async def _version(origin: str, backend: str) -> str:
    """Return the version of an Ollama or vLLM server, "" if unknown; sends no key."""
    path = _VERSION_PATHS.get(backend)
    version = await _get(origin, path, "version") if path is not None else None
    return version if isinstance(version, str) and len(version) < 40 else ""


async def _get(origin: str, path: str, field: str) -> object:
    """Return one field of the JSON response to a request without a key; None if there is none."""
    server = HttpServer(parse_url("", origin), None, Limits(_VERSION_S), "")
    try:
        async with asyncio.timeout(_VERSION_S):
            answer = await server.get(path)
    except (ServerError, TimeoutError):
        return None
    finally:
        await server.aclose()
    return answer.get(field) if isinstance(answer, dict) else None


async def _explain(server: _Server, error: Exception, proxy: str | None) -> Finding:
    """Return the finding for a server that accepts connections and returns no list of models."""
    address, name = server.address, server.backend
    text, fix = str(error), "check the log of the server"
    if isinstance(error, TimeoutError):
        text = (
            f"{address.host_port} accepts connections, but does not respond within {_LIST_S:.0f} s"
        )
        fix = "check the log of the server; it may be loading a model"
    if isinstance(error, SettingsError):
        fix = "correct that variable"
    elif isinstance(error, AuthenticationFailed) and (proxy is None or error.status == 401):
        # The full message quotes the server, which may repeat a part of the key.
        text = error.summary
        provider = PROVIDERS.get(name)
        set_key = f"%llm_load -b {name} --key-env NAME"
        has_variable = provider is not None and provider.key_variable
        fix = f"export {provider.key_variable}=…" if provider and has_variable else set_key
    elif proxy is not None:
        host = urlsplit(address.url).hostname
        text, fix = f"{text} The request used the proxy {proxy}.", f"export NO_PROXY={host}"
    elif isinstance(error, RequestFailed) and error.status in {200, 404, 405}:
        return await _explain_missing_api(server, text)
    return Finding(name, "problem", text, fix)


async def _explain_missing_api(server: _Server, text: str) -> Finding:
    """Return the finding for a server that has no API of the expected kind at its address."""
    address, name = server.address, server.backend
    fix = server.correction
    origin = address.origin
    if name != "ollama":
        if isinstance(await _get(origin, "/v1/models", "data"), list):
            text = f"there is no API at {address.url}, but there is one at /v1"
            fix = server.fix_address(f"{origin}/v1")
        elif await _version(origin, "ollama"):
            text = f"{address.host_port} is an Ollama server"
            fix = f"OLLAMA_BASE_URL={origin}, then %llm_config --reset"
    return Finding(name, "problem", text, fix)


# -- the hub --------------------------------------------------------------------------------------


async def check_hub() -> list[Finding]:
    """Return a finding about access to the Hugging Face Hub; sends no token."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return [Finding("hub", "ok", "HF_HUB_OFFLINE is set: only cached models can be loaded")]
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        address = parse_url("hub", url)
    except OptionError as error:
        return [Finding("hub", "problem", str(error), "correct HF_ENDPOINT")]
    problem = await _hub_problem(address)
    if not problem:
        return [Finding("hub", "ok", f"{address.host_port} responds")]
    fix = "check the network, set HTTPS_PROXY, or set HF_HUB_OFFLINE=1 to skip requests to the hub"
    return [Finding("hub", "warn", f"{problem}; cached models can be loaded", fix)]


async def _hub_problem(address: ServerAddress) -> str:
    """Return why the hub does not respond within three seconds, or "" if it does."""
    server = HttpServer(address, None, Limits(_HUB_S), "")
    try:
        async with asyncio.timeout(_HUB_S):
            if proxy_for(address) is None:
                # The name lookup of an HTTP client cannot be canceled.
                await _resolve(urlsplit(address.url).hostname or "")
            async with server.stream("HEAD", "", None):
                return ""
    except (RequestFailed, AuthenticationFailed):
        return ""  # any response proves that the hub is reachable
    except TimeoutError:
        return f"{address.host_port} does not respond within {_HUB_S:.0f} s"
    except socket.gaierror:
        return f"there is no host {address.host_port} (no network?)"
    except (ServerError, SettingsError) as error:
        return str(error).rstrip(" .")
    finally:
        await server.aclose()


def check_certificates() -> list[Finding]:
    """Return a finding if the certificates that the environment names cannot be used."""
    problem = certificate_problem()
    fix = "correct or unset that variable"
    return [Finding("certificates", "problem", problem, fix)] if problem else []


def check_keys(keys: ApiKeys) -> list[Finding]:
    """Return a finding with the names of the API keys that are set or not; sends nothing."""
    of_providers = [p.key_variable for p in PROVIDERS.values() if p.key_variable]
    names = dict.fromkeys((*of_providers, "HF_TOKEN", *keys.variables()))
    is_set = {name: bool(os.environ.get(name)) for name in names}
    lists = {
        "set": [_key_name(name) for name in names if is_set[name]],
        "not set": [name for name in names if not is_set[name]],
    }
    text = "; ".join(f"{state}: {', '.join(found)}" for state, found in lists.items() if found)
    return [Finding("keys", "ok", text)]


def _key_name(name: str) -> str:
    """Return the variable of a key, and the backend that uses it."""
    provider = of_variable(name)
    return f"{name} (-b {provider.name})" if provider is not None else name
