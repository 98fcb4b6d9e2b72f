"""One step of a model for many rows: who takes part, what is read, and what is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import logits_process as processing
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
)

from llm_magic.backends.local import memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.batch import continuous
from llm_magic.backends.local.batch.padded_batch import Group, shortest_window
from llm_magic.backends.local.batch.sequence import Ending, Job, Row, common_prefix
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled
from llm_magic.errors import LLMMagicError

# A prefill is cut into pieces that take about this long, so that it can be stopped.
_PIECE_S = 0.2
_FIRST_PIECE, _SMALLEST_PIECE, _LARGEST_PIECE = 256, 32, 16384
# So many rows share a step: on a CPU more make the step as much longer, a GPU has room.
_ROWS = {"cpu": 32}
_MANY_ROWS = 128
# What keys and values may take of the memory that is free, and the scores of a row in bytes a
# word of the vocabulary: in float32, sorted, exponentiated, drawn from.
_SHARE, _SCORE_BYTES = 0.5, 24
# A beginning that all prompts share is read once from this many tokens on.
_WORTH_SHARING = 16
# New rows come in when this share of the places is free: each time costs a pass and a copy.
_REFILL = 1 / 4
# What looks at each row alone, and not at where its prompt ends.
_ROW_BY_ROW = (
    processing.EpsilonLogitsWarper, processing.EtaLogitsWarper,
    processing.InfNanRemoveLogitsProcessor, processing.LogitNormalization,
    processing.MinPLogitsWarper, processing.SuppressTokensLogitsProcessor,
    processing.TemperatureLogitsWarper, processing.TopHLogitsWarper, processing.TopKLogitsWarper,
    processing.TopPLogitsWarper, processing.TypicalLogitsWarper,
)  # fmt: skip
# The answer that room is kept for; one that grows longer may run out of it, which is survived.
_USUAL_ANSWER = 2048
_NO_TOKEN = -1
_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)


class OneByOne(Exception):
    """An option was asked for that rows cannot share a step with."""


class Batch:
    """A model, the rows that wait for it, and those that share its steps now."""

    def __init__(self, loaded: LocalModel, rows: Sequence[Row], job: Job) -> None:
        self._loaded, self._job = loaded, job
        # The longest first: if memory runs out, it does so early.
        self._waiting = deque(sorted(rows, key=lambda row: -len(row.ids)))
        # Those that were let in and are not over, whether they are in a group yet or not.
        self._live: list[Row] = []
        self._group: Group | None = None
        self._room = Room(loaded)
        self._piece = _FIRST_PIECE
        self._prefix = 0
        self._read_prefix: DynamicCache | None = None

    def use(
        self,
        processors: LogitsProcessorList,
        criteria: Sequence[Any],
        settings: Any,
        inputs: Mapping[str, Any],
    ) -> None:
        """Take over what `generate` prepared; raises `OneByOne` for what rows cannot share."""
        self._processors = LogitsProcessorList([_shared(processor) for processor in processors])
        if any(type(criterion) not in _CRITERIA for criterion in criteria):
            raise OneByOne
        ends = [x.eos_token_id.tolist() for x in criteria if isinstance(x, EosTokenCriteria)]
        self._ending = Ending(frozenset(itertools.chain(*ends)), settings.max_time)
        self._samples = bool(settings.do_sample)
        self._positioned = inputs.get("position_ids") is not None
        self._settings = settings
        # The rest is what `generate` tells the model about every pass.
        own = (*compat.CACHE_NAMES, "attention_mask", "position_ids")
        self._told = {name: value for name, value in inputs.items() if name not in own}

    def run(self) -> None:
        """Answer every row."""
        if self._in_pages():
            self._answer_in_pages()
        if not self._waiting:
            return
        self._prefix = self._worth_sharing()
        while self._waiting or self._live:
            try:
                self._advance()
                continue
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                problem = self._job.translate(error)
            self._retreat(problem)

    def _in_pages(self) -> bool:
        wanted = self._job.pages
        if wanted is None:
            wanted = continuous.flash_attention(self._loaded.model) is not None
        return wanted and continuous.understands(self._processors, self._waiting)

    def _answer_in_pages(self) -> None:
        """Leave the rows to continuous batching; where that takes too much memory, go on here."""
        rows = list(self._waiting)
        tokens = self._room.tokens
        try:
            continuous.answer(
                self._loaded.model, rows, self._settings, self._ending, tokens, self._job.cancel
            )
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
        memory.release_memory()
        self._waiting = deque(row for row in rows if not row.over)

    def _worth_sharing(self) -> int:
        """Return how many tokens of all prompts are read once."""
        length = common_prefix([row.ids for row in self._waiting])
        window = shortest_window(self._loaded.model)
        # The padding after them is a distance for a layer that counts how far back it sees.
        seen = window is None or max(row.longest for row in self._waiting) <= window
        return length if seen and length >= _WORTH_SHARING else 0

    def _advance(self) -> None:
        """Let rows in where there is room, or take a step."""
        rows = self._admitted()
        if rows:
            newcomers = Group(rows, self._prefix, self._loaded.model.device)
            self._begin(newcomers)
            self._read(newcomers)
            if self._group is None:
                self._group = newcomers
            else:
                self._group.join(newcomers)
            return
        assert self._group is not None
        self._step(self._group)
        self._live = list(self._group.rows)
        if not self._live:
            self._group = None

    def _admitted(self) -> list[Row]:
        if self._live and not self._room.is_worth_it(len(self._live)):
            return []
        rows: list[Row] = []
        while self._waiting and self._room.has_place([*self._live, self._waiting[0]]):
            rows.append(self._waiting.popleft())
            rows[-1].begin(self._ending)
            self._live.append(rows[-1])
        return rows

    def _retreat(self, problem: LLMMagicError) -> None:
        """After memory ran out: all that were at it begin where they are, half as many at once."""
        rows, self._live, self._group = self._live, [], None
        if len(rows) == 1:
            rows[0].fail(problem)
        else:
            self._waiting.extendleft(reversed(rows))
            self._room.rows = len(rows) // 2
        memory.release_memory()

    def _begin(self, group: Group) -> None:
        if not self._prefix:
            group.cache = compat.new_cache(self._loaded.model)
            return
        if self._read_prefix is None:
            # Its last column is not read.
            row = dataclasses.replace(group.rows[0], ids=group.rows[0].ids[: self._prefix + 1])
            alone = Group([row], 0, group.ids.device)
            alone.cache = compat.new_cache(self._loaded.model)
            self._read(alone)
            self._read_prefix = alone.cache
        group.share(self._read_prefix)

    def _read(self, group: Group) -> None:
        """Read all but the last column, in pieces between which it can be stopped."""
        start, last = group.cache.get_seq_length(), group.width - 1
        while start < last:
            began = time.perf_counter()
            columns = max(1, self._piece // len(group.rows))
            self._pass(group, start, min(start + columns, last))
            if group.ids.device.type == "cuda":
                torch.cuda.synchronize(group.ids.device)
            start += columns
            if start <= last:
                share = _PIECE_S / max(time.perf_counter() - began, 1e-6)
                piece = int(self._piece * min(share, 2.0))
                self._piece = max(_SMALLEST_PIECE, min(piece, _LARGEST_PIECE))

    def _pass(self, group: Group, start: int, stop: int) -> torch.Tensor:
        """Let the model read some columns; returns what it says after the last one."""
        if self._job.cancel.is_set():
            raise Cancelled
        model = self._loaded.model
        inputs = {**self._told, **compat.cache_argument(model, group.cache)}
        if self._positioned:
            inputs["position_ids"] = group.positions()[:, :stop]
        inputs["attention_mask"] = group.mask[:, :stop] if group.padded else None
        prepared = compat.prepare_inputs(
            model, group.ids[:, :stop], stop - start, inputs, first=start == 0
        )
        logits: torch.Tensor = model(**prepared, return_dict=True).logits[:, -1]
        return logits

    def _step(self, group: Group) -> None:
        """Decode a token of every row."""
        logits = self._pass(group, group.width - 1, group.width)
        # Its annotation asks for a kind of tensor that no function of torch says it returns.
        processed: Any = self._processors
        scores: torch.Tensor = processed(
            group.ids, logits.to(copy=True, dtype=torch.float32, device=group.ids.device)
        )
        tokens = _drawn(scores, group.rows) if self._samples else scores.argmax(-1)
        group.extend(tokens)
        now = time.perf_counter()
        for row, token in zip(group.rows, tokens.tolist(), strict=True):
            if token == _NO_TOKEN:
                row.fail(self._job.translate(RuntimeError("the probabilities are not numbers")))
            else:
                row.take(token, now, self._ending)
        group.drop()


class Room:
    """How many rows may share a step: by number, and by the memory that they will take."""

    def __init__(self, loaded: LocalModel) -> None:
        config = loaded.model.config.get_text_config(decoder=True)
        self.rows = _ROWS.get(loaded.model.device.type, _MANY_ROWS)
        self._token = memory.token_bytes(config.to_dict(), loaded.info.dtype)
        self._scores = config.vocab_size * _SCORE_BYTES
        self._budget = memory.free_bytes(loaded.info.device.partition("+")[0]) * _SHARE

    @property
    def tokens(self) -> int:
        """How many tokens fit."""
        return int(self._budget / max(self._token, 1))

    def is_worth_it(self, live: int) -> bool:
        """Whether enough places are free."""
        return self.rows - live >= self.rows * _REFILL

    def has_place(self, rows: Sequence[Row]) -> bool:
        """Whether these may be at it together; one alone always may."""
        width = max(min(row.longest, len(row.ids) + _USUAL_ANSWER) for row in rows)
        needed = len(rows) * (width * self._token + self._scores)
        return len(rows) == 1 or (len(rows) <= self.rows and needed <= self._budget)


def _shared(processor: Any) -> Any:
    """Return a processor for rows that come and go; raises `OneByOne` if there is none."""
    if type(processor) is processing.RepetitionPenaltyLogitsProcessor:
        # Without the count of padding: that is of these rows, and our padding is no new token.
        return processing.RepetitionPenaltyLogitsProcessor(processor.penalty)
    if type(processor) not in _ROW_BY_ROW:
        raise OneByOne
    return processor


def _drawn(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Draw a token of every row, as `torch.multinomial` does it for one that is alone."""
    shares = scores.softmax(-1)
    noise = torch.empty_like(shares)
    if rows[0].generator is None:
        noise.exponential_()
    else:
        for row, line in zip(rows, noise, strict=True):
            line.exponential_(generator=row.generator)
    tokens = (shares / noise).argmax(-1)
    return tokens.masked_fill(shares.isnan().any(-1), _NO_TOKEN)
