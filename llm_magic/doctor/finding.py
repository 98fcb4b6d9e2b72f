"""What a check found: a fact in a line, how it is, and what to type where it is not well."""

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
    """One line of the table; `fix` is what to type, and is there wherever `state` is not ok."""

    name: str
    state: State
    text: str
    fix: str = ""


async def apart(function: Callable[[], T], seconds: float) -> T:
    """Run what blocks in a thread of its own; raises `TimeoutError` and leaves it behind.

    A daemon thread, not an executor's: Python waits for those at its end, however long they hang.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result: T | None = None
        failed: BaseException | None = None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            failed = error
        # Nobody may be waiting any more, nor the loop be open.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, result, failed)

    threading.Thread(target=work, name="llm_magic-doctor", daemon=True).start()
    async with asyncio.timeout(seconds):
        return await done
