"""The package without any extra: servers work, and what needs an extra names it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.kernels import Kernel, kernel
from tests.ollama_server import OllamaServer

pytestmark = pytest.mark.without_extras


@pytest.fixture(scope="module")
def k() -> Iterator[Kernel]:
    with OllamaServer() as ollama, kernel(OLLAMA_BASE_URL=ollama.url) as k:
        k.ok("%load_ext llm_magic")
        yield k


@pytest.mark.parametrize(
    "package", ["torch", "xllamacpp", "transformers", "huggingface_hub", "ipywidgets"]
)
def test_environment_has_no_extra(package: str) -> None:
    assert find_spec(package) is None


@pytest.mark.parametrize(
    ("cell", "extra"),
    [
        ("%llm_load", "llm_magic[local]"),
        ("%llm_load org/model", "llm_magic[local]"),
        ("%llm_models", "llm_magic[local]"),
        ("%llm_load -b llamacpp", "llm_magic[gguf]"),
        ("%llm_models -b llamacpp", "llm_magic[gguf]"),
        ("%llm_panel", "llm_magic[panel]"),
    ],
)
def test_missing_extra_is_one_line_with_the_command(k: Kernel, cell: str, extra: str) -> None:
    ran = k.run(cell)
    assert (ran.ename, len(ran.traceback)) == ("MissingDependency", 1)
    assert "pip install" in ran.error
    assert extra in ran.error


def test_server_works_without_extras(k: Kernel) -> None:
    k.ok("%llm_load llama3.2 -b ollama")
    assert "Hello there" in k.ok("%llm Hello there").text
    assert "qwen3:0.6b" in k.ok("%llm_models -b ollama").text


def test_doctor_lists_missing_extras(k: Kernel) -> None:
    found = k.ok("%llm_doctor").text
    assert "not installed: torch" in found
    assert "not installed: ipywidgets" in found
