"""Schedules the sequences of a batch: which of them wait, which of them share the next step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import abc, deque
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import logits_process as processing
from transformers.generation.stopping_criteria import MaxTimeCriteria

from llm_magic.backends.local import memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.batch.padded_batch import PaddedBatch
from llm_magic.backends.local.batch.sequence import BatchRequest, Sequence, common_prefix_length
from llm_magic.backends.local.generation.parameters import GenerateInputs
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled
from llm_magic.errors import LLMMagicError

# Prompts are read in chunks that take about this long, so that the work can be cancelled.
_CHUNK_S = 0.2
_FIRST_CHUNK, _MIN_CHUNK, _MAX_CHUNK = 256, 32, 16384
# How many sequences share a step. On a CPU more of them take as much longer, on a GPU they do not.
MAX_SEQUENCES = {"cpu": 32}
_MAX_SEQUENCES_ON_GPU = 128
# The share of the free memory for keys and values, and the bytes that the scores of a sequence take
# for each token of the vocabulary: in float32, sorted, exponentiated, sampled.
_MEMORY_SHARE, _SCORE_BYTES = 0.5, 24
# A prefix that all prompts share is read once from this length on.
_MIN_SHARED_PREFIX = 16
# Sequences are added when this share of the places is free: each time costs a pass and a copy.
_MIN_FREE_SHARE = 1 / 4
# These depend on each row alone, and not on where its prompt ends.
_PROCESSORS = (
    processing.EpsilonLogitsWarper, processing.EtaLogitsWarper,
    processing.InfNanRemoveLogitsProcessor, processing.LogitNormalization,
    processing.MinPLogitsWarper, processing.SuppressTokensLogitsProcessor,
    processing.TemperatureLogitsWarper, processing.TopHLogitsWarper, processing.TopKLogitsWarper,
    processing.TopPLogitsWarper, processing.TypicalLogitsWarper,
)  # fmt: skip
# The length of an answer that memory is reserved for. Longer ones may run out, and are preempted.
_USUAL_ANSWER = 2048
_NO_TOKEN = -1


class NotBatchable(Exception):
    """Raised for an option that sequences cannot share a step with."""


class Scheduler:
    """Decodes sequences together: those in `waiting` replace those of `running` that finish."""

    def __init__(
        self,
        loaded: LocalModel,
        sequences: abc.Sequence[Sequence],
        request: BatchRequest,
        inputs: GenerateInputs,
    ) -> None:
        """Raises `NotBatchable` for what sequences cannot share."""
        if any(type(criterion) is not MaxTimeCriteria for criterion in inputs.criteria):
            raise NotBatchable
        self._processors = LogitsProcessorList(map(_shared_processor, inputs.processors))
        self._loaded, self._request, self._inputs = loaded, request, inputs
        self._max_time = min((each.max_time for each in inputs.criteria), default=math.inf)
        # The longest first: if memory runs out, it does so early.
        self.waiting = deque(sorted(sequences, key=lambda sequence: -len(sequence.ids)))
        # Those that were scheduled and are not finished, whether their prompts are read or not.
        self.running: list[Sequence] = []
        self._batch: PaddedBatch | None = None
        self._budget = MemoryBudget(loaded)
        self._chunk_size = _FIRST_CHUNK
        self._prefix_length = self._shared_prefix_length()
        self._prefix_cache: DynamicCache | None = None

    def run(self) -> None:
        """Answer every sequence."""
        while self.waiting or self.running:
            try:
                self._advance()
                continue
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                problem = self._request.translate(error)
            self.preempt(problem)

    def _advance(self) -> None:
        """Read the prompts of scheduled sequences, or decode one step."""
        scheduled = self.schedule()
        if scheduled:
            self._prefill(scheduled)
            return
        assert self._batch is not None
        self._decode(self._batch)
        self.running = list(self._batch.sequences)
        if not self.running:
            self._batch = None

    def schedule(self) -> list[Sequence]:
        """Move waiting sequences to the running ones as the budget allows; returns them."""
        if self.running and not self._budget.has_free_places(len(self.running)):
            return []
        scheduled: list[Sequence] = []
        while self.waiting and self._budget.fits([*self.running, self.waiting[0]]):
            sequence = self.waiting.popleft()
            sequence.start(self._max_time)
            scheduled.append(sequence)
            self.running.append(sequence)
        return scheduled

    def preempt(self, problem: LLMMagicError) -> None:
        """Let all running sequences wait, and half as many run, after memory ran out.

        They continue where they are. A sequence that ran alone fails with `problem`.
        """
        sequences, self.running, self._batch = self.running, [], None
        if len(sequences) == 1:
            sequences[0].fail(problem)
        else:
            self.waiting.extendleft(reversed(sequences))
            self._budget.max_sequences = len(sequences) // 2
        memory.release_memory()

    def _shared_prefix_length(self) -> int:
        """Return the length of the prefix that is read once for all sequences; 0 for none."""
        length = common_prefix_length(self.waiting)
        # A window counts the padding after the prefix as distance.
        longest = max(sequence.max_length for sequence in self.waiting)
        seen = longest <= self._loaded.traits.shortest_window
        return length if seen and length >= _MIN_SHARED_PREFIX else 0

    def _prefill(self, sequences: list[Sequence]) -> None:
        """Read the prompts of sequences, and add them to those that are decoded."""
        batch = PaddedBatch(sequences, self._prefix_length, self._loaded.model.device)
        if self._prefix_length:
            batch.start_from(self._shared_prefix(sequences[0]))
        else:
            batch.cache = compat.new_cache(self._loaded.model)
        self._read(batch)
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)

    def _shared_prefix(self, sequence: Sequence) -> DynamicCache:
        """Return the cache of the prefix that all sequences share, read from one of them."""
        if self._prefix_cache is None:
            # The last column of a batch is not read.
            prefix = dataclasses.replace(sequence, ids=sequence.ids[: self._prefix_length + 1])
            batch = PaddedBatch([prefix], 0, self._loaded.model.device)
            batch.cache = compat.new_cache(self._loaded.model)
            self._read(batch)
            self._prefix_cache = batch.cache
        return self._prefix_cache

    def _read(self, batch: PaddedBatch) -> None:
        """Read all but the last column in chunks, between which the work can be cancelled."""
        start, last = batch.cache.get_seq_length(), batch.width - 1
        while start < last:
            began = time.perf_counter()
            columns = max(1, self._chunk_size // len(batch.sequences))
            self._forward(batch, start, min(start + columns, last))
            if batch.ids.device.type == "cuda":
                torch.cuda.synchronize(batch.ids.device)
            start += columns
            if start <= last:
                ratio = _CHUNK_S / max(time.perf_counter() - began, 1e-6)
                size = int(self._chunk_size * min(ratio, 2.0))
                self._chunk_size = max(_MIN_CHUNK, min(size, _MAX_CHUNK))

    def _forward(self, batch: PaddedBatch, start: int, end: int) -> torch.Tensor:
        """Read columns of a batch; returns the logits after the last one, one row a sequence."""
        if self._request.cancel.is_set():
            raise Cancelled
        model = self._loaded.model
        prepared = self._inputs.arguments
        arguments = {n: x for n, x in prepared.items() if n not in compat.CACHE_NAMES}
        arguments[self._loaded.traits.cache_name] = batch.cache
        if prepared.get("position_ids") is not None:
            arguments["position_ids"] = batch.position_ids()[:, :end]
        arguments["attention_mask"] = batch.mask[:, :end] if batch.is_padded else None
        inputs = compat.prepare_inputs(
            model, batch.ids[:, :end], end - start, arguments, first=start == 0
        )
        logits: torch.Tensor = model(**inputs, return_dict=True).logits[:, -1]
        return logits

    def _decode(self, batch: PaddedBatch) -> None:
        """Decode one token of every sequence."""
        logits = self._forward(batch, batch.width - 1, batch.width)
        # The annotation of a processor expects a tensor type that no function of torch returns.
        process: Any = self._processors
        scores: torch.Tensor = process(
            batch.ids, logits.to(copy=True, dtype=torch.float32, device=batch.ids.device)
        )
        sample = self._inputs.do_sample
        tokens = _sample(scores, batch.sequences) if sample else scores.argmax(-1)
        batch.append(tokens)
        for sequence, token in zip(batch.sequences, tokens.tolist(), strict=True):
            if token == _NO_TOKEN:
                error = RuntimeError("the probabilities are not numbers")
                sequence.fail(self._request.translate(error))
            else:
                sequence.append(token)
        batch.remove_finished()


class MemoryBudget:
    """How many sequences may run together, by their number and by the memory that they will take."""

    def __init__(self, loaded: LocalModel) -> None:
        config = loaded.model.config.get_text_config(decoder=True)
        device = loaded.model.device.type
        self.max_sequences = MAX_SEQUENCES.get(device, _MAX_SEQUENCES_ON_GPU)
        self._token_bytes = memory.token_bytes(config.to_dict(), loaded.info.dtype)
        self._score_bytes = config.vocab_size * _SCORE_BYTES
        free = memory.free_bytes(loaded.info.device.partition("+")[0])
        self._bytes = free * _MEMORY_SHARE

    def has_free_places(self, running: int) -> bool:
        """Return whether enough places are free to add sequences."""
        return self.max_sequences - running >= self.max_sequences * _MIN_FREE_SHARE

    def fits(self, sequences: abc.Sequence[Sequence]) -> bool:
        """Return whether these sequences may run together; one alone always may."""
        width = max(min(s.max_length, len(s.ids) + _USUAL_ANSWER) for s in sequences)
        needed = len(sequences) * (width * self._token_bytes + self._score_bytes)
        few = len(sequences) <= self.max_sequences
        return len(sequences) == 1 or (few and needed <= self._bytes)


def _shared_processor(processor: Any) -> Any:
    """Return a processor for sequences that join and leave; raises `NotBatchable` without one."""
    if type(processor) is processing.RepetitionPenaltyLogitsProcessor:
        # Without the count of padding, which is that of one prompt: our padding is no new token.
        return processing.RepetitionPenaltyLogitsProcessor(processor.penalty)
    if type(processor) not in _PROCESSORS:
        raise NotBatchable
    return processor


def _sample(scores: torch.Tensor, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
    """Sample a token of every sequence, as `torch.multinomial` does for one alone."""
    probabilities = scores.softmax(-1)
    noise = torch.empty_like(probabilities)
    if sequences[0].generator is None:
        noise.exponential_()
    else:
        for sequence, row in zip(sequences, noise, strict=True):
            row.exponential_(generator=sequence.generator)
    tokens = (probabilities / noise).argmax(-1)
    return tokens.masked_fill(probabilities.isnan().any(-1), _NO_TOKEN)
