"""The part of a map that runs in a worker process: loads the model once, and answers chunks of rows."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_magic.backends.reasoning import separated_answer
from llm_magic.backends.thread_bridge import CHECK_S
from llm_magic.errors import GenerationFailed, WorkersFailed, release_frames
from llm_magic.session.event_loop import LoopThread
from llm_magic.session.map.keys import identity
from llm_magic.session.response import AnswerParts
from llm_magic.types import Chunk

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager, LoadedModel
    from llm_magic.config.settings import GenerationConfig, LoadConfig, Settings
    from llm_magic.types import Message

# An import of the package itself would be one of everything, for the contracts of the layers.
VERSION: str = vars(sys.modules["llm_magic"])["__version__"]
# Identifies this process, and the forks of it.
PROCESS = uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """The model that a worker process loads, and what it must be; it contains no API keys.

    Attributes:
        version: The version of this package.
        client: The process that sends the rows, as `PROCESS` and its number.
        local_workers: How many workers are on the machine of the client; 0 if unknown.
        settings: The settings of the session.
        model: The model as the user named it; a path is absolute.
        name: What the session calls it.
        config: The options of its load, with the address of its server and the variable of its key.
        identity: What identifies the model.
    """

    version: str
    client: tuple[str, int]
    local_workers: int
    settings: Settings
    model: str | None
    name: str
    config: LoadConfig
    identity: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Rows that a worker answers together.

    Attributes:
        model: The model that answers.
        config: The options of the answers.
        rows: The messages of each row, and whether it is sent again to a server that rejects it.
        marker: A file on the machine of the client, which is deleted to stop the worker.
    """

    model: WorkerModel
    config: GenerationConfig
    rows: tuple[tuple[tuple[Message, ...], bool], ...]
    marker: Path


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """The chunks of an answer, and the error that ended it."""

    chunks: list[Chunk]
    error: Exception | None = None


def answer_rows(chunk: RowChunk) -> list[RowAnswer] | None:
    """Return the answers to the rows of a chunk, None if it was stopped.

    The first chunk of a process loads the model. Raises `LLMMagicError` if no row can be answered here.
    """
    _check_process(chunk.model)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and multiprocessing.parent_process() is not None:
        # SIGINT would end an idle worker, and with it the pool: ■ sends it to all children of the kernel.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _WORKER.thread.run(_WORKER.answer(chunk))


def comparable_identity(loaded: LoadedModel) -> dict[str, Any]:
    """Return what identifies a model on every machine; each has its own format of the same weights."""
    found = identity(loaded)
    return {name: value for name, value in found.items() if name not in {"dtype", "size"}}


class _Worker:
    """The model of a worker process, which stays loaded."""

    def __init__(self) -> None:
        self.thread = LoopThread("llm_magic-worker")
        self._lock = asyncio.Lock()
        self._settings: Settings | None = None
        self._manager: BackendManager | None = None

    async def answer(self, chunk: RowChunk) -> list[RowAnswer] | None:
        """Answer the rows of a chunk at once; returns None if it is stopped."""
        if _is_stopped(chunk):
            return None
        async with self._lock:
            loaded = await self._load(chunk.model)
        tasks = [
            asyncio.ensure_future(_collect(loaded, messages, chunk.config, retries))
            for messages, retries in chunk.rows
        ]
        running = set(tasks)
        while running:
            _, running = await asyncio.wait(running, timeout=CHECK_S)
            if running and _is_stopped(chunk):
                for task in running:
                    task.cancel()
                await asyncio.wait(running)
                return None
        return [task.result() for task in tasks]

    async def _load(self, model: WorkerModel) -> LoadedModel:
        """Return the model, loaded if it is not; raises `WorkersFailed` if it is another one."""
        manager, self._settings = self._created(), model.settings
        result = await manager.load(model.model, model.config, name=model.name)
        loaded = manager.find(result.info.name)
        found = comparable_identity(loaded)
        for name, value in model.identity.items():
            if found.get(name) != value:
                raise WorkersFailed(
                    f"{model.name} is another model there: its {name} is {found.get(name)}, not {value}."
                )
        return loaded

    def _created(self) -> BackendManager:
        if self._manager is None:
            from llm_magic.backends import registry
            from llm_magic.backends.manager import BackendManager
            from llm_magic.config.api_keys import ApiKeys
            from llm_magic.config.settings import Settings

            keys = ApiKeys()
            atexit.register(self._close)
            self._manager = BackendManager(
                lambda name: registry.create(name, lambda: self._settings or Settings.read(), keys)
            )
        return self._manager

    def _close(self) -> None:
        """Close connections and free the model when the process ends."""
        if self._manager is not None:
            self.thread.run(self._manager.aclose())
        self.thread.close()


# Starts nothing before the first chunk, and stays empty in the process of a session.
_WORKER = _Worker()


def _check_process(model: WorkerModel) -> None:
    """Raise `WorkersFailed` if this process cannot answer; limits the threads of a local model."""
    from llm_magic.backends import registry

    process, number = model.client
    if model.version != VERSION:
        raise WorkersFailed(
            f"It has llm_magic {VERSION}, the notebook has {model.version}. Install the same"
            " version on all machines."
        )
    if process == PROCESS and number == os.getpid():
        raise WorkersFailed(
            "It is in the process of the notebook, which has the model already. Use worker processes, or"
            " remove the executor."
        )
    if not registry.backend_class(model.config.backend).capabilities.in_process:
        return
    if process == PROCESS:
        raise WorkersFailed(
            "It is a fork of the notebook, in which a local model cannot compute. Start new processes:"
            ' ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")).'
        )
    if model.local_workers > 1 and "torch" not in sys.modules:
        from llm_magic.backends.local.cpus import cpus

        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus().usable // model.local_workers)))


def _is_stopped(chunk: RowChunk) -> bool:
    """Return whether the client has deleted the marker of a chunk; on its own machine only."""
    return not chunk.marker.exists() and chunk.marker.parent.exists()


async def _collect(
    loaded: LoadedModel, messages: tuple[Message, ...], config: GenerationConfig, retries: bool
) -> RowAnswer:
    """Return an answer, after the rejections of its server; without `retries` the first one ends it."""
    rejections, answer = list[Chunk](), AnswerParts()
    error: Exception | None = None
    try:
        async with contextlib.aclosing(separated_answer(loaded, messages, config)) as stream:
            async for chunk in stream:
                answer.add(chunk)
                if chunk.backoff_s:
                    rejections.append(Chunk(backoff_s=chunk.backoff_s))
                    if not retries:
                        return RowAnswer(rejections)
    except Exception as caught:  # noqa: BLE001 - each row has its own
        error = _sendable(release_frames(caught))
    return RowAnswer([*rejections, answer.joined()], error)


def _sendable(error: Exception) -> Exception:
    """Return an error as it arrives in the process of the session; one that cannot be sent as its text."""
    try:
        arrived = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickle runs the code of any class
        arrived = None
    is_same = type(arrived) is type(error) and type(error).__module__ in {
        "builtins",
        "llm_magic.errors",
    }
    return error if is_same else GenerationFailed(f"{type(error).__name__}: {error}")
