"""Separates the reasoning that a model writes into its text, between ``<think>`` and ``</think>``."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator

from llm_magic.backends.stop_strings import overlap
from llm_magic.errors import LLMMagicError
from llm_magic.types import Chunk

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"


class ReasoningSplitter:
    """Splits the text of one answer, however it is cut into pieces.

    Only a tag at the beginning of an answer opens reasoning: later ones are text about tags. A
    closing tag at the beginning of a line, without an opening one anywhere, ends reasoning that the
    template of the prompt opened.
    """

    def __init__(self) -> None:
        self._held = ""
        self._shown = ""
        self._is_line_start = True
        self._state = "before"  # -> "in" -> "behind" -> "after", or straight to "text"

    def feed(self, chunk: Chunk) -> Iterator[Chunk]:
        """Yield what `chunk` is made of: reasoning, text."""
        if self._is_plain(chunk):
            self._is_line_start = chunk.text.endswith("\n")
            yield chunk
            return
        if chunk.reasoning and self._state in {"before", "text"}:
            # The server keeps them apart itself: what looks like a tag is text.
            yield from self.flush()
            self._state = "after"
        if self._state == "after" or not (chunk.text or chunk.finish_reason):
            yield chunk
            return
        pieces = [*self._split(chunk.text), *(self._flush() if chunk.finish_reason else ())]
        yield from self._chunks(chunk, pieces)

    def _is_plain(self, chunk: Chunk) -> bool:
        """Whether no tag can begin, go on or end in it, which is so for nearly every chunk."""
        if self._state != "text" or self._held or chunk.reasoning or chunk.finish_reason:
            return False
        return "<" not in chunk.text and bool(chunk.text) and "<" not in self._shown

    def flush(self) -> Iterator[Chunk]:
        """Yield what was held back when an answer breaks off."""
        for kind, text in self._flush():
            yield _piece(Chunk(time=time.perf_counter()), kind, text)

    def _chunks(self, chunk: Chunk, pieces: list[tuple[str, str]]) -> Iterator[Chunk]:
        """Yield the pieces; counts and the end go with the last one, so that none counts twice."""
        if pieces == [("text", chunk.text)]:
            yield chunk
            return
        whole = dataclasses.replace(chunk, text="")
        for kind, text in pieces[:-1]:
            yield _piece(Chunk(time=chunk.time), kind, text)
        yield _piece(whole, *pieces[-1]) if pieces else whole

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        self._held += text
        if self._state == "before":
            self._find_opening()
        if self._state in {"in", "text"}:
            yield from self._until_close()
        if self._state == "behind":
            # The empty lines between thought and answer belong to neither.
            self._held = self._held.lstrip()
            if self._held:
                self._state = "after"
        if self._state == "after" and self._held:
            yield "text", self._held
            self._held = ""

    def _find_opening(self) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN_TAG):
            self._held, self._state = start[len(OPEN_TAG) :], "in"
        elif start.startswith(CLOSE_TAG):
            self._held, self._state = start[len(CLOSE_TAG) :], "behind"
        elif not (OPEN_TAG.startswith(start) or CLOSE_TAG.startswith(start)):
            self._state = "text"

    def _until_close(self) -> Iterator[tuple[str, str]]:
        kind = "reasoning" if self._state == "in" else "text"
        at = self._closing()
        if at < 0:
            keep = overlap(self._held, CLOSE_TAG)
            at = len(self._held) - (keep if self._may_close(len(self._held) - keep) else 0)
            shown, self._held = self._held[:at], self._held[at:]
        else:
            shown, self._held = self._held[:at], self._held[at + len(CLOSE_TAG) :]
            self._state = "behind"
        if shown:
            yield kind, shown
            self._is_line_start = shown.endswith("\n")
            # Enough of what was shown to find a tag that was cut.
            self._shown = (self._shown + shown)[-(len(shown) + len(OPEN_TAG)) :]
        if kind == "text" and OPEN_TAG in self._shown:
            # An answer about tags.
            self._held = f"{CLOSE_TAG if self._state == 'behind' else ''}{self._held}"
            self._state = "after"
        elif kind == "text" and self._state == "behind":
            yield "reasoning ended", ""

    def _closing(self) -> int:
        """Return where a closing tag stands that ends the thought, -1 if there is none."""
        at = self._held.find(CLOSE_TAG)
        while at > 0 and not self._may_close(at):
            at = self._held.find(CLOSE_TAG, at + 1)
        return at if at < 0 or self._may_close(at) else -1

    def _may_close(self, at: int) -> bool:
        if self._state == "in":
            return True
        return self._held[at - 1] == "\n" if at else self._is_line_start

    def _flush(self) -> Iterator[tuple[str, str]]:
        """Yield what was held back at the end of an answer: it is no tag."""
        if self._held:
            yield ("reasoning" if self._state == "in" else "text"), self._held
        self._held = ""


def _piece(chunk: Chunk, kind: str, text: str) -> Chunk:
    if kind == "reasoning ended":
        return dataclasses.replace(chunk, ends_reasoning=True)
    if kind == "reasoning":
        return dataclasses.replace(chunk, reasoning=chunk.reasoning + text)
    return dataclasses.replace(chunk, text=text)


async def split_reasoning(
    source: AsyncGenerator[Chunk, None], pending: list[Chunk] | None = None
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of an answer with the reasoning in its text separated.

    What is held back when the reader leaves cannot be yielded any more: it is added to `pending`.
    """
    splitter = ReasoningSplitter()
    async with contextlib.aclosing(source):
        try:
            async for chunk in source:
                for piece in splitter.feed(chunk):
                    yield piece
        except LLMMagicError:
            for piece in splitter.flush():
                yield piece
            raise
        except (GeneratorExit, asyncio.CancelledError):
            if pending is not None:
                pending.extend(splitter.flush())
            raise
        for piece in splitter.flush():
            yield piece
