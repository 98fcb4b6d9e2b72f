"""Kernels as people have them, and one figure from each cell."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jupyter_client.manager import KernelManager

from tests.benchmarks.inside import PROMPT
from tests.kernels import ROOT, Kernel

# What the person who measures has set must not change what is measured.
_SETTINGS = (
    "LLM_",
    "DEFAULT_LLM_",
    "DEFAULT_MODEL_",
    "LOCAL_MODELS_",
    "OMP_",
    "GOMP_",
    "KMP_",
    "PYTHON",
)
_PREPARE = """
from tests.benchmarks import inside
watch = inside.Stopwatch()
"""


@contextlib.contextmanager
def fresh_kernel(python: Path | None = None, **environment: str) -> Iterator[Kernel]:
    """Start a kernel that has done nothing yet, in the environment of `python` if it is given.

    Not the one of the tests: that one lets OpenMP's threads sleep while they wait, which
    changes the speed of every token.
    """
    with tempfile.TemporaryDirectory(prefix="llm_magic-bench-") as folder:
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_SETTINGS) or name == "LLM_MAGIC_CACHE_DIR"
        }
        env |= {"HF_HUB_OFFLINE": "1", "IPYTHONDIR": folder, "PYTHONPATH": str(ROOT)}
        env |= environment
        manager = KernelManager(transport="ipc", connection_file=f"{folder}/kernel.json")
        if python is not None:
            assert manager.kernel_spec is not None
            manager.kernel_spec.argv[0] = str(python)
        manager.start_kernel(env=env, cwd=folder)
        running = Kernel(manager)
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def loaded_kernel(load: str = "%llm_load") -> Iterator[Kernel]:
    """Start a kernel that holds the bundled model, with `inside`, `watch` and `llm`."""
    with fresh_kernel() as kernel:
        kernel.ok("%load_ext llm_magic\nfrom llm_magic import llm" + _PREPARE)
        kernel.ok(load, timeout=300)
        yield kernel


@contextlib.contextmanager
def bare_kernel(path: Path | None = None) -> Iterator[Kernel]:
    """Start a kernel that has loaded the bundled model, or a folder, with Transformers alone."""
    where = "" if path is None else repr(str(path))
    with fresh_kernel() as kernel:
        kernel.ok(_PREPARE + f"model, tokenizer = inside.load_bare({where})", timeout=300)
        yield kernel


def seconds(kernel: Kernel, code: str) -> float:
    """Run a cell and return what it took inside the kernel."""
    kernel.ok(code, timeout=300)
    taken: float = kernel.value("watch.seconds")
    return taken


def ask(kernel: Kernel, tokens: int) -> float:
    """Run one ``%%llm`` cell; returns tokens per second over the whole cell."""
    taken = seconds(kernel, f"%%llm -t 0 --max-new-tokens {tokens} -o reply\n{PROMPT}")
    return _rate(kernel.value("reply.usage.completion_tokens"), tokens, taken)


def bare(kernel: Kernel, call: str, tokens: int) -> float:
    """Run one of the peers; returns tokens per second over the whole cell."""
    taken = seconds(kernel, f"count = {call}")
    return _rate(kernel.value("count"), tokens, taken)


def _rate(produced: int, tokens: int, taken: float) -> float:
    # A shorter answer would weigh the prompt more than the peer's does.
    assert produced == tokens, f"the answer ended after {produced} of {tokens} tokens"
    return produced / taken
