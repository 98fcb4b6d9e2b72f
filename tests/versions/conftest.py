"""One session on the real local backend for each file of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.collection import pytest_collection as pytest_collection

if TYPE_CHECKING:
    from llm_magic.session import Session

# Read when torch is imported: threads that wait must not take the cores of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    # Some environments have no torch.
    from tests.local_models import local_session

    with local_session(temperature=0, repetition_penalty=1) as session:
        yield session
