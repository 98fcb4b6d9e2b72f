"""A few schemas, each time others; `scripts/soak` asks for answers to 200, and repeats a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_models import local_session
from tests.soak import schemas, typed

_SCHEMAS = 12


@pytest.mark.timeout(1200)  # its answers take minutes on a machine where others work, too
def test_answers_to_random_schemas_are_valid(
    model_cache: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = random.randrange(10**6)
    with local_session() as session:
        session.load()
        found = list(typed.answers(session, schemas.sample(_SCHEMAS, seed), seed=seed))
    report = typed.report(found)
    record_property("typed", report)
    again = f"scripts/soak --seed {seed} --schemas {_SCHEMAS} --interrupts 0 --seconds 0"
    assert not typed.problems(found), f"{again}\n{report}"
    assert sum(answer.outcome == "valid" for answer in found) > len(found) / 2, report
