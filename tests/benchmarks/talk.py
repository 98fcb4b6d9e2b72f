"""Conversations of the benchmarks in a kernel with the loaded model."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from tests.benchmarks.inside import loaded_model

_NOUNS = """
lighthouse keeper whale storm harbour lantern oil stairs fog horn rope boat tide gull rock letter
island winter bread stove coat window glass brass clock map chart star wave salt net
""".split()  # noqa: SIM905 - the list of strings would be ten times as long
_CODE = """
def area_of_circle(radius):
    return 3.14159 * radius * radius

def area_of_square(side):
    return side * side

def area_of_triangle(base, height):
    return 0.5 * base * height
"""
REPEATING = f"Repeat this code exactly as it is, nothing else:\n```python{_CODE}```"
OPEN = "Write a long story about a lighthouse keeper and a whale. Tell every detail."
_numbers = itertools.count()


def tenth_turn() -> dict[str, float]:
    """Answer the ninth and the tenth turn of a new conversation of about 2,000 tokens.

    Returns the seconds until the first token of the tenth, with and without the prefix cache.
    """
    from llm_magic import llm

    turns = _conversation(next(_numbers))
    options: Any = {"max_new_tokens": 1, "temperature": 0}
    llm.generate(turns[:-2], **options)
    ours = llm.generate(turns, **options)
    loaded_model().prefix_cache.clear()
    whole = llm.generate(turns, **options)
    assert not whole.usage.cached_tokens
    return {
        "ours": ours.timing.first_token_s or 0.0,
        "whole": whole.timing.first_token_s or 0.0,
        "tokens": float(ours.usage.prompt_tokens or 0),
        "reused": float(ours.usage.cached_tokens or 0),
    }


def _conversation(number: int) -> list[Any]:
    from llm_magic.types import Message

    turns: list[Any] = []
    for turn in range(10):
        length = 130 if turn < 9 else 100
        numbers = (number * 7 + turn * 5 + n * (turn + 3) for n in range(length))
        nouns = [_NOUNS[n % len(_NOUNS)] for n in numbers]
        turns.append(Message("user", f"{number}.{turn}: tell me about " + " ".join(nouns)))
        turns.append(Message("assistant", f"In turn {turn} I say: " + " ".join(nouns[:40]) + "."))
    return turns[:-1]


def long_prompt(number: int) -> str:
    """Return a prompt of about 500 tokens that shares no prefix with others."""
    return f"{number}: tell me about " + " ".join(_NOUNS[n * 7 % len(_NOUNS)] for n in range(400))


def read(number: int) -> dict[str, float]:
    """Return the seconds until the first token after a long prompt, and its length."""
    from llm_magic import llm

    reply = llm.generate(long_prompt(number), max_new_tokens=1, temperature=0)
    assert (reply.usage.cached_tokens or 0) < 64
    return {
        "ours": reply.timing.first_token_s or 0.0,
        "tokens": float(reply.usage.prompt_tokens or 0),
    }


def speculative_rates() -> dict[str, float]:
    """Answer with and without drafts; returns tokens per second."""
    figures = {}
    for name, prompt in (("repeating", REPEATING), ("open", OPEN)):
        figures[f"{name} with"] = _rate(prompt)
        with _without_draft():
            figures[f"{name} without"] = _rate(prompt)
    return figures


def _rate(prompt: str) -> float:
    from llm_magic import llm

    reply = llm.generate(prompt, temperature=0, repetition_penalty=1, max_new_tokens=96)
    return reply.timing.tokens_per_s or 0.0


@contextlib.contextmanager
def _without_draft() -> Iterator[None]:
    from llm_magic.backends.local.generation.speculative import PromptLookup

    lookup: Any = PromptLookup
    usual, lookup.propose = lookup.propose, lambda _self, _tokens, _limit: []
    try:
        yield
    finally:
        lookup.propose = usual
