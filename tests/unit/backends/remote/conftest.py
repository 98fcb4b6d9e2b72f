"""The fault server, and a session that has loaded a model from it; some modules have other ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llm_magic.session import Session
from tests.fault_server import FaultServer
from tests.remote_sessions import session_on


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture
def session(server: FaultServer) -> Iterator[Session]:
    with session_on(server) as made:
        yield made
