"""A prompt for each row: what a kill, an edit, faults and a limited server cost, and what we add."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from llm_magic.config.settings import GenerationConfig
from llm_magic.session import Session
from llm_magic.types import Chunk, Message, Usage
from tests.benchmarks.report import Row, Target
from tests.benchmarks.rounds import Rounds
from tests.fault_server import CHAT
from tests.kernels import ROOT
from tests.remote_sessions import session_on
from tests.rows_server import FAULTS, RowsServer
from tests.scripted import ScriptedBackend, settings

_ROWS, _WORKERS = 10_000, 16
_MANY = 100_000
_PER_S, _PACED_ROWS = 50, 3_000


class InstantBackend(ScriptedBackend):
    """Answers at once, and keeps nothing."""

    name = "instant"

    def concurrency_of(self, _name: str) -> int:
        """Return as many as a batch of a local model."""
        return 32

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Yield one chunk."""
        yield Chunk("an answer", tokens=2, finish_reason="stop", usage=Usage(7, 2))


def measure(rounds: Rounds) -> Iterable[Row]:
    """Measure everything in each round."""
    taken = rounds.run(_figures)
    targets = {
        "calls of the second run beyond the rest, kill -9 at half of 10,000 rows": (
            "calls",
            _WORKERS,
        ),
        "calls of the second run, 10 of 10,000 rows edited": ("calls", 10),
        "rows that are wrong, 1 % of 10,000 with faults": ("rows", 0),
        "our own CPU time, 100,000 rows of a generator": ("us/row", 60),
        "growth of the memory, 100,000 rows of a generator": ("MB", 50),
    }
    for name, (unit, limit) in targets.items():
        yield Row(name, unit, taken[name], Target("<=", limit))
    name = "of the rate of a server that allows 50/s, 3,000 rows"
    yield Row(name, "x", taken[name], Target(">=", 0.9))


def _figures() -> Mapping[str, float]:
    own = json.loads(_python("from tests.benchmarks import map; map.print_own()"))
    return {
        "calls of the second run beyond the rest, kill -9 at half of 10,000 rows": _killed(),
        "calls of the second run, 10 of 10,000 rows edited": _edited(),
        "rows that are wrong, 1 % of 10,000 with faults": _faulty(),
        "of the rate of a server that allows 50/s, 3,000 rows": _paced(),
        "our own CPU time, 100,000 rows of a generator": own["us"],
        "growth of the memory, 100,000 rows of a generator": own["mb"],
    }


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=True
    )
    return done.stdout.decode()


_CHILD = "import sys; from tests.benchmarks import map; map.run_saved(*sys.argv[1:])"


def run_saved(url: str, file: str) -> None:
    """Map over 10,000 rows with a file, as the process that is killed does."""
    session = Session(settings())
    session.load("tiny", backend="vllm", base_url=url)
    mapped = session.map("row {item}", range(_ROWS), save=file, temperature=0, workers=_WORKERS)
    assert list(mapped) == [f"row {i}" for i in range(_ROWS)]
    session.close()


def _killed() -> float:
    """Return how many calls the second run made, besides the rows that the first one did not send."""
    with RowsServer() as server, tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "rows.jsonl")
        with subprocess.Popen([sys.executable, "-c", _CHILD, server.url, file], cwd=ROOT) as child:
            server.wait_for(CHAT, _ROWS // 2, timeout=300)
            os.kill(child.pid, signal.SIGKILL)
        first = len(server.requests_to(CHAT))
        _python(_CHILD, server.url, file)
        return len(server.requests_to(CHAT)) - _ROWS if first < _ROWS else 0


def _edited() -> float:
    rows = [f"row {i}" for i in range(_ROWS)]
    with tempfile.TemporaryDirectory() as folder, RowsServer() as server:
        with session_on(server) as session:
            file = Path(folder) / "rows.jsonl"
            session.map("{item}", rows, save=file, workers=_WORKERS)
            first = len(server.requests_to(CHAT))
            for i in range(0, _ROWS, _ROWS // 10):
                rows[i] += " edited"
            assert list(session.map("{item}", rows, save=file, workers=_WORKERS)) == rows
        return len(server.requests_to(CHAT)) - first


def _faulty() -> float:
    rows = [f"row {i}" for i in range(_ROWS)]
    bad = {i: FAULTS[i // 100 % len(FAULTS)] for i in range(50, _ROWS, 100)}
    for i, fault in bad.items():
        rows[i] += f" {fault}"
    with RowsServer() as server, session_on(server, idle_s=0.5) as session:
        mapped = session.map("{item}", rows, workers=64)
        failed = {i for positions in mapped.errors.values() for i in positions}
        wrong = sum(mapped[i] != rows[i] for i in range(_ROWS) if i not in bad)
        return wrong + len(failed ^ bad.keys())


def _paced() -> float:
    with RowsServer(allowed_per_s=_PER_S, latency_s=0.05) as server, session_on(server) as session:
        began = time.perf_counter()
        mapped = session.map("row {item}", range(_PACED_ROWS))
        seconds = time.perf_counter() - began
        assert list(mapped) == [f"row {i}" for i in range(_PACED_ROWS)]
    return _PACED_ROWS / seconds / _PER_S


def print_own() -> None:
    """Map over 100,000 rows of a generator with an instant backend; print the time and the memory."""
    backend = InstantBackend()
    session = Session(settings(), create=lambda _name: backend)
    session.load("tiny")
    session.map("Classify {item}.", (f"text {i}" for i in range(1_000)))
    process = psutil.Process()
    before, began = process.memory_info().rss, time.process_time()
    mapped = session.map("Classify {item}.", (f"text {i}" for i in range(_MANY)))
    seconds = time.process_time() - began
    growth = process.memory_info().rss - before
    assert len(mapped) == _MANY
    assert mapped[-1] == "an answer"
    print(json.dumps({"us": seconds / _MANY * 1e6, "mb": growth / 1e6}))
    session.close()
