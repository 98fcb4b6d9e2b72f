"""Readers of streams on a loop thread, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from llm_magic.backends.thread_bridge import ThreadBridge
from llm_magic.session.event_loop import LoopStream, LoopThread


def drain(
    loop: LoopThread,
    source: AsyncGenerator[Any, None],
    take: Callable[[Any], object],
    tick: Callable[[], object] = lambda: None,
    pause: Callable[[], float] | None = None,
) -> None:
    """Give every item to `take`, and call `tick` after each batch."""
    for batch in LoopStream(loop, source).batches(pause):
        for item in batch:
            take(item)
        tick()


def iterate(loop: LoopThread, source: AsyncGenerator[Any, None]) -> Iterator[Any]:
    """Yield every item; leaving early stops the source."""
    for batch in LoopStream(loop, source).batches():
        yield from batch


async def relay(loop: LoopThread, source: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Yield every item on the loop of the caller."""
    stream, bridge = LoopStream(loop, source), ThreadBridge[Any]()
    stream.attach(bridge)
    stream.start()
    async with contextlib.aclosing(stream.read_async(bridge)) as batches:
        async for batch in batches:
            for item in batch:
                yield item
    if bridge.error is not None:
        raise bridge.error
