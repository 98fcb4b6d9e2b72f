"""The decoding loop: prefill, choose, feed, with kept prefixes and drafts; on the inference thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import GenerationConfig as TransformersConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.chat_template import encode, room
from llm_magic.backends.local.generation.cuda_graph import LateReader, StaticStep
from llm_magic.backends.local.generation.kv_cache import Steps
from llm_magic.backends.local.generation.parameters import end_ids, generate_options, seeded
from llm_magic.backends.local.generation.prefix_cache import can_be_cut, short_length
from llm_magic.backends.local.generation.reasoning_tokens import begun
from llm_magic.backends.local.generation.speculative import (
    Assistant,
    Confidence,
    Drafter,
    NoDrafts,
    PromptLookup,
)
from llm_magic.backends.local.generation.streamer import Emit, Emitter, Stopped
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled, process_lock
from llm_magic.config.settings import GenerationConfig
from llm_magic.types import Chunk, Message, Usage

# What one more token in a forward pass costs, as a share of the pass with one: a GPU reads
# the weights, and has time to spare for the arithmetic.
_DRAFT_COST = {"cpu": 0.25, "mps": 0.1, "cuda": 0.03}


def stream(
    loaded: LocalModel,
    messages: Sequence[Message],
    config: GenerationConfig,
    cancel: threading.Event,
    emit: Emit,
) -> None:
    """Answer `messages`, one chunk a token; raises `Cancelled` soon after the flag is set."""
    with process_lock(cancel), torch.inference_mode():
        ids = encode(loaded, messages)
        prompt_tokens = ids.shape[1]
        left = room(loaded, prompt_tokens)
        emit(Chunk(text=begun(loaded.tokenizer, ids), usage=Usage(prompt_tokens, 0, 0)))
        options = generate_options(loaded.model, config, left)
        stop = (*config.stop, *(loaded.model.generation_config.stop_strings or ()))
        emitter = Emitter(loaded, stop, cancel, emit)
        loop = _Loop(loaded, emitter, cancel)
        with seeded(config.seed, loaded.model.device), contextlib.suppress(Stopped):
            loop.answer(ids, options)
    emitter.finish(prompt_tokens, options, loop.reused)


class _NoCache(Exception):
    """Raised inside `generate`, before the first step, where it has made no cache to work with."""


class _Loop:
    """One answer; its `decode` replaces the loop of ``generate`` where that is possible."""

    def __init__(self, loaded: LocalModel, emitter: Emitter, cancel: threading.Event) -> None:
        self._loaded, self._emitter, self._cancel = loaded, emitter, cancel
        self._short = short_length(loaded.model)
        self.reused = 0

    def answer(self, ids: torch.Tensor, options: dict[str, Any]) -> None:
        """Answer a prompt of shape (1, length)."""
        loaded = self._loaded
        # `generate` comes from a mixin that the annotations of models do not show. It prepares
        # everything, and then calls the loop that it is given.
        generate: Any = loaded.model.generate
        generate = partial(generate, input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        if loaded.fallback_reason is None:
            try:
                generate(custom_generate=self.decode)
                return
            except _NoCache:
                loaded.fallback_reason = (
                    f"{type(loaded.model).__name__} has a state of its own kind"
                )
        generate(streamer=self._emitter)

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: TransformersConfig,
        **arguments: Any,
    ) -> torch.Tensor:
        """Answer with one sequence; returns all ids of shape (1, length)."""
        if compat.cache_in(arguments) is None:
            raise _NoCache
        limit: Any = generation_config.max_length
        steps = Steps(model, input_ids, arguments, limit - input_ids.shape[1])
        choice = Choice(logits_processor, sampling=bool(generation_config.do_sample))
        ends = Ends(stopping_criteria, generation_config)
        with self._kept(steps):
            logits = self._read(steps)
            if self._put(steps, choice(steps.ids, logits), ends):
                return steps.ids
            static = self._static(steps, logits_processor, choice.sampling)
            if static is not None:
                self._replay(steps, static, ends)
            else:
                self._step(steps, choice, ends)
        return steps.ids

    def _read(self, steps: Steps) -> torch.Tensor:
        """Read the prompt, but for the part that is known from an earlier one."""
        prompt = steps.ids[0].cpu()
        taken = self._loaded.prefixes.take(prompt) if self._keeps(steps) else None
        if taken is not None:
            steps.go_on_from(taken)
            self.reused = taken.length
        logits = steps.read(self._loaded.pace, self._cancel)
        if isinstance(steps.cache, DynamicCache) and not can_be_cut(steps.cache):
            # It cannot be cut back to here later, where the next turn may well begin.
            self._loaded.prefixes.keep(prompt, compat.fork(steps.cache), steps.cuts)
        return logits

    def _put(self, steps: Steps, token: int, ends: Ends) -> bool:
        """Add a token to the answer; returns whether it was the last."""
        steps.add(token)
        self._emitter.token(token)
        return ends(token, steps)

    def _step(self, steps: Steps, choice: Choice, ends: Ends) -> None:
        """Feed and choose, a token at a time, or several where a draft was right."""
        drafter = self._drafter(steps)
        tokens: list[int] = steps.ids[0].tolist()
        while True:
            draft = drafter.propose(tokens, steps.room - 1)
            logits = steps.advance(draft)
            accepted = 0
            for position in range(len(draft) + 1):
                token = choice(steps.ids, logits[position : position + 1])
                tokens.append(token)
                if self._put(steps, token, ends):
                    return
                if position == len(draft) or token != draft[position]:
                    break
                accepted += 1
            if draft:
                drafter.learn(len(draft), accepted)
                steps.forget_draft()

    def _static(
        self, steps: Steps, processors: LogitsProcessorList, sampling: bool
    ) -> StaticStep | None:
        """Return the step of fixed shape, where this model and these options have one."""
        fast = self._loaded.fast
        if not _is_plain(steps.cache) or self._loaded.assistant is not None:
            return None
        return fast.step(steps.length, steps.room, processors, sampling=sampling)

    def _replay(self, steps: Steps, static: StaticStep, ends: Ends) -> None:
        """Repeat one step, reading each token while the next one is made."""
        static.begin(steps.cache, steps.ids)  # type: ignore[arg-type]
        reader = LateReader(self._loaded.model.device)
        try:
            reader.send(static())
            while True:
                reader.send(static())
                if self._put(steps, reader.read(), ends):
                    return
        finally:
            # Also where it is left early: what was said is known to the next question.
            steps.take_over(static.result(steps.length - 1))

    def _drafter(self, steps: Steps) -> Drafter:
        if not steps.can_draft():
            return NoDrafts()
        loaded = self._loaded
        cost = _DRAFT_COST.get(loaded.model.device.type, 0.25)
        if loaded.assistant is None:
            return PromptLookup(Confidence(cost))
        cost += loaded.assistant.num_parameters() / loaded.model.num_parameters()
        return Assistant(loaded.assistant, Confidence(cost), loaded.pace, self._cancel)

    @contextlib.contextmanager
    def _kept(self, steps: Steps) -> Any:
        """Keep the cache for the next question, also of an answer that was stopped.

        After any other error it may hold half a step.
        """
        try:
            yield
        except (Cancelled, Stopped):
            self._keep(steps)
            raise
        self._keep(steps)

    def _keeps(self, steps: Steps) -> bool:
        """Return whether a cache of this kind, of a text of this length, may be gone on with."""
        short = self._short
        return _is_plain(steps.cache) and (short is None or steps.length <= short)

    def _keep(self, steps: Steps) -> None:
        if self._keeps(steps) and steps.fed:
            steps.settle()
            fed = steps.ids[0, : steps.fed].cpu()
            self._loaded.prefixes.keep(fed, steps.cache, steps.cuts)  # type: ignore[arg-type]


class Choice:
    """Chooses the next token as ``generate`` does."""

    def __init__(self, processors: LogitsProcessorList, *, sampling: bool) -> None:
        self._processors, self.sampling = processors, sampling

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """Return the token that follows `ids` (1, length), by its logits (1, vocabulary)."""
        scores: Any = self._processors(ids, logits)  # type: ignore[arg-type]
        if self.sampling:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(torch.argmax(scores, dim=-1))


class Ends:
    """Whether a token was the last one."""

    def __init__(self, criteria: StoppingCriteriaList, config: TransformersConfig) -> None:
        self._ids = end_ids(config)
        # These two need no tensors; others (-p max_time) are asked.
        usual = (EosTokenCriteria, MaxLengthCriteria)
        self._others = StoppingCriteriaList([c for c in criteria if not isinstance(c, usual)])

    def __call__(self, token: int, steps: Steps) -> bool:
        """Return whether the answer ends with `token`, the last of `steps`."""
        if token in self._ids or steps.room == 0:
            return True
        return bool(self._others) and bool(self._others(steps.ids, None).all())


def _is_plain(cache: object) -> bool:
    """Whether a cache is of the usual kind, that can be kept and gone on with."""
    return type(cache) is DynamicCache and not cache.offloading
