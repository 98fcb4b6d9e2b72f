"""Answers many conversations with one loaded model, at once and one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import LLMMagicError
from llm_magic.session import Session
from llm_magic.types import Chunk, FinishReason, Message, Usage
from tests.local_models import local_backend, local_model

Answer = tuple[str, FinishReason, Usage]
Item = tuple[int, Chunk | LLMMagicError]
Conversations = Sequence[Sequence[Message]]
TEXT = "the other man in a hat on the table sat there "
# From 15 to about 150 tokens, some of them of the same length.
PROMPTS = [TEXT[number % 11 :][: 3 + number] * (1 + number % 3) for number in range(36)]


def conversations(prompts: Sequence[str]) -> list[list[Message]]:
    """Return each prompt as a conversation of one turn."""
    return [[Message("user", prompt)] for prompt in prompts]


def joined(chunks: Sequence[Chunk]) -> Answer:
    """Return the text, the finish reason and the usage of an answer."""
    first, *_, last = chunks
    assert first.usage is not None
    assert last.usage is not None
    assert last.finish_reason is not None
    assert {chunk.finish_reason for chunk in chunks[:-1]} == {None}
    assert first.usage.prompt_tokens == last.usage.prompt_tokens
    assert sum(chunk.tokens for chunk in chunks) == last.usage.completion_tokens
    usage = Usage(last.usage.prompt_tokens, last.usage.completion_tokens)
    return "".join(chunk.text for chunk in chunks), last.finish_reason, usage


class Passes:
    """The forward passes of a model, by sequences and columns; `before` runs at each, and may raise."""

    def __init__(self, before: Callable[[Any], None]) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._before = before

    def __call__(self, _module: Any, _args: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        self.shapes.append(tuple(ids.shape))
        self._before(ids)

    @property
    def tokens(self) -> int:
        """All tokens that were read, with the padding."""
        return sum(sequences * columns for sequences, columns in self.shapes)


class BatchModel:
    """A loaded model that answers conversations together, and one by one for comparison."""

    def __init__(self, session: Session, folder: str, **options: Any) -> None:
        """Load it in float32, where the other sequences of a batch do not change an answer."""
        info = session.load(folder, dtype="float32", device="cpu", **options)
        self._session, self._name = session, info.name
        self._backend = local_backend(session)
        self._answers: dict[str, Answer] = {}

    @property
    def model(self) -> Any:
        """The PyTorch module."""
        return local_model(self._session, self._name).model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return local_model(self._session, self._name).tokenizer

    def answer(self, messages: Sequence[Message], config: GenerationConfig) -> Answer:
        """Answer one conversation alone."""

        async def ask() -> list[Chunk]:
            return [chunk async for chunk in self._backend.stream(self._name, messages, config)]

        return joined(asyncio.run(ask()))

    def alone(self, many: Conversations, config: GenerationConfig) -> list[Answer]:
        """Answer one conversation after another; answers to equal requests are reused."""
        answers = []
        for messages in many:
            key = repr((messages, config))
            if key not in self._answers:
                self._answers[key] = self.answer(messages, config)
            answers.append(self._answers[key])
        return answers

    def items(self, many: Conversations, config: GenerationConfig) -> list[Item]:
        """Answer all conversations together; returns the items as they come."""

        async def ask() -> list[Item]:
            return [item async for item in self._backend.stream_many(self._name, many, config)]

        return asyncio.run(ask())

    def together(
        self, many: Conversations, config: GenerationConfig
    ) -> list[Answer | LLMMagicError]:
        """Answer all conversations together; returns the answer of each, or its error."""
        items = self.items(many, config)
        results: list[Answer | LLMMagicError] = []
        for index in range(len(many)):
            own = [item for number, item in items if number == index]
            chunks = [item for item in own if isinstance(item, Chunk)]
            last = own[-1]
            results.append(joined(chunks) if isinstance(last, Chunk) else last)
        return results

    def close_after(self, count: int, many: Conversations, config: GenerationConfig) -> float:
        """Close the stream of all conversations after `count` items; returns how long that takes."""

        async def ask() -> float:
            stream = self._backend.stream_many(self._name, many, config)
            for _ in range(count):
                await anext(stream)
            began = time.perf_counter()
            await stream.aclose()
            return time.perf_counter() - began

        return asyncio.run(ask())

    @contextlib.contextmanager
    def passes(self, before: Callable[[Any], None] = lambda _ids: None) -> Iterator[Passes]:
        """Collect the forward passes of the model; `before` gets their token ids, and may raise."""
        passes = Passes(before)
        handle = self.model.register_forward_pre_hook(passes, with_kwargs=True)
        try:
            yield passes
        finally:
            handle.remove()
