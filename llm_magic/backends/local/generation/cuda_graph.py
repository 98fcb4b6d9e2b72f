"""Decoding steps of fixed shape: captured once as a CUDA graph, and replayed for every token.

A GPU that gets its operations one by one waits for Python most of the time. Here the cache is
allocated at its full length and the position is a tensor, so the step (forward, sampling, position)
is the same work each time: a CUDA graph. The host replays it and reads each token one step late,
while the next one is computed. The cache does not include the last step, which is one too many.

Elsewhere the same loop runs without a graph: in tests, and with ``--compile``, whose kernels also
need fixed shapes. No GPU figure has been measured for this module.
"""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import timeit
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache, StaticLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llm_magic.backends.base import Report
from llm_magic.backends.local import compile_cache, memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.worker import Cancelled
from llm_magic.types import Progress

# These depend on the set of earlier tokens at most, so that the rest of a buffer that is longer than
# the text may hold any token of it, and none of them waits for the GPU.
_PROCESSORS = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
    TypicalLogitsWarper, RepetitionPenaltyLogitsProcessor,
)  # fmt: skip
# Rotary embeddings that depend on the length of the text, by a decision in Python.
_ROPE_BY_LENGTH = ("dynamic", "longrope")
_MIN_CACHE_LENGTH = 1024
_WARM_UPS = 2
# The steps that are kept, each with a cache of another length.
_MAX_STEPS = 2
# Capturing a step takes longer than it saves in so few tokens.
_MIN_NEW_TOKENS = 8
# Compiling takes half a minute, a capture a second: only one length is compiled, and longer texts
# are decoded without.
_COMPILED_LENGTH = 2048
Forward = Callable[..., Any]


