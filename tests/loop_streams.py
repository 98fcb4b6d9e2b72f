"""Readers of streams on a loop thread, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any

from llm_magic.backends.thread_bridge import ThreadBridge
from llm_magic.session.event_loop import LoopStream, LoopThread
from llm_magic.session.interruptible_wait import held_back


def drain(
    loop: LoopThread,
    source: AsyncGenerator[Any, None],
    take: Callable[[Any], object],
    after_batch: Callable[[], object] = lambda: None,
    pause: Callable[[], float] | None = None,
) -> None:
    """Give every item to `take`, and call `after_batch` after each batch; holds signals back."""
    with held_back(), contextlib.closing(_batches(loop, source, pause)) as batches:
        for batch in batches:
            for item in batch:
                take(item)
            after_batch()


def iterate(loop: LoopThread, source: AsyncGenerator[Any, None]) -> Iterator[Any]:
    """Yield every item; leaving early stops the source."""
    for batch in _batches(loop, source):
        yield from batch


def _batches(
    loop: LoopThread,
    source: AsyncGenerator[Any, None],
    pause: Callable[[], float] | None = None,
) -> Generator[list[Any], None, None]:
    stream, bridge = LoopStream(loop, source), ThreadBridge[Any]()
    stream.attach(bridge)
    try:
        yield from stream.read(bridge, pause)
    finally:
        stream.stop()
    if bridge.error is not None:
        raise bridge.error


async def relay(loop: LoopThread, source: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Yield every item on the loop of the caller."""
    stream, bridge = LoopStream(loop, source), ThreadBridge[Any]()
    stream.attach(bridge)
    async with contextlib.aclosing(stream.read_async(bridge)) as batches:
        async for batch in batches:
            for item in batch:
                yield item
    if bridge.error is not None:
        raise bridge.error
