"""Answers many conversations with one loaded model, at once and one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.local.local_model import LocalModel
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import LLMMagicError
from llm_magic.session import Session
from llm_magic.types import Chunk, FinishReason, Message, Usage
from tests.local_models import local_backend, local_model

Answer = tuple[str, FinishReason, Usage]
Item = tuple[int, Chunk | LLMMagicError]
Conversations = Sequence[Sequence[Message]]
TEXT = "the other man in a hat on the table sat there "
# How many sequences share a step in tests.
SIZE = 8
# From 15 to about 150 tokens, some of them of the same length.
PROMPTS = [TEXT[number % 11 :][: 3 + number] * (1 + number % 3) for number in range(36)]


def conversations(prompts: Sequence[str]) -> list[list[Message]]:
    """Return each prompt as a conversation of one turn."""
    return [[Message("user", prompt)] for prompt in prompts]


def joined(chunks: Sequence[Chunk]) -> Answer:
    """Return the text, the finish reason and the usage of an answer."""
    chunks = [chunk for chunk in chunks if not (chunk.queued or chunk.progress)]
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


@dataclass(frozen=True)
class Arrival:
    """A request that comes before a forward pass, by its number, and is cancelled before another one."""

    prompt: str
    config: GenerationConfig
    at: int = 0
    cancelled_at: int | None = None


class BatchModel:
    """A loaded model that answers conversations together, and one by one for comparison."""

    def __init__(self, session: Session, folder: str, **options: Any) -> None:
        """Load it in float32, where the other sequences of a batch do not change an answer."""
        info = session.load(folder, dtype="float32", device="cpu", **options)
        self._session, self.name = session, info.name
        self._backend = local_backend(session)
        self._answers: dict[str, Answer] = {}

    @property
    def loaded(self) -> LocalModel:
        """The loaded model."""
        return local_model(self._session, self.name)

    @property
    def model(self) -> Any:
        """The PyTorch module."""
        return local_model(self._session, self.name).model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return local_model(self._session, self.name).tokenizer

    def answer(self, messages: Sequence[Message], config: GenerationConfig) -> Answer:
        """Answer one conversation alone."""

        async def ask() -> list[Chunk]:
            return [chunk async for chunk in self._backend.stream(self.name, messages, config)]

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

    async def stream(
        self, messages: Sequence[Message], config: GenerationConfig, index: int, items: list[Item]
    ) -> None:
        """Answer one conversation; appends its chunks, or its error, to `items` as they come."""
        try:
            async for chunk in self._backend.stream(self.name, messages, config):
                items.append((index, chunk))
        except LLMMagicError as error:
            items.append((index, error))

    def items(self, many: Conversations, config: GenerationConfig) -> list[Item]:
        """Answer all conversations together; returns the items as they come."""
        items: list[Item] = []

        async def ask() -> None:
            await asyncio.gather(
                *(self.stream(one, config, n, items) for n, one in enumerate(many))
            )

        asyncio.run(ask())
        return items

    def together(
        self, many: Conversations, config: GenerationConfig
    ) -> list[Answer | LLMMagicError]:
        """Answer all conversations together; returns the answer of each, or its error."""
        results = _results(self.items(many, config), len(many))
        return [result for result in results if result is not None]

    def close_after(self, count: int, many: Conversations, config: GenerationConfig) -> float:
        """Stop all conversations after `count` items; returns how long that takes."""
        items: list[Item] = []

        async def ask() -> float:
            tasks = [
                asyncio.ensure_future(self.stream(one, config, n, items))
                for n, one in enumerate(many)
            ]
            while len(items) < count:
                await asyncio.sleep(0.001)
            began = time.perf_counter()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return time.perf_counter() - began

        return asyncio.run(ask())

    def arrivals(
        self, arrivals: Sequence[Arrival]
    ) -> tuple[list[Answer | LLMMagicError | None], Passes]:
        """Answer requests that come while others are answered; returns None for a cancelled one."""
        items, cancelled, passes = self.arrival_items(arrivals)
        return _results(items, len(arrivals), cancelled), passes

    def arrival_items(self, arrivals: Sequence[Arrival]) -> tuple[list[Item], set[int], Passes]:
        """Answer requests that come while others are answered; returns the items as they come.

        Also which requests were cancelled, and the forward passes.
        """
        items: list[Item] = []
        tasks: dict[int, asyncio.Task[None]] = {}

        async def start(number: int) -> None:
            one = arrivals[number]
            (messages,) = conversations([one.prompt])
            coroutine = self.stream(messages, one.config, number, items)
            tasks[number] = asyncio.get_running_loop().create_task(coroutine)
            await _others()

        async def cancel(number: int) -> None:
            tasks[number].cancel()
            await _others()

        async def ask() -> Passes:
            loop = asyncio.get_running_loop()

            def come_and_go(_ids: Any) -> None:
                # On the inference thread, which goes on once the requests are queued.
                for number, one in enumerate(arrivals):
                    passed = len(passes.shapes) - 1
                    if number not in tasks and one.at <= passed:
                        asyncio.run_coroutine_threadsafe(start(number), loop).result(10)
                    if number in tasks and one.cancelled_at == passed:
                        asyncio.run_coroutine_threadsafe(cancel(number), loop).result(10)

            with self.passes(come_and_go) as passes:
                while missing := [n for n in range(len(arrivals)) if n not in tasks]:
                    await start(missing[0])
                    while pending := [task for task in tasks.values() if not task.done()]:
                        await asyncio.wait(pending)
            return passes

        passes = asyncio.run(ask())
        return items, {number for number, task in tasks.items() if task.cancelled()}, passes

    def wait_until_idle(self) -> None:
        """Wait until the thread has left the last answers, whose readers go on before that."""
        asyncio.run(self._backend.count(self.name, [Message("user", "x")]))

    @contextlib.contextmanager
    def passes(self, before: Callable[[Any], None] = lambda _ids: None) -> Iterator[Passes]:
        """Collect the forward passes of the model; `before` gets their token ids, and may raise."""
        passes = Passes(before)
        handle = self.model.register_forward_pre_hook(passes, with_kwargs=True)
        try:
            yield passes
        finally:
            handle.remove()


async def _others() -> None:
    """Let the other tasks of the loop run."""
    for _ in range(8):
        await asyncio.sleep(0)


def _results(
    items: Sequence[Item], count: int, cancelled: Collection[int] = ()
) -> list[Answer | LLMMagicError | None]:
    results: list[Answer | LLMMagicError | None] = []
    for index in range(count):
        own = [item for number, item in items if number == index]
        chunks = [item for item in own if isinstance(item, Chunk)]
        if index in cancelled:
            results.append(None)
        else:
            results.append(joined(chunks) if isinstance(own[-1], Chunk) else own[-1])
    return results
