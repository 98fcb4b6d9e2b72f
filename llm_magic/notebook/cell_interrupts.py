"""Raise `KeyboardInterrupt` for ■ only in the code of the cell.

ipykernel raises `KeyboardInterrupt` at any line between the arrival of a cell and its reply. In
IPython's code around the cell that shows up to 60 lines of traceback; in ipykernel's code the cell gets
no reply. This module delays a signal in such code until the cell's code or a wait of this package runs.
A signal after the cell's code has no effect.

In a cell that awaits, ipykernel turns SIGINT into a cancellation. asyncio then raises a new
`CancelledError` from `wait_for` or a task group, which this package cannot change. If SIGINT stopped an
answer, such a cell shows the `Interrupted` of the answer instead.

Python handles signals in the main thread only. If other threads of the cell, such as those of an
executor, wait for answers, ■ stops these answers and raises `Interrupted`: the end of an executor's
``with`` block waits for its threads. Errors of this package that end a thread are written as one line.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from llm_magic.errors import Interrupted, LLMMagicException
from llm_magic.session.interruptible_wait import (
    Holder,
    Noting,
    cancel_waits,
    current_cell,
)
from llm_magic.session.interruptible_wait import Interrupted as CancelledByInterrupt
from llm_magic.text import counted

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

    from llm_magic.session import Session

# The interval between attempts to raise a delayed signal, and the longest delay in code that IPython
# or ipykernel calls for the cell, such as a slow repr.
_STEP_S = 0.01
_LIMIT_S = 0.25
_MACHINERY = frozenset({"llm_magic", "IPython", "ipykernel"})


def start(shell: InteractiveShell, session: Session) -> None:
    """Delay SIGINT around the code of cells; does nothing outside of ipykernel.

    It also stops what other threads of the cell wait for in the session. Everywhere, it shortens the
    errors of this package that end threads.
    """
    _ThreadErrors().start()
    kernel = getattr(shell, "kernel", None)
    if hasattr(kernel, "pre_handler_hook") and hasattr(kernel, "post_handler_hook"):
        _CellInterrupts(shell, kernel, session).start()


def stop(shell: InteractiveShell) -> None:
    """Undo `start`; does nothing if it was not called."""
    hook = getattr(getattr(shell, "kernel", None), "pre_handler_hook", None)
    owner = getattr(hook, "__self__", None)
    if isinstance(owner, _CellInterrupts):
        owner.stop()
    if isinstance(threading.excepthook, _ThreadErrors):
        threading.excepthook.stop()


class _ThreadErrors:
    """Writes errors of this package that end a thread as cells show them, without a traceback."""

    def start(self) -> None:
        """Replace the hook that Python calls for the error of a thread."""
        self._previous, threading.excepthook = threading.excepthook, self

    def stop(self) -> None:
        """Restore the hook that was there before."""
        threading.excepthook = self._previous

    def __call__(self, failed: threading.ExceptHookArgs) -> None:
        """Write the error; nothing for what ■ stopped, which the cell shows."""
        error = failed.exc_value
        if not isinstance(error, LLMMagicException):
            self._previous(failed)
        elif not isinstance(error, Interrupted):
            name = failed.thread.name if failed.thread is not None else "a thread"
            lines = "\n".join(error._render_traceback_())
            sys.stderr.write(f"Exception in {name}: {lines}\n")


class _CellInterrupts:
    """Sets a SIGINT handler for each cell."""

    def __init__(self, shell: InteractiveShell, kernel: Any, session: Session) -> None:
        self._shell, self._kernel, self._session = shell, kernel, session
        # When the running cell started.
        self._began = 0.0
        self._holder: Holder | None = None
        self._errors = _CancelledCell(shell)

    def start(self) -> None:
        """Set the handler from the next cell on."""
        # ipykernel calls these two around each message; subclasses may override them.
        self._kernel.pre_handler_hook = self._before_message
        self._kernel.post_handler_hook = self._after_message
        self._shell.events.register("pre_run_cell", self._before_cell)

    def stop(self) -> None:
        """Stop setting the handler."""
        del self._kernel.pre_handler_hook, self._kernel.post_handler_hook
        self._shell.events.unregister("pre_run_cell", self._before_cell)
        self._errors.stop()

    def _before_message(self) -> None:
        kind = self._kernel.get_parent("shell").get("header", {}).get("msg_type")
        if kind != "execute_request" or not _is_main_thread():
            type(self._kernel).pre_handler_hook(self._kernel)
            return
        Noting.reset()
        self._began = time.monotonic()
        self._session.resume_threads()
        self._holder = Holder(self._raises, _STEP_S, self._error)
        self._kernel.saved_sigint_handler = signal.signal(signal.SIGINT, self._holder)

    def _after_message(self) -> None:
        type(self._kernel).post_handler_hook(self._kernel)
        if self._holder is not None and _is_main_thread():
            self._holder.take()
            self._errors.stop()

    def _before_cell(self, _info: object) -> None:
        """Record the signals that ipykernel turns into cancellations, in cells that await."""
        if not _is_main_thread():
            return
        handler = signal.getsignal(signal.SIGINT)
        if self._holder is not None and callable(handler) and _is_ipykernels(handler):

            def stop_all(number: int, at: FrameType | None) -> None:
                if message := self._stop_threads():
                    Noting.stopped = Noting.stopped or CancelledByInterrupt(message)
                handler(number, at)

            signal.signal(signal.SIGINT, Noting(stop_all))
            _note_earlier_signal(handler)
            self._errors.start()

    def _error(self) -> BaseException:
        """Stop what other threads of the cell wait for, and return the error that ends the cell."""
        message = self._stop_threads()
        return Interrupted(message) if message else KeyboardInterrupt()

    def _stop_threads(self) -> str:
        """Stop what other threads of the cell wait for; returns what was stopped, or an empty string."""
        count = self._session.interrupt_threads(self._began)
        stopped = f"Stopped {counted(count, 'answer')} in other threads."
        return f"{stopped} The partial texts are in their exceptions (.reply)." if count else ""

    def _raises(self, frame: FrameType | None, waited: float) -> bool:
        """Return whether `KeyboardInterrupt` may be raised in a frame."""
        if self._belongs_to_cell(frame):
            return True
        return waited > _LIMIT_S and _is_caught(frame, self._shell.user_ns)

    def _belongs_to_cell(self, frame: FrameType | None) -> bool:
        """Return whether a frame is the cell's code or was called by it, not by IPython or ipykernel."""
        while frame is not None:
            if frame.f_globals is self._shell.user_ns:
                return True
            if _package(frame) in _MACHINERY:
                return False
            frame = frame.f_back
        return False


