"""Answers with a form and free ones share steps, and each is the one that its request gets alone."""

from __future__ import annotations

import json

import pytest

from llm_magic.backends.local.generation.constraint import Constraint
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import GenerationFailed
from llm_magic.types import Structure
from tests.many import PROMPTS, Arrival, BatchModel, conversations

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FREE = GenerationConfig(max_new_tokens=24, temperature=0)
JSON = FREE.replace(structure=Structure("json_schema", json.dumps(SCHEMA)))
# More tokens than the form takes.
JSON = JSON.replace(max_new_tokens=80)
DIGITS = FREE.replace(structure=Structure("regex", "[0-9]{3,12}"))
SAMPLED = JSON.replace(temperature=1.2, seed=4)
CHOICE = FREE.replace(structure=Structure.choice(["hat", "table"]))
CONFIGS = [FREE, JSON, DIGITS, SAMPLED, CHOICE, FREE.replace(temperature=1.0, seed=9)]


def alone(llama: BatchModel, arrivals: list[Arrival]) -> list[object]:
    """Return the answer to each request alone."""
    return [llama.alone(conversations([one.prompt]), one.config)[0] for one in arrivals]


def test_rows_with_and_without_a_form_share_steps(llama: BatchModel) -> None:
    arrivals = [
        Arrival(PROMPTS[2 * n], CONFIGS[n % len(CONFIGS)], at=n // 2)
        for n in range(len(CONFIGS) * 2)
    ]
    answers, passes = llama.arrivals(arrivals)
    assert answers == alone(llama, arrivals)
    texts = [answer[0] for answer in answers if isinstance(answer, tuple)]
    for arrival, text in zip(arrivals, texts, strict=True):
        if arrival.config in (JSON, SAMPLED):
            assert json.loads(text).keys() == {"a", "b"}
        elif arrival.config == DIGITS:
            assert text.isdigit()
        elif arrival.config == CHOICE:
            assert text in {"hat", "table"}
    assert max(size for size, columns in passes.shapes if columns == 1) > 2


def test_answer_with_a_form_goes_on_in_a_batch(llama: BatchModel) -> None:
    for at in (1, 4, 9):
        arrivals = [Arrival(PROMPTS[5], JSON), Arrival(PROMPTS[8], FREE, at=at)]
        answers, _passes = llama.arrivals(arrivals)
        assert answers == alone(llama, arrivals)


def test_form_that_becomes_too_complex_ends_one_answer(
    llama: BatchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Constraint.append

    def fail_at_digit(self: Constraint, token: int) -> None:
        if llama.tokenizer.decode([token]).isdigit():
            raise GenerationFailed("too complex")
        append(self, token)

    monkeypatch.setattr(Constraint, "append", fail_at_digit)
    arrivals = [Arrival(PROMPTS[n], (FREE, DIGITS)[n % 2]) for n in range(6)]
    answers, _passes = llama.arrivals(arrivals)
    for arrival, answer in zip(arrivals, answers, strict=True):
        assert isinstance(answer, GenerationFailed) == (arrival.config == DIGITS)
