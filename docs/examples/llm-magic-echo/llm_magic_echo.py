"""A backend that repeats the prompt word by word, without a model."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, ClassVar

import psutil

from llm_magic.backends.base import (
    UNSUPPORTED,
    Backend,
    Capabilities,
    LoadPlan,
    Report,
    TokenCount,
)
from llm_magic.config.option_spec import OptionSpec
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.errors import ModelNotFound
from llm_magic.types import Chunk, MemoryUse, Message, ModelInfo, Unloaded, Usage


class EchoLoadConfig(LoadConfig):
    pause: Annotated[
        float,
        OptionSpec("Seconds between two pieces.", ("--pause",), "S", label="Pause", minimum=0),
    ] = 0.0


class EchoBackend(Backend):
    name = "echo"
    load_config = EchoLoadConfig
    capabilities = Capabilities(in_process=True, local_token_counts=True)
    option_names: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(GenerationConfig.model_fields, UNSUPPORTED),
        "max_new_tokens": "pieces",
        "stop": "stop",
    }
    pause = 0.0

    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        return [ModelInfo("parrot", self.name, context_length=2048)]

    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        if model not in (None, "parrot"):
            raise ModelNotFound(f"echo has no model {model!r}. Run %llm_load parrot -b echo.")
        return LoadPlan("parrot", "parrot", config, source=None)

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        assert isinstance(plan.config, EchoLoadConfig)
        self.pause = plan.config.pause
        return ModelInfo(name, self.name, source=plan.model, context_length=2048)

    async def unload(self, name: str) -> Unloaded:
        return Unloaded(name, 0, self.memory(), self.memory())

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        text = messages[-1].content
        for stop in config.stop:
            text = text.partition(stop)[0]
        pieces = text.split(" ")
        sent = pieces[: config.max_new_tokens]
        for n, word in enumerate(sent):
            await asyncio.sleep(self.pause)
            yield Chunk(f" {word}" if n else word, tokens=1, time=time.perf_counter())
        usage = Usage((await self.count(name, messages)).prompt_tokens, len(sent))
        yield Chunk(finish_reason="stop" if sent == pieces else "length", usage=usage)

    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        return TokenCount(sum(len(m.content.split()) for m in messages), 2048)

    def memory(self) -> MemoryUse:
        return MemoryUse(psutil.Process().memory_info().rss)

    async def aclose(self) -> None: ...  # nothing is open
