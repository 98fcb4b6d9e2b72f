"""How requests travel to a server: over connections of our own, or through a proxy.

Beside `_http` and `_streams`, the one place that knows httpx and httpcore.
"""

from __future__ import annotations

import functools
import os
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass

import httpcore
import httpx

from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.streams import Stream, connect
from llm_magic.config.api_keys import ApiKey
from llm_magic.config.certificates import certificate_problem
from llm_magic.config.server_address import ServerAddress, proxy_for
from llm_magic.errors import SettingsError

# A server that is there takes a connection at once; what it does then may take long.
CONNECT_S = 5.0
# What a connection raises that broke before an answer came over it.
_BROKE = (
    httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpcore.RemoteProtocolError,
    httpcore.ReadError, httpcore.WriteError,
)  # fmt: skip
# A person takes longer than httpx's 5 s from one cell to the next; who closes earlier is noticed.
KEEP_S = 60.0


@dataclass(frozen=True, slots=True)
class _Target:
    """An address as httpx and as httpcore has it; reading one takes longer than sending."""

    url: httpx.URL
    wire: httpcore.URL
    host: str
    origin: str


@functools.lru_cache(maxsize=256)
def _target(address: str) -> _Target:
    url = httpx.URL(address)
    wire = httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
    host = url.netloc.decode("ascii")
    return _Target(url, wire, host, f"{url.scheme}://{host}")


def transport(address: ServerAddress, key: ApiKey | None) -> Transport:
    """Return the way to a server, through a proxy where one is named for it."""
    tls = _trusted() if address.url.startswith("https:") else None
    proxy = proxy_for(address)
    if proxy is None:
        return Direct(key, tls)
    try:
        return Proxied(key, tls or _no_certificates())
    except ImportError:
        why = "it speaks SOCKS, for which there is a package: pip install socksio"
    except (ValueError, httpx.InvalidURL) as error:
        why = str(error)
    raise server_errors.proxy_error(address, proxy, why)


class Transport(ABC):
    """Sends requests. Redirects are not followed: they would carry key and prompt elsewhere."""

    def __init__(self, key: ApiKey | None) -> None:
        self._key = key

    async def send(self, method: str, url: str, content: bytes | None) -> httpx.Response:
        """Send one and return the head of its answer; whoever gets that closes it."""
        target = _target(url)
        headers = {
            "Host": target.host,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": "llm_magic",
        }
        if self._key is not None:
            # It refuses where that is not the origin it was given for.
            headers["Authorization"] = self._key.bearer(target.origin)
        if content is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        return await self._send(method, target, headers, content)

    @abstractmethod
    async def _send(
        self, method: str, target: _Target, headers: dict[str, str], content: bytes | None
    ) -> httpx.Response:
        """Send a request with these headers."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections."""


class Proxied(Transport):
    """Through the proxies that the environment names, which httpx knows to read."""

    def __init__(self, key: ApiKey | None, tls: ssl.SSLContext) -> None:
        super().__init__(key)
        self._client = httpx.AsyncClient(
            verify=tls,
            trust_env=True,
            follow_redirects=False,
            # Silence is timed where it is known what is waited for, connections are counted there.
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_S
            ),
        )

    async def _send(
        self, method: str, target: _Target, headers: dict[str, str], content: bytes | None
    ) -> httpx.Response:
        while True:
            steps: set[str] = set()

            async def trace(name: str, _info: object, steps: set[str] = steps) -> None:
                steps.add(name)

            request = self._client.build_request(
                method, target.url, headers=headers, content=content, extensions={"trace": trace}
            )
            try:
                return await self._client.send(request, stream=True)
            except _BROKE:
                # Each of these takes a kept connection out of the pool, so this comes to an end.
                if "connection.connect_tcp.started" in steps:
                    raise

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class Direct(Transport):
    """A stack of httpcore's connections to one origin, the one used last on top.

    Its own pool looks at every connection at every request, and httpx's client takes every request
    apart again: https://github.com/encode/httpx/issues/3215
    """

    def __init__(self, key: ApiKey | None, tls: ssl.SSLContext | None) -> None:
        super().__init__(key)
        self._tls = tls
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()

    async def _send(
        self, method: str, target: _Target, headers: dict[str, str], content: bytes | None
    ) -> httpx.Response:
        request = httpcore.Request(
            method, target.wire, headers=list(headers.items()), content=content
        )
        connection = self._pop()
        if connection is not None:
            before = connection.stream.received
            try:
                return await self._exchange(connection, request)
            except _BROKE:
                # Servers close kept connections whenever they like, uvicorn for `ilab` at once. A
                # request that crosses such an end was not answered, and so it is repeated
                # once, on a new connection.
                if connection.stream.received != before:
                    raise
        return await self._exchange(await self._open(target.wire.origin), request)

    async def _exchange(self, connection: _Connection, request: httpcore.Request) -> httpx.Response:
        self._busy.add(connection)
        try:
            response = await connection.http.handle_async_request(request)
        except BaseException:
            self.put(connection)
            raise
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(self, connection, response)
        )

    def _pop(self) -> _Connection | None:
        """Return the connection that was used last, if the server has not closed it meanwhile."""
        while self._idle and self._idle[0].http.has_expired():
            self._idle.popleft().stream.abort()
        while self._idle:
            connection = self._idle.pop()
            if not connection.http.has_expired():
                return connection
            connection.stream.abort()
        return None

    async def _open(self, origin: httpcore.Origin) -> _Connection:
        stream = await connect(origin.host.decode("ascii"), origin.port, self._tls, CONNECT_S)
        return _Connection(httpcore.AsyncHTTP11Connection(origin, stream, KEEP_S), stream)

    def put(self, connection: _Connection) -> None:
        """Take a connection back; what is not at the end of its answer cannot be used again."""
        self._busy.discard(connection)
        if connection.http.is_idle():
            self._idle.append(connection)
        else:
            connection.stream.abort()

    async def aclose(self) -> None:
        """Close the connections."""
        closing = [*self._busy, *self._idle]
        self._idle.clear()
        for connection in closing:
            await connection.http.aclose()


@dataclass(frozen=True, slots=True, eq=False)
class _Connection:
    """What speaks HTTP, and what it speaks over."""

    http: httpcore.AsyncHTTP11Connection
    stream: Stream


class _Body(httpx.AsyncByteStream):
    """The body of an answer; closing it gives its connection back."""

    def __init__(self, owner: Direct, connection: _Connection, response: httpcore.Response) -> None:
        self._owner, self._response = owner, response
        self._connection: _Connection | None = connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, AsyncIterable)
        return aiter(self._response.stream)

    async def aclose(self) -> None:
        """Close it, whatever of it was read."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            await self._response.aclose()
        finally:
            self._owner.put(connection)


def _trusted() -> ssl.SSLContext:
    # Looked up each time: whoever was told to name an authority need not start the kernel again.
    return _certificates(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=4)
def _certificates(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    """Return the one TLS context of these authorities: building one takes 20 ms.

    Raises `SettingsError` that names the variable.
    """
    if problem := certificate_problem():
        raise SettingsError(problem)
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@functools.cache
def _no_certificates() -> ssl.SSLContext:
    """Return the context of connections that are not encrypted, which is never used."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
