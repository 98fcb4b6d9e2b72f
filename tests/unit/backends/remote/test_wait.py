"""Waits of one answer: each ends in time, and they share a timer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from llm_magic.backends.remote.wait import Wait
from tests.loops import on_a_loop

# Far more than a slow machine takes to get round to something.
_FAR = 30.0


@on_a_loop
async def test_a_wait_that_is_too_long_is_a_timeout() -> None:
    wait, began = Wait(), time.monotonic()
    with pytest.raises(TimeoutError), wait.at_most(0.05):
        await asyncio.sleep(_FAR)
    assert 0.05 <= time.monotonic() - began < _FAR / 2
    await asyncio.sleep(0)  # The task is not cancelled for what comes after.


@on_a_loop
async def test_the_limit_counts_from_each_wait_on() -> None:
    wait = Wait()
    for _ in range(4):
        with wait.at_most(0.2):
            await asyncio.sleep(0.1)
    with pytest.raises(TimeoutError), wait.at_most(0.2):
        await asyncio.sleep(_FAR)


@on_a_loop
async def test_a_shorter_wait_after_a_longer_one_ends_in_its_own_time() -> None:
    wait, began = Wait(), time.monotonic()
    with wait.at_most(_FAR):
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError), wait.at_most(0.05):
        await asyncio.sleep(_FAR)
    assert time.monotonic() - began < _FAR / 2


@on_a_loop
async def test_between_two_waits_nothing_is_interrupted() -> None:
    wait = Wait()
    with wait.at_most(0.02):
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    with wait.at_most(_FAR):
        await asyncio.sleep(0)


@on_a_loop
async def test_whoever_cancels_the_task_is_obeyed() -> None:
    wait = Wait()

    async def work() -> None:
        with wait.at_most(_FAR):
            await asyncio.sleep(_FAR)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@on_a_loop
async def test_a_cancellation_at_the_moment_of_the_timeout_is_obeyed() -> None:
    wait = Wait()

    async def work() -> None:
        with wait.at_most(0):
            await asyncio.sleep(_FAR)

    task = asyncio.create_task(work())
    # The timer rings in the turn of the loop in which this cancels.
    asyncio.get_running_loop().call_later(0, task.cancel)
    await asyncio.wait({task})
    assert task.cancelled()


@on_a_loop
async def test_nothing_is_left_of_waits_that_are_over() -> None:
    wait, loop = Wait(), asyncio.get_running_loop()
    with wait.at_most(0.02):
        await asyncio.sleep(0)
    wait.over()
    scheduled: Any = loop
    assert [timer for timer in scheduled._scheduled if not timer.cancelled()] == []
