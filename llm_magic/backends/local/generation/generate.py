"""The decoding loop: prefill, then sample and decode until the answer ends; on the inference thread.

The public `generate` of Transformers prepares everything and answers by itself where this loop cannot.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation import parameters
from llm_magic.backends.local.generation.cuda_graph import StaticStep, TokenReader
from llm_magic.backends.local.generation.model_runner import ModelRunner
from llm_magic.backends.local.generation.parameters import GenerateInputs
from llm_magic.backends.local.generation.speculative import drafter
from llm_magic.backends.local.generation.token_streamer import (
    GenerateStreamer,
    StopStringReached,
    TokenStreamer,
    opening_tag,
)
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled, process_lock
from llm_magic.config.settings import GenerationConfig
from llm_magic.types import Chunk, FinishReason, Message, Usage


def stream(
    loaded: LocalModel,
    messages: Sequence[Message],
    config: GenerationConfig,
    cancel: threading.Event,
    emit: Callable[[Chunk], None],
) -> None:
    """Answer `messages` with one chunk a token; raises `Cancelled` soon after `cancel` is set."""
    model = loaded.model
    with process_lock(cancel), torch.inference_mode(), contextlib.ExitStack() as stack:
        prompt = loaded.prompt_encoder.encode(messages)
        left = parameters.max_new_tokens_left(loaded, len(prompt))
        tag = opening_tag(loaded.tokenizer, prompt)
        emit(Chunk(text=tag, usage=Usage(len(prompt), 0, 0)))
        options = parameters.generate_options(model, config, left)
        streamer = TokenStreamer(loaded, config, emit)
        if config.seed is not None:
            stack.enter_context(parameters.seeded(config.seed, model.device))
        ids = torch.tensor([prompt], device=model.device)
        cached_tokens = _answer(loaded, ids, options, streamer, cancel)
    streamer.finish(_finish_reason(loaded, streamer, options), len(prompt), cached_tokens)


def _answer(
    loaded: LocalModel,
    ids: torch.Tensor,
    options: dict[str, Any],
    streamer: TokenStreamer,
    cancel: threading.Event,
) -> int:
    """Answer the prompt `ids` (1, length); returns how many of its tokens an earlier prompt had."""
    if loaded.traits.fallback_reason is None:
        inputs = parameters.prepare(loaded.model, ids, options)
        if isinstance(inputs.arguments.get(loaded.traits.cache_name), Cache):
            return DecodingLoop(loaded, ids, inputs, streamer, cancel).run()
        reason = f"{type(loaded.model).__name__} keeps a custom state"
        loaded.traits = compat.ModelTraits(reason)
    # `generate` comes from a mixin that the annotations of models do not show.
    generate: Any = loaded.model.generate
    with contextlib.suppress(StopStringReached):
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=GenerateStreamer(streamer, cancel),
            **options,
        )
    return 0


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
    """Answers one prompt of shape (1, length)."""

    def __init__(
        self,
        loaded: LocalModel,
        ids: torch.Tensor,
        inputs: GenerateInputs,
        streamer: TokenStreamer,
        cancel: threading.Event,
    ) -> None:
        self._loaded, self._inputs = loaded, inputs
        self._streamer, self._cancel = streamer, cancel
        name = loaded.traits.cache_name
        self._runner = ModelRunner(loaded.model, name, ids, inputs.arguments, inputs.max_new_tokens)
        cache = self._runner.cache
        # Only the usual kind of cache can serve other prompts, and those of fixed shape.
        self._is_plain = type(cache) is DynamicCache and not cache.offloading

    def run(self) -> int:
        """Answer the prompt; returns how many of its tokens an earlier prompt had."""
        try:
            cached_tokens, logits = self._prefill()
            if not self._append(self._sample(logits)):
                self._decode()
        except Cancelled:
            # After any other error the cache may hold half a step.
            self._store_prefix()
            raise
        self._store_prefix()
        return cached_tokens

    def _prefill(self) -> tuple[int, torch.Tensor]:
        """Read the part of the prompt that no cached prefix has; returns its length and the logits."""
        loaded, runner = self._loaded, self._runner
        is_reusable = self._is_plain and runner.length <= loaded.traits.longest_reuse
        prompt = runner.ids[0].cpu()
        hit = loaded.prefix_cache.lookup(prompt) if is_reusable else None
        if hit is not None:
            runner.resume(hit)
        cached_tokens = runner.cached_length
        unread = runner.length - cached_tokens
        if unread > loaded.prefill_chunk_size.tokens:
            self._streamer.report_prefill(0, unread)
        while (logits := runner.prefill_chunk(loaded.prefill_chunk_size, self._cancel)) is None:
            self._streamer.report_prefill(runner.cached_length - cached_tokens, unread)
        if is_reusable and not compat.can_be_cropped(runner.cache):
            # The cache cannot be cropped to the prompt later, where the next turn may begin.
            loaded.prefix_cache.store(prompt, compat.fork(runner.cache), runner.boundaries)
        return cached_tokens, logits

    def _sample(self, logits: torch.Tensor) -> int:
        """Return the next token by its logits (1, vocabulary), as `generate` chooses it."""
        process: Any = self._inputs.processors
        scores: torch.Tensor = process(self._runner.ids, logits)
        if self._inputs.do_sample:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(torch.argmax(scores, dim=-1))

    def _append(self, token: int) -> bool:
        """Append a token to the answer; returns whether the answer ends with it."""
        runner, streamer, inputs = self._runner, self._streamer, self._inputs
        runner.append(token)
        if self._cancel.is_set():
            raise Cancelled
        streamer.append(token)
        if streamer.stop_reached or token in inputs.eos_token_ids:
            return True
        if streamer.token_count >= inputs.max_new_tokens:
            return True
        ids: Any = runner.ids
        return bool(inputs.criteria) and bool(inputs.criteria(ids, None).all())

    def _decode(self) -> None:
        """Decode in steps of fixed shape where the model and the options allow it, else freely."""
        decoder, inputs = self._loaded.static_decoder, self._inputs
        left = inputs.max_new_tokens - 1
        if self._is_plain and decoder.unavailable_reason is None and self._loaded.assistant is None:
            step = decoder.step(
                self._runner.length, left, inputs.processors, do_sample=inputs.do_sample
            )
            if step is not None:
                self._replay(step)
                return
        self._step()

    def _step(self) -> None:
        """Decode token by token, and several in one pass where a draft is accepted."""
        runner = self._runner
        proposer = None
        if isinstance(runner.cache, DynamicCache) and compat.can_roll_back(runner.cache):
            proposer = drafter(self._loaded, self._cancel)
        tokens: list[int] = runner.ids[0].tolist()
        while True:
            limit = self._inputs.max_new_tokens - self._streamer.token_count - 1
            draft = [] if proposer is None else proposer.propose(tokens, limit)
            logits = runner.decode(draft)
            for accepted in range(len(draft) + 1):
                token = self._sample(logits[accepted : accepted + 1])
                tokens.append(token)
                if self._append(token):
                    return
                if accepted == len(draft) or token != draft[accepted]:
                    break
            if proposer is not None and draft:
                proposer.draft_length.update(len(draft), accepted)
                runner.crop(runner.length - 1)

    def _replay(self, step: StaticStep) -> None:
        """Replay one step, and read each token while the next one is computed."""
        runner = self._runner
        step.start(runner.cache, runner.ids)
        reader = TokenReader(self._loaded.model.device)
        try:
            reader.send(step())
            while True:
                reader.send(step())
                if self._append(reader.read()):
                    return
        finally:
            # Also where the answer is cancelled: the next prompt can reuse it.
            runner.replace_cache(step.result(runner.length - 1))

    def _store_prefix(self) -> None:
        """Store the cache for the prompts that start with this one."""
        runner = self._runner
        runner.trim_cache()
        is_reusable = self._is_plain and runner.length <= self._loaded.traits.longest_reuse
        if is_reusable and runner.cached_length:
            ids = runner.ids[0, : runner.cached_length].cpu()
            self._loaded.prefix_cache.store(ids, runner.cache, runner.boundaries)
