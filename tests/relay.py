"""A server that passes bytes on to another port: on another address, or as a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator

Negotiate = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _nothing(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    pass


@contextlib.contextmanager
def relay(port: int, host: str = "127.0.0.1", negotiate: Negotiate = _nothing) -> Iterator[int]:
    """Listen at a free port of `host`, which is returned, and pass what follows `negotiate` on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await negotiate(reader, writer)
            server = await asyncio.open_connection("127.0.0.1", port)
            both = [_copy(reader, server[1]), _copy(server[0], writer)]
            await asyncio.gather(*both)
        writer.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    starting = asyncio.start_server(serve, host, 0)
    server = asyncio.run_coroutine_threadsafe(starting, loop).result(10)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def tunnel(received: list[bytes], tls: ssl.SSLContext) -> Negotiate:
    """Return what an HTTP proxy does for an https address, and then the server with `tls`."""

    async def negotiate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.start_tls(tls)

    return negotiate


def refuse(status: bytes) -> Negotiate:
    """Return what an HTTP proxy does that refuses a tunnel."""

    async def negotiate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        raise ConnectionError

    return negotiate


def socks(received: list[bytes], reply: int = 0) -> Negotiate:
    """Return what a SOCKS5 proxy does; a `reply` other than 0 refuses."""

    async def negotiate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _version, methods = await reader.readexactly(2)
        await reader.readexactly(methods)
        writer.write(b"\x05\x00")
        *_, kind, length = await reader.readexactly(5)
        assert kind == 3, "the name of a host"
        received.append(await reader.readexactly(length + 2))
        writer.write(bytes([5, reply, 0, 1, 0, 0, 0, 0, 0, 0]))
        if reply:
            raise ConnectionError

    return negotiate


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