class StaticDecoder:
    """The steps of fixed shape of one model; `unavailable_reason` is set where there are none."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool, forced: bool = False) -> None:
        """`forced` allows it without a GPU and without a compiler, for tests: it is slower there."""
        self.steps: dict[int, StaticStep] = {}
        self._model = model
        self._compiled = compiled
        self.unavailable_reason = _obstacle(model, compiled=compiled, forced=forced)

    @property
    def description(self) -> str:
        """How the model decodes, as ``%llm_status`` shows it."""
        if self.unavailable_reason is not None:
            return f"step by step ({self.unavailable_reason})"
        compiled = "compiled, " if self._compiled else ""
        return f"{compiled}{'captured graph' if self._on_gpu else 'fixed shapes'}"

    @property
    def _on_gpu(self) -> bool:
        return self._model.device.type == "cuda"

    def warm_up(self, report: Report, cancel: threading.Event) -> None:
        """Compile and capture the first step, so that the first answer does not wait for it."""
        if self.unavailable_reason is not None:
            return
        report(Progress("compiling" if self._compiled else "warming up"))
        try:
            step = self._step_of_length(self._cache_length(1))
            step.warm_up()
            slower = self.compare_speed(step) if self._compiled else None
        except Exception as error:  # noqa: BLE001 - a compiler or a driver may raise anything
            self._disable(error)
        else:
            if slower is not None:
                self.clear()
                self.unavailable_reason = slower
        if cancel.is_set():
            raise Cancelled

    def compare_speed(self, step: StaticStep) -> str | None:
        """Return by how much a compiled step is slower than a usual one; None if it is not."""
        cache = {compat.cache_name(self._model): compat.new_cache(self._model)}
        token = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)

        def usual() -> None:
            with torch.inference_mode():
                self._model(input_ids=token, use_cache=True, **cache)

        # The first ones warm it up.
        compiled_s, usual_s = (
            statistics.median(timeit.repeat(work, number=1, repeat=8)[3:])
            for work in (step.warm_up, usual)
        )
        if compiled_s < usual_s:
            return None
        return f"compiled {compiled_s * 1000:.0f} ms a token, not compiled {usual_s * 1000:.0f} ms"

    def clear(self) -> None:
        """Free the steps and their caches; the next answer makes the one that it needs."""
        while self.steps:
            self.steps.popitem()[1].close()

    def step(
        self,
        length: int,
        max_new_tokens: int,
        processors: LogitsProcessorList,
        *,
        do_sample: bool,
        is_masked: bool = False,
    ) -> StaticStep | None:
        """Return the step for a text of `length` tokens that may grow; None where there is none.

        `is_masked`: some tokens cannot come next, see `StaticStep.exclude`.
        """
        if self.unavailable_reason is not None or max_new_tokens < _MIN_NEW_TOKENS:
            return None
        if not all(
            type(each) in _PROCESSORS and not getattr(each, "prompt_ignore_length", None)
            for each in processors
        ):
            return None
        # The last step is one too many.
        needed = length + max_new_tokens + 1
        if self._compiled and needed > self._cache_length(1):
            return None
        try:
            step = self._step_of_length(self._cache_length(needed))
            step.set_options(processors, do_sample=do_sample, is_masked=is_masked)
        except Exception as error:  # noqa: BLE001 - a compiler or a driver may raise anything
            self._disable(error)
            return None
        return step

    def _cache_length(self, needed: int) -> int:
        context = memory.context_length(vars(self._model.config.get_text_config()))
        least = min(_COMPILED_LENGTH, context or _COMPILED_LENGTH) if self._compiled else 1
        return bucket_length(max(needed, least), context)

    def _step_of_length(self, length: int) -> StaticStep:
        step = self.steps.pop(length, None)
        if step is None:
            while len(self.steps) >= _MAX_STEPS:
                self.steps.pop(next(iter(self.steps))).close()
            step = StaticStep(self._model, length, self._forward)
        self.steps[length] = step
        return step

    @cached_property
    def _forward(self) -> Forward | None:
        """The compiled form of the model, if it is compiled."""
        if not self._compiled:
            return None
        compile_cache.set_folder()
        # On a CPU, weights that never change may get another layout.
        options: dict[str, Any] = {} if self._on_gpu else {"freezing": True}
        return torch.compile(self._model.forward, dynamic=False, options=options)

    def _disable(self, error: Exception) -> None:
        self.clear()
        line = " ".join(str(error).split())[:200]
        self.unavailable_reason = f"{type(error).__name__}: {line}"


def _obstacle(model: PreTrainedModel, *, compiled: bool, forced: bool) -> str | None:
    """Return why a model is not decoded in steps of fixed shape; None if it is."""
    device = model.device.type
    if device != "cuda" and not (compiled or forced):
        return f"CUDA graphs need a GPU, the model is on {device}; see --compile"
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if compiled and device == "cpu" and not any(map(shutil.which, compilers)):
        return "--compile needs a C++ compiler (g++ or clang++)"
    if not compat.can_compile(model):
        return "this architecture makes decisions in Python"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is on several devices"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit matrix products wait for the CPU"
    if compat.rope_parameters(model).get("rope_type") in _ROPE_BY_LENGTH:
        return "rotary embeddings depend on the length of the text"
    if (attention := compat.attention(model)) != "sdpa":
        return f"attention {attention} takes no mask of fixed shape"
    cache = StaticCache(config=model.config, max_cache_len=_MIN_CACHE_LENGTH)
    if not all(type(layer) is StaticLayer for layer in cache.layers):
        return "some layers have a sliding window or a state"
    return None


def bucket_length(length: int, context: int | None) -> int:
    """Return the cache length for a text of `length` tokens: few sizes need few captures."""
    size = max(_MIN_CACHE_LENGTH, 1 << (length - 1).bit_length())
    return max(length, min(size, context or size))


class _Replay:
    """Work with fixed inputs and outputs: captured and replayed on a GPU, called elsewhere."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            # Streams belong to the current device of the thread.
            with torch.cuda.device(device):
                self._capture(device)

    def __call__(self) -> None:
        """Do the work once."""
        if self._graph is not None:
            with torch.cuda.device(self._device):
                self._graph.replay()
        else:
            self._work()

    def _capture(self, device: torch.device) -> None:
        usual = torch.cuda.current_stream(device)
        # Warm-up and capture must not use up random numbers of the answer.
        with torch.random.fork_rng(devices=[device]):
            side = torch.cuda.Stream(device)
            side.wait_stream(usual)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._work()
            usual.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Only the work of this thread is captured: a cell may use the GPU meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._work()
            finally:
                # A capture that fails leaves its own stream behind.
                torch.cuda.set_stream(usual)
            self._graph = graph


