"""■ in the kernel: raised in the user's own code at once, and nowhere else while a cell runs.

ipykernel lets SIGINT raise `KeyboardInterrupt` at any line from the arrival of a cell to its reply. In
IPython's own code around the cell that shows up to 60 lines of traceback, and in ipykernel's the cell
gets no reply at all. Here, a signal in such code is held back until the cell's code or a wait of this
package is reached; one that comes after the cell's code has no effect.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from llm_magic.interrupts import Holder, Noting

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

# How often a signal that is held back is tried again, and for how long it is held while code that
# IPython or ipykernel called for the cell runs: a slow repr, say.
_STEP_S = 0.01
_LIMIT_S = 0.25
_MACHINERY = frozenset({"llm_magic", "IPython", "ipykernel"})


def start(shell: InteractiveShell) -> None:
    """Hold SIGINT back around the code of cells; does nothing outside of ipykernel."""
    kernel = getattr(shell, "kernel", None)
    if hasattr(kernel, "pre_handler_hook") and hasattr(kernel, "post_handler_hook"):
        _CellInterrupts(shell, kernel).start()


def stop(shell: InteractiveShell) -> None:
    """Undo `start`, if it was called."""
    hook = getattr(getattr(shell, "kernel", None), "pre_handler_hook", None)
    owner = getattr(hook, "__self__", None)
    if isinstance(owner, _CellInterrupts):
        owner.stop()


class _CellInterrupts:
    """Sets the handler of SIGINT for each cell."""

    def __init__(self, shell: InteractiveShell, kernel: Any) -> None:
        self._shell, self._kernel = shell, kernel
        self._holder: Holder | None = None

    def start(self) -> None:
        """Take effect from the next cell on."""
        # ipykernel calls these two around each message, for subclasses to override.
        self._kernel.pre_handler_hook = self._before_message
        self._kernel.post_handler_hook = self._after_message
        self._shell.events.register("pre_run_cell", self._before_cell)

    def stop(self) -> None:
        """Take effect no longer."""
        del self._kernel.pre_handler_hook, self._kernel.post_handler_hook
        self._shell.events.unregister("pre_run_cell", self._before_cell)

    def _before_message(self) -> None:
        kind = self._kernel.get_parent("shell").get("header", {}).get("msg_type")
        if kind != "execute_request" or not _is_main_thread():
            type(self._kernel).pre_handler_hook(self._kernel)
            return
        Noting.noted = False
        self._holder = Holder(self._raises, _STEP_S)
        self._kernel.saved_sigint_handler = signal.signal(signal.SIGINT, self._holder)

    def _after_message(self) -> None:
        type(self._kernel).post_handler_hook(self._kernel)
        if self._holder is not None and _is_main_thread():
            self._holder.take()

    def _before_cell(self, _info: object) -> None:
        """Note the signals that ipykernel makes cancellations of, in cells that await."""
        if not _is_main_thread():
            return
        handler = signal.getsignal(signal.SIGINT)
        if self._holder is not None and callable(handler) and _is_ipykernels(handler):
            signal.signal(signal.SIGINT, Noting(handler))

    def _raises(self, frame: FrameType | None, waited: float) -> bool:
        """Return whether `KeyboardInterrupt` may be raised in a frame."""
        if self._belongs_to_cell(frame):
            return True
        return waited > _LIMIT_S and _is_caught(frame, self._shell.user_ns)

    def _belongs_to_cell(self, frame: FrameType | None) -> bool:
        """Return whether the cell's code runs, or what it called, other than the machinery."""
        while frame is not None:
            if frame.f_globals is self._shell.user_ns:
                return True
            if _package(frame) in _MACHINERY:
                return False
            frame = frame.f_back
        return False


def _is_caught(frame: FrameType | None, names: dict[str, Any]) -> bool:
    """Return whether IPython, and not ipykernel, catches what is raised: the cell gets its reply."""
    while frame is not None:
        if frame.f_globals is names:
            return True
        if frame.f_globals.get("__name__") == "IPython.core.events":
            return True
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_ipykernels(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).startswith("ipykernel.")


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
