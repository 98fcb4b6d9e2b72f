"""Thoughts that a model writes into its text, between ``<think>`` and ``</think>``, kept apart."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator

from llm_magic.errors import LLMMagicError
from llm_magic.types import Chunk

_OPEN, _CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """Splits the text of one answer, however it is cut into pieces.

    Only a tag at the beginning of an answer opens a thought: later ones are text about tags. A
    closing tag at the beginning of a line, without an opening one anywhere, ends a thought that the
    prompt's template began.
    """

    def __init__(self) -> None:
        self._held = ""
        self._shown = ""
        self._place = "before"  # -> "in" -> "behind" -> "after", or straight to "text"

    def feed(self, chunk: Chunk) -> Iterator[Chunk]:
        """Yield what `chunk` is made of: reasoning, text."""
        if chunk.reasoning and self._place == "before":
            # The server keeps them apart itself: what looks like a tag is text.
            self._place = "after"
        if self._place == "after" or not (chunk.text or chunk.finish_reason):
            yield chunk
            return
        pieces = [*self._split(chunk.text), *(self._rest() if chunk.finish_reason else ())]
        yield from self._chunks(chunk, pieces)

    def flush(self) -> Iterator[Chunk]:
        """Yield what was held back when an answer breaks off."""
        for kind, text in self._rest():
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
        if self._place == "before":
            self._begin()
        if self._place in {"in", "text"}:
            yield from self._until_close()
        if self._place == "behind":
            # The empty lines between thought and answer belong to neither.
            self._held = self._held.lstrip()
            if self._held:
                self._place = "after"
        if self._place == "after" and self._held:
            yield "text", self._held
            self._held = ""

    def _begin(self) -> None:
        start = self._held.lstrip()
        if start.startswith(_OPEN):
            self._held, self._place = start[len(_OPEN) :], "in"
        elif start.startswith(_CLOSE):
            self._held, self._place = start[len(_CLOSE) :], "behind"
        elif not (_OPEN.startswith(start) or _CLOSE.startswith(start)):
            self._place = "text"

    def _until_close(self) -> Iterator[tuple[str, str]]:
        kind, mark = ("reasoning", _CLOSE) if self._place == "in" else ("text", f"\n{_CLOSE}")
        before, close, rest = self._held.partition(mark)
        keep = 0 if close else _overlap(before, mark)
        shown, held = before[: len(before) - keep], before[len(before) - keep :]
        if shown:
            yield kind, shown
        # Enough of what was shown to find a tag that was cut.
        self._shown = (self._shown + shown)[-(len(shown) + len(_OPEN)) :]
        if kind == "text" and _OPEN in self._shown:
            # An answer about tags.
            self._place = "after"
        elif close:
            self._place = "behind"
            if kind == "text":
                yield "thought", ""
        self._held = (f"{mark}{rest}" if self._place == "after" else rest) if close else held

    def _rest(self) -> Iterator[tuple[str, str]]:
        """Yield what was held back at the end of an answer: no tag came of it."""
        if self._held:
            yield ("reasoning" if self._place == "in" else "text"), self._held
        self._held = ""


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def _piece(chunk: Chunk, kind: str, text: str) -> Chunk:
    if kind == "thought":
        return dataclasses.replace(chunk, thought=True)
    if kind == "reasoning":
        return dataclasses.replace(chunk, reasoning=text)
    return dataclasses.replace(chunk, text=text)


async def split_thoughts(source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of an answer with the thoughts in its text kept apart."""
    splitter = ThinkSplitter()
    async with contextlib.aclosing(source):
        try:
            async for chunk in source:
                for piece in splitter.feed(chunk):
                    yield piece
        except LLMMagicError:
            for piece in splitter.flush():
                yield piece
            raise
