"""What the tests of local models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.local_models import listening


@pytest.fixture
def no_noise() -> Iterator[None]:
    """Fail a test that logs a warning, which a user would see under the cell."""
    with listening() as noise:
        yield
    assert noise == []
