"""SIGINT ends the next wait, instead of raising an exception at a random line.

`wait` returns at once at SIGINT. Around that, `held_back` keeps a signal until the code reaches such a
wait. In a task that a signal cancelled, `translated` turns the cancellation into `Interrupted`.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, TypeAlias

from llm_magic import errors
from llm_magic.backends.thread_bridge import ThreadBridge

# Decides from the interrupted frame, and from how long a signal has been held back, whether it raises.
Raises: TypeAlias = Callable[[FrameType | None, float], bool]

# What does not reach a wait within this time is interrupted where it is.
_LIMIT_S = 0.4


class Interrupted(errors.Interrupted, asyncio.CancelledError):
    """`Interrupted` in a task that SIGINT cancelled: for asyncio, the task is cancelled."""


class Holder:
    """A handler of SIGINT that holds a signal back until it is taken, or until `raises` allows it."""

    def __init__(
        self,
        raises: Raises,
        step_s: float,
        make_error: Callable[[], BaseException] = KeyboardInterrupt,
    ) -> None:
        """`raises` is called at the signal, and about every `step_s` seconds while one is held.

        `make_error` returns what is raised then.
        """
        self._raises, self._step_s, self._make_error = raises, step_s, make_error
        self._since: float | None = None
        self._sending = _thread.allocate_lock()

    def __call__(self, _signal: int, frame: FrameType | None) -> None:
        """Raise `KeyboardInterrupt` or another error, or hold the signal back."""
        waited = 0.0 if self._since is None else time.monotonic() - self._since
        if self._raises(frame, waited):
            self._since = None
            raise self._make_error()
        self.hold()

    def hold(self) -> None:
        """Hold a signal back; several are one."""
        if self._since is None:
            self._since = time.monotonic()
            # Not `threading`: its locks may be taken by what the signal interrupted.
            _thread.start_new_thread(self._repeat, (self._since,))

    def take(self) -> bool:
        """Return whether a signal is held back, and hold it no longer."""
        # Or `_repeat` sends a signal that was taken, which arrives after the handler was replaced.
        with self._sending:
            since, self._since = self._since, None
        return since is not None

    def _repeat(self, since: float) -> None:
        while self._since == since:
            time.sleep(self._step_s)
            with self._sending:
                if self._since != since:
                    return
                if signal.getsignal(signal.SIGINT) is not self:
                    # Another handler was set, by code that does not use this one.
                    self._since = None
                _interrupt_main_thread()


def _interrupt_main_thread() -> None:
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        # Unlike `interrupt_main`, it also ends a system call that blocks.
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let SIGINT raise `Interrupted` where the block waits, and nowhere else for `_LIMIT_S` seconds.

    A signal that the block does not take goes to the handler of before. Signals only reach the main
    thread; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    holder = Holder(lambda _frame, waited: waited > _LIMIT_S, 1.1 * _LIMIT_S)
    previous = signal.signal(signal.SIGINT, holder) or signal.default_int_handler
    try:
        if isinstance(previous, Holder) and previous.take():
            raise KeyboardInterrupt
        yield
    except KeyboardInterrupt:
        raise errors.Interrupted("Stopped.") from None
    finally:
        signal.signal(signal.SIGINT, previous)
        late = holder.take()
        if late and isinstance(previous, Holder):
            previous.hold()
    if late and not isinstance(previous, Holder):
        raise errors.Interrupted("Stopped.")


def wait(bridge: ThreadBridge[Any], timeout: float, pause: float = 0.0) -> bool:
    """Wait as `ThreadBridge.wait` does; returns whether SIGINT or `ThreadBridge.interrupt` ended it.

    A signal that is held back ends it at once. Signals only reach the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return bridge.wait(timeout, pause) or bridge.take_interrupt()

    def deliver(_signal: int, _frame: FrameType | None) -> None:
        bridge.interrupt()

    previous = signal.signal(signal.SIGINT, deliver)
    try:
        if isinstance(previous, Holder) and previous.take():
            bridge.interrupt()
        is_interrupted = bridge.wait(timeout, pause)
    finally:
        # None stands for a handler that was not set from Python; then ours was the better one.
        signal.signal(signal.SIGINT, previous or signal.default_int_handler)
    # Here, where no more signals go to the bridge: the next wait may come late, or not at all.
    return is_interrupted or bridge.take_interrupt()


class Noting:
    """A handler of SIGINT that calls another one, and notes that there was a signal."""

    # One for the process, as signals are; `reset` when a cell begins.
    noted: ClassVar[bool] = False
    # What ■ stopped: shown where a plain cancellation, made by asyncio, ends the cell.
    stopped: ClassVar[Interrupted | None] = None

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal and hand it on."""
        self.note()
        self._handler(number, frame)

    @classmethod
    def note(cls) -> None:
        """Note that there was a signal."""
        cls.noted = True

    @classmethod
    def show(cls, error: Interrupted) -> None:
        """Let a cell that ■ ends show an error, unless there is one with an answer."""
        shown = cls.stopped
        if shown is None or (shown.reply is None and shown.mapped is None):
            cls.stopped = error

    @classmethod
    def reset(cls) -> None:
        """Start anew, for the next cell."""
        cls.noted, cls.stopped = False, None


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    """A task that waits for this package; `stopping` is called before it is cancelled."""

    cell: object
    task: asyncio.Task[object]
    stopping: Callable[[], None]
    cancelled_before: int

    @property
    def is_cancelled(self) -> bool:
        """Whether the task was cancelled since the wait began."""
        return self.task.cancelling() > self.cancelled_before


_waits: list[_Wait] = []
# The awaiting cell whose code runs; the tasks that it starts inherit it.
current_cell: contextvars.ContextVar[object] = contextvars.ContextVar(
    "llm_magic_cell", default=None
)


@contextlib.contextmanager
def translated(stopping: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn a cancellation into `Interrupted` where SIGINT was its reason.

    `stopping` is called before `cancel_waits` cancels the task in the block.
    """
    task = asyncio.current_task()
    wait = None
    if task is not None:
        wait = _Wait(current_cell.get(), task, stopping, task.cancelling())
        _waits.append(wait)
    try:
        yield
    except asyncio.CancelledError as error:
        if isinstance(error, Interrupted) or not Noting.noted:
            raise
        interrupted = Interrupted("Stopped.")
        Noting.stopped = Noting.stopped or interrupted
        raise interrupted from None
    finally:
        if wait is not None:
            _waits.remove(wait)


def cancel_waits(cell: object) -> None:
    """Cancel the other tasks of a cell that are in `translated`; called in the cell's loop.

    The end of `asyncio.wait`, `as_completed` and `shield` does not end the tasks they wait for. `gather`
    cancels them, also those of earlier cells, but ends with the first one.
    """
    here, loop = asyncio.current_task(), asyncio.get_running_loop()
    for wait in tuple(_waits):
        task, is_own = wait.task, wait.cell is cell
        if task is here or task.get_loop() is not loop or task.done():
            continue
        if is_own or wait.is_cancelled:
            wait.stopping()
            Noting.stopped = Noting.stopped or Interrupted("Stopped.")
        if is_own:
            task.cancel()
