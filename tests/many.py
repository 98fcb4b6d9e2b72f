"""Asks one resident model many things at once, and one at a time, through the door of its backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import LLMMagicError
from llm_magic.session import Session
from llm_magic.types import Chunk, FinishReason, Message, Usage
from tests.local_models import local_model

Answer = tuple[str, FinishReason, Usage]
Conversations = Sequence[Sequence[Message]]
TEXT = "the other man in a hat on the table sat there "
# More than share a step on a CPU; from 15 to about 150 tokens, some of them of the same length.
PROMPTS = [TEXT[number % 11 :][: 3 + number] * (1 + number % 3) for number in range(36)]


def asked(prompts: Sequence[str]) -> list[list[Message]]:
    """Prompts as conversations."""
    return [[Message("user", prompt)] for prompt in prompts]


def put_together(chunks: Sequence[Chunk]) -> Answer:
    """What is said in all chunks; only the last one says how it ended."""
    first, *_, last = chunks
    assert first.usage is not None
    assert last.usage is not None
    assert last.finish_reason is not None
    assert {chunk.finish_reason for chunk in chunks[:-1]} == {None}
    assert first.usage.prompt_tokens == last.usage.prompt_tokens
    assert sum(chunk.tokens for chunk in chunks) == last.usage.completion_tokens
    usage = Usage(last.usage.prompt_tokens, last.usage.completion_tokens)
    return "".join(chunk.text for chunk in chunks), last.finish_reason, usage


def outcomes(
    items: Sequence[tuple[int, Chunk | LLMMagicError]], count: int
) -> list[Answer | LLMMagicError]:
    """What each of the rows ended with."""
    answers: list[Answer | LLMMagicError] = []
    for index in range(count):
        mine = [item for number, item in items if number == index]
        chunks = [item for item in mine if isinstance(item, Chunk)]
        last = mine[-1]
        answers.append(put_together(chunks) if isinstance(last, Chunk) else last)
    return answers


class Passes:
    """Every pass of a model: how many rows and columns it read; `before` may break it."""

    def __init__(self, before: Callable[[Any], None]) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._before = before

    def __call__(self, _module: Any, _args: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        self.shapes.append(tuple(ids.shape))
        self._before(ids)

    @property
    def tokens(self) -> int:
        """All that was read, padding and all."""
        return sum(rows * columns for rows, columns in self.shapes)


class Asker:
    """One resident model, and the backend that has it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.name = ""

    @property
    def backend(self) -> Any:
        """The real one."""
        return self.session._manager._backends["local"]

    @property
    def model(self) -> Any:
        """The PyTorch module."""
        return local_model(self.session, self.name).model

    def load(self, folder: Path) -> Asker:
        """Load a model in float32, where neighbours change nothing that could be seen."""
        self.name = self.session.load(str(folder), dtype="float32", device="cpu").name
        return self

    def alone(self, conversations: Conversations, config: GenerationConfig) -> list[Answer]:
        """Ask one after another."""

        async def ask(messages: Sequence[Message]) -> list[Chunk]:
            return [chunk async for chunk in self.backend.stream(self.name, messages, config)]

        return [put_together(self.session._loop.run(ask(turns))) for turns in conversations]

    def items(
        self, conversations: Conversations, config: GenerationConfig
    ) -> list[tuple[int, Chunk | LLMMagicError]]:
        """Ask all at once; returns what comes, as it comes."""

        async def ask() -> list[tuple[int, Chunk | LLMMagicError]]:
            many = self.backend.stream_many(self.name, conversations, config)
            return [item async for item in many]

        return self.session._loop.run(ask())

    def together(
        self, conversations: Conversations, config: GenerationConfig
    ) -> list[Answer | LLMMagicError]:
        """Ask all at once; returns the answers, or what they ended with."""
        return outcomes(self.items(conversations, config), len(conversations))

    @contextlib.contextmanager
    def watched(self, before: Callable[[Any], None] = lambda _ids: None) -> Iterator[Passes]:
        """See what the model does, or break it."""
        passes = Passes(before)
        handle = self.model.register_forward_pre_hook(passes, with_kwargs=True)
        try:
            yield passes
        finally:
            handle.remove()
