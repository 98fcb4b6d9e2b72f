"""Typed answers without a constraint: after an invalid one, the model gets a second try."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from llm_magic.types import Chunk, Message, Usage

if TYPE_CHECKING:
    from llm_magic.session.schemas import AnswerType

# Returns the chunks of the second answer, given its messages besides those of the first one.
Again = Callable[[tuple[Message, ...]], AsyncGenerator[Chunk, None]]


async def with_second_try(
    first: AsyncGenerator[Chunk, None], answer_type: AnswerType, again: Again
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of an answer; if it is invalid, those of a second one follow a `Chunk.retry`.

    There is no second try after an answer that was cut: the second one would be cut, too.
    """
    text, last = "", Chunk()
    async with contextlib.aclosing(first):
        async for chunk in first:
            text = ("" if chunk.ends_reasoning else text) + chunk.text
            if chunk.finish_reason is not None:
                last = chunk
                continue
            yield chunk
    problem = _problem(answer_type, text, last)
    if not problem:
        yield last
        return
    yield dataclasses.replace(
        last, text="", reasoning="", finish_reason=None, usage=None, retry=problem
    )
    second = again(_complaint(text, problem, answer_type))
    async with contextlib.aclosing(second):
        async for chunk in second:
            if chunk.finish_reason is not None and chunk.usage is not None:
                chunk = dataclasses.replace(chunk, usage=_sum(last.usage, chunk.usage))
            yield chunk


def _problem(answer_type: AnswerType, text: str, last: Chunk) -> str:
    _, problem = answer_type.checked(text, last.finish_reason or "truncated")
    return "" if problem is None or problem.is_cut else str(problem)


def _complaint(text: str, problem: str, answer_type: AnswerType) -> tuple[Message, ...]:
    question = Message("user", f"This is invalid: {problem} {answer_type.instruction}")
    # Some servers reject an empty message.
    return (Message("assistant", text), question) if text.strip() else (question,)


def _sum(first: Usage | None, second: Usage) -> Usage:
    """Return what both answers took; None where one of them is unknown."""
    values = {}
    for field in dataclasses.fields(Usage):
        one, two = getattr(first, field.name, None), getattr(second, field.name)
        values[field.name] = None if one is None or two is None else one + two
    return Usage(**values)
