"""The fast way to decode, where a model allows one: when it is taken, and why not where it is not."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList

from llm_magic.backends.base import Report
from llm_magic.backends.local import memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.files.gguf import cache_folder
from llm_magic.backends.local.generation.cuda_graph import StaticStep, bucket, fits, why_not
from llm_magic.backends.local.worker import Cancelled
from llm_magic.types import Progress

# Each length has a cache of its own.
_KEPT_STEPS = 2
# A step that was captured for a few tokens takes longer than it spares.
_FEW = 8
# Compiling takes half a minute, a capture a second: only one length is compiled, and longer texts
# go on step by step.
_COMPILED_LENGTH = 2048


class FastPath:
    """Steps of fixed shape for one model; falls back by itself, and then says why."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool, forced: bool = False) -> None:
        """`forced` takes it without a GPU and without a compiler, which is slower: for tests."""
        self._model = model
        self._compiled = compiled
        self._steps: dict[int, StaticStep] = {}
        self._forward: Callable[..., Any] | None = None
        self.problem = _problem(model, compiled=compiled or forced)

    @property
    def how(self) -> str:
        """What ``%llm_status`` says about the decoding."""
        if self.problem is not None:
            return f"step by step ({self.problem})"
        compiled = "compiled, " if self._compiled else ""
        return f"{compiled}{'captured graph' if self._on_gpu else 'fixed shapes'}"

    @property
    def _on_gpu(self) -> bool:
        return self._model.device.type == "cuda"

    def warm_up(self, report: Report, cancel: threading.Event) -> None:
        """Compile and capture now, so that the first answer does not wait for it."""
        if self.problem is not None:
            return
        report(Progress("compiling" if self._compiled else "warming up"))
        try:
            step = self._of_length(self._length(1))
            step.try_out()
            if self._compiled and (slower := self._slower(step)):
                self.clear()
                self.problem = slower
        except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver raises: without it, then
            self._give_up(error)
        if cancel.is_set():
            raise Cancelled

    def _slower(self, step: StaticStep) -> str | None:
        """Return by how much a compiled step is slower than a usual one; None if it is not."""
        cache = compat.cache_argument(self._model, compat.new_cache(self._model))
        token = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)

        def usual() -> None:
            with torch.inference_mode():
                self._model(input_ids=token, use_cache=True, **cache)

        compiled_s, usual_s = _seconds(step.try_out), _seconds(usual)
        if compiled_s < usual_s:
            return None
        return f"compiled {compiled_s * 1000:.0f} ms a token, not compiled {usual_s * 1000:.0f} ms"

    def clear(self) -> None:
        """Free the caches of fixed length; the next answer makes the one that it needs."""
        while self._steps:
            self._steps.popitem()[1].close()

    def step(
        self, length: int, room: int, processors: LogitsProcessorList, *, sampling: bool
    ) -> StaticStep | None:
        """Return the step for a text of `length` tokens that may grow by `room`; None without one."""
        if self.problem is not None or room < _FEW or not fits(processors):
            return None
        # One more: the last step is one too many.
        needed = length + room + 1
        if self._compiled and needed > self._length(1):
            return None
        try:
            step = self._of_length(self._length(needed))
            step.options(processors, sampling=sampling)
        except Exception as error:  # noqa: BLE001 - as above; the answer goes on step by step
            self._give_up(error)
            return None
        return step

    def _length(self, needed: int) -> int:
        text_config = self._model.config.get_text_config()
        context = memory.valid_context_length(getattr(text_config, "max_position_embeddings", None))
        least = min(_COMPILED_LENGTH, context or _COMPILED_LENGTH) if self._compiled else 1
        return bucket(max(needed, least), context)

    def _of_length(self, length: int) -> StaticStep:
        step = self._steps.pop(length, None)
        if step is None:
            while len(self._steps) >= _KEPT_STEPS:
                self._steps.pop(next(iter(self._steps))).close()
            step = StaticStep(self._model, length, self._compiled_forward())
        self._steps[length] = step
        return step

    def _compiled_forward(self) -> Callable[..., Any] | None:
        if not self._compiled:
            return None
        if self._forward is None:
            # Where compiled kernels are found again the next time.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
            # Weights that never change may be laid out anew for the CPU.
            options: dict[str, Any] = {} if self._on_gpu else {"freezing": True}
            self._forward = torch.compile(self._model.forward, dynamic=False, options=options)
        return self._forward

    def _give_up(self, error: Exception) -> None:
        self.clear()
        line = " ".join(str(error).split())[:200]
        self.problem = f"{type(error).__name__}: {line}"


def _seconds(work: Callable[[], None]) -> float:
    """Return what some work takes, once it is warm."""
    taken = []
    for _ in range(8):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[3:])


def _problem(model: PreTrainedModel, *, compiled: bool) -> str | None:
    if model.device.type != "cuda" and not compiled:
        return f"a graph is for CUDA, this is {model.device.type}; see --compile"
    if compiled and model.device.type == "cpu" and not _has_compiler():
        return "--compile needs a C++ compiler (g++ or clang++)"
    return why_not(model)


def _has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl")))
