"""The servers that a backend talks to: one client for each, shared and closed in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

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
        """`start` is what to type to start such a server, `concurrency` how much it usually takes,
        `prefix` where its API begins."""
        self._settings, self._keys = settings, keys
        self._start, self._concurrency, self._prefix = start, concurrency, prefix
        self._clients: dict[tuple[ServerAddress, ApiKey | None, Limits], HttpServer] = {}
        # How many requests each gets at once, where that followed from what it is.
        self._limits: WeakKeyDictionary[HttpServer, int] = WeakKeyDictionary()
        # Of a model that was checked and is not loaded yet.
        self.planned: HttpServer | None = None

    def find(self, config: LoadConfig) -> HttpServer:
        """Return the one client of a server; loads that differ in its limits have their own."""
        # It imports the HTTP library, which a load of a local model does not need.
        from llm_magic.backends.remote.http_client import HttpServer

        spec = self._spec(config)
        if spec not in self._clients:
            address, key, limits = spec
            client = self._clients[spec] = HttpServer(address, key, limits, self._start)
            client.prefix = self._prefix(address)
        return self._clients[spec]

    def limit(self, server: HttpServer, config: LoadConfig, concurrency: int) -> None:
        """Give a server `concurrency` requests at once, unless the user chose a number."""
        assert isinstance(config, ServerLoadConfig)
        now = self._limits.get(server, server.limits.concurrency)
        if config.concurrency is None and now != concurrency:
            self._limits[server] = concurrency
            server.turns = asyncio.Semaphore(concurrency)

    def is_of(self, config: LoadConfig, server: HttpServer) -> bool:
        """Return whether a server is the one that a load would be about now."""
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

        Its answer decides what becomes of the key.
        """
        server = self.find(config)
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
