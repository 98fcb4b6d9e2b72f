"""The decoding loop: prefill, then sample and decode until the answer ends; on the inference thread.

The public `generate` of Transformers prepares everything and answers by itself where this loop cannot.
When another request for the same model comes, the loop stops at the next token or chunk of the prompt,
and `batch` answers both together.
"""

from __future__ import annotations

import contextlib
import math
from collections import abc
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation import parameters
from llm_magic.backends.local.generation.choice import Labels, read_separately
from llm_magic.backends.local.generation.constraint import Constraint
from llm_magic.backends.local.generation.cuda_graph import StaticStep, TokenReader
from llm_magic.backends.local.generation.distribution import Distribution, TokenScores
from llm_magic.backends.local.generation.model_runner import ModelRunner
from llm_magic.backends.local.generation.parameters import GenerateInputs
from llm_magic.backends.local.generation.sequence import Sequence
from llm_magic.backends.local.generation.speculative import drafter
from llm_magic.backends.local.generation.token_streamer import GenerateStreamer, StopStringReached
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled
from llm_magic.config.commands import option
from llm_magic.errors import OptionError
from llm_magic.types import FinishReason, Score

# Attention that takes a mask with 4 dimensions and a value for each pair of tokens.
_MASKED_ATTENTION = {"sdpa", "eager"}
_NO_STRUCTURE = "{name} cannot be held to a structure: {reason}. Ask for it in the prompt."
_NO_SCORES = "{name} cannot score texts: {reason}."
# Of the texts that are scored in one forward pass.
_MAX_SCORED = 512
_NO_LOGPROBS = "{name} reports no probabilities of tokens: {reason}. Remove {option}."


def answer(loaded: LocalModel, sequence: Sequence) -> bool:
    """Answer a sequence alone; returns False where it has to go on together with others.

    Raises `Cancelled` soon after the flag of its job is set.
    """
    seed, device = sequence.seed, loaded.model.device
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(parameters.seeded(seed, device))
        if sequence.labels is not None:
            _choose(loaded, sequence, sequence.labels)
            return True
        is_finished = _answer(loaded, torch.tensor([sequence.ids], device=device), sequence)
        if not is_finished and seed is not None:
            sequence.generator = parameters.current_generator(device)
    if is_finished:
        reason = _finish_reason(sequence)
        sequence.streamer.finish(reason, sequence.prompt_tokens, sequence.cached_tokens)
    return is_finished


def _answer(loaded: LocalModel, ids: torch.Tensor, sequence: Sequence) -> bool:
    """Answer the prompt `ids` (1, length); returns whether the answer is finished."""
    if loaded.traits.fallback_reason is None:
        sequence.inputs = inputs = parameters.prepare(loaded.model, ids, sequence.options)
        if isinstance(inputs.arguments.get(loaded.traits.cache_name), Cache):
            return DecodingLoop(loaded, ids, inputs, sequence).run()
        reason = f"{type(loaded.model).__name__} keeps a custom state"
        loaded.traits = compat.ModelTraits(reason)
    if sequence.constraint is not None:
        raise _unavailable(loaded, _NO_STRUCTURE)
    if sequence.alternatives is not None:
        raise _unavailable(loaded, _NO_LOGPROBS)
    sequence.job.set_accepts(False)
    # `generate` comes from a mixin that the annotations of models do not show.
    generate: Any = loaded.model.generate
    with contextlib.suppress(StopStringReached):
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=GenerateStreamer(sequence.streamer, sequence.job.cancel),
            **sequence.options,
        )
    return True


def _unavailable(loaded: LocalModel, what: str) -> OptionError:
    """Return the error for a model that only `generate` of Transformers decodes."""
    name, reason = loaded.info.name, loaded.traits.fallback_reason
    return OptionError(what.format(name=name, reason=reason, option=option("logprobs")))


