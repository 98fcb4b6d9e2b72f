"""The result of a check, and checks that may block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, TypeVar

State = Literal["ok", "warn", "problem"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table. `fix` is what to do, empty only if `state` is ``ok``."""

    name: str
    state: State
    text: str
    fix: str = ""


async def run_in_thread(function: Callable[[], T], timeout: float) -> T:
    """Return the result of a blocking function; raises `TimeoutError` after `timeout` seconds.

    The thread is a daemon and may continue after the timeout. At exit, Python would wait for the
    threads of an executor.
    """
    result: Future[T] = Future()
    # It is not cancelled by the timeout: the thread sets its result.
    result.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's await
            result.set_exception(error)

    threading.Thread(target=work, name="llm_magic-doctor", daemon=True).start()
    return await asyncio.wait_for(asyncio.wrap_future(result), timeout)
