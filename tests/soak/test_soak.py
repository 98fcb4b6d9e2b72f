"""A short soak; `scripts/soak` runs longer ones, each time with another seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.soak.interrupts import Attack, attack
from tests.soak.mixed import Soak

# Half a minute together.
_INTERRUPTS_S = 12
_MIXED_S = 20
# What is tried does not change from one run to the next; when it happens does.
_SEED = 20


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    with attack(tmp_path_factory.mktemp("soak") / "model", _SEED) as attacked:
        yield attacked


def test_random_interrupts_end_cells_in_order(
    attacked: Attack, record_property: Callable[[str, object], None]
) -> None:
    end = time.monotonic() + _INTERRUPTS_S
    while time.monotonic() < end:
        attacked.attempt()
    record_property("interrupts", len(attacked.tries))
    bad = [str(done) for done in attacked.tries if done.problems]
    again = f"scripts/soak --seed {_SEED} --interrupts {len(attacked.tries)} --seconds 0"
    assert not bad, "\n".join([again, *bad])


def test_mixed_work_leaves_nothing_behind(
    attacked: Attack, record_property: Callable[[str, object], None]
) -> None:
    again = f"scripts/soak --seed {_SEED} --interrupts {len(attacked.tries)} --seconds {_MIXED_S}"
    soak = Soak(attacked, _SEED)
    found = soak.report(soak.run(_MIXED_S), "installed")
    record_property("soak", found)
    assert not soak.problems, f"{again}\n{found}"
