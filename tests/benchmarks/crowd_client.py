"""One client of a crowd, in a process of its own: ``python crowd_client.py NAME URL``.

It needs nothing but the client that it is about, so that a peer may live in an environment of its
own. Every line of its input is a task, ``JOB MODEL COUNT AT_ONCE``; the answer to each is a line of
JSON with the seconds it took, and those that this process computed.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

PROMPT = "Write a long story about a lighthouse keeper and a whale."
_MESSAGES = [{"role": "user", "content": PROMPT}]
_OPTIONS = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.9}
# Asks a model, and returns the text of its answer.
Ask = Callable[[str], Awaitable[str]]


class Ours:
    """`Session.agenerate`, which streams whatever it does."""

    package = "llm_magic"

    def __init__(self, url: str) -> None:
        from llm_magic.config.settings import Settings
        from llm_magic.session import Session

        self._url, self._session = url, Session(Settings(_env_file=None))

    def prepare(self, model: str) -> None:
        """Load the model: what others do at their first question."""
        self._session.load(model, backend="openai", base_url=self._url)

    async def whole(self, model: str) -> str:
        """Return an answer."""
        return (await self._session.agenerate(PROMPT, model=model)).text

    streamed = whole

    def close(self) -> None:
        """Close the connections."""
        self._session.close()


class OpenAI:
    """The `openai` client."""

    package = "openai"

    def __init__(self, url: str) -> None:
        module = importlib.import_module("openai")
        self._client = module.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")

    def prepare(self, model: str) -> None:
        """Nothing is to be done."""

    async def whole(self, model: str) -> str:
        """Return an answer that comes in one piece, which costs this client least."""
        answer = await self._client.chat.completions.create(
            model=model, messages=_MESSAGES, **_OPTIONS
        )
        return str(answer.choices[0].message.content)

    async def streamed(self, model: str) -> str:
        """Return an answer that comes word by word."""
        chunks = await self._client.chat.completions.create(
            model=model, messages=_MESSAGES, stream=True, **_OPTIONS
        )
        return await _joined(chunks)


class LiteLLM:
    """`litellm.acompletion`."""

    package = "litellm"

    def __init__(self, url: str) -> None:
        self._ask = importlib.import_module("litellm").acompletion
        self._where = {"api_base": f"{url}/v1", "api_key": "none", "messages": _MESSAGES}

    def prepare(self, model: str) -> None:
        """Nothing is to be done."""

    async def whole(self, model: str) -> str:
        """Return an answer that comes in one piece, which costs this client least."""
        answer = await self._ask(model=f"openai/{model}", **self._where, **_OPTIONS)
        return str(answer.choices[0].message.content)

    async def streamed(self, model: str) -> str:
        """Return an answer that comes word by word."""
        return await _joined(
            await self._ask(model=f"openai/{model}", stream=True, **self._where, **_OPTIONS)
        )


async def _joined(chunks: Any) -> str:
    return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])


CLIENTS: dict[str, Any] = {"ours": Ours, "openai": OpenAI, "litellm": LiteLLM}


async def _all(ask: Ask, model: str, count: int, at_once: int) -> set[str]:
    left = iter(range(count))

    async def work() -> set[str]:
        return {await ask(model) for _ in left}

    return set().union(*await asyncio.gather(*(work() for _ in range(at_once))))


def _task(runner: asyncio.Runner, client: Any, line: str) -> dict[str, Any]:
    job, model, count, at_once = line.split()
    client.prepare(model)
    wall, cpu = time.perf_counter(), time.process_time()
    texts = runner.run(_all(getattr(client, job), model, int(count), int(at_once)))
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "texts": sorted(texts),
    }


def main() -> None:
    """Do the tasks until the input ends."""
    name, url = sys.argv[1:]
    client = CLIENTS[name](url)
    version = importlib.metadata.version(client.package)
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            print(json.dumps({**_task(runner, client, line), "version": version}), flush=True)
    if isinstance(client, Ours):
        client.close()


if __name__ == "__main__":
    main()
