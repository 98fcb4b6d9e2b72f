"""The notebooks of this project: run in a real kernel, and compared by what must not differ."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from llm_magic.config import Settings
from tests.kernels import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SANITIZE = Path(__file__).with_name("sanitize.cfg")
# nbval reads the same lines, with the same expression.
_PATTERNS: list[tuple[str, str]] = re.findall(
    r"^regex: (.*)$\n^replace: (.*)$", SANITIZE.read_text(encoding="utf-8"), re.MULTILINE
)
PATH = _PATTERNS[0]
_CELL_TIMEOUT_S = 300  # on a busy machine; about 5 s otherwise


def environment(stream: Literal["on", "off"]) -> dict[str, str]:
    """Return the environment of a kernel that no setting of the person who tests reaches."""
    own = {str(field.validation_alias) for field in Settings.model_fields.values()}
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "LLM_DEVICE": "cpu",
        "LLM_MAGIC_STREAM": stream,
        # OpenMP's threads spin while they wait: on a busy machine a token would take a second.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def read(path: Path) -> NotebookNode:
    """Read a notebook."""
    book: NotebookNode = nbformat.read(path, as_version=4)
    return book


def code_cells(book: NotebookNode) -> list[NotebookNode]:
    """Return the cells that are run."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def run(path: Path, stream: Literal["on", "off"]) -> NotebookNode:
    """Return the notebook as it is after all cells ran; raises where one failed unexpectedly."""
    book = read(path)
    client = NotebookClient(
        book,
        kernel_name="python3",
        timeout=_CELL_TIMEOUT_S,
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory(prefix="llm_magic-ipython-") as profile:
        client.execute(env={**environment(stream), "IPYTHONDIR": profile})
    return book


def sanitized(value: Any) -> Any:
    """Return outputs without what may differ: figures of time and memory, places, tracebacks."""
    if isinstance(value, str):
        for pattern, replacement in _PATTERNS:
            value = re.sub(pattern, replacement, value)
        return value
    if isinstance(value, list):
        return [sanitized(item) for item in value]
    if isinstance(value, dict):
        volatile = {"traceback", "execution_count", "metadata"}
        return {key: sanitized(item) for key, item in value.items() if key not in volatile}
    return value


def text(cell: NotebookNode) -> str:
    """Return what a cell shows as plain text."""
    parts = [
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain")
        for output in cell.outputs
    ]
    return "\n".join(part for part in parts if part)
