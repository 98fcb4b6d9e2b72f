"""A map on the worker processes of a Dask cluster, one of which is killed half-way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from llm_magic.errors import Interrupted, OptionError, WorkersFailed
from llm_magic.session import Session
from tests import worker_backend
from tests.kernels import within_a_second
from tests.until import until


@pytest.fixture(scope="module")
def client(worker_path: None) -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_killed_worker_loses_no_row_and_repeats_one_chunk_at_most(
    recorded: Session, model: Path, tmp_path: Path, client: Client
) -> None:
    prompts = [f"row {i}" for i in range(96)]
    assert list(recorded.map("{item}", prompts, on=client)) == prompts
    assert len(worker_backend.loads(model)) == 3
    prompts = [f"again {i}" for i in range(96)]
    prompts[48] += " kills"
    file = tmp_path / "rows.jsonl"
    assert list(recorded.map("{item}", prompts, on=client, save=file)) == prompts
    assert (model / "killed").exists()
    sent = worker_backend.rows(model)[96:]
    assert set(sent) == set(prompts)
    # A chunk has four rows.
    assert len(sent) <= 96 + 4
    assert len(file.read_text().splitlines()) >= 96

    pressed = 0.0

    def press() -> None:
        nonlocal pressed
        until((model / "waiting").exists, "no worker waits")
        pressed = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(Interrupted, match="Stopped before an answer was complete"):
        recorded.map("{item}", ["it waits"], on=client)
    assert time.monotonic() - pressed < within_a_second()
    until(lambda: not (model / "waiting").exists(), "the worker was not stopped", within=25)
    # Dask gives a chunk up after the fourth death, here after the first.
    assert client.cluster is not None
    client.cluster.scheduler.allowed_failures = 0
    mapped = recorded.map("{item}", ["it kills!"], on=client)
    assert list(mapped) == [None]
    assert "Several workers died with the same rows" in next(iter(mapped.errors))
    with pytest.raises(WorkersFailed, match="Several workers died with the same rows"):
        recorded.map("{item}", ["a kills!", "b kills!"], on=client, workers=2)
    client.close()
    with pytest.raises(OptionError, match="The Dask client is not connected"):
        recorded.map("{item}", ["after"], on=client)
