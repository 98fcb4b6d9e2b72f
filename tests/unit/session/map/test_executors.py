"""Maps on worker processes of an executor: one load each, errors in place, deaths, stops, keys."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from llm_magic.errors import Interrupted, OptionError, WorkersFailed
from llm_magic.session import Session
from tests import worker_backend
from tests.fault_server import CHAT
from tests.kernels import within_a_second
from tests.remote_sessions import session_on
from tests.rows_server import RowsServer
from tests.until import until


def new_pool(workers: int = 2, method: str = "spawn") -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context(method))


@pytest.fixture(scope="module")
def pool(worker_path: None) -> Iterator[ProcessPoolExecutor]:
    with new_pool() as executor:
        yield executor


def test_each_worker_loads_the_model_once_and_rows_keep_their_order(
    recorded: Session, model: Path, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    prompts = [f"row {i}" for i in range(40)]
    file = tmp_path / "rows.jsonl"
    mapped = recorded.map("{item}", prompts, on=pool, save=file)
    assert list(mapped) == prompts
    # Reasoning is separated in the worker.
    workers = {reply.reasoning for reply in mapped if reply is not None}
    here, *others = worker_backend.loads(model)
    assert here == os.getpid()
    assert workers == {f"pid {number}" for number in others}
    assert len(set(others)) == len(others) == 2
    assert (mapped.usage.answers, mapped.usage.completion_tokens) == (40, 80)
    prompts[7] = "edited"
    assert list(recorded.map("{item}", prompts, on=pool, save=file)) == prompts
    assert len(worker_backend.rows(model)) == 41
    assert list(recorded.imap("{item}", iter("abc"), on=pool)) == ["a", "b", "c"]
    assert worker_backend.loads(model) == [here, *others]


def test_workers_answer_with_a_type(
    recorded: Session, model: Path, pool: ProcessPoolExecutor
) -> None:
    mapped = recorded.map("{item}", ["aa", "ab"], on=pool, grammar="start: /a+b?/\n")
    assert [reply.value for reply in mapped if reply is not None] == ["aa", "ab"]
    mapped = recorded.map("{item}", ["aa"], on=pool, choice="aa,b", schema_by="prompt")
    (error,) = mapped.errors
    assert "is none of aa, b" in error
    assert worker_backend.rows(model)[-1].startswith("This is invalid: "), "it has a second try"


def test_row_that_fails_on_a_worker_keeps_its_error_in_its_place(
    recorded: Session, pool: ProcessPoolExecutor
) -> None:
    mapped = recorded.map("{item}", ["it fails", "a", "it breaks", None, "b"], on=pool)
    assert list(mapped) == [None, "a", None, None, "b"]
    assert mapped.errors == {"It failed.": [0], "ValueError: It broke.": [2]}
    assert mapped.missing == [3]


def test_dead_worker_of_a_pool_ends_the_map_with_what_is_finished_and_a_new_pool_goes_on(
    recorded: Session, model: Path
) -> None:
    prompts = [f"row {i}" for i in range(48)]
    prompts[24] += " kills"
    with new_pool() as first, pytest.raises(WorkersFailed) as caught:
        recorded.map("{item}", prompts, on=first)
    assert "A worker process died" in str(caught.value)
    assert "Create a new one and run the same call again" in str(caught.value)
    finished = 48 - len(caught.value.mapped.pending)
    assert finished >= 16
    sent = len(worker_backend.rows(model))
    with new_pool() as pool:
        assert list(recorded.map("{item}", prompts, on=pool)) == prompts
    assert len(worker_backend.rows(model)) - sent == 48 - finished
    with pytest.raises(WorkersFailed, match="The executor was closed"):
        recorded.map("{item}", ["another"], on=pool)


def test_stop_ends_the_map_and_its_workers_within_a_second_and_the_pool_stays_usable(
    recorded: Session, model: Path, pool: ProcessPoolExecutor
) -> None:
    began = 0.0

    def rows() -> Iterator[str]:
        nonlocal began
        yield from (f"row {i}" for i in range(8))
        yield from ["it waits"] * 4
        until((model / "waiting").exists, "no worker waits")
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        yield "late"

    with pytest.raises(Interrupted) as caught:
        recorded.map("{item}", rows(), on=pool)
    assert time.monotonic() - began < within_a_second()
    assert "the same call goes on from there" in str(caught.value)
    until(lambda: not (model / "waiting").exists(), "the worker was not stopped", within=25)
    assert list(recorded.map("{item}", ["after"], on=pool)) == ["after"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_workers_that_cannot_answer_end_the_map_with_the_reason(
    recorded: Session, model: Path, pool: ProcessPoolExecutor
) -> None:
    with new_pool(1, "fork") as forks, pytest.raises(WorkersFailed, match="fork of the notebook"):
        recorded.map("{item}", ["a"], on=forks)
    (model / "broken").touch()
    with pytest.raises(WorkersFailed) as caught:
        recorded.map("{item}", ["a"], on=pool)
    assert str(caught.value).startswith("A worker cannot answer. Its file is broken.")
    threads: Any
    with ThreadPoolExecutor() as threads, pytest.raises(OptionError, match="ProcessPoolExecutor"):
        recorded.map("{item}", ["a"], on=threads)
    wrong: Any = 4
    with pytest.raises(OptionError, match="A int has no workers"):
        recorded.map("{item}", ["a"], on=wrong)


def test_each_worker_calls_the_server_with_the_key_of_its_own_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROWS_KEY", "sk-of-the-workers")
    with (
        RowsServer(allowed_per_s=10) as server,
        session_on(server, key_env="ROWS_KEY") as session,
        new_pool() as pool,
    ):
        prompts = [f"row {i}" for i in range(24)]
        prompts[3] += " refuse"
        mapped = session.map("{item}", prompts, on=pool)
        assert [i for i, reply in enumerate(mapped) if reply is None] == [3]
        assert "not acceptable" in next(iter(mapped.errors))
        # The throttle of the session takes the rejections of all workers into account.
        assert 0 < server.rejected < 100
        keys = {one.headers["Authorization"] for one in server.requests_to(CHAT)}
        assert keys == {"Bearer sk-of-the-workers"}
        monkeypatch.delenv("ROWS_KEY")
        with pytest.raises(OptionError, match="ROWS_KEY is not set in the environment"):
            session.map("{item}", ["a"], on=pool)