def _choose(loaded: LocalModel, sequence: Sequence, labels: Labels) -> None:
    """Answer a sequence with the likeliest label, whatever the temperature; after its reasoning."""
    sequence.job.set_accepts(False)
    if loaded.traits.fallback_reason is not None:
        raise _unavailable(loaded, _NO_STRUCTURE)
    first, others = _read_after(loaded, sequence, labels.read)
    if sequence.in_reasoning or loaded.grammars.opens_reasoning(int(first.argmax())):
        _answer(loaded, torch.tensor([sequence.ids], device=loaded.model.device), sequence)
        reason = _finish_reason(sequence)
        if reason != "stop":
            sequence.finish(reason)
            return
        first, others = _read_after(loaded, sequence, labels.read)
        token = int(first.argmax())
        if str(loaded.tokenizer.decode([token])).isspace():
            # What this model writes between its reasoning and its answer.
            sequence.ids.append(token)
            first, others = _read_after(loaded, sequence, labels.read)
    sequence.choose(labels, first, others)


def _read_after(
    loaded: LocalModel, sequence: Sequence, continuations: abc.Sequence[abc.Sequence[int]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits after the text of a sequence, and after the tokens of each continuation."""
    ids, logits = torch.tensor([sequence.ids], device=loaded.model.device), None
    if loaded.traits.can_batch:
        inputs = parameters.prepare(loaded.model, ids, sequence.options)
        sequence.inputs = inputs
        logits = DecodingLoop(loaded, ids, inputs, sequence).read_side_by_side(continuations)
    return logits or read_separately(loaded.model, ids, continuations)


def score(loaded: LocalModel, sequence: Sequence, texts: abc.Sequence[str]) -> Iterator[Score]:
    """Yield how probable each text is after the prompt of a sequence, in the order of the texts."""
    if loaded.traits.fallback_reason is not None:
        raise _unavailable(loaded, _NO_SCORES)
    tokens = [loaded.prompt_encoder.encode_answer(one) for one in texts]
    sequence.check_length(loaded, max(map(len, tokens)))
    described = sequence.streamer.texts.of_text
    for group in _groups(tokens):
        found = _group_scores(loaded, sequence, [tokens[number] for number in group])
        for number, scores in zip(group, found, strict=True):
            logprob = math.fsum(each.logprob for each in scores)
            yield Score(texts[number], logprob, described(tokens[number], scores))


def _groups(tokens: abc.Sequence[abc.Sequence[int]]) -> Iterator[list[int]]:
    """Yield the numbers of the texts that are read together: the logits of all their tokens take memory."""
    group: list[int] = []
    size = 0
    for number, one in enumerate(tokens):
        if group and size + len(one) > _MAX_SCORED:
            yield group
            group, size = [], 0
        group.append(number)
        size += len(one)
    yield group


def _group_scores(
    loaded: LocalModel, sequence: Sequence, group: abc.Sequence[list[int]]
) -> list[list[TokenScores]]:
    """Return the scores of the tokens of each text; one that is too long is read in parts."""
    prompt, scores = sequence.ids, list[list[TokenScores]]([] for _ in group)
    for start in range(0, max(map(len, group)), _MAX_SCORED):
        parts = [tokens[start : start + _MAX_SCORED] for tokens in group]
        # Only a text that is alone has several parts.
        sequence.ids = prompt + group[0][:start]
        first, others = _read_after(loaded, sequence, [part[:-1] for part in parts])
        for part, rows, found in zip(parts, others, scores, strict=True):
            logits = torch.cat([first[None], rows])
            found += Distribution(logits, sequence.alternatives or 0).scores(part)
    sequence.ids = prompt
    return scores


def _finish_reason(sequence: Sequence) -> FinishReason:
    streamer, options = sequence.streamer, sequence.options
    if sequence.has_ended:
        return sequence.end_reason
    if streamer.token_count >= options["max_new_tokens"]:
        return "length"
    return "stop" if options.get("max_time") is None else "truncated"


class DecodingLoop:
    """Answers one prompt of shape (1, length)."""

    def __init__(
        self,
        loaded: LocalModel,
        ids: torch.Tensor,
        inputs: GenerateInputs,
        sequence: Sequence,
    ) -> None:
        self._loaded, self._inputs, self._sequence = loaded, inputs, sequence
        self._streamer, self._job = sequence.streamer, sequence.job
        # Of the token that was sampled last, if its probability is requested.
        self._distribution: Distribution | None = None
        self._limit: int = sequence.options["max_new_tokens"]
        self._runner = ModelRunner(loaded.model, loaded.traits, ids, inputs.arguments, self._limit)
        cache = self._runner.cache
        # Only the usual kind of cache can serve other prompts, and those of fixed shape.
        self._is_plain = type(cache) is DynamicCache and not cache.offloading
        can_share = self._is_plain and loaded.traits.can_batch and inputs.shared() is not None
        can_share = can_share and sequence.labels is None and self._job.group is not None
        self._job.set_accepts(can_share)
        sequence.start_clock()

    def run(self) -> bool:
        """Answer the prompt; returns False, at a token or a chunk of it, where others have come."""
        if self._job.has_company:
            return False
        try:
            logits = self._prefill()
            is_finished = logits is not None and (
                self._append(self._sample(logits)) or self._decode()
            )
        except Cancelled:
            # After any other error the cache may hold half a step.
            self._store_prefix()
            raise
        self._store_prefix()
        if not is_finished or self._sequence.labels is not None:
            self._sequence.ids = self._runner.ids[0].tolist()
            self._sequence.cache = compat.fork(self._runner.cache)
        return is_finished

    def read_side_by_side(
        self, continuations: abc.Sequence[abc.Sequence[int]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Read the prompt and continuations of it, see `ModelRunner.read_side_by_side`."""
        loaded, runner = self._loaded, self._runner
        longest = runner.length + sum(map(len, continuations))
        has_mask = compat.attention(loaded.model) in _MASKED_ATTENTION
        if not (self._is_plain and has_mask and longest <= loaded.traits.shortest_window):
            return None
        # In a row with others, such as those of a map, rounding may differ, as in a batch.
        self._resume(anywhere=self._job.worker.has_next(self._job.group))
        chunk_size = loaded.prefill_chunk_size
        while runner.length - runner.cached_length > chunk_size.tokens:
            runner.prefill_chunk(chunk_size, self._job.cancel)
        # The logits after the last token are needed.
        runner.crop(runner.length - 1)
        logits = runner.read_side_by_side(continuations)
        self._store_prefix()
        return logits

    def _resume(self, *, anywhere: bool = False) -> None:
        """Start from the longest cached prefix of the prompt; see `PrefixCache` for where it may end."""
        runner, prefixes = self._runner, self._loaded.prefix_cache
        find = prefixes.beginning if anywhere else prefixes.lookup
        hit = find(runner.ids[0].cpu()) if self._is_reusable else None
        if hit is not None:
            runner.resume(hit)
        self._sequence.cached_tokens = runner.cached_length

    def _prefill(self) -> torch.Tensor | None:
        """Read the part of the prompt that no cached prefix has; returns the logits, None for others."""
        loaded, runner = self._loaded, self._runner
        self._resume()
        cached_tokens = runner.cached_length
        unread = runner.length - cached_tokens
        if unread > loaded.prefill_chunk_size.tokens:
            self._streamer.report_prefill(0, unread)
        chunk_size, cancel = loaded.prefill_chunk_size, self._job.cancel
        while (logits := runner.prefill_chunk(chunk_size, cancel)) is None:
            self._streamer.report_prefill(runner.cached_length - cached_tokens, unread)
            if self._job.has_company:
                return None
        if self._is_reusable and not compat.can_be_cropped(runner.cache):
            # The cache cannot be cropped to the prompt later, where the next turn may begin.
            prompt, cache = runner.ids[0].cpu(), compat.fork(runner.cache)
            loaded.prefix_cache.store(prompt, cache, runner.boundaries)
        return logits

    def _sample(self, logits: torch.Tensor) -> int:
        """Return the next token by its logits (1, vocabulary), as `generate` chooses it."""
        self._rank(logits)
        if self._sequence.constraint is not None:
            self._sequence.constraint.mask(logits)
        process: Any = self._inputs.processors
        scores: torch.Tensor = process(self._runner.ids, logits)
        if self._inputs.do_sample:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(torch.argmax(scores, dim=-1))

    def _rank(self, logits: torch.Tensor) -> None:
        """Compute the probabilities by the logits (1, vocabulary) of the next token, if requested."""
        if self._sequence.alternatives is not None:
            self._distribution = Distribution(logits, self._sequence.alternatives)

    def _append(self, token: int) -> bool:
        """Append a token to the answer; returns whether the answer ends with it."""
        runner, streamer, inputs = self._runner, self._streamer, self._inputs
        runner.append(token)
        if self._job.cancel.is_set():
            raise Cancelled
        ranked = self._distribution
        streamer.append(token, ranked.scores([token])[0] if ranked is not None else None)
        if self._sequence.follow(token):
            return True
        if streamer.token_count >= self._limit:
            return True
        ids: Any = runner.ids
        return bool(inputs.criteria) and bool(inputs.criteria(ids, None).all())

    def _decode(self) -> bool:
        """Decode in steps of fixed shape where the model and the options allow it, else freely.

        Returns whether the answer is finished; False where others have come.
        """
        decoder, inputs = self._loaded.static_decoder, self._inputs
        if self._is_plain and decoder.unavailable_reason is None and self._loaded.assistant is None:
            constraint = self._sequence.constraint
            step = decoder.step(
                self._runner.length,
                self._limit - 1,
                inputs.processors,
                do_sample=inputs.do_sample,
                is_masked=constraint is not None,
            )
            if step is not None:
                is_free = constraint is None and self._sequence.alternatives is None
                return self._replay(step) if is_free else self._read_steps(step, constraint)
        return self._step()

    def _step(self) -> bool:
        """Decode token by token, and several in one pass where a draft is accepted."""
        runner = self._runner
        proposer = None
        if isinstance(runner.cache, DynamicCache) and compat.can_roll_back(runner.cache):
            proposer = drafter(self._loaded, self._job.cancel)
        tokens: list[int] = runner.ids[0].tolist()
        constraint = self._sequence.constraint
        while not self._job.has_company:
            limit = self._limit - self._streamer.token_count - 1
            forced, draft = [], []
            if proposer is not None:
                forced = constraint.forced(limit) if constraint is not None else []
                draft = forced or proposer.propose(tokens, limit)
            if constraint is not None and not forced:
                draft = constraint.valid(draft)
            logits = runner.decode(draft)
            for accepted in range(len(draft) + 1):
                token = self._sample(logits[accepted : accepted + 1])
                tokens.append(token)
                if self._append(token):
                    return True
                if accepted == len(draft) or token != draft[accepted]:
                    break
            if proposer is not None and draft:
                if not forced:
                    proposer.draft_length.update(len(draft), accepted)
                runner.crop(runner.length - 1)
        return False

    def _replay(self, step: StaticStep) -> bool:
        """Replay one step, and read each token while the next one is computed."""
        runner = self._runner
        step.start(runner.cache, runner.ids)
        reader = TokenReader(self._loaded.model.device)
        try:
            reader.send(step())
            while not self._job.has_company:
                reader.send(step())
                if self._append(reader.read()):
                    return True
            # The step that runs has used the next random numbers.
            return self._append(reader.read(last=True))
        finally:
            # Also where the answer is cancelled: the next prompt can reuse it.
            runner.replace_cache(step.result(runner.length - 1))

    def _read_steps(self, step: StaticStep, constraint: Constraint | None) -> bool:
        """Replay one step, and read its logits; compute meanwhile which tokens may come next."""
        runner = self._runner
        step.start(runner.cache, runner.ids)
        try:
            while not self._job.has_company:
                self._rank(step.read())
                if constraint is not None:
                    step.exclude(constraint.excluded(step.vocabulary))
                if self._append(int(step.choose())):
                    return True
            return False
        finally:
            # Also where the answer is cancelled: the next prompt can reuse it.
            runner.replace_cache(step.result(runner.length - 1))

    @property
    def _is_reusable(self) -> bool:
        """Whether another prompt can start from the cache."""
        return self._is_plain and self._runner.length <= self._loaded.traits.longest_reuse

    def _store_prefix(self) -> None:
        """Store the cache for the prompts that start with this one."""
        runner = self._runner
        runner.trim_cache()
        if self._is_reusable and runner.cached_length:
            ids = runner.ids[0, : runner.cached_length].cpu()
            self._loaded.prefix_cache.store(ids, runner.cache, runner.boundaries)
