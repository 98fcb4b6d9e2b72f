"""One HTTP server: connections, limits, the key, and errors in our own words.

The one place that imports httpx.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.request import getproxies

import httpx

from llm_magic.backends import _refusals
from llm_magic.backends._lines import Decoder, is_whole
from llm_magic.errors import RequestRefused, ServerError, ServerSilent, ServerUnreachable
from llm_magic.keys import Key
from llm_magic.places import Place

# A server that is there takes a connection at once; what it does then may take long.
CONNECT_S = 5.0
# Lists and descriptions: a server that thinks about those is not well.
ANSWER_S = 30.0
# A model may be read from disk, or wait for others, before its first word: this many times longer.
FIRST_FACTOR = 5
# After the last word of an answer nothing but its end is to come.
END_S, DRAIN_S = 5.0, 0.25
# A person takes longer than httpx's 5 s from one cell to the next; who closes earlier is noticed.
KEEP_S = 60.0
_MOST_ERROR_BYTES = 64 * 1024
_MOST_JSON_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of silence within an answer, and how many requests may be under way at once."""

    idle_s: float = 120.0
    concurrency: int = 256


# How many at once is counted here, in turns, not in connections.
_NO_LIMITS = httpx.Limits(
    max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_S
)


class _Bearer(httpx.Auth):
    """Puts the key into a request for its own origin, and nowhere else."""

    def __init__(self, key: Key) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        url = request.url
        origin = f"{url.scheme}://{url.netloc.decode('ascii')}"
        request.headers["Authorization"] = self._key.bearer(origin)
        yield request


class _Pools(httpx.AsyncBaseTransport):
    """Connections behind one client, each a pool of its own while there are not too many.

    httpcore looks at every connection of a pool at every request, so that one pool of 256 takes
    ten times longer than many small ones: https://github.com/encode/httpx/issues/3215
    """

    _SIZE, _MOST = 1, 256

    def __init__(self, verify: ssl.SSLContext) -> None:
        self._verify = verify
        self._pools: list[httpx.AsyncHTTPTransport] = []
        self._busy: list[int] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send through the first pool that has room, so that open connections are used again."""
        index = self._choose()
        self._busy[index] += 1

        def release() -> None:
            self._busy[index] -= 1

        try:
            response = await self._pools[index].handle_async_request(request)
        except BaseException:
            release()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Counted(response.stream, release)
        return response

    def _choose(self) -> int:
        room = next((i for i, busy in enumerate(self._busy) if busy < self._SIZE), None)
        if room is not None:
            return room
        if len(self._pools) == self._MOST:
            return self._busy.index(min(self._busy))
        self._pools.append(
            httpx.AsyncHTTPTransport(
                verify=self._verify,
                trust_env=False,
                limits=_NO_LIMITS,
                socket_options=_alive(),
            )
        )
        self._busy.append(0)
        return len(self._pools) - 1

    async def aclose(self) -> None:
        """Close them all."""
        for pool in self._pools:
            await pool.aclose()


class _Counted(httpx.AsyncByteStream):
    """A response's body that tells when it is closed, once."""

    def __init__(self, stream: httpx.AsyncByteStream, release: Callable[[], None]) -> None:
        self._stream = stream
        self._release: Callable[[], None] | None = release

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        """Close it and give its place in the pool back."""
        try:
            await self._stream.aclose()
        finally:
            release, self._release = self._release, None
            if release is not None:
                release()


