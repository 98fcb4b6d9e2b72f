"""A complete backend: it repeats the question, word by word. docs/backends.md reads it aloud."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import psutil

from llm_magic.backends.base import Backend, LoadPlan, Report, TokenCount
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.errors import ModelNotFound, OptionError
from llm_magic.types import Chunk, MemoryUse, Message, ModelInfo, Unloaded, Usage


class EchoBackend(Backend):
    name, counts_here = "echo", True
    pace = 0.0  # seconds a word

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        return [ModelInfo("parrot", self.name, context_length=2048)]

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        if model not in (None, "parrot"):
            raise ModelNotFound(f"echo has no model {model!r}. Type %llm_load parrot -b echo.")
        return LoadPlan("parrot", "parrot", config, source=None)

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        return ModelInfo(name, self.name, source=plan.model, context_length=2048)

    async def unload(self, name: str) -> Unloaded:
        return Unloaded(name, 0, self.memory(), self.memory())

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        text = messages[-1].content
        for stop in config.stop:
            text = text.partition(stop)[0]
        words = text.split(" ")
        said = words[: config.max_new_tokens]
        for n, word in enumerate(said):
            await asyncio.sleep(self.pace)
            yield Chunk(f" {word}" if n else word, tokens=1, time=time.perf_counter())
        usage = Usage((await self.count(name, messages)).prompt_tokens, len(said))
        yield Chunk(finish_reason="stop" if said == words else "length", usage=usage)

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        return TokenCount(sum(len(m.content.split()) for m in messages), 2048)

    def check_extra(self, config: GenerationConfig) -> None:
        if config.extra:
            raise OptionError("echo takes no -p: what it can do has an option of its own.")

    def memory(self) -> MemoryUse:
        return MemoryUse(psutil.Process().memory_info().rss)

    async def aclose(self) -> None: ...  # nothing is open
