"""Ends a text before the first of its stop strings, whether it comes from a model or a server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence

from llm_magic.errors import LLMMagicError
from llm_magic.types import Chunk

# How long after a stop string the end may take, with the counts; then the answer is closed.
_END_S = 1.0


def overlap(text: str, searched: str) -> int:
    """Return the length of the longest end of `text` that starts `searched`, and is not all of it."""
    # Called for each token of an answer; most texts do not even have the first letter.
    if searched[0] not in text[-len(searched) :]:
        return 0
    longest = min(len(text), len(searched) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(searched[:n])), 0)


class StopText:
    """Ends a text before the first of some stop strings; holds back what may be their start."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.reached = False

    def feed(self, text: str) -> str:
        """Return what can be shown now; sets `reached` where a stop string is complete."""
        if not self._stops or self.reached:
            return "" if self.reached else text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.reached = True
            # The one that is complete first: so the result does not depend on the pieces.
            _end, start = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        held = max(overlap(self._held, stop) for stop in self._stops)
        end = len(self._held) - held
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


async def until_stop(
    source: AsyncGenerator[Chunk, None], stops: Sequence[str], pending: list[Chunk]
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of an answer up to the first stop string, and close `source` there.

    Only what may be the start of a stop string is held back. If the reader leaves meanwhile, it is
    added to `pending`. Reasoning that a server separates is not searched: servers differ in that.
    """
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