class HttpServer:
    """One server and the client that talks to it; lives on the loop thread."""

    def __init__(self, place: Place, key: Key | None, limits: Limits, start: str) -> None:
        """`start` is what to type to start such a server."""
        self.place, self.key, self.limits, self._start = place, key, limits, start
        self.turns = asyncio.Semaphore(limits.concurrency)
        # Requests under way that do not belong to a loaded model, and where the API begins.
        self.users = 0
        self.prefix: str | None = None

    @functools.cached_property
    def _client(self) -> httpx.AsyncClient:
        options: dict[str, Any] = {
            "auth": _Bearer(self.key) if self.key else None,
            # Redirects are not followed: they would carry the key and the prompt elsewhere.
            "follow_redirects": False,
            # Silence is timed where it is known what is waited for.
            "timeout": httpx.Timeout(None, connect=CONNECT_S),
            "headers": {"Accept-Encoding": "identity", "User-Agent": "llm_magic"},
        }
        secure = self.place.url.startswith("https:")
        verify = _certificates() if secure else _no_certificates()
        # A proxy has no business between this machine and itself.
        if not self.place.is_local and getproxies():
            return httpx.AsyncClient(**options, verify=verify, trust_env=True)
        return httpx.AsyncClient(**options, transport=_Pools(verify), trust_env=False)

    async def get(self, path: str) -> Any:
        """Return what a GET answers, as JSON."""
        return await self._json("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return what a POST answers, as JSON."""
        return await self._json("POST", path, body)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S), self.stream(method, path, body) as answer:
                data = await answer.read(_MOST_JSON_BYTES)
        except TimeoutError:
            raise self.silent(ANSWER_S) from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise RequestRefused(
                f"{self.place.url}{path} answers, but not as {self.place.backend} does."
                " Is --base-url right?",
                status=200,
            ) from None

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[Answer]:
        """Open an answer; leaving the block closes the connection if it is not at its end."""
        # Only ASCII: half a surrogate pair cannot be written as UTF-8.
        content = json.dumps(body).encode("ascii") if body is not None else None
        headers = {"Content-Type": "application/json"} if body is not None else {}
        with self.translated():
            request = self._client.build_request(
                method, self.place.url + path, content=content, headers=headers
            )
            response = await self._send(request)
        try:
            answer = Answer(self, response)
            if not response.is_success:
                raise await self._refusal(response, answer)
            yield answer
        finally:
            await response.aclose()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        limit = self.limits.idle_s * FIRST_FACTOR
        try:
            async with asyncio.timeout(limit):
                return await self._client.send(request, stream=True)
        except TimeoutError:
            raise self.silent(limit) from None

    async def _refusal(self, response: httpx.Response, answer: Answer) -> ServerError:
        try:
            async with asyncio.timeout(CONNECT_S):
                body = await answer.read(_MOST_ERROR_BYTES)
        except (TimeoutError, ServerError):
            # The status alone says enough.
            body = b""
        return _refusals.explain(
            self.place, self.key, response.status_code, response.headers, _refusals.read(body)
        )

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what httpx raises into our errors."""
        try:
            yield
        except httpx.ConnectTimeout:
            raise ServerUnreachable(
                f"{self.place.origin} did not answer within {CONNECT_S:.0f} s. {self._start}",
                brief="no connection",
            ) from None
        except httpx.ConnectError as error:
            raise _refusals.not_there(self.place, str(error), self._start) from None
        except (httpx.RequestError, httpx.StreamError) as error:
            raise self.broken(error) from None
        except httpx.InvalidURL:
            raise ServerUnreachable(f"{self.place.url} is no address. Check --base-url.") from None

    def broken(self, error: Exception) -> ServerUnreachable:
        """Return the error for a connection that broke."""
        why = _refusals.one_line(self.scrub(str(error)))
        because = f" ({why})" if why else ""
        return ServerUnreachable(
            f"The connection to {self.place.origin} broke{because}. Look at the server.",
            brief="connection lost",
        )

    def silent(self, seconds: float) -> ServerSilent:
        """Return the error for a silence."""
        return ServerSilent(
            f"{self.place.origin} said nothing for {seconds:.0f} s."
            " Look at the server, or allow more with --idle-timeout.",
            brief="silent",
        )

    def scrub(self, text: str) -> str:
        """Return `text` without the key."""
        return self.key.scrub(text) if self.key else text

    async def aclose(self) -> None:
        """Close the connections."""
        client = self.__dict__.pop("_client", None)
        if client is not None:
            await client.aclose()


class Answer:
    """The body of a response, as it comes; `limit` seconds of silence end it."""

    def __init__(self, server: HttpServer, response: httpx.Response) -> None:
        self._server, self._response = server, response
        self.limit = server.limits.idle_s * FIRST_FACTOR
        self.kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        plain = response.headers.get("content-encoding", "identity") == "identity"
        # One that compresses although it was asked not to costs a copy.
        self._raw = response.aiter_raw() if plain else response.aiter_bytes()

    async def piece(self) -> bytes:
        """Return the next bytes from the socket, none at the end; raises `ServerError`."""
        try:
            async with asyncio.timeout(self.limit):
                return await anext(self._raw)
        except StopAsyncIteration:
            return b""
        except TimeoutError:
            raise self._server.silent(self.limit) from None
        except (httpx.RequestError, httpx.StreamError) as error:
            raise self._server.broken(error) from None

    def has_begun(self) -> None:
        """From the first word on, silence means something else than thinking."""
        self.limit = self._server.limits.idle_s

    async def decoded(self, decoder: Decoder) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        while piece := await self.piece():
            for event in decoder.feed(piece):
                yield event
        for event in decoder.flush():
            # What the end cut in two is no event, and no error either: the answer is not whole.
            if is_whole(event):
                yield event

    async def drain(self) -> None:
        """Read to the end, which is near: the connection can be used again only then."""
        self.limit = DRAIN_S
        with contextlib.suppress(ServerError):
            while await self.piece():
                pass

    async def read(self, most: int) -> bytes:
        """Return the whole body, or the first `most` bytes of it."""
        parts: list[bytes] = []
        size = 0
        while size < most and (piece := await self.piece()):
            parts.append(piece)
            size += len(piece)
        return b"".join(parts)[:most]


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Return the one TLS context: building one takes 20 ms."""
    return httpx.create_ssl_context()


@functools.cache
def _no_certificates() -> ssl.SSLContext:
    """Return the context of connections that are not encrypted, which is never used."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _alive() -> list[tuple[int, int, int]]:
    """Return socket options that find out when a server's machine is gone."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
