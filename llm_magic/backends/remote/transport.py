"""Sends HTTP requests to one server through aiohttp: kept connections, TLS, and proxies.

Only this module and `http_client` import aiohttp.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import socket
import ssl
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
import aiohttp.abc
import certifi

from llm_magic.backends.remote import server_errors
from llm_magic.config.api_keys import ApiKey
from llm_magic.config.certificates import certificate_problem
from llm_magic.config.providers import PROVIDERS
from llm_magic.config.server_address import ServerAddress, proxy_for, proxy_url
from llm_magic.errors import SettingsError

# A running server accepts a connection at once, even if its answer takes long.
CONNECT_S = 5.0
# How long to find out why a connection failed.
_PROBE_S = 1.0
# How long an unused connection is kept: longer than aiohttp's 15 s, because people take longer than
# that from one cell to the next.
KEEP_S = 60.0
# Servers and proxies send longer headers than aiohttp's limit of 8 KiB.
_MAX_HEADER_BYTES = 64 * 1024
# aiohttp stops reading from the socket at twice this size.
_BUFFER_BYTES = 128 * 1024


class SocksError(Exception):
    """A SOCKS proxy could not be reached, or refused the connection."""


class Transport:
    """The connections to one server; create and use it on the event-loop thread.

    Redirects are not followed, and cookies are not kept.
    """

    def __init__(self, address: ServerAddress, key: ApiKey | None) -> None:
        """Raises `ServerUnreachable` for an unusable proxy, `SettingsError` for certificates."""
        headers = {"User-Agent": "llm_magic", "Accept-Encoding": "identity"}
        self._key_headers = {
            method: _key_headers(address, key, method) for method in ("GET", "POST")
        }
        proxy = proxy_url(address)
        socks = proxy if proxy is not None and proxy.startswith("socks") else None
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEEP_S}
        if "https:" in f"{address.url} {proxy}":
            # Read for each client: a variable that is set later counts without a restart of the kernel.
            variables = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
            options["ssl"] = _trusted_authorities(*variables)
        self._url = address.url
        self._socks_errors: tuple[type[Exception], ...] = ()
        try:
            connector = self._socks(socks, options) if socks else _connector(proxy, options)
        except ImportError:
            why = "a SOCKS proxy needs another package: pip install aiohttp-socks"
            raise server_errors.proxy_error(address, proxy_for(address) or "", why) from None
        except ValueError as error:
            raise server_errors.proxy_error(address, proxy_for(address) or "", str(error)) from None
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            proxy=None if socks else proxy,
            cookie_jar=aiohttp.DummyCookieJar(),
            # The limits on silence depend on how far an answer is: see `http_client`.
            timeout=aiohttp.ClientTimeout(connect=CONNECT_S),
            read_bufsize=_BUFFER_BYTES,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            response_class=_Response,
            trace_configs=[_reuse_trace()],
        )

    def _socks(self, proxy: str, options: dict[str, Any]) -> aiohttp.TCPConnector:
        """Return connections through a SOCKS proxy, which also resolves the names of hosts."""
        import aiohttp_socks

        self._socks_errors = (
            aiohttp_socks.ProxyError,
            aiohttp_socks.ProxyConnectionError,
            aiohttp_socks.ProxyTimeoutError,
        )
        proxy = proxy.replace("socks5h:", "socks5:", 1)
        connector: aiohttp.TCPConnector
        connector = aiohttp_socks.ProxyConnector.from_url(proxy, rdns=True, **options)
        return connector

    async def send(self, method: str, path: str, content: bytes | None) -> aiohttp.ClientResponse:
        """Send a request, and return the response when its headers have arrived.

        The caller closes the response.
        """
        headers = dict(self._key_headers.get(method, {}))
        if content is not None:
            headers["Content-Type"] = "application/json"
        while True:
            attempt = SimpleNamespace(reused_connection=False)
            # aiohttp sends a file in pieces, and warns about long bytes.
            data = None if content is None else io.BytesIO(content)
            try:
                return await self._session.request(
                    method, self._url + path, data=data, headers=headers,
                    allow_redirects=False, trace_request_ctx=attempt,
                )  # fmt: skip
            except aiohttp.ClientConnectionError:
                # Servers close kept connections at any time, uvicorn for `ilab` after each answer. A
                # request that meets such an end was not answered. Each of these attempts removes a
                # kept connection from the pool.
                if not attempt.reused_connection:
                    raise
            except self._socks_errors as error:
                raise SocksError(str(error)) from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()


async def uses_other_scheme(address: ServerAddress) -> bool:
    """Return whether the port of an http address is encrypted, or that of an https address is not.

    Nothing but the wording of an error depends on the result: the certificate is not checked, and
    neither a key nor a prompt is sent.
    """
    parts = urlsplit(address.url)
    is_plain = parts.scheme == "http"
    port = parts.port or (80 if is_plain else 443)
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(
                parts.hostname, port, ssl=_unchecked_tls() if is_plain else None
            )
            try:
                if is_plain:
                    return True
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                return (await reader.read(5)).startswith(b"HTTP/")
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return False


def _unchecked_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _key_headers(address: ServerAddress, key: ApiKey | None, method: str) -> dict[str, str]:
    """Return the headers that hold the key in requests of a method; none without a key."""
    if key is None:
        return {}
    provider = PROVIDERS.get(address.backend)
    of_lists = provider.list_headers if provider is not None and method == "GET" else {}
    forms = of_lists or {"Authorization": "Bearer {key}"}
    return {name: key.header(address.origin, form) for name, form in forms.items()}


def _reuse_trace() -> aiohttp.TraceConfig:
    """Return what sets `reused_connection` of the `trace_request_ctx` of a request."""

    async def reused(_session: object, context: Any, _params: object) -> None:
        context.trace_request_ctx.reused_connection = True

    async def created(_session: object, context: Any, _params: object) -> None:
        context.trace_request_ctx.reused_connection = False

    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(reused)
    trace.on_connection_create_start.append(created)
    return trace


class _Response(aiohttp.ClientResponse):
    """A response that aborts its connection where aiohttp would first send what is left to send."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """Wait for the headers."""
        try:
            return await super().start(connection)
        except BaseException:
            _abort(connection)
            raise

    def close(self) -> None:
        """Close the response, and its connection unless the whole body has arrived."""
        _abort(self.connection)
        super().close()


def _abort(connection: Any) -> None:
    if connection is not None and connection.transport is not None:
        connection.transport.abort()


class _Resolver(aiohttp.abc.AbstractResolver):
    """Resolves names as the system does.

    aiohttp's own resolvers omit ``::1`` for localhost on machines without another IPv6 address.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        """Return the addresses of a host."""
        infos = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, family=family
        )
        return [
            aiohttp.abc.ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, protocol, _, address in infos
        ]  # fmt: skip

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


