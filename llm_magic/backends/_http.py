"""One HTTP server: connections, limits, the key, and errors in our own words.

With `_transport` and `_streams` the one place that imports httpx and httpcore.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx

from llm_magic.backends import _refusals
from llm_magic.backends._lines import Decoder, is_whole
from llm_magic.backends._transport import CONNECT_S, Transport, transport
from llm_magic.backends._wait import Wait
from llm_magic.errors import RequestRefused, ServerError, ServerSilent, ServerUnreachable
from llm_magic.keys import Key
from llm_magic.places import Place, proxy_to

# Lists and descriptions: a server that thinks about those is not well.
ANSWER_S = 30.0
# A model may be read from disk, or wait for others, before its first word: this many times longer.
FIRST_FACTOR = 5
# After the last word of an answer nothing but its end is to come.
END_S, DRAIN_S = 5.0, 0.25
_MOST_ERROR_BYTES = 64 * 1024
_MOST_JSON_BYTES = 64 * 1024 * 1024
# Whatever a connection can raise, with a proxy and without.
BROKEN = (
    httpx.RequestError, httpx.StreamError,
    httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of silence within an answer, and how many requests may be under way at once."""

    idle_s: float = 120.0
    concurrency: int = 256


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
    def _transport(self) -> Transport:
        return transport(self.place, self.key)

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
            raise self.silent(ANSWER_S, "Look at the server.") from None
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
        wait = Wait()
        with self.translated():
            response = await self._send(method, self.place.url + path, content, wait)
        try:
            answer = Answer(self, response, wait)
            if not response.is_success:
                raise await self._refusal(response, answer)
            yield answer
        finally:
            wait.over()
            await response.aclose()

    async def _send(
        self, method: str, url: str, content: bytes | None, wait: Wait
    ) -> httpx.Response:
        limit = self.limits.idle_s * FIRST_FACTOR
        try:
            with wait.at_most(limit):
                return await self._transport.send(method, url, content)
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
        except (httpx.ConnectTimeout, httpcore.ConnectTimeout):
            raise ServerUnreachable(
                f"{self.place.origin} did not answer within {CONNECT_S:.0f} s. {self._start}",
                brief="no connection",
            ) from None
        except (httpx.ConnectError, httpx.ProxyError, httpcore.ConnectError) as error:
            raise self._not_there(str(error)) from None
        except BROKEN as error:
            raise self.broken(error) from None
        except httpx.InvalidURL:
            raise ServerUnreachable(f"{self.place.url} is no address. Check --base-url.") from None

    def _not_there(self, why: str) -> ServerUnreachable:
        proxy = proxy_to(self.place)
        if proxy is not None and "SSL" not in why:
            return _refusals.no_proxy(self.place, proxy, self.scrub(why))
        return _refusals.not_there(self.place, why, self._start)

    def broken(self, error: Exception) -> ServerUnreachable:
        """Return the error for a connection that broke."""
        why = _refusals.one_line(self.scrub(str(error)))
        because = f" ({why})" if why else ""
        return ServerUnreachable(
            f"The connection to {self.place.origin} broke{because}. Look at the server.",
            brief="connection lost",
        )

    def silent(
        self, seconds: float, mend: str = "Look at the server, or allow more with --idle-timeout."
    ) -> ServerSilent:
        """Return the error for a silence."""
        return ServerSilent(
            f"{self.place.origin} said nothing for {seconds:.0f} s. {mend}", brief="silent"
        )

    def scrub(self, text: str) -> str:
        """Return `text` without the key."""
        return self.key.scrub(text) if self.key else text

    async def aclose(self) -> None:
        """Close the connections."""
        way = self.__dict__.pop("_transport", None)
        if way is not None:
            await way.aclose()


class Answer:
    """The body of a response, as it comes; `limit` seconds of silence end it."""

    def __init__(self, server: HttpServer, response: httpx.Response, wait: Wait) -> None:
        self._server, self._response, self._wait = server, response, wait
        self.limit = server.limits.idle_s * FIRST_FACTOR
        self.kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        plain = response.headers.get("content-encoding", "identity") == "identity"
        assert isinstance(response.stream, httpx.AsyncByteStream)
        # One that compresses although it was asked not to costs a copy.
        self._raw = aiter(response.stream if plain else response.aiter_bytes())

    async def piece(self) -> bytes:
        """Return the next bytes from the socket, none at the end; raises `ServerError`."""
        try:
            with self._wait.at_most(self.limit):
                return await anext(self._raw)
        except StopAsyncIteration:
            return b""
        except TimeoutError:
            raise self._server.silent(self.limit) from None
        except BROKEN as error:
            raise self._server.broken(error) from None

    def has_begun(self) -> None:
        """From the first word on, silence means something else than thinking."""
        self.limit = self._server.limits.idle_s

    def decoded(self, decoder: Decoder) -> AsyncIterator[bytes]:
        """Return the events of a stream, as they come."""
        return _Events(self, decoder)

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


class _Events:
    """The events of one answer. No generator: one that is left before its end has to be closed."""

    def __init__(self, answer: Answer, decoder: Decoder) -> None:
        self._answer, self._decoder = answer, decoder
        self._ready: deque[bytes] = deque()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._ready:
            piece = await self._answer.piece()
            if piece:
                self._ready.extend(self._decoder.feed(piece))
                continue
            # What the end cut in two is no event, and no error either: the answer is not whole.
            self._ready.extend(filter(is_whole, self._decoder.flush()))
            if not self._ready:
                raise StopAsyncIteration
        return self._ready.popleft()
