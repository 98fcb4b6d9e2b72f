"""A few schemas; `scripts/soak` asks for answers to 200, each time to others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_models import local_session
from tests.soak import schemas, typed

_SCHEMAS, _SEED = 12, 20


@pytest.mark.timeout(1200)  # its answers take minutes on a machine where others work, too
def test_answers_to_random_schemas_are_valid(
    model_cache: Path, record_property: Callable[[str, object], None]
) -> None:
    with local_session() as session:
        session.load()
        found = list(typed.answers(session, schemas.sample(_SCHEMAS, _SEED), seed=_SEED))
    report = typed.report(found)
    record_property("typed", report)
    again = f"scripts/soak --seed {_SEED} --schemas {_SCHEMAS} --interrupts 0 --seconds 0"
    assert not typed.problems(found), f"{again}\n{report}"
    assert sum(answer.outcome == "valid" for answer in found) > len(found) / 2, report
