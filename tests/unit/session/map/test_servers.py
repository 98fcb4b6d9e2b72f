"""Maps over a server on a real socket: faults, rates, a process that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.kernels import ROOT
from tests.ollama_models import OllamaModel
from tests.ollama_server import OllamaServer
from tests.remote_sessions import questions, session_on
from tests.rows_server import FAULTS, RowsServer

_CHILD = """
import sys
from llm_magic.session import Session
from tests.scripted import settings
session = Session(settings())
session.load("tiny", backend="vllm", base_url=sys.argv[1])
mapped = session.map("row {item}", range(200), save=sys.argv[2], temperature=0, workers=4)
print(*mapped, sep="|")
session.close()
"""


def test_faulty_rows_have_their_error_in_their_place() -> None:
    prompts = [f"row {i}" for i in range(100)]
    for i, fault in enumerate(FAULTS):
        prompts[20 * i + 3] += f" {fault}"
    with RowsServer() as server, session_on(server, idle_s=0.5) as session:
        mapped = session.map("{item}", prompts, workers=16)
        bad = [20 * i + 3 for i in range(len(FAULTS))]
        assert [i for i, reply in enumerate(mapped) if reply is None] == bad
        assert [reply for reply in mapped if reply is not None] == [
            text for i, text in enumerate(prompts) if i not in bad
        ]
        errors = [next(e for e, at in mapped.errors.items() if i in at) for i in bad]
        for error, part in zip(
            errors, ("not acceptable", "Out of order", "no data", "sent", "incomplete"), strict=True
        ):
            assert part in error
        assert all(len(error.splitlines()) == 1 for error in errors)
        assert (mapped.progress.failed, mapped.progress.answered) == (5, 95)


def test_pace_adapts_to_a_server_that_rejects_requests_and_loses_no_row() -> None:
    with RowsServer(allowed_per_s=20) as server, session_on(server) as session:
        mapped = session.map("row {item}", range(40))
        assert list(mapped) == [f"row {i}" for i in range(40)]
        # The server is asked again after its Retry-After of one second.
        assert 0 < server.rejected < 100


def test_rate_and_workers_limit_the_requests() -> None:
    with RowsServer(latency_s=0.02) as server, session_on(server) as session:
        began = time.perf_counter()
        session.map("row {item}", range(10), rate="1200/min")
        # The first ones may start at once.
        assert time.perf_counter() - began > 0.3
        session.map("row {item}", range(10), workers=2)
        assert server.rejected == 0
        assert server.connections <= 10


class PulledAgain(OllamaModel):
    """The same name with other weights."""

    digest = "f" * 64


def test_weights_that_changed_under_the_same_name_answer_again(tmp_path: Path) -> None:
    def map_once() -> int:
        with session_on(server, "ollama") as session:
            assert list(session.map("{item}", ["a", "b"], save=tmp_path / "rows.jsonl"))
        return len(questions(server))

    with OllamaServer([OllamaModel("llama3.2")]) as server:
        assert [map_once(), map_once()] == [2, 2]
        model = PulledAgain("llama3.2")
        server.models[model.full_name] = model
        assert map_once() == 4


def test_killed_process_costs_only_the_rows_in_flight(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with RowsServer(latency_s=0.01) as server:
        call = [sys.executable, "-c", _CHILD, server.url, str(file)]
        with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE) as child:
            server.wait_for("/v1/chat/completions", 100, timeout=60)
            child.send_signal(signal.SIGKILL)
        first = len(server.prompts)
        done = subprocess.run(call, cwd=ROOT, capture_output=True, check=True, timeout=60)
        assert done.stdout.decode().strip() == "|".join(f"row {i}" for i in range(200))
        assert len(server.prompts) <= 200 + 4
        assert first >= 100
