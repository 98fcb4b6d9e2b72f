"""Connections to a host, encrypted or not, as asyncio has them and as httpcore wants them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import httpcore

# The most that is returned at once: httpcore reads up to 700 heads from this without a wait.
_MOST_AT_ONCE = 16 * 1024
# The longest that one answer keeps the event loop from the other tasks.
TURN_S = 0.01
# More than this is left to the socket until somebody reads.
_MOST_WAITING = 256 * 1024
# RFC 8305: how long one address of a host may take before the next is tried beside it.
_NEXT_ADDRESS_S = 0.25


async def connect(
    host: str, port: int, tls: ssl.SSLContext | None, timeout: float | None
) -> Stream:
    """Connect within `timeout` seconds; raises httpcore's errors."""
    loop = asyncio.get_running_loop()
    with _connecting():
        async with asyncio.timeout(timeout):
            _, stream = await loop.create_connection(
                Stream, host, port, happy_eyeballs_delay=_NEXT_ADDRESS_S
            )
        stream.keep_alive()
    return stream if tls is None else await stream.start_tls(tls, host, timeout)


class Stream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One connection. httpcore's own goes through anyio, which costs more than all of HTTP."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._received, self._unsent = bytearray(), bytearray()
        # How many bytes have come so far, read or not.
        self.received = 0
        self._turn_began = 0.0
        self._arrival: asyncio.Future[None] | None = None
        self._ended, self._paused = False, False
        self._broken: Exception | None = None

    # -- what asyncio calls -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or go on encrypted."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep what came until it is read."""
        self._received += data
        self.received += len(data)
        if len(self._received) > _MOST_WAITING and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """Note the end; asyncio then closes the transport."""
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end, and what broke the connection if anything did."""
        self._ended, self._broken = True, exc
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # -- what httpcore calls ------------------------------------------------------------------

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has come, at least a byte; none at the end."""
        self._send()
        loop = asyncio.get_running_loop()
        if not self._received and not self._ended:
            await self._more(timeout)
            self._turn_began = loop.time()
        elif loop.time() - self._turn_began > TURN_S:
            await asyncio.sleep(0)
            self._turn_began = loop.time()
        max_bytes = min(max_bytes, _MOST_AT_ONCE)
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        if not data and self._broken is not None:
            raise httpcore.ReadError(str(self._broken)) from None
        if self._paused and not self._received:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def _more(self, timeout: float | None) -> None:
        self._arrival = asyncio.get_running_loop().create_future()
        try:
            if timeout is None:
                await self._arrival
            else:
                async with asyncio.timeout(timeout):
                    await self._arrival
        except TimeoutError:
            raise httpcore.ReadTimeout from None
        finally:
            self._arrival = None

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Take `buffer`; it travels when an answer is waited for, head and body in one packet.

        This cannot take long, whatever `timeout` says: a prompt is in memory anyway.
        """
        if self._ended or self._transport.is_closing():
            raise httpcore.WriteError("the connection is closed")
        self._unsent += buffer

    def _send(self) -> None:
        if self._unsent and not self._transport.is_closing():
            self._transport.write(self._unsent)
        self._unsent = bytearray()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> Stream:
        """Encrypt from here on; the connection is closed where that fails."""
        loop = asyncio.get_running_loop()
        try:
            with _connecting():
                async with asyncio.timeout(timeout):
                    secure = await loop.start_tls(
                        self._transport, self, ssl_context, server_hostname=server_hostname
                    )
        except BaseException:
            self.abort()
            raise
        assert secure is not None
        self._transport = secure
        return self

    async def aclose(self) -> None:
        """Close it; who is at the other end is told so at once."""
        try:
            self._transport.close()
            # What TLS says goodbye with is sent, but not waited for.
            await asyncio.sleep(0)
        finally:
            self.abort()

    def keep_alive(self) -> None:
        """Find out when the machine at the other end is gone."""
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Not every system has all of them.
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def abort(self) -> None:
        """Close it now, in the middle of whatever it is."""
        self._transport.abort()

    def get_extra_info(self, info: str) -> Any:
        """Return facts under httpcore's names, others under asyncio's."""
        if info == "is_readable":
            # Where nothing is to come, this is the end, or what should not be.
            return self._ended or bool(self._received)
        names = {"client_addr": "sockname", "server_addr": "peername"}
        return self._transport.get_extra_info(names.get(info, info))


@contextlib.contextmanager
def _connecting() -> Iterator[None]:
    """Raise httpcore's errors for those of a connection that does not come about."""
    try:
        yield
    except TimeoutError:
        raise httpcore.ConnectTimeout from None
    except (OSError, ssl.SSLError) as error:
        raise httpcore.ConnectError(str(error)) from None
