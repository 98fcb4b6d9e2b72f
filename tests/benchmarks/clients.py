"""The same question asked in several ways: by this package, and as one would without it.

Every client keeps its connections, and yields the pieces of text as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from llm_magic.config.settings import Settings
from llm_magic.session import Session
from tests.benchmarks.server import PIECE

PROMPT = "Write a long story about a lighthouse keeper and a whale."
_NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def body(model: str) -> dict[str, Any]:
    """Return what all of them send."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 512,
        "temperature": 0.7,
        "top_p": 0.9,
    }


class Client(ABC):
    """One way to ask; `whole` may use another call than `pieces`."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def pieces(self, model: str) -> AsyncIterator[str]:
        """Yield the text of an answer as it comes."""

    async def whole(self, model: str) -> str:
        """Return the text of an answer."""
        return "".join([piece async for piece in self.pieces(model)])

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections."""


class SyncClient(ABC):
    """One way to ask from a plain program."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def pieces(self, model: str) -> Iterator[str]:
        """Yield the text of an answer as it comes."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


class _Models:
    """A session and the models that were loaded into it, each at its first use."""

    def __init__(self, url: str) -> None:
        self._url, self._loaded = url, set[str]()
        self.session = Session(Settings(_env_file=None))

    def load(self, model: str) -> None:
        """Load a model beside the others, once."""
        if model not in self._loaded:
            self.session.load(model, backend="openai", base_url=self._url, keep=True)
            self._loaded.add(model)


class Ours(Client):
    """`Session`, in an async cell or program."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._models = _Models(url)

    async def pieces(self, model: str) -> AsyncIterator[str]:
        self._models.load(model)
        chunks = self._models.session.astream(PROMPT, model=model)
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    async def whole(self, model: str) -> str:
        self._models.load(model)
        return (await self._models.session.agenerate(PROMPT, model=model)).text

    async def aclose(self) -> None:
        self._models.session.close()


class OursSync(SyncClient):
    """`Session`, in a plain cell or program."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._models = _Models(url)

    def load(self, model: str) -> None:
        """Load a model before it is asked for."""
        self._models.load(model)

    def pieces(self, model: str) -> Iterator[str]:
        self._models.load(model)
        for chunk in self._models.session.stream(PROMPT, model=model):
            if chunk.text:
                yield chunk.text

    def close(self) -> None:
        self._models.session.close()


class Httpx(Client):
    """A loop over httpx without errors, retries or limits."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._client = httpx.AsyncClient(timeout=600, limits=_NO_LIMITS)

    async def pieces(self, model: str) -> AsyncIterator[str]:
        address = f"{self.url}/v1/chat/completions"
        async with self._client.stream("POST", address, json=body(model)) as response:
            async for line in response.aiter_lines():
                if text := _text(line):
                    yield text

    async def aclose(self) -> None:
        await self._client.aclose()


class HttpxSync(SyncClient):
    """The same with httpx's other client."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._client = httpx.Client(timeout=600, limits=_NO_LIMITS)

    def pieces(self, model: str) -> Iterator[str]:
        address = f"{self.url}/v1/chat/completions"
        with self._client.stream("POST", address, json=body(model)) as response:
            for line in response.iter_lines():
                if text := _text(line):
                    yield text

    def close(self) -> None:
        self._client.close()


def _text(line: str) -> str:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return ""
    choices = json.loads(line[6:])["choices"]
    return choices[0]["delta"].get("content") or "" if choices else ""


class OpenAI(Client):
    """The `openai` client."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        # By its name: it is no dependency, and not installed where types are checked.
        module = importlib.import_module("openai")
        self._client = module.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")

    async def pieces(self, model: str) -> AsyncIterator[str]:
        chunks = await self._client.chat.completions.create(**body(model))
        async for chunk in chunks:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield text

    async def aclose(self) -> None:
        await self._client.close()


class OpenAISync(SyncClient):
    """The `openai` client in a plain program."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        module = importlib.import_module("openai")
        self._client = module.OpenAI(base_url=f"{url}/v1", api_key="none")

    def pieces(self, model: str) -> Iterator[str]:
        for chunk in self._client.chat.completions.create(**body(model)):
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield text

    def close(self) -> None:
        self._client.close()


class BareSockets(Client):
    """Only sockets, and no parsing of the answer: only a faster server is faster than this."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def pieces(self, model: str) -> AsyncIterator[str]:
        address = urlsplit(self.url)
        connection = self._free.pop() if self._free else None
        reader, writer = connection or await asyncio.open_connection(address.hostname, address.port)
        content = json.dumps(body(model)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await reader.readuntil(b"\r\n\r\n")
        end, last = b"\r\n0\r\n\r\n", b""
        while not last.endswith(end):
            data = await reader.read(1 << 16)
            last = last[-len(end) :] + data
            yield data.count(b'"content":" word"') * PIECE
        self._free.append((reader, writer))

    async def aclose(self) -> None:
        for _reader, writer in self._free:
            writer.close()
            await writer.wait_closed()
