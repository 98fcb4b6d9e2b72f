"""Finished rows in a file and after an interrupt: what is sent again, and what is not."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_magic.errors import GenerationFailed, Interrupted, OptionError
from llm_magic.session import Session
from llm_magic.types import Chunk, Usage
from tests.scripted import Hang, Pause, ScriptedBackend, scripted_session, stop_when, whole_answer

Pair = tuple[Session, ScriptedBackend]


@pytest.fixture
def scripted() -> Iterator[Pair]:
    with scripted_session() as pair:
        yield pair


def sent(backend: ScriptedBackend) -> list[str]:
    """Return the prompts that were sent since the last call."""
    prompts = [call.messages[-1].content for call in backend.requests]
    backend.requests.clear()
    return prompts


def test_only_changed_rows_are_sent_again(scripted: Pair, tmp_path: Path) -> None:
    session, backend = scripted
    file, rows = tmp_path / "rows.jsonl", [f"row {i}" for i in range(1_000)]
    first = session.map("{item}", rows, save=file)
    assert len(sent(backend)) == 1_000
    for i in range(0, 1_000, 100):
        rows[i] += " edited"
    second = session.map("{item}", rows, save=file)
    assert sent(backend) == rows[::100]
    assert list(second) == rows
    assert (second.progress.cached, second.usage.answers) == (990, 10)
    assert first[1] == second[1]
    # What changes the answer is part of the key.
    session.map("{item}", rows[:2], save=file, temperature=0.1)
    session.map("{item}", rows[:2], save=file, system="Be brief.")
    session.load("org/other", keep=True)
    session.map("{item}", rows[:2], save=file, model="other")
    assert len(sent(backend)) == 6
    entry = json.loads(file.read_text().splitlines()[0])
    assert entry.keys() == {"key", "text", "finish_reason", "usage", "seconds", "time"}
    assert entry["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "cached_tokens": 0}


def test_failed_rows_are_sent_again_on_request(scripted: Pair, tmp_path: Path) -> None:
    session, backend = scripted
    file = tmp_path / "rows.jsonl"
    backend.will(GenerationFailed("It broke."))
    backend.will("cut", Chunk(finish_reason="length", usage=Usage(5, 1)))
    assert list(session.map("{item}", ["a", "b", "c"], save=file)) == [None, "cut", "c"]
    sent(backend)
    again = session.map("{item}", ["a", "b", "c"], save=file)
    assert (again.errors, again.cut, sent(backend)) == ({"It broke.": [0]}, [1], [])
    assert list(again.retry()) == ["a", "cut", "c"]
    assert sent(backend) == ["a"]
    assert not session.map("{item}", ["a", "b", "c"], save=file).errors
    backend.will(GenerationFailed("It broke."))
    session.map("{item}", ["d"], save=file)
    assert list(session.map("{item}", ["d"], save=file, retry_failed=True)) == ["d"]
    assert sent(backend) == ["d", "d"]


def test_torn_and_foreign_lines_are_skipped(scripted: Pair, tmp_path: Path) -> None:
    session, backend = scripted
    file = tmp_path / "rows.jsonl"
    session.map("{item}", ["a", "b", "c"], save=file, temperature=0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    sent(backend)
    torn = session.map("{item}", ["a", "b", "c"], save=file, temperature=0)
    assert (list(torn), sent(backend), torn.notes) == (["a", "b", "c"], ["c"], ())
    mapped = session.map("{item}", ["a", "b", "c"], save=file, temperature=0)
    assert sent(backend) == []
    assert mapped.notes == (f"{file}: 1 line cannot be read.",)
    with file.open("a") as more:
        for line in ("[]", '{"key": "00"}', '{"key": 1}', "\ufffd", "[" * 100_000, "{}"):
            more.write(f"{line}\n")
    assert list(session.map("{item}", ["a"], save=file, temperature=0)) == ["a"]
    assert sent(backend) == []


def test_file_that_is_none_of_saved_rows_stays_as_it_is(scripted: Pair, tmp_path: Path) -> None:
    session, backend = scripted
    table = tmp_path / "data.csv"
    table.write_text("text,label\none,1\n")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (table, "data.csv is not a file of saved rows. Choose another file name"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / "no" / "rows.jsonl", "cannot be read: No such file"),
    ):
        with pytest.raises(OptionError, match=message):
            session.map("{item}", ["a"], save=path)
    assert table.read_text() == "text,label\none,1\n"
    assert sent(backend) == []


@pytest.mark.parametrize("text", ['{"a": 1}', '{"key":"a"}', "TODO: call Bob", "a,b", " ", "{"])
def test_foreign_file_of_one_line_without_its_end_stays_as_it_is(
    scripted: Pair, tmp_path: Path, text: str
) -> None:
    session, backend = scripted
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(OptionError, match=r"config\.json is not a file of saved rows\."):
        session.map("{item}", ["a"], save=file)
    assert (file.read_text(), sent(backend)) == (text, [])


def test_file_with_a_part_of_its_first_row_is_used(scripted: Pair, tmp_path: Path) -> None:
    session, backend = scripted
    file = tmp_path / "rows.jsonl"
    session.map("{item}", ["a"], save=file)
    file.write_bytes(file.read_bytes()[:30])
    assert list(session.map("{item}", ["a"], save=file)) == ["a"]
    assert sent(backend) == ["a", "a"]


def test_full_disk_ends_the_map_and_keeps_its_rows(scripted: Pair) -> None:
    session, backend = scripted
    with pytest.raises(OptionError, match="/dev/full is not a regular file"):
        session.map("{item}", ["a"], save="/dev/full")
    assert sent(backend) == []


def test_two_writers_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"

    def work(start: int) -> None:
        with scripted_session() as (session, _backend):
            session.map("{item} " + "x" * 500, range(start, start + 200), save=file)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = file.read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) == len(lines) == 400


def test_equal_rows_are_sent_once_at_temperature_0_and_never_merged_above(
    scripted: Pair, tmp_path: Path
) -> None:
    session, backend = scripted
    mapped = session.map("{item}", ["a", "b", "a", "a"], temperature=0, workers=4)
    assert list(mapped) == ["a", "b", "a", "a"]
    assert (sent(backend), mapped.progress.cached) == (["a", "b"], 2)
    for i in range(3):
        backend.will(*whole_answer(f"answer {i}"))
    file = tmp_path / "rows.jsonl"
    mapped = session.map("{item}", ["a", "a", "a"], temperature=1, save=file)
    answers = [f"answer {i}" for i in range(3)]
    assert (list(mapped), sent(backend)) == (answers, ["a", "a", "a"])
    assert list(session.map("{item}", ["a", "a", "a", "a"], temperature=1, save=file)) == [
        *answers,
        "a",
    ]
    assert sent(backend) == ["a"]
    # An error of the one that was sent is that of all.
    backend.will(Pause(0.05), GenerationFailed("It broke."))
    failed = session.map("{item}", ["z", "z"], temperature=0, workers=2)
    assert failed.errors == {"It broke.": [0, 1]}
    assert list(failed.retry()) == ["z", "z"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_same_call_goes_on_after_an_interrupt(scripted: Pair, temperature: float) -> None:
    session, backend = scripted
    hang = Hang()
    for i in range(10):
        backend.will(*whole_answer(f"answer {i}"))
    backend.will(hang)
    stop_when(hang.reached)
    with pytest.raises(Interrupted):
        session.map("{item}", range(20), temperature=temperature)
    sent(backend)
    mapped = session.map("{item}", range(20), temperature=temperature)
    assert list(mapped) == [*(f"answer {i}" for i in range(10)), *map(str, range(10, 20))]
    assert (len(sent(backend)), mapped.progress.cached) == (10, 10)
    # A map that has completed is sent again.
    session.map("{item}", range(20), temperature=temperature)
    assert len(sent(backend)) == 20
