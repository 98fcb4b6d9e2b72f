"""An HTTP server on a real socket, with a script and a record; subclasses define its answers.

It reads while it answers, so that it notices at once when a client leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Literal, Self

from tests.exchange import Exchange, Reader, Received, open_streams, read_request, reset
from tests.wire import Step

_HOST = "127.0.0.1"
_TIMEOUT_S = 30


class HttpServer:
    """Serves while the `with` block lasts; subclasses define the answers without a script."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.connections = 0  # accepted so far
        self.open_now = 0
        self.pace = 0.0  # seconds before each piece of an answer that no script gave
        # What becomes of a connection after an answer: it stays open; it is closed at once, as by
        # uvicorn with `timeout_keep_alive=0`; or the next request gets no byte, but an end or a reset.
        self.after_answer: Literal["keep", "close", "end-next", "reset-next"] = "keep"
        self.dropped: list[Received] = []  # the requests that got no byte
        self._scripts: defaultdict[str, deque[tuple[Step, ...]]] = defaultdict(deque)
        self._news = threading.Condition()
        self._failures: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        # Bound and never listening: it keeps the port ours while no server listens there.
        self._reservation = _bound(0)
        self.port: int = self._reservation.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._failed)
        self._thread = threading.Thread(target=self._loop.run_forever, name=type(self).__name__)

    @property
    def url(self) -> str:
        """The address, without a path."""
        return f"http://{_HOST}:{self.port}"

    def answer(self, request: Received) -> Generator[Step, None, None]:
        """Yield what a request without a script is answered; runs in the server's thread."""
        raise NotImplementedError

    def will(self, path: str, *script: Step) -> None:
        """Queue the answer to the next request to `path` that no script is waiting for."""
        self._scripts[path].append(script)

    def requests_to(self, path: str) -> list[Received]:
        """Return the requests to `path` so far."""
        return [request for request in tuple(self.received) if request.path == path]

    def wait_for(self, path: str, count: int = 1, timeout: float = _TIMEOUT_S) -> Received:
        """Block until `count` requests to `path` have arrived, and return the last of them."""
        with self._news:
            if self._news.wait_for(lambda: len(self.requests_to(path)) >= count, timeout):
                return self.requests_to(path)[count - 1]
        raise TimeoutError(f"Not {count} × {path} within {timeout} s, only {self.received}")

    def start(self) -> None:
        """Accept connections (again), always at the same port."""
        self._do(self._listen())

    def refuse(self) -> None:
        """Accept no more connections; those that are open go on."""
        self._do(self._close_listener())

    def stop(self) -> None:
        """Die: refuse connections, and drop those that are open."""
        self._do(self._hang_up())

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reservation.close()
        # A double that fails in silence would make its tests pass or fail for the wrong reason.
        if error is None and self._failures:
            raise self._failures[0]

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the server's thread, and wait for it."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT_S)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.port)
            self._listener.listen(1024)
            self._listener.setblocking(False)
            # And not `asyncio.start_server`, which loses a connection that it is just accepting
            # when it is closed.
            self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        # One at a time: in a storm, those who are inside are served before others are let in.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            task = self._loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._served)

    async def _close_listener(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def _hang_up(self) -> None:
        await self._close_listener()
        # Let every task begin: one that is cancelled before that would not close its connection.
        await asyncio.sleep(0)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failures.append(error)

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failures.append(context.get("exception") or RuntimeError(context["message"]))

    async def _serve(self, connection: socket.socket) -> None:
        """Answer one request after the other, until one side closes the connection."""
        self.connections += 1
        self.open_now += 1
        try:
            reader, writer = await open_streams(connection)
            try:
                is_reused = await self._exchange(reader, writer, is_reused=False)
                while is_reused and self.after_answer != "close":
                    is_reused = await self._exchange(reader, writer, is_reused=True)
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            finally:
                writer.transport.abort()
        finally:
            self.open_now -= 1

    async def _exchange(
        self, reader: Reader, writer: asyncio.StreamWriter, *, is_reused: bool
    ) -> bool:
        """Answer one request; returns whether the connection may carry another."""
        request = await read_request(reader)
        if request is None or (is_reused and self._drops(request, writer)):
            return False
        scripts = self._scripts[request.path]
        pace = 0.0 if scripts else self.pace
        # A generator either way: what an answer cleans up must happen when the client leaves.
        steps = (step for step in scripts.popleft()) if scripts else self.answer(request)
        with self._news:
            self.received.append(request)
            self._news.notify_all()
        with contextlib.closing(steps):
            return await Exchange(request, reader, writer).follow(steps, pace)

    def _drops(self, request: Received, writer: asyncio.StreamWriter) -> bool:
        """Return whether a request on a is_reused connection gets no answer."""
        if self.after_answer in {"keep", "close"}:
            return False
        self.dropped.append(request)
        if self.after_answer == "reset-next":
            reset(writer)
        return True


def _bound(port: int) -> socket.socket:
    """Return a socket at the port; two may be bound there as long as only one of them listens."""
    # Named, or asyncio leaves Nagle's algorithm on, which costs 40 ms an answer.
    bound = socket.socket(proto=socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((_HOST, port))
    return bound
