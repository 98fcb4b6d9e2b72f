"""Schedules the sequences of a batch: which of them wait, which of them share the next step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import abc, defaultdict, deque
from typing import Any

import torch

from llm_magic.backends.local import memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.batch import shared_prefix
from llm_magic.backends.local.batch.padded_batch import PaddedBatch
from llm_magic.backends.local.batch.shared_prefix import PrefixNotRead, SharedPrefix
from llm_magic.backends.local.generation import parameters
from llm_magic.backends.local.generation.distribution import Distribution, TokenScores
from llm_magic.backends.local.generation.parameters import GenerateInputs
from llm_magic.backends.local.generation.prefix_cache import PrefixCache, PrefixHit
from llm_magic.backends.local.generation.sequence import Sequence, common_prefix_length
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled

# Prompts are read in chunks that take about this long, or as long as so many steps. Between two of them,
# running sequences get a token each.
_CHUNK_S, _CHUNK_STEPS = 0.15, 2
# The same while running sequences pause, or none runs: longer chunks take less time a token.
_LONG_CHUNK_S = 0.4
_MIN_CHUNK, _MAX_CHUNK = 32, 16384
# The last chunk of a prompt has up to so many times the tokens of the others.
_LONGEST_CHUNK = 1.5
# A chunk that is a smaller share of the planned tokens is no measure of the speed.
_MEASURED_SHARE = 1 / 2
# Running sequences pause while the prompts of more others are read, or of more than this share of them
# and than a few: each step of a part takes almost as long as one of all. They pause for at most so many
# times a step, and at most so long.
_PAUSE_SHARE, _FEW = 1 / 4, 4
_PAUSE_STEPS, _MAX_PAUSE_S = 8, 1.0
# How many sequences share a step. On a CPU more of them take as much longer, on a GPU they do not.
MAX_SEQUENCES = {"cpu": 64}
_MAX_SEQUENCES_ON_GPU = 128
# The share of the free memory for keys and values, and the bytes that the scores of a sequence take
# for each token of the vocabulary: in float32, sorted, exponentiated, sampled.
_MEMORY_SHARE, _SCORE_BYTES = 0.5, 24
# The share of that for prefixes which other prompts may have, too.
_PREFIX_SHARE = 1 / 8
# A prefix that prompts share is read once from this length on.
_MIN_SHARED_PREFIX = 16
# A prompt of which so much more is cached is read alone: the next turn of a chat.
_MIN_OWN_PREFIX = 64
# Prompts are read together if the longest has at most so many times the tokens of the shortest one.
_SIMILAR_LENGTH = 1.5
# Sequences are added when this share of the places is free: each time costs a pass and a copy.
_MIN_FREE_SHARE = 1 / 4
# The length of an answer that memory is reserved for. Longer ones may run out, and are preempted.
_USUAL_ANSWER = 2048
# The options of requests whose preparation is kept.
_MAX_PREPARED = 64
_NO_TOKEN = -1
_NO_HIT = PrefixHit(None, 0, ())


@dataclasses.dataclass(eq=False, slots=True)
class Prefill:
    """Prompts that are read together; or a prefix alone, which the prompts `followers` start with.

    `boundaries` are the lengths that the cache had when each forward pass began.
    """

    batch: PaddedBatch
    boundaries: list[int]
    followers: list[Sequence] = dataclasses.field(default_factory=list)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that wait for it."""
        return self.followers or self.batch.sequences

    def remove_finished(self) -> None:
        """Remove the sequences that were cancelled."""
        if self.followers:
            self.followers = [each for each in self.followers if not each.finished]
            if self.followers:
                return
            self.batch.sequences = []
        self.batch.remove_finished()


@dataclasses.dataclass(eq=False, slots=True)
class Unread:
    """Prompts of similar length, of which nothing is read but the prefix that they start with."""

    sequences: list[Sequence]
    hit: PrefixHit
    shared: SharedPrefix | None

    def remove_finished(self) -> None:
        """Remove the sequences that were cancelled."""
        self.sequences = [each for each in self.sequences if not each.finished]