class StaticStep:
    """One decoding step of a model over a cache of `length` tokens."""

    def __init__(self, model: PreTrainedModel, length: int, forward: Forward | None = None) -> None:
        """`forward` is the compiled form of the model, if it is compiled."""
        self.length = length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self._forward: Forward = model
        self._device = model.device
        self._cache_argument = {compat.cache_name(model): self.cache}
        self._positions = torch.arange(length, device=self._device)
        self._token = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._position = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._ids = torch.zeros((1, length), dtype=torch.long, device=self._device)
        self._logits = torch.zeros((1, 0), device=self._device)
        self._excluded = torch.zeros((1, 0), dtype=torch.bool, device=self._device)
        self._read: _Replay | None = None
        self._sample: _Replay | None = None
        self._sampling_key: object = None
        with torch.inference_mode():
            if forward is not None:
                # The cache is allocated at first use. Compiled before that, it is compiled twice.
                self._read_token()
                self._forward = forward
            self._read = _Replay(self._read_token, self._device)

    def _read_token(self) -> None:
        """Read the token at the position, and store the logits."""
        mask = (self._positions <= self._position).view(1, 1, 1, self.length)
        outputs = self._forward(
            input_ids=self._token,
            position_ids=self._position,
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **self._cache_argument,
        )
        logits = outputs.logits[:, -1].float()
        if self._logits.shape != logits.shape:
            self._logits = torch.zeros_like(logits)
        self._logits.copy_(logits)
        self._position.add_(1)

    def warm_up(self) -> None:
        """Run one forward pass, which compiles what is compiled at first use."""
        assert self._read is not None
        with torch.inference_mode():
            self._read()

    def close(self) -> None:
        """Free the cache now: the work refers to this object, a cycle that only a collection frees."""
        self._read = self._sample = None

    def start(self, cache: DynamicCache, ids: torch.Tensor) -> None:
        """Copy the cache of `ids` (1, length), in which all but the last token are."""
        cached = ids.shape[1] - 1
        compat.fill_static(self.cache, cache, cached)
        self._position.fill_(cached)
        self._token.copy_(ids[:, -1:])
        self._ids.fill_(int(ids[0, 0]))
        self._ids[:, : ids.shape[1]] = ids

    def set_options(
        self, processors: LogitsProcessorList, *, do_sample: bool, is_masked: bool = False
    ) -> None:
        """Sample with these options from here on; `is_masked`: without the tokens of `exclude`."""
        key = (do_sample, is_masked, [(type(p), repr(sorted(vars(p).items()))) for p in processors])
        if self._sample is not None and key == self._sampling_key:
            return
        self._sampling_key = key
        ids, token = self._ids.clone(), self._token.clone()
        self._allocate_mask()

        def sample() -> None:
            scores: Any = self._logits.clone()
            if is_masked:
                scores = scores.masked_fill(self._excluded, -torch.inf)
            scores = processors(self._ids, scores)  # type: ignore[arg-type]
            if do_sample:
                # The same as `multinomial`, which would wait for the GPU.
                scores = torch.softmax(scores, dim=-1)
                scores = scores / torch.empty_like(scores).exponential_(1)
            self._token.copy_(scores.argmax(dim=-1, keepdim=True))
            self._ids.scatter_(1, self._position, self._token)

        self._sample = _Replay(sample, self._device)
        # The warm-up has written into these.
        self._ids.copy_(ids)
        self._token.copy_(token)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that it chooses from."""
        return int(self._logits.shape[-1])

    def exclude(self, tokens: torch.Tensor) -> None:
        """Let the next choice be another token than those of a mask (vocabulary,)."""
        self._allocate_mask()
        self._excluded.copy_(tokens[None], non_blocking=True)

    def _allocate_mask(self) -> None:
        """Allocate the mask, once the first forward pass has shown its size: graphs refer to it."""
        if self._excluded.shape != self._logits.shape:
            self._excluded = torch.zeros_like(self._logits, dtype=torch.bool)

    def __call__(self) -> torch.Tensor:
        """Read the last token and sample the next one; returns a copy of it, of shape (1, 1)."""
        self.read()
        return self.choose()

    def read(self) -> torch.Tensor:
        """Read the last token; returns the logits after it (1, vocabulary), which the next step replaces."""
        assert self._read is not None
        self._read()
        return self._logits

    def choose(self) -> torch.Tensor:
        """Sample the next token after `read`; returns a copy of it, of shape (1, 1)."""
        assert self._sample is not None
        self._sample()
        return self._token.clone()

    def result(self, length: int) -> DynamicCache:
        """Return a dynamic cache with a copy of the first `length` tokens."""
        return compat.from_static(self.cache, length)


class TokenReader:
    """Copies tokens to the host asynchronously: each is read while the next one is computed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        # Two buffers: one is read while the other is written.
        self._buffers = [torch.zeros((1, 1), dtype=torch.long, pin_memory=self._cuda) for _ in "ab"]
        self._events: list[Any] = [torch.cuda.Event() for _ in "ab"] if self._cuda else []
        self._sent = 0

    def send(self, token: torch.Tensor) -> None:
        """Start to copy a token."""
        index = self._sent % 2
        self._buffers[index].copy_(token, non_blocking=self._cuda)
        if self._cuda:
            self._events[index].record(torch.cuda.current_stream(self._device))
        self._sent += 1

    def read(self, *, last: bool = False) -> int:
        """Return the token that was sent before the last one, or the last one."""
        index = (self._sent - last) % 2
        if self._cuda:
            self._events[index].synchronize()
        return int(self._buffers[index])