def _create_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket on which the system checks that the other machine still exists."""
    family, kind, protocol, _, _ = address
    created = socket.socket(family, kind, protocol)
    created.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every system has all of them.
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            created.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return created


def _connector(proxy: str | None, options: dict[str, Any]) -> aiohttp.TCPConnector:
    """Return connections to a server or an HTTP proxy; raises `ValueError` for another proxy."""
    if proxy is not None:
        parts = urlsplit(proxy)
        if parts.scheme not in {"http", "https"}:
            raise ValueError(f"Unknown scheme for a proxy: {parts.scheme}")
        # Both raise for what aiohttp cannot use: a port that is no number, and credentials that
        # are not Latin-1.
        _ = parts.port
        unquote(parts.netloc).encode("latin-1")
    return aiohttp.TCPConnector(**options, resolver=_Resolver(), socket_factory=_create_socket)


@functools.lru_cache(maxsize=4)
def _trusted_authorities(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Return a TLS context that trusts the authorities of a file, a folder, or certifi.

    It is cached because creating one takes 20 ms. Raises `SettingsError` that names the variable.
    """
    if problem := certificate_problem():
        raise SettingsError(problem)
    if file or not folder:
        context = ssl.create_default_context(cafile=file or certifi.where())
    else:
        context = ssl.create_default_context(capath=folder)
    context.set_alpn_protocols(["http/1.1"])
    return context
