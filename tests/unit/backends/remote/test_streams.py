"""Our network streams, against sockets: bytes, ends, and what httpcore expects of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import httpcore
import pytest
import trustme

from llm_magic.backends.remote.streams import Stream, connect
from tests.loops import on_a_loop

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
_HOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve one connection and give the port; afterwards nothing is left of either."""
    over = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        over.set()

    async with await asyncio.start_server(handle, _HOST, 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait_for(over.wait(), 5)


@contextlib.asynccontextmanager
async def connected(handler: Handler) -> AsyncIterator[Stream]:
    """Give a stream to a server that does what `handler` does."""
    async with serving(handler) as port:
        stream = await connect(_HOST, port, None, 5.0)
        try:
            yield stream
        finally:
            await stream.aclose()


@on_a_loop
async def test_head_and_body_travel_in_one_piece() -> None:
    came: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.read(100))
        writer.write(b"ok")

    async with connected(take) as stream:
        await stream.write(b"head ")
        await stream.write(b"body")
        assert await stream.read(100) == b"ok"
        assert await stream.read(100) == b""
    assert came == [b"head body"]


@on_a_loop
async def test_no_more_is_read_than_asked_for() -> None:
    async def send(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"abcdef")

    async with connected(send) as stream:
        assert [await stream.read(4), await stream.read(4), await stream.read(4)] == [
            b"abcd", b"ef", b"",
        ]  # fmt: skip


@on_a_loop
async def test_what_nobody_reads_stays_with_the_sender() -> None:
    size = 32 * 1024 * 1024
    sent = asyncio.Event()

    async def send(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(size))
        await writer.drain()
        sent.set()

    async with connected(send) as stream:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sent.wait(), 0.3)
        read = 0
        while data := await stream.read(65536):
            read += len(data)
        assert read == size


@on_a_loop
async def test_a_reset_is_an_error_behind_what_came_before() -> None:
    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"so far")
        await writer.drain()
        await reader.read(100)
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with connected(send) as stream:
        assert await stream.read(100) == b"so far"
        await stream.write(b"go on")
        with pytest.raises(httpcore.ReadError):
            await stream.read(100)
        with pytest.raises(httpcore.WriteError):
            await stream.write(b"more")


@on_a_loop
async def test_a_read_has_the_limit_that_httpcore_gives_it() -> None:
    async def hold(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(100)

    async with connected(hold) as stream:
        with pytest.raises(httpcore.ReadTimeout):
            await stream.read(100, timeout=0.05)


@on_a_loop
async def test_the_end_shows_without_reading() -> None:
    async def leave(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        """Close it at once."""

    async with connected(leave) as stream:
        for _ in range(1000):
            if stream.get_extra_info("is_readable"):
                break
            await asyncio.sleep(0.005)
        assert stream.get_extra_info("is_readable")


@on_a_loop
async def test_closing_is_seen_at_the_other_end_at_once() -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        ended.set()

    async with connected(wait) as stream:
        assert not ended.is_set()
        await stream.aclose()
        await asyncio.wait_for(ended.wait(), 5)


@on_a_loop
async def test_where_nothing_listens_is_an_error_of_httpcore() -> None:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        with pytest.raises(httpcore.ConnectError):
            await connect(_HOST, free.getsockname()[1], None, 5.0)


@on_a_loop
async def test_a_handshake_without_an_answer_ends_in_time() -> None:
    async def hold(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    # The server sees the end, too, or this would wait for it.
    async with serving(hold) as port:
        with pytest.raises(httpcore.ConnectTimeout):
            await connect(_HOST, port, ssl.create_default_context(), 0.1)


@on_a_loop
async def test_an_encrypted_stream_carries_what_is_longer_than_a_record() -> None:
    authority, data = trustme.CA(), bytes(range(256)) * 4096
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(_HOST).configure_cert(theirs)
    authority.configure_trust(ours)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(len(data)))
        await writer.drain()
        await reader.read()

    async with serving(echo, theirs) as port:
        stream = await connect(_HOST, port, ours, 5.0)
        await stream.write(data)
        came = b""
        while len(came) < len(data):
            came += await stream.read(65536)
        assert came == data
        assert stream.get_extra_info("ssl_object") is not None
        await stream.aclose()
