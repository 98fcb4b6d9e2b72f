"""``python -m tests.soak [--seconds N] [--interrupts N] [--schemas N] [--seed S] [--ipykernel VERSION]``."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.local_models import local_session
from tests.soak import schemas, typed
from tests.soak.interrupts import Attack, attack, report
from tests.soak.mixed import Soak


def main(arguments: Sequence[str] | None = None) -> None:
    """Run interrupts, mixed work and typed answers, print the figures, and exit with 1 at a problem."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of mixed work (600)")
    parser.add_argument("--interrupts", type=int, default=300, help="how many (300)")
    parser.add_argument("--schemas", type=int, default=200, help="for typed answers (200)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--ipykernel", metavar="VERSION", help="one of scripts/install-kernels")
    options = parser.parse_args(arguments)
    version = options.ipykernel or "installed"
    print(f"seed {options.seed}", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        attack(Path(folder, "model"), options.seed, options.ipykernel) as attacked,
    ):
        problems = _interrupts(attacked, options.interrupts, version)
        if options.seconds:
            soak = Soak(attacked, options.seed)
            print(soak.report(soak.run(options.seconds), version))
            problems += len(soak.problems)
    problems += _schemas(options.schemas, options.seed)
    sys.exit(1 if problems else 0)


def _interrupts(attacked: Attack, count: int, version: str) -> int:
    for number in range(count):
        if (done := attacked.attempt()).problems:
            print(f"{number}: {done}", flush=True)
    if count:
        print(report(attacked.tries, version), flush=True)
    return sum(bool(done.problems) for done in attacked.tries)


def _schemas(count: int, seed: int) -> int:
    if not count:
        return 0
    with local_session() as session:
        session.load()
        found = list(typed.answers(session, schemas.sample(count, seed), seed=seed))
    print(typed.report(found), flush=True)
    return len(typed.problems(found))


if __name__ == "__main__":
    main()
