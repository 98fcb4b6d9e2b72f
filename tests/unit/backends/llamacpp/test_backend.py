"""What llama.cpp is given: files, sizes and threads; a real engine where a file has to be loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.llamacpp import backend
from llm_magic.backends.llamacpp.engine_config import EngineConfig
from llm_magic.backends.local.cpus import Cpus
from llm_magic.backends.local.files import gguf
from llm_magic.errors import LoadFailed, MissingDependency, OptionError, OutOfMemory
from llm_magic.session import Session
from tests.scripted import settings
from tests.tiny_gguf import SPECIAL_TOKENS, write_gguf

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def load(file: Path, **options: Any) -> None:
    """Load a file with a session of its own."""
    session = Session(settings())
    try:
        session.load(str(file), backend="llamacpp", **options)
    finally:
        session.close()


def test_header_has_the_values_and_control_tokens_of_the_file(tiny: Path) -> None:
    header = gguf.read_header(tiny)
    assert header.values["general.architecture"] == "llama"
    assert header.values["llama.context_length"] == 512
    assert header.control_tokens == tuple(SPECIAL_TOKENS)


def test_changed_file_is_loaded_again(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "mine.gguf")
    session = Session(settings())
    try:
        session.load(str(file), backend="llamacpp")
        assert session.load_with_details("mine", backend="llamacpp").was_loaded
        os.utime(file, ns=(0, 0))
        assert not session.load_with_details(str(file), backend="llamacpp").was_loaded
    finally:
        session.close()


def test_damaged_file_is_one_error_and_the_process_goes_on(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    cut, renamed = tmp_path / "cut.gguf", tmp_path / "renamed.gguf"
    cut.write_bytes(data[:-1000])
    with pytest.raises(LoadFailed, match=r"^cut\.gguf is incomplete"):
        load(cut)
    renamed.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"))
    with pytest.raises(
        LoadFailed, match=r"^llama\.cpp cannot load renamed\.gguf\. It may be damaged"
    ):
        load(renamed)
    strange = write_gguf(tmp_path / "strange.gguf", "nosucharchitecture")
    with pytest.raises(LoadFailed, match=r"^llama\.cpp cannot load strange\.gguf\."):
        load(strange)


@pytest.mark.parametrize(
    ("key", "value"), [("block_count", 0), ("context_length", 0), ("context_length", 2**32 - 1)]
)
def test_header_that_would_end_the_process_is_an_error(
    tiny: Path, tmp_path: Path, key: str, value: int
) -> None:
    data, name = bytearray(tiny.read_bytes()), f"llama.{key}".encode()
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    data[at : at + 4] = struct.pack("<I", value)
    (tmp_path / "hostile.gguf").write_bytes(data)
    with pytest.raises(LoadFailed, match=r"^The header of the file is damaged"):
        load(tmp_path / "hostile.gguf")


def test_a_model_that_does_not_fit_is_not_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_magic.backends.local.memory.free_bytes", lambda _device: 10_000_000)
    with pytest.raises(
        OutOfMemory, match=r"^tiny needs about .* only 10 MB is free\. Try a smaller"
    ):
        load(tiny)


def test_missing_package_error_contains_how_to_install_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        backend, "find_spec", lambda name: None if name == "xllamacpp" else find(name)
    )
    with pytest.raises(MissingDependency) as caught:
        load(tiny)
    assert str(caught.value) == (
        '-b llamacpp needs xllamacpp. To install, run: pip install "llm_magic[gguf]"'
    )


def config(header: gguf.Header, free: int, **options: Any) -> EngineConfig:
    """Return the configuration for two threads."""
    options = {"context": None, "keep_prefixes": True} | options
    return EngineConfig.for_model(header, 2, free, **options)


def test_context_and_batch_depend_on_the_model_and_the_memory() -> None:
    large = gguf.Header(
        8_000_000_000,
        5 * GIB,
        1,
        {
            "general.architecture": "llama",
            "llama.context_length": 131_072,
            "llama.block_count": 32,
            "llama.embedding_length": 4096,
            "llama.attention.head_count": 32,
            "llama.attention.head_count_kv": 8,
        },
        (),
    )
    roomy = config(large, 100 * GIB)
    assert (roomy.context, roomy.context_bytes, roomy.batch) == (16_384, 2 * GIB, 16)
    assert roomy.cache_bytes == 4 * GIB
    assert config(large, 2 * GIB).context == 4096
    assert config(large, 2 * GIB, context=100_000).context == 100_096
    assert config(large, 2 * GIB, keep_prefixes=False).cache_bytes == 0
    assert config(large._replace(parameters=100_000_000), GIB).batch == 128


def test_threads_are_those_of_the_cpu_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(backend, "cpus", lambda: Cpus(64, 16, 3.5))
    assert backend.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert backend.threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert backend.threads() == 3


def test_answer_has_the_form_that_was_requested() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    session = Session(settings(max_new_tokens=60))
    try:
        session.load(backend="llamacpp")
        for temperature in (0, 1.5):
            reply = session.generate(
                "Ada Lovelace is 36.",
                schema=schema,
                temperature=temperature,
                seed=2,
            )
            assert reply.startswith('{"name": "')
            assert reply.json().keys() == {"name", "age"}
        regex = "(Yes|No), [a-z ]{3,10}"
        assert re.fullmatch(regex, session.generate("Is it late?", regex=regex))
        lark = 'start: "Year " NUMBER\nNUMBER: /[0-9]{4}/'
        assert re.fullmatch("Year [0-9]{4}", session.generate("When?", grammar=lark))
        labels = ["red", 'green "x"']
        assert session.generate("Which color?", choice=labels) in labels
        # llama.cpp would answer without a form.
        with pytest.raises(OptionError, match=r"^--grammar cannot be used: .*unknown name"):
            session.generate("?", grammar="start: other\n")
    finally:
        session.close()


BESIDE = """
import os, subprocess, sys
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from llm_magic import llm

def answer(tokens):
    most = 0
    options = {"temperature": 0, "max_new_tokens": tokens, "extra": {"ignore_eos": True}}
    for _ in llm.stream("Tell a story.", **options):
        most = max(most, len(list(Path("/proc/self/task").iterdir())))
    return most

llm.load(backend="llamacpp")
answer(1)
before = len(list(Path("/proc/self/task").iterdir()))
with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
    most = answer(200)
    busy.kill()
llm.close()
print(most - before)
"""


def test_openmp_of_llamacpp_spins_alone_and_is_throttled_beside_a_busy_process() -> None:
    ours = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_"))}
    child = subprocess.run(
        [sys.executable, "-c", BESIDE], env=ours | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    # One thread that watches, and one of OpenMP.
    assert child.stdout == "2\n", child.stderr
    assert "GOMP_SPINCOUNT" in child.stderr
    assert "GOMP_SPINCOUNT = '10000'" not in child.stderr
