"""Separates the reasoning that a model writes into its text, between ``<think>`` and ``</think>``."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from llm_magic.backends.stop_strings import until_stop
from llm_magic.errors import LLMMagicError
from llm_magic.types import Chunk

if TYPE_CHECKING:
    from llm_magic.backends.base import Backend
    from llm_magic.backends.manager import LoadedModel
    from llm_magic.config.settings import GenerationConfig
    from llm_magic.types import Message

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
# What decides about text that no tag opened: a closing tag at the start of a line, any opening tag.
_DECIDING_TAG = re.compile(rf"(?<=\n){CLOSE_TAG}|{OPEN_TAG}")
_Kind = Literal["reasoning", "text", "reasoning ended"]


class ReasoningSplitter:
    """Splits the text of one answer, however it is cut into pieces.

    Only a tag at the beginning of an answer opens reasoning: later ones are text about tags. A
    closing tag at the beginning of a line, without an opening one anywhere, ends reasoning that the
    template of the prompt opened.
    """

    def __init__(self) -> None:
        # What may be the start of a tag, and text before it: a line break or the start of a tag at least.
        self._held, self._context = "", "\n"
        # After a closing tag come "blanks", which belong to neither; "final" text has no tags.
        self._state: Literal["start", "reasoning", "text", "blanks", "final"] = "start"

    def feed(self, chunk: Chunk) -> Iterator[Chunk]:
        """Yield the reasoning and the text of `chunk`."""
        is_plain = self._state == "text" and "<" not in self._context + chunk.text
        if is_plain and not (self._held or chunk.reasoning or chunk.finish_reason):
            # Nearly every chunk.
            self._context = chunk.text or self._context
            yield chunk
            return
        if chunk.reasoning and self._state in {"start", "text"}:
            # The server separates them itself: what looks like a tag is text.
            yield from self.flush()
            self._state = "final"
        if self._state == "final" or not (chunk.text or chunk.finish_reason):
            yield chunk
            return
        pieces = list(self._split(self._held + chunk.text))
        if chunk.finish_reason and self._held:
            pieces.append((self._held_kind, self._held))
            self._held = ""
        if pieces == [("text", chunk.text)]:
            yield chunk
            return
        # Counts and the finish reason are in the last piece, so that none counts twice.
        for kind, text in pieces[:-1]:
            yield _piece(Chunk(time=chunk.time), kind, text)
        whole = dataclasses.replace(chunk, text="")
        yield _piece(whole, *pieces[-1]) if pieces else whole

    def flush(self) -> Iterator[Chunk]:
        """Yield what was held back when an answer breaks off: it is no tag."""
        if self._held:
            yield _piece(Chunk(time=time.perf_counter()), self._held_kind, self._held)
            self._held = ""

    @property
    def _held_kind(self) -> _Kind:
        return "reasoning" if self._state == "reasoning" else "text"

    def _split(self, text: str) -> Iterator[tuple[_Kind, str]]:
        """Yield the parts of a text with their kinds; holds back what may be the start of a tag."""
        self._held = ""
        if self._state == "start":
            text = self._after_opening(text)
        if self._state == "reasoning":
            before, tag, text = text.partition(CLOSE_TAG)
            if tag:
                self._state = "blanks"
            else:
                before = self._without_partial_tag(before)
            if before:
                yield "reasoning", before
        elif self._state == "text":
            text = yield from self._until_tag(text)
        if self._state == "blanks":
            text = text.lstrip()
        if text and self._state in {"blanks", "final"}:
            self._state = "final"
            yield "text", text

    def _after_opening(self, text: str) -> str:
        """Return the text after the tag that an answer starts with, or all of it."""
        start = text.lstrip()
        if start.startswith(OPEN_TAG):
            self._state = "reasoning"
            return start.removeprefix(OPEN_TAG)
        if start.startswith(CLOSE_TAG):
            self._state = "blanks"
            return start.removeprefix(CLOSE_TAG)
        if OPEN_TAG.startswith(start) or CLOSE_TAG.startswith(start):
            self._held = text
            return ""
        self._state = "text"
        return text

    def _until_tag(self, text: str) -> Generator[tuple[_Kind, str], None, str]:
        """Yield the text before the tag that decides what it is; returns the text after it."""
        searched = self._context + text
        found = _DECIDING_TAG.search(searched)
        if found is not None and found[0] == OPEN_TAG:
            # An answer about tags.
            self._state = "final"
            return text
        before, after = text, ""
        if found is not None:
            self._state = "blanks"
            before, after = searched[len(self._context) : found.start()], searched[found.end() :]
        elif "<" in text:
            before = self._without_partial_tag(text)
        if before:
            self._context = (self._context + before)[-len(OPEN_TAG) :]
            yield "text", before
        if found is not None:
            yield "reasoning ended", ""
        return after

    def _without_partial_tag(self, text: str) -> str:
        """Hold back the start of a closing tag at the end of a text; returns what is before it."""
        at = text.rfind("<")
        if at < 0 or not CLOSE_TAG.startswith(text[at:]):
            return text
        if self._state == "text" and not (self._context + text[:at]).endswith("\n"):
            return text
        self._held = text[at:]
        return text[:at]


def _piece(chunk: Chunk, kind: _Kind, text: str) -> Chunk:
    if kind == "reasoning ended":
        return dataclasses.replace(chunk, ends_reasoning=True)
    if kind == "reasoning":
        return dataclasses.replace(chunk, reasoning=chunk.reasoning + text)
    return dataclasses.replace(chunk, text=text)


async def split_reasoning(
    source: AsyncGenerator[Chunk, None], pending: list[Chunk]
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
            pending.extend(splitter.flush())
            raise
        for piece in splitter.flush():
            yield piece


def separated(
    chunks: AsyncGenerator[Chunk, None],
    backend: Backend,
    config: GenerationConfig,
    pending: list[Chunk],
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of an answer up to its stop strings, with the reasoning separated.

    What is held back when the reader leaves is added to `pending`.
    """
    if config.stop and not backend.capabilities.stop_strings:
        chunks = until_stop(chunks, config.stop, pending)
    return split_reasoning(chunks, pending)


def separated_answer(
    loaded: LoadedModel, messages: Sequence[Message], config: GenerationConfig
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of a new answer, see `separated`."""
    chunks = loaded.backend.stream(loaded.name, messages, config)
    return separated(chunks, loaded.backend, config, [])