class Scheduler:
    """Decodes sequences together; requests for the same model join while it runs.

    A step reads a chunk of the prompts of those that have joined, and decodes one token of all others.
    """

    def __init__(self, loaded: LocalModel, first: Sequence) -> None:
        """`first` is the sequence of the running job, which may have begun."""
        self._loaded, self._job = loaded, first.job
        self._device = loaded.model.device
        self._budget = MemoryBudget(loaded)
        self._prefixes = PrefixCache(self._budget.prefix_bytes)
        self._prepared: dict[str, GenerateInputs | None] = {}
        self._tokens_per_s = loaded.prefill_chunk_size.tokens / _LONG_CHUNK_S
        # When the last step ended, and how long it took.
        self._last_step, self._step_s = 0.0, 0.0
        self._share(first)
        self.waiting = deque([first])
        # Those that were scheduled and are not finished: their prompts are read, or they are decoded.
        self._reading: deque[Prefill | Unread] = deque()
        self._batch: PaddedBatch | None = None
        # The next one, which cannot share a step: no others are admitted before it.
        self._alone: Sequence | None = None

    @property
    def running(self) -> list[Sequence]:
        """The sequences that were scheduled and are not finished."""
        reading = [sequence for prefill in self._reading for sequence in prefill.sequences]
        return reading if self._batch is None else [*self._batch.sequences, *reading]

    def run(self) -> Sequence | None:
        """Answer every sequence; returns the next one that has to be answered alone, if any."""
        try:
            while self.waiting or self.running:
                self._advance_or_preempt()
        except BaseException as error:  # noqa: BLE001 - ends the jobs of all that share the step
            for sequence in [*self.waiting, *self.running]:
                sequence.fail(error)
        # What comes from here on starts without waiting for an answer.
        self._job.is_over = self._alone is None
        self._job.set_accepts(False)
        return self._alone

    def _advance_or_preempt(self) -> None:
        try:
            self._advance()
            return
        except PrefixNotRead:
            traits = self._loaded.traits
            self._loaded.traits = dataclasses.replace(traits, shares_prefix=False)
            self._wait_again()
            return
        except Exception as error:
            running = self.running
            if not (memory.is_out_of_memory(error) and running):
                raise
            if len(running) == 1:
                running[0].fail(error)
        self.preempt()

    def _advance(self) -> None:
        """Admit and schedule sequences, read a chunk of prompts, and decode one token of the others."""
        self._remove_cancelled()
        admitted = self._admit()
        self._start_reading(self.schedule())
        for sequence in admitted:
            if sequence in self.waiting:
                sequence.job.emit_queued()
        if self._reading:
            self._read_chunk(self._next_prefill())
        if self._batch is not None and not self._is_paused(self._batch):
            began = time.perf_counter()
            self._decode(self._batch)
            self._last_step = time.perf_counter()
            self._step_s = self._last_step - began

    def _is_paused(self, batch: PaddedBatch) -> bool:
        """Return whether running sequences wait for many others, whose prompts are read."""
        reading = sum(len(prefill.sequences) for prefill in self._reading)
        pause_s = min(_PAUSE_STEPS * self._step_s, _MAX_PAUSE_S)
        is_over = time.perf_counter() - self._last_step > pause_s
        running = len(batch.sequences)
        return reading > min(running, max(running * _PAUSE_SHARE, _FEW)) and not is_over

    # -- who runs -----------------------------------------------------------------------------

    def _remove_cancelled(self) -> None:
        cancelled = [s for s in (*self.waiting, *self.running) if s.job.cancel.is_set()]
        if not cancelled:
            return
        for sequence in cancelled:
            sequence.fail(Cancelled())
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.finished)
        for prefill in self._reading:
            prefill.remove_finished()
        self._reading = deque(prefill for prefill in self._reading if prefill.sequences)
        if self._batch is not None:
            self._batch.remove_finished()
            self._batch = self._batch if self._batch.sequences else None

    def _admit(self) -> list[Sequence]:
        """Take the requests that have come, as many as there are places; returns their sequences."""
        admitted: list[Sequence] = []
        count = len(self.waiting) + len(self.running)
        if self._budget.has_free_places(count):
            while self._alone is None and count + len(admitted) < self._budget.max_sequences:
                job = self._job.worker.take_next(self._job.group)
                if job is None:
                    break
                try:
                    sequence = Sequence.start(self._loaded, job)
                    can_share = self._share(sequence)
                except BaseException as error:  # noqa: BLE001 - the end of another job
                    job.fail(error)
                    continue
                if can_share:
                    admitted.append(sequence)
                else:
                    self._alone = sequence
                    job.emit_queued()
        self.waiting.extend(admitted)
        has_places = self._budget.has_free_places(count + len(admitted))
        self._job.set_accepts(self._alone is None and has_places)
        return admitted

    def _share(self, sequence: Sequence) -> bool:
        """Prepare a sequence to share steps; returns whether its options allow that."""
        if sequence.labels is not None:
            # One pass answers it.
            return False
        options = {n: x for n, x in sequence.options.items() if n != "max_new_tokens"}
        key = repr(sorted(options.items()))
        if key not in self._prepared:
            if len(self._prepared) >= _MAX_PREPARED:
                self._prepared.clear()
            ids = torch.tensor([sequence.ids], device=self._device)
            model = self._loaded.model
            inputs = sequence.inputs or parameters.prepare(model, ids, sequence.options)
            self._prepared[key] = inputs.shared()
        sequence.inputs = self._prepared[key]
        if sequence.seed is not None and sequence.generator is None:
            sequence.generator = torch.Generator(self._device).manual_seed(sequence.seed)
        return sequence.inputs is not None

    def schedule(self) -> list[Sequence]:
        """Schedule waiting sequences as the budget allows; returns them."""
        running = self.running
        scheduled: list[Sequence] = []
        while self.waiting and self._budget.fits([*running, *scheduled, self.waiting[0]]):
            scheduled.append(self.waiting.popleft())
        return scheduled

    def preempt(self) -> None:
        """Let all running sequences wait, and half as many run, after memory ran out.

        They continue where they are. The limit rises again as answers end, see `MemoryBudget`.
        """
        count = self._wait_again()
        if count > 1:
            self._budget.reduce(count // 2)
        self._prefixes.clear()
        self._loaded.free_caches()
        memory.release_memory()

    def _wait_again(self) -> int:
        """Let all running sequences wait, to be read again; returns how many there are."""
        sequences = [sequence for sequence in self.running if not sequence.finished]
        self._reading.clear()
        self._batch = None
        for sequence in sequences:
            sequence.cache = None
        self.waiting.extendleft(reversed(sequences))
        return len(sequences)

    # -- prompts ------------------------------------------------------------------------------

    def _start_reading(self, sequences: list[Sequence]) -> None:
        """Start to read prompts; what several of them start with is read once."""
        groups: dict[tuple[int, ...], list[Sequence]] = defaultdict(list)
        for sequence in sequences:
            if sequence.cache is None:
                groups[tuple(sequence.ids[:_MIN_SHARED_PREFIX])].append(sequence)
            else:
                self._start_similar([sequence], PrefixHit(None, 0, (0,)))
        others = []
        for group in groups.values():
            others += self._start_cached(group)
        self._start_similar(others, _NO_HIT)

    def _start_cached(self, group: list[Sequence]) -> list[Sequence]:
        """Start to read prompts that start alike; returns those that start with nothing cached."""
        length = common_prefix_length(group) if self._can_share_prefix(group) else 0
        others = []
        for sequence in group:
            hit = self._cached_beginning(sequence.ids)
            own = hit.length - length if len(group) > 1 else hit.length
            if own > max(_MIN_OWN_PREFIX, (len(sequence.ids) - length) // 2):
                self._start_similar([sequence], hit)
            else:
                others.append(sequence)
        hit = self._cached_beginning(others[0].ids[: length + 1]) if others else _NO_HIT
        if len(others) > 1 and length - hit.length >= _MIN_SHARED_PREFIX:
            # The last column of a batch is not read.
            prefix = dataclasses.replace(others[0], ids=others[0].ids[: length + 1])
            self._reading.append(self._prefill([prefix], hit, followers=others))
        elif hit.length:
            self._start_similar(others, hit)
        else:
            return others
        return []

    def _start_similar(self, group: list[Sequence], hit: PrefixHit) -> None:
        """Start to read prompts that start with a cached prefix, those of similar length together."""
        group = sorted(group, key=lambda sequence: len(sequence.ids))
        shared = self._shared_prefix(group, hit)
        while group:
            longest = hit.length + (len(group[0].ids) - hit.length) * _SIMILAR_LENGTH
            similar = [sequence for sequence in group if len(sequence.ids) <= longest]
            self._reading.append(Unread(similar, hit, shared))
            del group[: len(similar)]

    def _next_prefill(self) -> Prefill:
        """Return what is read next. Of prompts of which nothing is read, it takes the first ones.

        No more of them than a chunk has all tokens of: each pass reads the keys and values of all.
        """
        first = self._reading[0]
        if isinstance(first, Prefill):
            return first
        unread = len(first.sequences[-1].ids) - first.hit.length
        count = max(1, self._chunk_size() // max(1, unread))
        prefill = self._prefill(first.sequences[:count], first.hit, shared=first.shared)
        first.sequences = first.sequences[count:]
        if not first.sequences:
            self._reading.popleft()
        self._reading.appendleft(prefill)
        return prefill

    def _shared_prefix(self, group: list[Sequence], hit: PrefixHit) -> SharedPrefix | None:
        """Return the cached prefix of prompts if it is to be shared with all that are decoded."""
        if hit.cache is None or not self._loaded.traits.shares_prefix:
            return None
        inputs, batch = group[0].inputs, self._batch
        assert inputs is not None
        if inputs.arguments.get("position_ids") is None:
            return None
        count = len(group)
        if batch is not None and batch.shared is not None:
            count += len(batch.sequences)
        shortest = min(len(sequence.ids) for sequence in group)
        length = min(hit.length, shortest - shared_prefix.MIN_OWN_TOKENS)
        if not shared_prefix.is_worth_it(length, count):
            return None
        return SharedPrefix(group[0].ids[: hit.length], hit.cache).cropped(length)

    def _can_share_prefix(self, group: list[Sequence]) -> bool:
        if len(group) == 1:
            return True
        # A window counts the padding after the prefix as distance.
        longest = max(sequence.max_length for sequence in group)
        return longest <= self._loaded.traits.shortest_window

    def _cached_beginning(self, ids: list[int]) -> PrefixHit:
        """Return the longest cached beginning of `ids`, not all of them."""
        if len(ids) <= _MIN_SHARED_PREFIX:
            return _NO_HIT
        tokens = torch.tensor(ids)
        caches = (self._prefixes, self._loaded.prefix_cache)
        hits = [cache.beginning(tokens) or _NO_HIT for cache in caches]
        best = max(hits, key=lambda hit: hit.length)
        return best if best.length >= _MIN_SHARED_PREFIX else _NO_HIT

    def _prefill(
        self,
        sequences: list[Sequence],
        hit: PrefixHit,
        followers: abc.Sequence[Sequence] = (),
        shared: SharedPrefix | None = None,
    ) -> Prefill:
        own, prefix_length = sequences[0].cache, hit.length if shared is None else len(shared.ids)
        batch = PaddedBatch(sequences, prefix_length if own is None else 0, self._device)
        if own is not None:
            batch.cache, sequences[0].cache = own, None
        elif shared is not None:
            batch.start_after(shared, compat.new_cache(self._loaded.model))
        elif hit.cache is not None:
            batch.start_from(hit.cache)
        else:
            batch.cache = compat.new_cache(self._loaded.model)
        if own is None and prefix_length:
            for sequence in sequences:
                sequence.cached_tokens = prefix_length
        return Prefill(batch, list(hit.boundaries), list(followers))

    def _read_chunk(self, prefill: Prefill) -> None:
        """Read a chunk of prompts, which are decoded once all but the last column are read."""
        batch = prefill.batch
        start, last = batch.read, batch.width - 1
        for sequence in prefill.sequences:
            sequence.start_clock()
        if start < last:
            began, size = time.perf_counter(), self._chunk_size()
            columns = max(1, size // len(batch.sequences))
            # A short rest would take almost as long as a chunk.
            end = start + columns if last - start > columns * _LONGEST_CHUNK else last
            self._forward(batch, start, end)
            prefill.boundaries.append(start)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            read = (end - start) * len(batch.sequences)
            if read > size * _MEASURED_SHARE:
                measured = read / max(time.perf_counter() - began, 1e-6)
                self._tokens_per_s = min(measured, 2 * self._tokens_per_s)
            if end < last:
                for sequence in prefill.sequences:
                    sequence.streamer.report_prefill(end, last)
        if batch.is_read:
            self._reading.popleft()
            self._end_reading(prefill)
        else:
            self._reading.rotate(-1)

    def _chunk_size(self) -> int:
        """Return how many tokens the next chunk has, with the padding."""
        is_alone = self._batch is None or self._is_paused(self._batch)
        chunk_s = max(_CHUNK_S, min(_CHUNK_STEPS * self._step_s, _LONG_CHUNK_S))
        size = int(self._tokens_per_s * (_LONG_CHUNK_S if is_alone else chunk_s))
        # Beside other processes shorter chunks take as long, and all prompts together much longer.
        least = max(_MIN_CHUNK, self._loaded.prefill_chunk_size.tokens // 2)
        return max(least, min(size, _MAX_CHUNK))

    def _end_reading(self, prefill: Prefill) -> None:
        """Store the prefix, or add the sequences to those that are decoded."""
        batch = prefill.batch
        ids, followers = batch.ids[0, :-1].cpu(), prefill.followers
        if followers:
            self._prefixes.store(ids, batch.cache, prefill.boundaries)
            self._start_similar(followers, PrefixHit(batch.cache, len(ids), (0,)))
            return
        is_alone = len(batch.sequences) == 1 and batch.shared is None
        if is_alone and not batch.sequences[0].streamer.token_count:
            cache = compat.fork(batch.cache)
            self._loaded.prefix_cache.store(ids, cache, prefill.boundaries)
        if self._batch is None:
            batch.start_decoding()
            self._batch = batch
        else:
            self._batch.join(batch)

    # -- steps --------------------------------------------------------------------------------

    def _forward(self, batch: PaddedBatch, start: int, end: int) -> torch.Tensor:
        """Read columns of a batch; returns the logits after the last one, one row a sequence."""
        model, inputs = self._loaded.model, batch.sequences[0].inputs
        assert inputs is not None
        arguments = dict(inputs.arguments)
        arguments[self._loaded.traits.cache_name] = batch.cache
        if arguments.get("position_ids") is not None:
            arguments["position_ids"] = batch.position_ids()[:, :end]
        arguments["attention_mask"] = batch.mask[:, :end] if batch.is_padded else None
        is_first = start + batch.shared_length == 0
        prepared = compat.prepare_inputs(
            model, batch.ids[:, :end], end - start, arguments, first=is_first
        )
        if end - start == 1 and self._loaded.traits.masks_single_tokens:
            prepared["attention_mask"] = batch.mask[:, None, None, :end].bool()
        shared = batch.shared
        with contextlib.nullcontext() if shared is None else shared.attended(model):
            logits: torch.Tensor = model(**prepared, return_dict=True).logits[:, -1]
        return logits

    def _decode(self, batch: PaddedBatch) -> None:
        """Decode one token of every sequence."""
        logits = self._forward(batch, batch.width - 1, batch.width)
        scores = logits.to(copy=True, dtype=torch.float32, device=batch.ids.device)
        ranked = _rank(batch, scores)
        for sequence, row in zip(batch.sequences, scores, strict=True):
            if sequence.constraint is not None:
                sequence.constraint.mask(row)
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, sequence in enumerate(batch.sequences):
            rows_of[id(sequence.inputs)].append(row)
        ids, tokens = batch.all_ids(), batch.ids.new_empty(len(batch.sequences))
        for rows in rows_of.values():
            sequences = [batch.sequences[row] for row in rows]
            index = slice(None) if len(rows_of) == 1 else torch.tensor(rows, device=tokens.device)
            tokens[index] = _next_tokens(ids[index], scores[index], sequences)
        batch.append(tokens)
        chosen = tokens.tolist()
        found = _scores(batch, ranked, chosen)
        for sequence, token, own in zip(batch.sequences, chosen, found, strict=True):
            try:
                if token == _NO_TOKEN:
                    raise RuntimeError("the probabilities are not numbers")
                sequence.append(token, own)
            except Exception as error:  # noqa: BLE001 - the end of one answer, the others go on
                sequence.fail(error)
        self._budget.raise_after(sum(sequence.finished for sequence in batch.sequences))
        batch.remove_finished()
        if not batch.sequences:
            self._batch = None


def _rank(batch: PaddedBatch, scores: torch.Tensor) -> Distribution | None:
    """Return the distributions of the sequences whose probabilities are requested, None if none is."""
    counts = [s.alternatives for s in batch.sequences]
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return None
    # A copy: the scores are masked later.
    requested = scores[torch.tensor(rows, device=scores.device)]
    return Distribution(requested, max(count for count in counts if count is not None))


def _scores(
    batch: PaddedBatch, ranked: Distribution | None, tokens: abc.Sequence[int]
) -> list[TokenScores | None]:
    """Return the scores of the next token of each sequence, None where they are not requested."""
    if ranked is None:
        return [None] * len(tokens)
    counts = [s.alternatives for s in batch.sequences]
    # A row without a token has failed.
    requested = [max(t, 0) for t, count in zip(tokens, counts, strict=True) if count is not None]
    found = iter(ranked.scores(requested))
    return [next(found).first(count) if count is not None else None for count in counts]


def max_sequences(device: str) -> int:
    """Return how many sequences may share a step on a kind of device, if memory allows."""
    return MAX_SEQUENCES.get(device, _MAX_SEQUENCES_ON_GPU)


class MemoryBudget:
    """How many sequences may run together, by their number and by the memory that they will take.

    Memory that ran out may become free again: the limit rises by one place for some answers that end.
    That number doubles each time, because preempted prompts are read again.
    """

    def __init__(self, loaded: LocalModel) -> None:
        config = loaded.model.config.get_text_config(decoder=True)
        device = loaded.model.device.type
        self.max_sequences = max_sequences(device)
        self._most = self.max_sequences
        # How many answers have to end for another place, and how many have ended.
        self._answers_a_place, self._answers = 1, 0
        self._token_bytes = memory.token_bytes(config.to_dict(), loaded.info.dtype)
        self._score_bytes = config.vocab_size * _SCORE_BYTES
        free = memory.free_bytes(loaded.info.device.partition("+")[0])
        self._bytes = free * _MEMORY_SHARE
        self.prefix_bytes = int(self._bytes * _PREFIX_SHARE)

    def reduce(self, count: int) -> None:
        """Let at most `count` sequences run together, after memory ran out."""
        self.max_sequences, self._answers = count, 0
        self._answers_a_place *= 2

    def raise_after(self, answers: int) -> None:
        """Raise a reduced limit after so many more answers have ended."""
        if self.max_sequences < self._most:
            more, self._answers = divmod(self._answers + answers, self._answers_a_place)
            self.max_sequences = min(self.max_sequences + more, self._most)

    def has_free_places(self, running: int) -> bool:
        """Return whether enough places are free to add sequences."""
        return self.max_sequences - running >= self.max_sequences * _MIN_FREE_SHARE

    def fits(self, sequences: abc.Sequence[Sequence]) -> bool:
        """Return whether these sequences may run together; one alone always may."""
        width = max(min(s.max_length, len(s.ids) + _USUAL_ANSWER) for s in sequences)
        needed = len(sequences) * (width * self._token_bytes + self._score_bytes)
        few = len(sequences) <= self.max_sequences
        return len(sequences) == 1 or (few and needed <= self._bytes)


def _next_tokens(
    ids: torch.Tensor, scores: torch.Tensor, sequences: abc.Sequence[Sequence]
) -> torch.Tensor:
    """Return the next token of sequences with the same options."""
    inputs = sequences[0].inputs
    assert inputs is not None
    # The annotation of a processor expects a tensor type that no function of torch returns.
    process: Any = inputs.processors
    scores = process(ids, scores)
    # As `argmax`, which takes three times as long on a CPU.
    return _sample(scores, sequences) if inputs.do_sample else scores.max(-1).indices


def _sample(scores: torch.Tensor, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
    """Sample a token of every sequence, as `torch.multinomial` does for one alone."""
    probabilities = scores.softmax(-1)
    noise = torch.empty_like(probabilities)
    if all(sequence.generator is None for sequence in sequences):
        noise.exponential_()
    else:
        for sequence, row in zip(sequences, noise, strict=True):
            row.exponential_(generator=sequence.generator)
    tokens = (probabilities / noise).argmax(-1)
    return tokens.masked_fill(probabilities.isnan().any(-1), _NO_TOKEN)
