"""Rows on worker processes: those of an executor, or of a Dask cluster.

The event-loop thread collects rows into chunks and submits these; `worker_process.py` runs in the workers
and returns the chunks of the answers. Throttle, order, retries and results stay here, as for any backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llm_magic.config.server_address import resolve_address
from llm_magic.config.settings import ServerLoadConfig
from llm_magic.errors import GenerationFailed, LLMMagicError, OptionError, WorkersFailed
from llm_magic.session.map.worker_process import (
    PROCESS,
    VERSION,
    RowAnswer,
    RowChunk,
    WorkerModel,
    answer_rows,
    comparable_identity,
)
from llm_magic.types import Chunk

if TYPE_CHECKING:
    from llm_magic.backends.manager import LoadedModel
    from llm_magic.config.settings import Settings
    from llm_magic.session.requests import PreparedRequest
    from llm_magic.types import Message

# The most rows in a chunk, and how long the first row of a chunk waits for others.
_MOST_ROWS, _COLLECT_S = 32, 0.01
# Chunks of each worker at once: the one that it answers, and the next one.
_CHUNKS_AHEAD = 2
# How often a chunk is sent again after its executor broke: some start new workers.
_MOST_SENDS = 2
# So many chunks in a row that Dask has given up end the map: others would not be answered, either.
_MOST_GIVEN_UP = 2
_GOES_ON = "Finished rows are not sent again."
_DEATHS = (
    "Several workers died with the same rows: they were killed, or their memory is not sufficient."
)


@runtime_checkable
class DaskClient(Protocol):
    """The part of `distributed.Client` that a map uses."""

    status: str

    @property
    def asynchronous(self) -> bool:
        """Whether its methods have to be awaited."""

    def get_executor(self, **options: Any) -> Executor:
        """Return an executor that runs functions on the workers of the cluster."""

    def ncores(self) -> Mapping[str, int]:
        """Return the number of threads of each worker."""


@dataclass(slots=True, eq=False)
class _Row:
    """A row that waits for its answer; `retries`: its worker sends it again if a server rejects it."""

    messages: tuple[Message, ...]
    retries: bool
    answer: asyncio.Future[RowAnswer]


@dataclass(slots=True, eq=False)
class _Submitted:
    """A chunk that the executor has, and how often it was submitted."""

    rows: list[_Row]
    chunk: RowChunk
    future: Future[list[RowAnswer] | None] | None = None
    sends: int = 0


class Workers:
    """The worker processes of a map; used on the event-loop thread.

    Attributes:
        rows_at_once: The number of rows that keeps them busy, or the most that their server gets.
    """

    def __init__(
        self, on: object, prepared: PreparedRequest, settings: Settings, total: int | None
    ) -> None:
        """Check the executor `on`, and what its workers need for the model; `total` rows come."""
        self._executor, self._count, is_here = _executor_of(on)
        loaded = prepared.loaded_model
        self._model = _worker_model(loaded, settings, self._count if is_here else 0)
        self._config = prepared.config
        self.rows_at_once = loaded.backend.concurrency_of(loaded.name)
        self._most = _MOST_ROWS
        if loaded.backend.capabilities.in_process:
            self._most = _even_chunk(min(_MOST_ROWS, self.rows_at_once), self._count, total)
            self.rows_at_once = _CHUNKS_AHEAD * self._count * self._most
        self._waiting: list[_Row] = []
        self._timer: asyncio.TimerHandle | None = None
        self._submitted: set[_Submitted] = set()
        self._given_up = 0

    async def stream(
        self, messages: tuple[Message, ...], at_once: int
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of an answer of a worker, while the map sends `at_once` rows.

        A reader that goes on after a chunk with `backoff_s` waits until the server accepts the row.
        """
        for retries in (False, True):
            answer = await self._answer(messages, retries, at_once)
            for chunk in answer.chunks:
                yield chunk
            if answer.error is not None:
                raise answer.error
            if not (answer.chunks and answer.chunks[-1].backoff_s):
                return

    async def _answer(
        self, messages: tuple[Message, ...], retries: bool, at_once: int
    ) -> RowAnswer:
        loop = asyncio.get_running_loop()
        row = _Row(messages, retries, loop.create_future())
        self._waiting.append(row)
        if len(self._waiting) >= min(self._most, math.ceil(at_once / _CHUNKS_AHEAD / self._count)):
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(_COLLECT_S, self._send)
        try:
            return await row.answer
        finally:
            if row.answer.cancelled():
                self._leave(row)

    def _send(self) -> None:
        """Submit the rows that wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        marker = _marker()
        marker.touch()
        sent = tuple((row.messages, row.retries) for row in rows)
        one = _Submitted(rows, RowChunk(self._model, self._config, sent, marker))
        self._submitted.add(one)
        self._submit(one)

    def _submit(self, one: _Submitted) -> None:
        one.sends += 1
        try:
            with _new_processes():
                one.future = self._executor.submit(answer_rows, one.chunk)
        except Exception as error:  # noqa: BLE001 - of the code of any executor
            self._fail(one, error)
            return
        loop = asyncio.get_running_loop()

        def end(future: Future[list[RowAnswer] | None]) -> None:
            # The loop is closed at the end of the session.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._end, one, future)

        one.future.add_done_callback(end)

    def _end(self, one: _Submitted, future: Future[list[RowAnswer] | None]) -> None:
        """Give the rows of a chunk their answers; sends them again if their worker died."""
        if one not in self._submitted:
            return
        error = CancelledError() if future.cancelled() else future.exception()
        answers = future.result() if error is None else None
        if isinstance(error, BrokenExecutor) and one.sends < _MOST_SENDS:
            self._submit(one)
        elif answers is None:
            self._fail(one, error or CancelledError())
        else:
            self._given_up = 0
            for row, answer in zip(self._remove(one), answers, strict=True):
                if not row.answer.done():
                    row.answer.set_result(answer)

    def _fail(self, one: _Submitted, error: BaseException) -> None:
        """Give the rows of a chunk the error that ends the map: other rows would fail, too.

        Rows at which several workers died have an error of their own.
        """
        self._given_up += _is_given_up(error)
        ends = not _is_given_up(error) or self._given_up >= _MOST_GIVEN_UP
        for row in self._remove(one):
            if not row.answer.done():
                row.answer.set_exception(_explained(error) if ends else GenerationFailed(_DEATHS))

    def _leave(self, row: _Row) -> None:
        """Remove a row that nothing waits for, and stop the worker if that is true of its whole chunk."""
        if row in self._waiting:
            self._waiting.remove(row)
        for one in tuple(self._submitted):
            if row in one.rows and all(other.answer.done() for other in one.rows):
                if (future := one.future) is not None:
                    # On another thread, because Dask waits for its scheduler.
                    asyncio.get_running_loop().run_in_executor(None, future.cancel)
                self._remove(one)

    def _remove(self, one: _Submitted) -> list[_Row]:
        self._submitted.discard(one)
        # Dask computes a result again whose worker died, while there is a future for it.
        one.future = None
        one.chunk.marker.unlink(missing_ok=True)
        return one.rows


def _even_chunk(most: int, workers: int, total: int | None) -> int:
    """Return how many rows a chunk has, at most `most`, so that all workers get the same number."""
    if not total:
        return most
    rounds = math.ceil(total / (workers * most))
    return math.ceil(total / (workers * rounds))


def _executor_of(on: object) -> tuple[Executor, int, bool]:
    """Return an executor, how many chunks it runs at once, and whether it does so on this machine."""
    if isinstance(on, DaskClient):
        if on.asynchronous:
            raise OptionError(
                "An asynchronous Dask client has no results here. Use Client(ADDRESS)."
            )
        if on.status != "running":
            raise OptionError(
                "The Dask client is not connected. Create a new one: Client(ADDRESS)."
            )
        # Equal calls have different answers.
        return on.get_executor(pure=False), max(1, sum(on.ncores().values())), False
    if isinstance(on, ThreadPoolExecutor):
        raise OptionError(
            "The workers of a ThreadPoolExecutor are in the process of the notebook, which has the model"
            " already. Use a ProcessPoolExecutor, or remove the executor."
        )
    if not isinstance(on, Executor):
        raise OptionError(
            f"A {type(on).__name__} has no workers. Use an executor, such as a ProcessPoolExecutor, or the"
            " Client of a Dask cluster."
        )
    # There is no public attribute for it, except in MPI.
    sizes = (getattr(on, name, None) for name in ("num_workers", "_max_workers"))
    count = next((size for size in sizes if type(size) is int and size > 0), os.cpu_count() or 1)
    return on, count, type(on).__module__.partition(".")[0] in {"concurrent", "loky"}


def _worker_model(loaded: LoadedModel, settings: Settings, local_workers: int) -> WorkerModel:
    """Return what a worker needs to load a model; raises `OptionError` for a key that it cannot have."""
    config, model = loaded.config, loaded.requested
    if isinstance(config, ServerLoadConfig):
        config = config.replace(base_url=resolve_address(config, settings).url)
        if config.key_env and not os.environ.get(config.key_env):
            raise OptionError(
                f"{config.key_env} is not set in the environment, and a key that was typed in is not sent to"
                " workers. Set it where the notebook and the workers start."
            )
    elif model is not None and Path(model).exists():
        model = str(Path(model).absolute())
    return WorkerModel(
        VERSION,
        (PROCESS, os.getpid()),
        local_workers,
        settings,
        model,
        loaded.name,
        config,
        comparable_identity(loaded),
    )


def _is_given_up(error: BaseException) -> bool:
    """Return whether Dask has sent a chunk to several workers, which died."""
    return type(error).__name__ == "KilledWorker"


def _explained(error: BaseException) -> WorkersFailed:
    """Return the error that ends the map."""
    if isinstance(error, LLMMagicError):
        return WorkersFailed.like(error, "A worker cannot answer.")
    if isinstance(error, BrokenExecutor):
        return WorkersFailed(
            "A worker process died: it was killed, or its memory was not sufficient. This executor cannot be"
            f" used again. Create a new one and run the same call again. {_GOES_ON}"
        )
    if _is_given_up(error):
        return WorkersFailed(f"{_DEATHS} The same call goes on from there. {_GOES_ON}")
    if isinstance(error, CancelledError) or "shutdown" in str(error):
        return WorkersFailed(
            f"The executor was closed. Run the same call again with another one. {_GOES_ON}"
        )
    python = ".".join(map(str, sys.version_info[:2]))
    return WorkersFailed(f"A worker cannot answer. {type(error).__name__}: {error}").advise(
        f"Workers need the packages of the notebook: llm_magic {VERSION} on Python {python}."
    )


@functools.cache
def _markers() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of the files that exist while chunks run; it is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="llm_magic-running-")


_numbers = itertools.count()


def _marker() -> Path:
    return Path(_markers().name) / f"{os.getpid()}-{next(_numbers)}"


@contextlib.contextmanager
def _new_processes() -> Iterator[None]:
    """Let an executor start its processes: without SIGINT, which ■ sends to the children of the kernel."""
    # `multiprocessing` reads it, and %reset deletes it.
    vars(sys.modules["__main__"]).setdefault("__spec__", None)
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
