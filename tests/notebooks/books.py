"""The notebooks of this project: run in a real kernel, and compared by what must not differ."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from llm_magic.config.settings import Settings
from tests import without_grammars
from tests.kernels import ROOT
from tests.notebooks.server import KEY

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SANITIZE = Path(__file__).with_name("sanitize.cfg")
# nbval reads the same lines, with the same expression.
_PATTERNS: list[tuple[str, str]] = re.findall(
    r"^regex: (.*)$\n^replace: (.*)$", SANITIZE.read_text(encoding="utf-8"), re.MULTILINE
)
PATH = _PATTERNS[0]
# The server's address in the notebooks: the port that vLLM takes, too.
_WRITTEN = "localhost:8000"
SECRET = secrets.token_hex(16)  # the key of that server
WIDGET = "application/vnd.jupyter.widget-view+json"
_REMOVED = {"text/plain": "", "text/html": ""}
_CELL_TIMEOUT_S = 300  # on a busy machine; about 5 s otherwise


def environment(stream: Literal["on", "off"]) -> dict[str, str]:
    """Return the environment of a kernel that no setting of the person who tests reaches."""
    own = {str(field.validation_alias) for field in Settings.model_fields.values()}
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return {
        **inherited,
        "HF_HUB_OFFLINE": "1",
        "LLM_DEVICE": "cpu",
        "LLM_MAGIC_STREAM": stream,
        # OpenMP's threads spin while they wait: on a busy machine a token would take a second.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


@dataclass(frozen=True, slots=True)
class Stage:
    """What a notebook finds around it: where its server is, and the environment of its kernel."""

    server: str = _WRITTEN
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def open(self, path: Path) -> NotebookNode:
        """Read a notebook, with the address of the running server in it."""
        return _moved(read(path), _WRITTEN, self.server)

    def close(self, book: NotebookNode) -> NotebookNode:
        """Return the notebook as it was written, with the outputs it has now."""
        return _moved(book, self.server, _WRITTEN)


@contextlib.contextmanager
def stage(path: Path, stream: Literal["on", "off"]) -> Iterator[Stage]:
    """Set up what a notebook needs while the block lasts: a profile, and the server, if it asks one."""
    with tempfile.TemporaryDirectory(prefix="llm_magic-ipython-") as profile:
        around = {**environment(stream), "IPYTHONDIR": profile}
        if _WRITTEN not in path.read_text(encoding="utf-8"):
            yield Stage(environment=around)
            return
        around[KEY] = SECRET
        command = [sys.executable, "-m", "tests.notebooks.server", "--port", "0"]
        with subprocess.Popen(
            command, cwd=ROOT, env=around, stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None
                # Printed when it is ready.
                address = server.stdout.readline().strip().rpartition("//")[2]
                assert address, "the server of the notebooks did not start"
                yield Stage(address, around)
            finally:
                server.terminate()


def _moved(book: NotebookNode, before: str, after: str) -> NotebookNode:
    text = nbformat.writes(book).replace(before, after)
    moved: NotebookNode = nbformat.reads(text, as_version=4)
    return moved


def read(path: Path) -> NotebookNode:
    """Read a notebook."""
    book: NotebookNode = nbformat.read(path, as_version=4)
    return book


def code_cells(book: NotebookNode) -> list[NotebookNode]:
    """Return the cells that are run."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def run(path: Path, stream: Literal["on", "off"]) -> NotebookNode:
    """Return the notebook as it is after all cells ran; raises where one failed unexpectedly."""
    with stage(path, stream) as around:
        book = around.open(path)
        client = NotebookClient(
            book,
            kernel_name="python3",
            timeout=_CELL_TIMEOUT_S,
            coalesce_streams=True,
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env=dict(around.environment))
        for cell in code_cells(book):
            # A line of progress that was removed at its end.
            cell.outputs = [output for output in cell.outputs if output.get("data") != _REMOVED]
        return around.close(book)


@dataclass(frozen=True, slots=True)
class Executed:
    """A notebook after a run under nbval: its counts of tests, failures, errors and skips, and all outputs."""

    path: Path
    exit_code: int
    report: str
    counts: list[int]
    # By the id of the cell.
    outputs: dict[str, list[dict[str, Any]]]


def run_nbval(path: Path, folder: Path) -> Executed:
    """Run a notebook under nbval, as its documentation shows it, in a folder of its own."""
    counts, outputs = folder / "counts.xml", folder / "outputs.json"
    # Its own settings: neither the warnings nor the markers of this suite are nbval's business.
    (folder / "pytest.ini").write_text("[pytest]\n")
    with stage(path, "off") as around:
        copy = folder / path.name
        nbformat.write(around.open(path), copy)
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
                *("-c", str(folder / "pytest.ini"), "--junitxml", str(counts)),
                *("-p", "tests.notebooks.save_outputs", "--save-outputs", str(outputs)),
                *("--nbval", "--nbval-sanitize-with", str(SANITIZE), str(copy)),
            ],
            env={**around.environment, "PYTHONPATH": without_grammars.path(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    suite = next(ElementTree.parse(counts).iter("testsuite"))
    return Executed(
        path,
        ran.returncode,
        ran.stdout[-5000:] + ran.stderr[-2000:],
        [int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")],
        json.loads(outputs.read_text(encoding="utf-8").replace(around.server, _WRITTEN)),
    )


def sanitized(value: Any) -> Any:
    """Return outputs without what may differ: figures of time and memory, places, tracebacks."""
    if isinstance(value, str):
        for pattern, replacement in _PATTERNS:
            value = re.sub(pattern, replacement, value)
        return value
    if isinstance(value, list):
        return [sanitized(item) for item in value]
    if isinstance(value, dict):
        volatile = {"traceback", "execution_count", "metadata", WIDGET}
        return {key: sanitized(item) for key, item in value.items() if key not in volatile}
    return value


def text(outputs: Iterable[Mapping[str, Any]]) -> str:
    """Return outputs as plain text, and of an error its message."""
    parts = [
        output.get("text") or output.get("evalue") or output.get("data", {}).get("text/plain")
        for output in outputs
    ]
    return "\n".join(part for part in parts if part)
