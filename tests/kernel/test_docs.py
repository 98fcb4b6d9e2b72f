"""Every cell of the pages runs in a real kernel with the small model, page by page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import ALL, Block, blocks, name_of
from tests.echo_package import install
from tests.kernels import Kernel, kernel

# Some of what the cells of a page display, because the page describes it.
SHOWN = {
    "README": ["Lima", "Tokyo"],
    "index": ["Tokyo"],
    "first-cells": ["Amsterdam", "Lima", "France"],
    "answers": ["Amsterdam", "nothing was sent", "Rome"],
    "background": ["cancelled"],
    "variables": ["You have been to Lima", r"\\frac\{1\}\{2\}", "3 towns in all"],
    "local-models": ["Ready", "ready in", "SmolLM2-135M-Instruct"],
    "chats": ["My snake is called Monty"],
    "speed": [r"\(\d+ reused\)"],
    "explain-errors": ["ZeroDivisionError"],
    "errors": ["temperature=9 is out of range. It must be 0 to 2"],
    "python": ["Tokyo", "done"],
    "offline": ["bundled"],
    "vscode-and-colab": ["Tokyo", "ipykernel"],
}
PAGES = [path for path in ALL if any(block.runs for block in blocks(path))]


@pytest.fixture(scope="module")
def k(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Return a kernel where the example package is installed."""
    folder = tmp_path_factory.mktemp("docs")
    packages = install(tmp_path_factory.mktemp("echo"))
    # Answers may be as long as those that the pages limit themselves: longer ones show nothing more.
    variables = {"LLM_MAGIC_CACHE_DIR": str(model_cache), "DEFAULT_LLM_MAX_NEW_TOKENS": "40"}
    with kernel(packages=packages, cwd=folder, **variables) as k:
        yield k


def check(k: Kernel, block: Block) -> str:
    """Run a cell, and return what it showed."""
    ran = k.run(block.text)
    expected = ("error", block.raises) if block.raises else ("ok", "")
    assert (ran.status, ran.ename) == expected, f"{block.text}\n{ran.error}"
    return ran.text


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_cells_of_a_page_run_in_their_order(k: Kernel, path: Path) -> None:
    try:
        shown = [check(k, block) for block in blocks(path) if block.runs]
    finally:
        k.ok("%unload_ext llm_magic")
        k.ok("%reset -f")
        # Each load and unload of the next page collects all garbage: what is imported is none.
        k.ok("__import__('gc').freeze()")
    assert any(text.strip() for text in shown), "a page shows something"
    for pattern in SHOWN.get(path.stem, ()):
        assert re.search(pattern, "\n".join(shown)), shown
