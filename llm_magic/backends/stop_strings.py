"""Ends a text before the first of its stop strings, whether it comes from a model or a server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence

from llm_magic.errors import LLMMagicError
from llm_magic.types import Chunk, TokenLogprob

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


class ShownTokens:
    """Passes on the tokens of a text, each with its probability, as far as the text is shown."""

    def __init__(self) -> None:
        self._tokens: list[TokenLogprob] = []
        self._shown = 0  # characters of these tokens

    def add(self, *tokens: TokenLogprob) -> None:
        """Add the next tokens of the text."""
        self._tokens += tokens

    def complete(self, text: str) -> None:
        """Append a text to the last token, which had none of its own."""
        if self._tokens and text:
            last = self._tokens[-1]
            self._tokens[-1] = dataclasses.replace(last, text=last.text + text)

    def feed(self, shown: str) -> tuple[TokenLogprob, ...]:
        """Return the tokens whose text is shown completely with the next part of the text.

        A token without text belongs to the next one with text.
        """
        self._shown += len(shown)
        count = end = length = 0
        for number, token in enumerate(self._tokens, 1):
            length += len(token.text)
            if length > self._shown:
                break
            if token.text:
                count, end = number, length
        self._shown -= end
        whole, self._tokens = self._tokens[:count], self._tokens[count:]
        return tuple(whole)

    def end(self) -> tuple[TokenLogprob, ...]:
        """Return the token in which the shown text ends, with the part of its text that is shown."""
        part: list[TokenLogprob] = []
        for token in self._tokens if self._shown else ():
            part.append(dataclasses.replace(token, text=token.text[: self._shown]))
            if token.text:
                break
        self._tokens, self._shown = [], 0
        return tuple(part)


async def until_stop(
    source: AsyncGenerator[Chunk, None], stops: Sequence[str], pending: list[Chunk]
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of an answer up to the first stop string, and close `source` there.

    Only what may be the start of a stop string is held back. If the reader leaves meanwhile, it is
    added to `pending`. Reasoning that a server separates is not searched: servers differ in that.
    """
    stop, tokens = StopText(stops), ShownTokens()
    async with contextlib.aclosing(source):
        try:
            async for chunk in source:
                yield _cut(chunk, stop, tokens)
                if stop.reached and not chunk.finish_reason:
                    end = await _end(source)
                    yield Chunk(finish_reason="stop", usage=end.usage, time=time.perf_counter())
                    if end.finish_reason is None:
                        return
        except LLMMagicError:
            yield _held(stop, tokens)
            raise
        except (GeneratorExit, asyncio.CancelledError):
            pending.append(_held(stop, tokens))
            raise


def _held(stop: StopText, tokens: ShownTokens) -> Chunk:
    """Return what was held back."""
    text = stop.flush()
    return Chunk(text=text, time=time.perf_counter(), logprobs=tokens.feed(text))


def _cut(chunk: Chunk, stop: StopText, tokens: ShownTokens) -> Chunk:
    """Return what can be shown of a chunk; with the last one that is everything."""
    text = stop.feed(chunk.text)
    if chunk.finish_reason:
        text += stop.flush()
    tokens.add(*chunk.logprobs)
    logprobs = tokens.feed(text)
    if chunk.finish_reason or stop.reached:
        logprobs += tokens.end()
    reason = "stop" if chunk.finish_reason and stop.reached else chunk.finish_reason
    if (text, reason, logprobs) == (chunk.text, chunk.finish_reason, chunk.logprobs):
        return chunk
    return dataclasses.replace(chunk, text=text, finish_reason=reason, logprobs=logprobs)


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
