"""What the answers of a session took: complete, stopped and failed ones, and unknown numbers."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest

from llm_magic.errors import GenerationFailed
from llm_magic.notebook.display.messages import usage_table
from llm_magic.session.usage import SessionUsage
from llm_magic.text import dollars
from llm_magic.types import Chunk, Usage
from tests.scripted import scripted_session, whole_answer


def test_answers_are_summed_by_model() -> None:
    with scripted_session() as (session, backend):
        assert session.usage().models == ()
        session.load("org/other", keep=True)
        backend.will("a", Chunk(finish_reason="stop", usage=Usage(10, 1, 4, 2, 0.25)))
        session.generate("?", model="tiny")
        backend.will(*whole_answer("b", "c", prompt_tokens=5))
        asyncio.run(_awaited(session.agenerate("?", model="tiny")))
        backend.will(*whole_answer("d", prompt_tokens=1_000))
        list(session.stream("?", model="other"))
        tiny, other = session.usage().models
        assert (tiny.model, tiny.answers, tiny.stopped, tiny.failed) == ("tiny", 2, 0, 0)
        assert (tiny.prompt_tokens, tiny.cached_tokens, tiny.completion_tokens) == (15, 4, 3)
        # Only one of the answers reported them.
        assert (tiny.reasoning_tokens, tiny.cost) == (2, 0.25)
        assert tiny.lower_bounds == {"reasoning_tokens", "cost"}
        assert (other.cost, other.lower_bounds) == (None, frozenset())
        assert tiny.seconds > 0
        total = session.usage().total
        assert (total.answers, total.prompt_tokens, total.cost) == (3, 1_015, 0.25)
        assert repr(session.usage()).startswith("<SessionUsage: 3 answers, 1,015 → 4 tokens, 0.")
        assert repr(session.usage()).endswith(" s, $0.25>")
        heads, *rows, note = repr(usage_table(session.usage())).splitlines()
        assert heads.split("  ")[-1].strip() == "cost"
        assert [row.split()[0] for row in rows] == ["tiny", "other", "all"]
        assert [row.split()[-1] for row in rows] == ["$0.25", "-", "$0.25"]
        assert rows[0].split()[-2:] == ["≥", "$0.25"]
        assert "≥ is a lower bound" in note
        assert "- is unknown" in note


async def _awaited(answer: object) -> object:
    return await answer  # type: ignore[misc]


def test_stopped_and_failed_answers_are_counted_and_unknown_numbers_are_none() -> None:
    with scripted_session() as (session, backend):
        backend.will("some", Chunk(text=" words"), *whole_answer("more"))
        for _ in session.stream("?"):
            break
        backend.will(GenerationFailed("No."))
        with pytest.raises(GenerationFailed):
            session.generate("?")
        (usage,) = session.usage().models
        assert (usage.answers, usage.stopped, usage.failed) == (2, 1, 1)
        assert (usage.prompt_tokens, usage.cost) == (None, None)
        assert usage.completion_tokens == 1
        assert "completion_tokens" in usage.lower_bounds
        shown = repr(usage_table(session.usage()))
        assert "2 (1 stopped, 1 failed)" in shown
        assert "≥\u00a01" in shown
        assert "cost" not in shown.splitlines()[0]
        # Models in this process have no cost.
        assert shown.endswith("no answer reported it.")
    server = SessionUsage((dataclasses.replace(usage, backend="ollama"), usage))
    assert repr(usage_table(server)).endswith("No server reported a cost.")


def test_unread_response_is_not_counted_and_reset_starts_anew() -> None:
    with scripted_session() as (session, _backend):
        session.stream("never started")
        assert session.usage().total.answers == 0
        session.generate("one two three")
        assert session.usage(reset=True).total.answers == 1
        assert session.usage().models == ()
        assert repr(usage_table(session.usage())) == "No answers yet."


def test_answers_of_many_threads_are_all_counted() -> None:
    with scripted_session() as (session, _backend):
        threads = [threading.Thread(target=session.generate, args=("a b",)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = session.usage().total
        assert (total.answers, total.prompt_tokens) == (16, 7 * 16)
        assert total.lower_bounds == frozenset()


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0.00"), (1234.5, "$1,234.50"), (0.25, "$0.25"), (0.1, "$0.10"), (0.0499, "$0.050"),
        (0.00095, "$0.00095"), (0.0000123, "$0.000012"), (1e-12, "$0.0000000000010"),
    ],
)  # fmt: skip
def test_dollars(amount: float, text: str) -> None:
    assert dollars(amount) == text
