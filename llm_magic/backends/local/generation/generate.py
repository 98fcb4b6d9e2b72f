"""The decoding loop: prefill, then sample and decode until the answer ends; on the inference thread.

The public `generate` of Transformers prepares everything and answers by itself where this loop cannot.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers import GenerationConfig as TransformersConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation import parameters
from llm_magic.backends.local.generation.chat_template import encode
from llm_magic.backends.local.generation.cuda_graph import StaticStep, TokenReader
from llm_magic.backends.local.generation.model_runner import ModelRunner
from llm_magic.backends.local.generation.parameters import GenerateInputs
from llm_magic.backends.local.generation.prefix_cache import can_be_cropped
from llm_magic.backends.local.generation.reasoning_tokens import opening_tag
from llm_magic.backends.local.generation.speculative import (
    AssistantModel,
    DraftLengthController,
    PromptLookup,
)
from llm_magic.backends.local.generation.token_streamer import (
    GenerateStreamer,
    StopStringReached,
    TokenStreamer,
)
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled, process_lock
from llm_magic.config.settings import GenerationConfig
from llm_magic.types import Chunk, FinishReason, Message, Usage

# What one more token in a forward pass costs, as a share of a pass with one. A GPU reads the weights
# meanwhile, and has time to spare for the arithmetic.
_DRAFT_COST = {"cpu": 0.25, "mps": 0.1, "cuda": 0.03}


def stream(
    loaded: LocalModel,
    messages: Sequence[Message],
    config: GenerationConfig,
    cancel: threading.Event,
    emit: Callable[[Chunk], None],
) -> None:
    """Answer `messages` with one chunk a token; raises `Cancelled` soon after `cancel` is set."""
    with process_lock(cancel), torch.inference_mode():
        ids = encode(loaded, messages)
        prompt_tokens = ids.shape[1]
        left = parameters.max_new_tokens_left(loaded, prompt_tokens)
        emit(Chunk(text=opening_tag(loaded.tokenizer, ids), usage=Usage(prompt_tokens, 0, 0)))
        options = parameters.generate_options(loaded.model, config, left)
        stop_strings = parameters.stop_strings(loaded.model, config)
        streamer = TokenStreamer(loaded.tokenizer, stop_strings, emit)
        loop = DecodingLoop(loaded, streamer, cancel)
        with parameters.seeded(config.seed, loaded.model.device):
            loop.run(ids, options)
    streamer.finish(_finish_reason(loaded, streamer, options), prompt_tokens, loop.cached_tokens)


def _finish_reason(
    loaded: LocalModel, streamer: TokenStreamer, options: dict[str, Any]
) -> FinishReason:
    ends = parameters.eos_token_ids(loaded.model, options)
    if streamer.stop_reached or streamer.last_token in ends:
        return "stop"
    if streamer.token_count >= options["max_new_tokens"]:
        return "length"
    return "stop" if options.get("max_time") is None else "truncated"


class DecodingLoop:
    """Answers one prompt; `cached_tokens` is how many of its tokens an earlier prompt had."""

    def __init__(
        self, loaded: LocalModel, streamer: TokenStreamer, cancel: threading.Event
    ) -> None:
        self._loaded, self._streamer, self._cancel = loaded, streamer, cancel
        self.cached_tokens = 0

    def run(self, ids: torch.Tensor, options: dict[str, Any]) -> None:
        """Answer the prompt `ids` of shape (1, length)."""
        loaded = self._loaded
        if loaded.fallback_reason is None:
            inputs = parameters.prepare(loaded.model, ids, options)
            if compat.cache_in(inputs.model_inputs) is not None:
                self._decode(inputs)
                return
            loaded.fallback_reason = f"{type(loaded.model).__name__} has a state of its own kind"
        # `generate` comes from a mixin that the annotations of models do not show.
        generate: Any = loaded.model.generate
        streamer = GenerateStreamer(self._streamer, self._cancel)
        with contextlib.suppress(StopStringReached):
            generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options
            )

    def _decode(self, inputs: GenerateInputs) -> None:
        max_length: Any = inputs.config.max_length
        max_new_tokens = max_length - inputs.ids.shape[1]
        runner = ModelRunner(self._loaded.model, inputs.ids, inputs.model_inputs, max_new_tokens)
        sampler = Sampler(inputs.processors, do_sample=bool(inputs.config.do_sample))
        stop = StopCondition(inputs.criteria, inputs.config)
        try:
            logits = self._prefill(runner)
            if not self._append(runner, sampler(runner.ids, logits), stop):
                static_step = self._static_step(runner, inputs)
                if static_step is not None:
                    self._replay(runner, static_step, stop)
                else:
                    self._step(runner, sampler, stop)
        except Cancelled:
            # After any other error the cache may hold half a step.
            self._store_prefix(runner)
            raise
        self._store_prefix(runner)

    def _prefill(self, runner: ModelRunner) -> torch.Tensor:
        """Read the part of the prompt that no cached prefix has; returns the last logits."""
        loaded = self._loaded
        prompt = runner.ids[0].cpu()
        hit = loaded.prefix_cache.lookup(prompt) if self._is_reusable(runner) else None
        if hit is not None:
            runner.resume(hit)
            self.cached_tokens = hit.length
        logits = runner.prefill(loaded.prefill_chunk_size, self._cancel)
        if isinstance(runner.cache, DynamicCache) and not can_be_cropped(runner.cache):
            # The cache cannot be cropped to the prompt later, where the next turn may begin.
            cache = compat.fork(runner.cache)
            loaded.prefix_cache.store(prompt, cache, runner.boundaries)
        return logits

    def _append(self, runner: ModelRunner, token: int, stop: StopCondition) -> bool:
        """Append a token to the answer; returns whether the answer ends with it."""
        runner.append(token)
        if self._cancel.is_set():
            raise Cancelled
        self._streamer.append(token)
        return self._streamer.stop_reached or stop.is_met(token, runner)

    def _step(self, runner: ModelRunner, sampler: Sampler, stop: StopCondition) -> None:
        """Decode token by token, and several in one pass where a draft is accepted."""
        drafter = self._drafter(runner)
        tokens: list[int] = runner.ids[0].tolist()
        while True:
            limit = runner.max_new_tokens_left - 1
            draft = [] if drafter is None else drafter.propose(tokens, limit)
            logits = runner.decode(draft)
            for accepted in range(len(draft) + 1):
                token = sampler(runner.ids, logits[accepted : accepted + 1])
                tokens.append(token)
                if self._append(runner, token, stop):
                    return
                if accepted == len(draft) or token != draft[accepted]:
                    break
            if drafter is not None and draft:
                drafter.draft_length.update(len(draft), accepted)
                runner.remove_draft()

    def _static_step(self, runner: ModelRunner, inputs: GenerateInputs) -> StaticStep | None:
        """Return the step of fixed shape, where the model and the options allow one."""
        if not _is_plain(runner.cache) or self._loaded.assistant is not None:
            return None
        return self._loaded.static_decoder.step(
            runner.length,
            runner.max_new_tokens_left,
            inputs.processors,
            do_sample=bool(inputs.config.do_sample),
        )

    def _replay(self, runner: ModelRunner, step: StaticStep, stop: StopCondition) -> None:
        """Replay one step, and read each token while the next one is computed."""
        step.start(runner.cache, runner.ids)  # type: ignore[arg-type]
        reader = TokenReader(self._loaded.model.device)
        try:
            reader.send(step())
            while True:
                reader.send(step())
                if self._append(runner, reader.read(), stop):
                    return
        finally:
            # Also where the answer is cancelled: the next prompt can reuse it.
            runner.replace_cache(step.result(runner.length - 1))

    def _drafter(self, runner: ModelRunner) -> PromptLookup | AssistantModel | None:
        if not runner.can_draft():
            return None
        loaded = self._loaded
        cost = _DRAFT_COST.get(loaded.model.device.type, 0.25)
        if loaded.assistant is None:
            return PromptLookup(DraftLengthController(cost))
        cost += loaded.assistant.num_parameters() / loaded.model.num_parameters()
        return AssistantModel(
            loaded.assistant, DraftLengthController(cost), loaded.prefill_chunk_size, self._cancel
        )

    def _is_reusable(self, runner: ModelRunner) -> bool:
        """Return whether the cache of a text of this length can serve another prompt."""
        threshold = compat.longrope_threshold(self._loaded.model)
        return _is_plain(runner.cache) and (threshold is None or runner.length <= threshold)

    def _store_prefix(self, runner: ModelRunner) -> None:
        if self._is_reusable(runner) and runner.cached_length:
            runner.trim_cache()
            ids = runner.ids[0, : runner.cached_length].cpu()
            cache: Any = runner.cache
            self._loaded.prefix_cache.store(ids, cache, runner.boundaries)


class Sampler:
    """Chooses the next token as `generate` does."""

    def __init__(self, processors: LogitsProcessorList, *, do_sample: bool) -> None:
        self._processors, self._do_sample = processors, do_sample

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """Return the token that follows `ids` (1, length), by its logits (1, vocabulary)."""
        scores: Any = self._processors(ids, logits)  # type: ignore[arg-type]
        if self._do_sample:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(torch.argmax(scores, dim=-1))


class StopCondition:
    """Decides whether an answer ends, by the stopping criteria of `generate`."""

    def __init__(self, criteria: StoppingCriteriaList, config: TransformersConfig) -> None:
        self._eos_token_ids = parameters.token_ids(config.eos_token_id)
        # These two need no tensors; others (-p max_time) are called.
        usual = (EosTokenCriteria, MaxLengthCriteria)
        self._others = StoppingCriteriaList([c for c in criteria if not isinstance(c, usual)])

    def is_met(self, token: int, runner: ModelRunner) -> bool:
        """Return whether the answer ends with `token`, the last one of `runner`."""
        if token in self._eos_token_ids or runner.max_new_tokens_left == 0:
            return True
        return bool(self._others) and bool(self._others(runner.ids, None).all())


def _is_plain(cache: object) -> bool:
    """Return whether a cache is of the usual kind, which other prompts can start from."""
    return type(cache) is DynamicCache and not cache.offloading