class _CancelledCell:
    """Shows `Interrupted` if SIGINT stopped an answer and a cancellation ends the cell."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._cell: object = None
        # The exceptions and the handler that the user set, and the handler that replaces it.
        self._own: tuple[tuple[type[BaseException], ...], Any] = ((), None)
        self._handler: Any = None

    def start(self) -> None:
        """Install the handler for the cell that starts; called in its task."""
        self.stop()
        self._cell = object()
        current_cell.set(self._cell)
        shell: Any = self._shell
        self._own = (shell.custom_exceptions, shell.CustomTB)
        shell.set_custom_exc((*shell.custom_exceptions, asyncio.CancelledError), self._show)
        self._handler = shell.CustomTB

    def stop(self) -> None:
        """Restore the user's handler, unless another one was set in the meantime."""
        if self._handler is not None and self._shell.CustomTB is self._handler:
            self._shell.custom_exceptions, self._shell.CustomTB = self._own
        self._handler = None

    def _show(
        self,
        shell: InteractiveShell,
        kind: type[BaseException],
        error: BaseException,
        tb: TracebackType | None,
        tb_offset: int | None = None,
    ) -> None:
        shown = self._interrupted(error)
        exceptions, handler = self._own
        if isinstance(shown, exceptions):
            handler(type(shown), shown, tb, tb_offset)
        else:
            shell.showtraceback((type(shown), shown, tb), tb_offset=tb_offset)

    def _interrupted(self, error: BaseException) -> BaseException:
        """Return the error to show for an error that ends the cell."""
        if not (isinstance(error, asyncio.CancelledError) and Noting.noted):
            return error
        cancel_waits(self._cell)
        shown = Noting.stopped or error

        def replace(result: ExecutionResult) -> None:
            # ipykernel makes its reply from the result.
            self._shell.events.unregister("post_run_cell", replace)
            if result.error_in_exec is error:
                result.error_in_exec = shown

        self._shell.events.register("post_run_cell", replace)
        return shown


def _is_caught(frame: FrameType | None, names: dict[str, Any]) -> bool:
    """Return whether IPython, not ipykernel, catches an exception: then the cell gets its reply."""
    while frame is not None:
        if frame.f_globals is names:
            return True
        if frame.f_globals.get("__name__") == "IPython.core.events":
            return True
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _note_earlier_signal(handler: Any) -> None:
    """Note a signal that came since ipykernel has set its handler for the cell that starts.

    Its handler sets the result of a future, which is in none of its public attributes. Without it, such
    a signal shows the traceback of a cancellation.
    """
    for cell in getattr(handler, "__closure__", None) or ():
        if isinstance(cell.cell_contents, asyncio.Future):
            cell.cell_contents.add_done_callback(
                lambda signaled: signaled.cancelled() or Noting.note()
            )


def _is_ipykernels(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).startswith("ipykernel.")


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
