"""A backend that worker processes find as an installed package: it records loads and rows in a folder."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from llm_magic.backends.base import Capabilities, LoadPlan, Report
from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.settings import GenerationConfig, ReadSettings
from llm_magic.errors import GenerationFailed, LoadFailed
from llm_magic.types import Chunk, Message, ModelInfo, Usage
from tests.scripted import ScriptedBackend

_METADATA = "Metadata-Version: 2.1\nName: llm-magic-recorded\nVersion: 1\n"
_ENTRY_POINT = "[llm_magic.backends]\nrecorded = tests.worker_backend:RecordedBackend\n"


def install(folder: Path) -> Path:
    """Make a folder that adds the backend to the path, and return it."""
    metadata = folder / "llm_magic_recorded-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(_METADATA)
    (metadata / "entry_points.txt").write_text(_ENTRY_POINT)
    return folder


def loads(folder: Path) -> list[int]:
    """Return the processes that loaded the model of a folder, in order."""
    return [int(line) for line in _lines(folder / "loads")]


def rows(folder: Path) -> list[str]:
    """Return the prompts that were answered with the model of a folder."""
    return _lines(folder / "rows")


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _append(file: Path, line: object) -> None:
    with file.open("a") as opened:
        opened.write(f"{line}\n")


class RecordedBackend(ScriptedBackend):
    """Repeats the prompt; its model is a folder. The last word of a prompt can be a fault.

    ``fails`` and ``breaks`` raise an error, ``kills`` ends the process once, ``kills!`` each time,
    ``waits`` waits for half a minute, and ``pauses`` for a tenth of a second.
    """

    name = "recorded"
    capabilities = Capabilities(in_process=True, local_token_counts=True)

    def __init__(self, settings: ReadSettings, keys: ApiKeys) -> None:
        super().__init__()

    def concurrency_of(self, _name: str) -> int:
        """Return the rows of a chunk."""
        return 4

    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Record the process."""
        self.folder = Path(plan.model)
        if (self.folder / "broken").exists():
            raise LoadFailed("Its file is broken.")
        _append(self.folder / "loads", os.getpid())
        self.loaded.append(name)
        return ModelInfo(name, self.name, where="folder", source=plan.model, folder=plan.model)

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer a row, or fail as its last word requests."""
        prompt = messages[-1].content
        fault = prompt.rpartition(" ")[2]
        if fault == "kills" and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            # The answers of the chunk before have arrived.
            await asyncio.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "kills!":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "waits":
            (self.folder / "waiting").touch()
            try:
                await asyncio.sleep(30)
            finally:
                (self.folder / "waiting").unlink()
        if fault == "pauses":
            await asyncio.sleep(0.1)
        if fault == "fails":
            raise GenerationFailed("It failed.")
        if fault == "breaks":
            raise ValueError("It broke.")
        await asyncio.sleep(0.01)
        yield Chunk(f"<think>pid {os.getpid()}", tokens=1)
        yield Chunk(f"</think>{prompt}", tokens=1)
        _append(self.folder / "rows", prompt)
        yield Chunk(finish_reason="stop", usage=Usage(7, 2))
