"""One real server of each kind, started when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.processes import Server, running


@pytest.fixture(scope="session")
def vllm(model_cache: Path) -> Iterator[Server]:
    """Return a vLLM server."""
    with running("vllm", model_cache) as server:
        yield server


@pytest.fixture(scope="session")
def llamacpp(model_cache: Path) -> Iterator[Server]:
    """Return llama-cpp-python's server, which is what `ilab model serve` runs."""
    with running("llamacpp", model_cache) as server:
        yield server


@pytest.fixture(scope="session")
def transformers_serve(model_cache: Path) -> Iterator[Server]:
    """Return `transformers serve`: compatible with OpenAI's routes, and unlike in what it sends."""
    with running("transformers", model_cache) as server:
        yield server
