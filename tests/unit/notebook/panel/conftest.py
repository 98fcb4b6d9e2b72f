"""What the tests of the panel share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.panels import Scripted, scripted_panel


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """Return a panel on a session whose backend follows a script."""
    with scripted_panel() as made:
        yield made
