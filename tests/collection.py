"""A hook for the collection of tests, which each conftest that is read alone imports."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude what the collection of tests imports from garbage collections, then and later.

    Each load and unload of a model collects all garbage. With torch, Transformers and all test
    modules on the heap, that takes longer than everything else that a tiny model does.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
