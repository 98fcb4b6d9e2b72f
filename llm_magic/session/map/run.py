"""A running map: reads the rows on the caller's thread, sends them on the event loop's."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import (
    AsyncGenerator,
    Callable,
    Generator,
    Iterator,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from llm_magic.backends.thread_bridge import CHECK_S, ThreadBridge
from llm_magic.errors import (
    GenerationStopped,
    Interrupted,
    LLMMagicException,
    NoAttribute,
    first_line,
)
from llm_magic.prompts.values_as_text import to_text
from llm_magic.session import interruptible_wait
from llm_magic.session.event_loop import LoopStream, LoopThread
from llm_magic.session.jobs import show_until_end, stopped_waiting, without_view
from llm_magic.session.map.mapped import Mapped
from llm_magic.session.map.outcome import Outcome
from llm_magic.session.map.progress import Counts, MapProgress
from llm_magic.session.map.sender import PreparedRow, Sender
from llm_magic.text import counted, visible_line

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager
    from llm_magic.session.jobs import ProgressView
    from llm_magic.session.map.executors import Workers
    from llm_magic.session.map.prompts import RowTemplate
    from llm_magic.session.map.rows import Rows
    from llm_magic.session.map.throttle import Throttle
    from llm_magic.session.requests import PreparedRequest
    from llm_magic.session.response import ResponseView
    from llm_magic.session.usage import UsageCounter
    from llm_magic.types import Reply

# Rows that wait for a request: twice those that run, and at least this many.
_LEAST_WAITING, _LEAST_WAITING_LAZY = 128, 8
# How long rows are read before a view is drawn again.
_READ_S = 0.02


class RowStore(Protocol):
    """Finished rows by key, in `finished`, which gets those of a map while it runs."""

    @property
    def finished(self) -> MutableMapping[bytes, Outcome]:
        """The outcomes that are known."""

    def note(self, row: PreparedRow, outcome: Outcome, is_sent: bool) -> None:
        """Keep the outcome of a row; it was sent for that, or known."""

    def close(self, *, is_whole: bool) -> None:
        """End the map: all its rows have an outcome, or it ended early."""


@dataclass(slots=True)
class MapPlan:
    """A checked map: its rows, and how they are sent.

    Attributes:
        rows: The rows, for the shape of the result.
        source: The rows with their messages; reading it runs the code of the user.
        prepared: A request with the model, the options and the system prompt of all rows.
        throttle: How fast they are sent.
        store: The rows that are known, and where those of this map are kept.
        stops_at_error: Whether the first row that fails ends the map.
        notes: Notes about the template, the data and the options.
        sampled_from: Of a sample, the number of all rows.
        prompt: The template, or the name of the function.
        is_sample: Whether the rows are a sample.
        template: The compiled template, if there is one.
        workers: The worker processes that answer, if it is not this process.
    """

    rows: Rows
    source: Iterator[PreparedRow]
    prepared: PreparedRequest
    throttle: Throttle
    store: RowStore
    stops_at_error: bool = False
    notes: tuple[str, ...] = ()
    sampled_from: int | None = None
    prompt: str = ""
    is_sample: bool = False
    template: RowTemplate | None = None
    workers: Workers | None = None


class MapRun:
    """A map while it runs. Every attribute can be read from any thread at any time.

    Call `result` for the whole result; or iterate over `updates`, in which the rows are read, and draw
    `progress` meanwhile. With ``with``, leaving early stops it.
    """

    def __init__(
        self,
        plan: MapPlan,
        manager: BackendManager,
        thread: LoopThread,
        usage: UsageCounter,
        changed: Callable[[], None],
        *,
        is_lazy: bool = False,
    ) -> None:
        """`changed` is called after each outcome. Of a lazy map, `take` removes the outcomes."""
        self._plan, self._thread, self._usage, self._changed = plan, thread, usage, changed
        self._manager, self._is_lazy = manager, is_lazy
        self._counts = Counts()
        # By position; of a lazy map, those that are not taken yet.
        self._outcomes: list[Outcome | None] = []
        self._untaken: dict[int, Outcome] = {}
        model = plan.prepared.loaded_model
        self._names = model.name, model.config.backend
        self.mapped = Mapped(plan.rows, self._outcomes, self._counts, self._names, self._retry)
        self.mapped.notes, self.mapped.sampled_from = plan.notes, plan.sampled_from
        self.mapped.answer_type = plan.prepared.request.answer_type
        self.number: int | None = None
        self.view: ResponseView | None = None
        self.progress_view: Callable[[MapRun], ProgressView | None] = without_view
        self._start(plan.source)

    def _start(self, source: Iterator[PreparedRow]) -> None:
        """Set everything for the rows of `source`; nothing runs before `updates`."""
        plan = self._plan
        self._source, self._is_exhausted = source, False
        # The thread that reads the rows of a job: two would break a generator.
        self._reader: threading.Thread | None = None
        # How many rows were read, and taken from a lazy map.
        self._read = self._next = 0
        self.error: BaseException | None = None
        self.done = self.is_awaited = self._is_cancelled = False
        self.finished_at = math.inf
        self._sender = Sender(
            plan.prepared,
            self._manager,
            plan.throttle,
            plan.store.finished,
            self._report,
            self._counts.writing,
        )
        self._sender.stops_at_error = plan.stops_at_error
        self._sender.workers = plan.workers
        chunks = self._sender.run(self._low)
        self._stream = LoopStream(self._thread, chunks, None, self._end)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The name of the model."""
        return self._plan.prepared.loaded_model.name

    @property
    def prompt(self) -> str:
        """The template, or the name of the function that makes the prompts."""
        return self._plan.prompt

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the template, the data and the options."""
        return self.mapped.notes

    @property
    def max_new_tokens(self) -> int | None:
        """The most tokens of an answer; None if only the server limits it."""
        return self._plan.prepared.config.max_new_tokens

    @property
    def is_in_process(self) -> bool:
        """Whether the model that answers is in the memory of this process."""
        in_process = self._plan.prepared.loaded_model.backend.capabilities.in_process
        return in_process and self._plan.workers is None

    @property
    def is_generating(self) -> bool:
        """Whether it has started and needs its model."""
        return self._stream.is_started and not (self.done or self._stream.done.is_set())

    @property
    def short_name(self) -> str:
        """What messages call it: ``job 3``, or ``a map``."""
        return "a map" if self.number is None else f"job {self.number}"

    @property
    def amount(self) -> str:
        """How many of its rows have an answer or failed, in words."""
        done, total = self._counts.done, self.total
        return counted(done, "row") if total is None else f"{done:,} of {counted(total, 'row')}"

    @property
    def is_sample(self) -> bool:
        """Whether only a sample of the rows is sent."""
        return self._plan.is_sample

    @property
    def references(self) -> tuple[str, ...]:
        """The references of the template to the rows, without ``{index}``."""
        template = self._plan.template
        return tuple(map(str, template.shown)) if template is not None else ()

    @property
    def repeats_labels(self) -> bool:
        """Whether several rows may have the same label."""
        return self._plan.rows.repeats_labels

    def shown(self, position: int) -> tuple[str, ...]:
        """Return the label of a row, and the texts of its `references`, "" where they are gone."""
        template, row = self._plan.template, self._plan.rows.at(position)
        if row is None:
            return (str(position), *("" for _ in self.references))
        label = row.index if isinstance(row.index, (str, int)) else to_text(row.index)
        return (str(label), *(template.texts(row) if template is not None else ()))

    @property
    def progress(self) -> MapProgress:
        """The state now."""
        return self._counts.snapshot(self.total, self._plan.throttle.limit)

    @property
    def total(self) -> int | None:
        """The number of rows; None until an iterator without a length has ended."""
        total = self._plan.rows.total
        return self._read if total is None and self._is_exhausted else total

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        return (self._counts.finished_at or time.perf_counter()) - self._counts.started

    @property
    def state(self) -> str:
        """``running``, ``done``, ``stopped``, or ``failed`` where an error ended it."""
        if not self.done:
            return "running"
        if self._is_cancelled:
            return "stopped"
        return "failed" if self.error is not None else "done"

    @property
    def failure(self) -> str:
        """The first line of the error that ended it, empty if none did."""
        return "" if self.error is None or self.state != "failed" else first_line(self.error)

    def __repr__(self) -> str:
        about = "Map" if self.number is None else f"Job {self.number}"
        return f"<{about}: {visible_line(self.model)}, {self.state}, {self.mapped.summary()}>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Raise `NoAttribute`, which names the methods with the answers."""
            raise NoAttribute(
                f"{type(self).__name__!r} object has no attribute {name!r}. result() returns the answers,"
                " result().frame() a table with them."
            )

    # -- how it runs --------------------------------------------------------------------------

    def updates(self, pause: Callable[[], float] | None = None) -> Iterator[None]:
        """Read and send the rows; return, again and again, to draw `progress`, until the end.

        It returns after about 0.1 s at the latest, and no sooner than after `pause()` seconds once all
        rows are read. An interrupt raises `Interrupted`, whose `mapped` is the result so far.
        """

        def pause_at_the_end() -> float:
            # Rows with a known answer take no time: a pause would be most of theirs.
            return pause() if pause is not None and self._is_exhausted else 0.0

        bridge: ThreadBridge[None] = ThreadBridge(keep=1)
        self._stream.attach(bridge)
        batches = self._stream.read(bridge, pause_at_the_end, stops=self._reader is None)
        while True:
            with self._ending():
                if next(batches, None) is None:
                    break
                self._read_rows()
            yield
        self._raise_error(bridge.error)
        yield
        if self._is_lazy:
            # An error of the data, after the answers that come before it.
            self._raise_error(self.error)

    async def aupdates(self) -> AsyncGenerator[None, None]:
        """Do what `updates` does, on the event loop of the caller."""
        bridge: ThreadBridge[None] = ThreadBridge(keep=1)
        self._stream.attach(bridge)
        with self._ending():
            reading = self._stream.read_async(bridge, self._end_outside, timeout=CHECK_S)
            async with contextlib.aclosing(reading) as batches:
                async for _ in batches:
                    self._read_rows()
                    yield
                    await asyncio.sleep(0)
        self._raise_error(bridge.error)

    def replies(self) -> Iterator[Reply | None]:
        """Yield the answers of a lazy map in the order of the rows; leaving early stops it."""
        with self:
            for _ in self.updates():
                yield from self._ready()

    def _ready(self) -> Iterator[Reply | None]:
        while (outcome := self._untaken.pop(self._next, None)) is not None:
            self._next += 1
            yield outcome.reply(*self._names, self._plan.prepared.request.answer_type)

    def result(self) -> Mapped:
        """Run to the end and return the result; a cell shows the progress meanwhile.

        Raises:
            Interrupted: You stopped it. `mapped` of the exception is the result so far, and the same
                call goes on from there.
            GenerationStopped: It was stopped in another way, such as by ``%llm_stop``.
            LLMMagicError: A row failed and ``on_error="stop"`` is set, or an error concerns all rows.
        """
        # The cell of a job shows its progress.
        view = self.progress_view(self) if self.number is None and not self.done else None
        if view is not None:
            show_until_end(self, view)
        elif not self.done:
            for _ in self.updates():
                pass
        self._raise_error(self.error)
        self.is_awaited = True
        return self.mapped

    def __await__(self) -> Generator[Any, None, Mapped]:
        return self._await().__await__()

    async def _await(self) -> Mapped:
        if self._reader is None:
            async with contextlib.aclosing(self.aupdates()) as updates:
                async for _ in updates:
                    pass
        else:
            await self._wait_for_end()
        return self.result()

    async def _wait_for_end(self) -> None:
        """Wait for a job, which an interrupt does not stop."""
        bridge: ThreadBridge[None] = ThreadBridge(keep=1)
        self._stream.attach(bridge)
        try:
            reading = self._stream.read_async(bridge, stops=False)
            async with contextlib.aclosing(reading) as batches:
                async for _ in batches:
                    pass
        except Interrupted as error:
            raise stopped_waiting([self], type(error)) from None

    def cancel(self) -> None:
        """Stop it and return at once; finished rows stay."""
        self._stream.cancel()

    def wait(self, timeout: float) -> None:
        """Wait for the end at most `timeout` seconds, and raise nothing."""
        self._stream.done.wait(timeout)

    def until_end(self, pause: Callable[[], float], deadline: float = math.inf) -> Iterator[object]:
        """Return, as `updates` does, until it has ended; never stops it.

        The `deadline` (`time.monotonic`) ends it earlier.
        """
        bridge: ThreadBridge[None] = ThreadBridge(keep=1)
        self._stream.attach(bridge)
        return self._stream.read(bridge, pause, stops=False, deadline=deadline)

    def start_in_background(self) -> MapRun:
        """Read and send the rows on a thread of their own; returns the run itself."""

        def run() -> None:
            with contextlib.suppress(BaseException):
                for _ in self.updates():
                    pass

        self._stream.start()
        self._reader = threading.Thread(target=run, name="llm_magic-map", daemon=True)
        self._reader.start()
        return self

    def __enter__(self) -> MapRun:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Stop it if it has not ended, unless it runs in the background."""
        if self.done or self.number is not None:
            return
        self._stream.stop()
        self._end(asyncio.CancelledError())
        if isinstance(error, KeyboardInterrupt):
            raise self._stopped(Interrupted) from None

    # -- rows, on the caller's thread ---------------------------------------------------------

    @property
    def _low(self) -> int:
        least = _LEAST_WAITING_LAZY if self._is_lazy else _LEAST_WAITING
        return max(least, self._plan.throttle.limit)

    def _space(self) -> int:
        """Return how many rows can be read now; none while it stops after an interrupt."""
        if self._stream.is_ending:
            return 0
        most = 2 * self._low
        if self._is_lazy:
            return most - (self._read - self._next)
        return most - (self._read - self._sender.taken)

    def _read_rows(self) -> None:
        """Read rows while there is space, for a short time; each is passed on at once.

        Those of a job are read on its own thread only, also while others wait for it.
        """
        if self._reader not in {None, threading.current_thread()}:
            return
        deadline = time.perf_counter() + _READ_S
        sender = self._sender
        while not self._is_exhausted and self._space() > 0 and time.perf_counter() < deadline:
            row = self._next_row()
            if row is None:
                self._is_exhausted = True
                call: Callable[[], None] = sender.complete
            else:
                call = partial(sender.accept, row)
                if row.position == len(self._outcomes) and not self._is_lazy:
                    self._outcomes.append(None)
                self._read += 1
            self._stream.call(call)

    def _next_row(self) -> PreparedRow | None:
        """Return the next row, None at the end; a lazy map passes on the answers before an error first."""
        try:
            return next(self._source, None)
        except Exception as error:
            if not self._is_lazy:
                raise
            self.error = error
            return None

    # -- outcomes, on the event-loop thread ---------------------------------------------------

    def _report(self, row: PreparedRow, outcome: Outcome, is_sent: bool) -> None:
        if self._is_lazy:
            self._untaken[row.position] = outcome
            self._sender.wake()
        else:
            self._outcomes[row.position] = outcome
        if self._counts.add(row, outcome, is_sent=is_sent):
            self._add_usage()
        self._plan.store.note(row, outcome, is_sent)
        self._changed()

    def end(self, _reason: object = None) -> None:
        """Record that it was stopped, where the loop is being closed and nothing runs any more."""
        self._end(asyncio.CancelledError())

    def _end(self, error: BaseException | None) -> None:
        """Record the end, once; called on any thread."""
        if self.done:
            return
        is_cancelled = isinstance(error, asyncio.CancelledError)
        # An error of the data stops it, too.
        self._is_cancelled = is_cancelled and self.error is None
        self.error = self.error or (None if is_cancelled else error)
        self._counts.finished_at = time.perf_counter()
        throttle = self._plan.throttle
        self.mapped.at_once, self.mapped.rate = throttle.limit, throttle.rate or math.inf
        self._add_usage()
        self._plan.store.close(is_whole=error is None)
        self.finished_at, self.done = time.perf_counter(), True
        self._changed()

    def _add_usage(self) -> None:
        """Add what was sent since the last time to the usage of the session."""
        usage = self._counts.take_usage(*self._names)
        if usage.answers:
            self._usage.add(usage)

    # -- how it ends --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Stop where the reader leaves early; an interrupt leaves as `Interrupted`."""
        try:
            yield
        except BaseException as error:
            is_interrupt = isinstance(error, (KeyboardInterrupt, Interrupted))
            kind = type(error) if isinstance(error, Interrupted) else Interrupted
            if self._reader is not None and is_interrupt:
                raise stopped_waiting([self], kind) from None
            if isinstance(error, Exception):
                self.error = error
            self._stream.stop()
            self._end(asyncio.CancelledError())
            if is_interrupt:
                raise self._stopped(kind) from None
            raise

    def _raise_error(self, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError) or (self.done and self._is_cancelled):
            raise self._stopped(GenerationStopped)
        if isinstance(error, LLMMagicException):
            error.mapped = self.mapped
        if error is not None:
            raise error

    def _end_outside(self) -> None:
        """Record the end when ■ has ended the cell, before its task is cancelled."""
        self._end(asyncio.CancelledError())
        self._stopped(interruptible_wait.Interrupted)

    def _stopped(self, kind: type[Any]) -> Any:
        """Return the error of a map that was stopped, with the result so far."""
        text = f"Stopped after {self.amount}. They are kept: the same call goes on from there."
        if not self._counts.answered + self._counts.cut:
            text = "Stopped before an answer was complete. Incomplete answers are not kept."
        elif not self._is_lazy and self.number is None:
            text += " llm.last_mapped has their answers."
        error = kind(text)
        error.mapped = self.mapped
        if isinstance(error, interruptible_wait.Interrupted):
            interruptible_wait.Noting.show(error)
        return error

    def _retry(self, positions: Sequence[int]) -> None:
        """Send failed rows again, and replace their outcomes."""
        if self._reader is not None:
            # It has reported the end, but may look once more for a row.
            self._reader.join()
        outcomes = [(i, self._outcomes[i]) for i in positions]
        found = ((i, outcome) for i, outcome in outcomes if outcome is not None and outcome.key)
        rows = [PreparedRow(i, i, outcome.messages, outcome.key) for i, outcome in found]
        self._counts.start_again(len(rows))
        for row in rows:
            self._plan.store.finished.pop(row.key, None)
            self._outcomes[row.position] = None
        self._start(iter(rows))
        self.result()
