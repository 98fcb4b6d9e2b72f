"""Requests to one HTTP server: limits on time and size, and errors of this package.

Only this module and `transport` import aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp

from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.limits import ANSWER_S, DRAIN_S, FIRST_FACTOR, Limits
from llm_magic.backends.remote.stream_decoders import (
    Decoder,
    MalformedStream,
    is_complete,
    parse_json,
)
from llm_magic.backends.remote.transport import CONNECT_S, SocksError, Transport, uses_other_scheme
from llm_magic.config.api_keys import ApiKey
from llm_magic.config.commands import option
from llm_magic.config.server_address import ServerAddress, proxy_for
from llm_magic.errors import ServerError, ServerTimeout, ServerUnreachable

# What aiohttp decodes, in steps of a bounded size. It leaves several layers as they are: two of them
# turn 656 bytes into 300 MB.
_ENCODINGS = {"", "identity", "gzip", "deflate", "br", "zstd"}
_MOST_ERROR_BYTES = 64 * 1024
# In the response of a TLS server to a plain request: nginx, Apache and Go describe it with status 400.
_NAMES_TLS = re.compile(rb"https|\bssl\b|\btls\b", re.IGNORECASE)
_MOST_JSON_BYTES = 16 * 1024 * 1024
# The longest that one response keeps the event loop from other tasks, and the most that is read from
# it at once.
_TURN_S, _CHUNK_BYTES = 0.01, 16 * 1024
# How often to check whether a connection is closed.
_CHECK_S = 1.0


class HttpServer:
    """A client of one server; use it on the event-loop thread."""

    def __init__(
        self, address: ServerAddress, key: ApiKey | None, limits: Limits, start: str
    ) -> None:
        """`start` is the advice for a server that does not run."""
        self.address, self.key, self.limits, self._start = address, key, limits, start
        self.concurrency = limits.concurrency
        self.turns = asyncio.Semaphore(self.concurrency)
        # The number of running requests, and the path of the API.
        self.users = 0
        self.prefix: str | None = None

    @functools.cached_property
    def _transport(self) -> Transport:
        return Transport(self.address, self.key)

    async def get(self, path: str) -> Any:
        """Send a GET request, and return the JSON of its response."""
        return await self._json("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a POST request, and return the JSON of its response."""
        return await self._json("POST", path, body)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S), self.stream(method, path, body) as answer:
                data = await answer.read_all()
        except TimeoutError:
            raise self.timeout_error(ANSWER_S, has_option=False) from None
        try:
            return parse_json(data)
        except MalformedStream:
            raise server_errors.format_error(self.address, path, data) from None

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[HttpResponse]:
        """Send a request, and yield its response; an incomplete one is closed with its connection."""
        # ASCII, because half a surrogate pair cannot be written as UTF-8.
        content = json.dumps(body).encode("ascii") if body is not None else None
        try:
            with self._translated():
                response = await self._send(method, path, content)
        except ServerUnreachable as error:
            raise await self._scheme_error() or error from None
        answer = HttpResponse(self, response)
        try:
            if not 200 <= response.status < 300:
                to_prompt = body is not None and "messages" in body
                raise await self._error_response(response, answer, to_prompt=to_prompt)
            yield answer
        finally:
            answer.close()

    async def _send(self, method: str, path: str, content: bytes | None) -> aiohttp.ClientResponse:
        limit = self.limits.idle_s * FIRST_FACTOR
        try:
            async with asyncio.timeout(limit):
                return await self._transport.send(method, path, content)
        except aiohttp.ServerTimeoutError:
            # Also a `TimeoutError`.
            raise
        except TimeoutError:
            raise self.timeout_error(limit) from None

    async def _error_response(
        self, response: aiohttp.ClientResponse, answer: HttpResponse, *, to_prompt: bool
    ) -> ServerError:
        try:
            async with asyncio.timeout(CONNECT_S):
                body = await answer.read(_MOST_ERROR_BYTES)
        except (TimeoutError, ServerError):
            # The status is reported without the body.
            body = b""
        names_tls = response.status == 400 and _NAMES_TLS.search(body)
        if names_tls and (wrong := await self._scheme_error()):
            return wrong
        return server_errors.status_error(
            self.address,
            self.key,
            response.status,
            response.headers,
            server_errors.parse_error_body(body),
            to_prompt=to_prompt,
        )

    async def _scheme_error(self) -> ServerUnreachable | None:
        """Return the error for http at a port of https and the reverse, None for other failures."""
        if proxy_for(self.address) is not None or not await uses_other_scheme(self.address):
            return None
        return server_errors.scheme_error(self.address)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of this package for those of aiohttp."""
        try:
            yield
        except aiohttp.ConnectionTimeoutError:
            late = ServerUnreachable(
                f"{self.address.origin} did not respond within {CONNECT_S:.0f} s.",
                brief="no connection",
                is_temporary=True,
            )
            raise server_errors.with_start(late, self._start) from None
        except aiohttp.ClientConnectorError as error:
            raise self._connection_error(error.os_error, str(error.os_error)) from None
        except aiohttp.ClientHttpProxyError as error:
            raise self._connection_error(error, f"{error.status} {error.message}") from None
        except SocksError as error:
            raise self._connection_error(error, str(error)) from None
        except aiohttp.InvalidURL:
            invalid = ServerUnreachable(f"{self.address.url} is not a valid address.")
            raise invalid.advise(f"Check {option('base_url')}.", "base_url") from None
        except aiohttp.ClientError as error:
            raise self.disconnected_error(error) from None

    def _connection_error(self, error: Exception, reason: str) -> ServerUnreachable:
        proxy = proxy_for(self.address)
        if proxy is not None and not isinstance(error, ssl.SSLError):
            return server_errors.proxy_error(self.address, proxy, self.scrub(reason), error)
        return server_errors.connection_error(self.address, error, self._start)

    def disconnected_error(self, error: Exception) -> ServerUnreachable:
        """Return the error for a connection that was lost."""
        why = server_errors.one_line(self.scrub(_reason(error)))
        because = f" ({why})" if why else ""
        return ServerUnreachable(
            f"The connection to {self.address.origin} was lost{because}. Check the server.",
            brief="connection lost",
            is_temporary=True,
        )

    def timeout_error(self, seconds: float, *, has_option: bool = True) -> ServerTimeout:
        """Return the error for a server that sent no data for too long.

        `has_option`: ``--idle-timeout`` sets the limit.
        """
        error = ServerTimeout(
            f"{self.address.origin} sent no data for {seconds:.0f} s.", brief="timed out"
        )
        if not has_option:
            return error.append("Check the server.")
        advice = f"Check the server, or allow more time with {option('idle_timeout')}"
        if seconds > self.limits.idle_s:
            advice += f" (the limit for the first data is {FIRST_FACTOR} times as long)"
        return error.advise(f"{advice}.", "idle_timeout")

    def scrub(self, text: str) -> str:
        """Return `text` without the key."""
        return self.key.scrub(text) if self.key else text

    async def aclose(self) -> None:
        """Close the connections."""
        transport = self.__dict__.pop("_transport", None)
        if transport is not None:
            await transport.aclose()


class HttpResponse:
    """The body of a response. It ends with an error when nothing arrives for `limit` seconds."""

    def __init__(self, server: HttpServer, response: aiohttp.ClientResponse) -> None:
        self._server, self._response = server, response
        self.limit = server.limits.idle_s * FIRST_FACTOR
        self._deadline: float | None = None
        self.content_type = (
            response.headers.get("content-type", "").partition(";")[0].strip().lower()
        )
        self._loop = asyncio.get_running_loop()
        self._turn_began = self._loop.time()
        # When the current wait for bytes ends, and the timer that ends it.
        self._wait_ends, self._timed_out = math.inf, False
        self._timer: asyncio.TimerHandle | None = None
        self._encoding = response.headers.get("content-encoding", "").strip().lower()

    def close(self) -> None:
        """Close the response, and its connection unless the whole body has arrived."""
        if self._timer is not None:
            self._timer.cancel()
        self._response.close()

    async def next_chunk(self) -> bytes:
        """Return the next bytes of the body, none at the end; raises `ServerError`."""
        # Not before the body is read: the status of an error response is reported first.
        if self._encoding not in _ENCODINGS:
            raise server_errors.encoding_error(self._server.address, self._encoding)
        now = self._loop.time()
        if self._deadline is not None and now >= self._deadline:
            # A timer cannot run while a server sends without a pause.
            raise self._server.timeout_error(0.0)
        if now - self._turn_began > _TURN_S:
            await asyncio.sleep(0)
            self._turn_began = now = self._loop.time()
        limit = self.limit if self._deadline is None else self._deadline - now
        self._wait_ends = now + limit
        if self._timer is None or self._timer.when() > self._wait_ends:
            self._set_timer()
        try:
            return await self._response.content.read(_CHUNK_BYTES)
        except aiohttp.ClientError as error:
            if self._timed_out:
                raise self._server.timeout_error(limit) from None
            raise self._server.disconnected_error(error) from None
        finally:
            self._wait_ends = math.inf

    def _set_timer(self) -> None:
        """Set the only timer of this response; one for each chunk would cost half as much as the chunk."""
        if self._timer is not None:
            self._timer.cancel()
        when = min(self._wait_ends, self._loop.time() + _CHECK_S)
        self._timer = self._loop.call_at(when, self._check)

    def _check(self) -> None:
        """Close the response when its wait is over, or when its connection is closed."""
        self._timer = None
        if self._wait_ends == math.inf:
            return
        self._timed_out = self._loop.time() >= self._wait_ends
        connection = self._response.connection
        # aiohttp closes the connection after an invalid chunk, but the reader continues to wait.
        if self._timed_out or (connection is not None and connection.closed):
            self._response.close()
        else:
            self._set_timer()

    def use_idle_limit(self) -> None:
        """Apply the limit for a pause within a reply instead of that for the first token."""
        self.limit = self._server.limits.idle_s

    def set_deadline(self, seconds: float) -> None:
        """End the body in `seconds` at the latest; an earlier deadline is kept."""
        deadline = self._loop.time() + seconds
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline

    def events(self, decoder: Decoder) -> AsyncIterator[bytes]:
        """Return an iterator over the events of a stream."""
        return _Events(self, decoder)

    async def drain(self) -> None:
        """Read the rest of the body for a short time, so that the connection can be used again."""
        self.set_deadline(DRAIN_S)
        with contextlib.suppress(ServerError):
            while await self.next_chunk():
                pass

    async def read(self, most: int) -> bytes:
        """Return the whole body, or the first `most` bytes of it."""
        parts = bytearray()
        while len(parts) < most and (chunk := await self.next_chunk()):
            parts += chunk
        return bytes(parts[:most])

    async def read_all(self) -> bytes:
        """Return the whole body; raises `RequestFailed` if it is too large."""
        data = await self.read(_MOST_JSON_BYTES + 1)
        if len(data) > _MOST_JSON_BYTES:
            raise server_errors.size_error(self._server.address, _MOST_JSON_BYTES)
        return data


class _Events:
    """The events of one response. Not a generator: callers would have to close it."""

    def __init__(self, answer: HttpResponse, decoder: Decoder) -> None:
        self._answer, self._decoder = answer, decoder
        self._ready: deque[bytes] = deque()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._ready:
            chunk = await self._answer.next_chunk()
            if chunk:
                # Events without data are heartbeats.
                self._ready.extend(filter(bytes.strip, self._decoder.feed(chunk)))
                continue
            # The body may end within an event. It is dropped, and the caller sees an incomplete reply.
            self._ready.extend(filter(is_complete, self._decoder.flush()))
            if not self._ready:
                raise StopAsyncIteration
        return self._ready.popleft()


def _reason(error: Exception) -> str:
    """Return why a connection broke."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed it"
    if isinstance(error, aiohttp.ClientResponseError):
        # The parser quotes the response after the problem.
        return error.message.partition("\n")[0].partition(": b'")[0].rstrip(":")
    if isinstance(error, aiohttp.ClientPayloadError):
        return "it sent an incomplete or invalid body"
    # Without its number.
    return (isinstance(error, OSError) and error.strerror) or str(error)
