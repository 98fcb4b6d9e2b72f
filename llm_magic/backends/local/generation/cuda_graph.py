"""One decoding step with fixed shapes: on a GPU captured once and replayed for every token.

A GPU that is fed operation by operation waits for Python most of the time. Here the cache is
allocated at its full length, the position is a tensor, and so the step (forward, sampling,
position) is the same work each time: a CUDA graph. The host replays it, and reads each token one
step late, while the next is being made; the one step too many at the end is left out of the cache.

Elsewhere the same loop runs without a graph: to test it, and with ``--compile``, whose kernels
need the fixed shapes too. No GPU figure has been measured for this module.
"""

from __future__ import annotations

from collections.abc import Callable
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

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.prefix_cache import rope_parameters

# Their work depends on the set of earlier tokens at most, so that the rest of a buffer that is
# longer than the text may hold any token of it, and none of them waits for the GPU.
_FIXED = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
    TypicalLogitsWarper, RepetitionPenaltyLogitsProcessor,
)  # fmt: skip
# Ways to scale positions that ask in Python how long the text is.
_BY_LENGTH = ("dynamic", "longrope")
_SHORTEST = 1024
_WARM_UPS = 2
Forward = Callable[..., Any]


def why_not(model: PreTrainedModel) -> str | None:
    """Return why the steps of a model cannot have fixed shapes; None if they can."""
    if not compat.can_compile(model):
        return "this architecture decides in Python while it computes"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it is spread over several devices"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit products wait for the CPU to see which numbers are large"
    if rope_parameters(model).get("rope_type") in _BY_LENGTH:
        return "it places tokens by the length of the text"
    if (attention := compat.attention(model)) != "sdpa":
        return f"attention {attention} takes no mask of fixed shape"
    cache = StaticCache(config=model.config, max_cache_len=_SHORTEST)
    if not all(type(layer) is StaticLayer for layer in cache.layers):
        return "it has windows or states beside full attention"
    return None


def fits(processors: LogitsProcessorList) -> bool:
    """Return whether an answer's options can be part of the step."""
    return all(
        type(processor) in _FIXED and not getattr(processor, "prompt_ignore_length", None)
        for processor in processors
    )


def bucket(length: int, context: int | None) -> int:
    """Return the length of the cache for a text of `length` tokens: few sizes, few captures."""
    size = max(_SHORTEST, 1 << (length - 1).bit_length())
    return max(length, min(size, context or size))


class Replay:
    """Work with fixed inputs and outputs: captured and replayed on a GPU, called elsewhere."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            # Streams are those of the thread's own device, unless it says otherwise.
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
        # The answer's own random numbers begin after this.
        with torch.random.fork_rng(devices=[device]):
            side = torch.cuda.Stream(device)
            side.wait_stream(usual)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._work()
            usual.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Only what this thread does counts: a cell may use the GPU meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._work()
            finally:
                # A capture that fails leaves its own stream behind.
                torch.cuda.set_stream(usual)
            self._graph = graph


class StaticStep:
    """The step of one model over a cache of `length` tokens."""

    def __init__(self, model: PreTrainedModel, length: int, forward: Forward | None = None) -> None:
        """`forward` stands in for the model, as its compiled form."""
        self.length = length
        self._forward: Forward = model
        self._device = model.device
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._cache_argument = compat.cache_argument(model, self._cache)
        # Where each token's key goes, and what the mask compares the position with.
        self._places = torch.arange(length, device=self._device)
        self._token = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._position = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._history = torch.zeros((1, length), dtype=torch.long, device=self._device)
        self._logits = torch.zeros((1, 0), device=self._device)
        self._read: Replay | None = None
        self._choose: Replay | None = None
        self._chosen_as: object = None
        with torch.inference_mode():
            if forward is not None:
                # The cache is allocated at its first use: compiled after that, it is compiled once.
                self._feed()
                self._forward = forward
            self._read = Replay(self._feed, self._device)

    def _feed(self) -> None:
        """Feed the token at the position; leaves the logits."""
        mask = (self._places <= self._position).view(1, 1, 1, self.length)
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

    def try_out(self) -> None:
        """Take one step over nothing: what is compiled at first use is compiled now."""
        assert self._read is not None
        with torch.inference_mode():
            self._read()

    def close(self) -> None:
        """Let go of the cache now: the work refers back to this, and would wait for the collector."""
        self._read = self._choose = None

    def begin(self, cache: DynamicCache, ids: torch.Tensor) -> None:
        """Take over what was read of `ids` (1, length): all but the last token."""
        read = ids.shape[1] - 1
        compat.fill_static(self._cache, cache, read)
        self._position.fill_(read)
        self._token.copy_(ids[:, -1:])
        self._history.fill_(int(ids[0, 0]))
        self._history[:, : ids.shape[1]] = ids

    def options(self, processors: LogitsProcessorList, *, sampling: bool) -> None:
        """Let the steps from here on choose with these options."""
        chosen_as = (sampling, [(type(p), repr(sorted(vars(p).items()))) for p in processors])
        if self._choose is not None and chosen_as == self._chosen_as:
            return
        self._chosen_as = chosen_as
        history, token = self._history.clone(), self._token.clone()

        def choose() -> None:
            scores: Any = processors(self._history, self._logits.clone())  # type: ignore[arg-type]
            if sampling:
                # As `multinomial` does it, which would wait for the GPU.
                scores = torch.softmax(scores, dim=-1)
                scores = scores / torch.empty_like(scores).exponential_(1)
            self._token.copy_(scores.argmax(dim=-1, keepdim=True))
            self._history.scatter_(1, self._position, self._token)

        self._choose = Replay(choose, self._device)
        # Trying it out has written into these.
        self._history.copy_(history)
        self._token.copy_(token)

    def __call__(self) -> torch.Tensor:
        """Feed the last token and choose the next; returns it, of shape (1, 1), as of this step."""
        assert self._read is not None
        assert self._choose is not None
        self._read()
        self._choose()
        return self._token.clone()

    def result(self, length: int) -> DynamicCache:
        """Return a cache of its own with the first `length` tokens."""
        return compat.from_static(self._cache, length)


class LateReader:
    """Brings tokens to the host one step late: while one is on its way, the next is made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        # Two places: one is read while the other is written.
        self._slots = [torch.zeros((1, 1), dtype=torch.long, pin_memory=self._cuda) for _ in "ab"]
        self._events: list[Any] = [torch.cuda.Event() for _ in "ab"] if self._cuda else []
        self._sent = 0

    def send(self, token: torch.Tensor) -> None:
        """Begin to bring a token here."""
        at = self._sent % 2
        self._slots[at].copy_(token, non_blocking=self._cuda)
        if self._cuda:
            self._events[at].record(torch.cuda.current_stream(self._device))
        self._sent += 1

    def read(self) -> int:
        """Return the token that was sent before the last one."""
        at = self._sent % 2
        if self._cuda:
            self._events[at].synchronize()
        return int(self._slots[at])
