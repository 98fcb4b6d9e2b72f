"""Ends an answer before a stop text, where its server includes that text or goes on after it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence

from llm_magic.errors import LLMMagicError
from llm_magic.text.partial_match import StopText
from llm_magic.types import Chunk

# How long after a stop text the end may take, with the counts; then the answer is closed.
_END_S = 1.0


def until_stop(
    source: AsyncGenerator[Chunk, None], stops: Sequence[str], pending: list[Chunk]
) -> AsyncGenerator[Chunk, None]:
    """Return the chunks of an answer up to the first stop text, and close `source` there.

    Only what may be the beginning of a stop text is held back. If the reader leaves meanwhile, it goes
    into `pending`. Reasoning that a server keeps apart is not searched: servers differ in that.
    """
    return _until_stop(source, stops, pending) if stops else source


async def _until_stop(
    source: AsyncGenerator[Chunk, None], stops: Sequence[str], pending: list[Chunk]
) -> AsyncGenerator[Chunk, None]:
    stop = StopText(stops)
    async with contextlib.aclosing(source):
        try:
            async for chunk in source:
                yield _cut(chunk, stop)
                if stop.reached and not chunk.finish_reason:
                    end = await _end(source)
                    yield Chunk(finish_reason="stop", usage=end.usage, time=time.perf_counter())
                    if end.finish_reason is None:
                        return
        except LLMMagicError:
            yield Chunk(text=stop.flush(), time=time.perf_counter())
            raise
        except (GeneratorExit, asyncio.CancelledError):
            pending.append(Chunk(text=stop.flush(), time=time.perf_counter()))
            raise


def _cut(chunk: Chunk, stop: StopText) -> Chunk:
    """Return what can be shown of a chunk; with the last one that is everything."""
    text = stop.feed(chunk.text)
    if chunk.finish_reason:
        text += stop.flush()
    reason = "stop" if chunk.finish_reason and stop.reached else chunk.finish_reason
    if (text, reason) == (chunk.text, chunk.finish_reason):
        return chunk
    return dataclasses.replace(chunk, text=text, finish_reason=reason)


async def _end(source: AsyncGenerator[Chunk, None]) -> Chunk:
    """Return the last chunk of an answer if it comes next, an empty one otherwise."""
    # An error after the stop text is none of the answer.
    with contextlib.suppress(TimeoutError, LLMMagicError):
        async with asyncio.timeout(_END_S):
            async for chunk in source:
                if chunk.finish_reason:
                    return chunk
                if chunk.text or chunk.reasoning:
                    break
    return Chunk()
