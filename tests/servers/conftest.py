"""One real server of each kind, started when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.processes import Server, running

# Tokens of llama.cpp's context: a prompt that fills it takes seconds to read.
SHORT = 256


@pytest.fixture(scope="session")
def vllm(model_cache: Path) -> Iterator[Server]:
    """Return a vLLM server."""
    with running("vllm", model_cache) as server:
        yield server


@pytest.fixture(scope="session")
def llamacpp() -> Iterator[Server]:
    """Return llama-cpp-python's server, which is what `ilab model serve` runs."""
    with running("llamacpp", None) as server:
        yield server


@pytest.fixture(scope="session")
def xllamacpp() -> Iterator[Server]:
    """Return llama.cpp's own server, from a wheel; it is in CI."""
    with running("xllamacpp", None, "--context", str(SHORT)) as server:
        yield server


@pytest.fixture(scope="session")
def ilab() -> Iterator[Server]:
    """Return `ilab model serve`, which takes one request at a time and closes idle connections."""
    with running("instructlab", None) as server:
        yield server


@pytest.fixture(scope="session")
def litellm(xllamacpp: Server) -> Iterator[Server]:
    """Return LiteLLM's proxy in front of llama.cpp's server."""
    with running("litellm", None, xllamacpp.url) as server:
        yield server


@pytest.fixture(scope="session")
def transformers_serve(model_cache: Path) -> Iterator[Server]:
    """Return `transformers serve`: compatible with OpenAI's routes, and unlike in what it sends."""
    with running("transformers", model_cache) as server:
        yield server
