"""The servers that a backend talks to: one client for each, shared and closed in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from llm_magic.backends.remote.limits import Limits
from llm_magic.config.api_keys import ApiKey, ApiKeys
from llm_magic.config.server_address import ServerAddress, resolve_address
from llm_magic.config.settings import LoadConfig, ReadSettings, ServerLoadConfig
from llm_magic.errors import AuthenticationFailed

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer


class Servers:
    """The clients by address, key and limits; lives on the loop thread."""

    def __init__(
        self,
        settings: ReadSettings,
        keys: ApiKeys,
        start: str,
        concurrency: int,
        prefix: Callable[[ServerAddress], str | None],
    ) -> None:
        """`start` is how to start such a server, `concurrency` how many requests it usually processes
        at once, `prefix` returns the path of its API."""
        self._settings, self._keys = settings, keys
        self._start, self._concurrency, self._prefix = start, concurrency, prefix
        self._clients: dict[tuple[ServerAddress, ApiKey | None, Limits], HttpServer] = {}
        # Of a model that was checked and is not loaded yet.
        self.planned: HttpServer | None = None

    def limit(self, server: HttpServer, config: LoadConfig, concurrency: int) -> None:
        """Give a server `concurrency` requests at once, unless the user chose a number."""
        assert isinstance(config, ServerLoadConfig)
        if config.concurrency is None and server.concurrency != concurrency:
            server.concurrency, server.turns = concurrency, asyncio.Semaphore(concurrency)

    def is_of(self, config: LoadConfig, server: HttpServer) -> bool:
        """Return whether a load would use this server now."""
        return self._clients.get(self._spec(config)) is server

    def _spec(self, config: LoadConfig) -> tuple[ServerAddress, ApiKey | None, Limits]:
        assert isinstance(config, ServerLoadConfig)
        settings = self._settings()
        address = resolve_address(config, settings)
        limits = Limits(
            config.idle_timeout or settings.idle_timeout, config.concurrency or self._concurrency
        )
        return address, self._keys.find(config, address, settings), limits

    @contextlib.contextmanager
    def borrowed(self, config: LoadConfig) -> Iterator[HttpServer]:
        """Use a server that no loaded model belongs to yet, and keep others from closing it.

        Loads that differ in their limits have clients of their own. The response decides whether the
        key is kept for that server.
        """
        # It imports the HTTP library, which a load of a local model does not need.
        from llm_magic.backends.remote.http_client import HttpServer

        spec = self._spec(config)
        if spec not in self._clients:
            address, key, limits = spec
            self._clients[spec] = HttpServer(address, key, limits, self._start)
            self._clients[spec].prefix = self._prefix(address)
        server = self._clients[spec]
        server.users += 1
        try:
            yield server
        except AuthenticationFailed:
            self._keys.discard(server.key)
            raise
        else:
            self._keys.bind(server.key)
        finally:
            server.users -= 1

    async def close_unused(self, used: Iterable[HttpServer]) -> None:
        """Close the clients that are neither `used` nor borrowed nor planned."""
        used_ids = {id(server) for server in used}
        for spec, server in list(self._clients.items()):
            if id(server) not in used_ids and not server.users and server is not self.planned:
                del self._clients[spec]
                await server.aclose()
