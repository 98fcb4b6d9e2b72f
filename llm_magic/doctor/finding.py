"""The result of a check, and checks that may block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
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
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result: T | None = None
        raised: BaseException | None = None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's await
            raised = error
        # After a timeout, the loop may be closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(finish, result, raised)

    threading.Thread(target=work, name="llm_magic-doctor", daemon=True).start()
    async with asyncio.timeout(timeout):
        return await done
