"""A prompt and its answer so far, decoded alone or together with others."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from llm_magic.backends.local.generation import parameters
from llm_magic.backends.local.generation.choice import Labels
from llm_magic.backends.local.generation.constraint import Constraint
from llm_magic.backends.local.generation.distribution import Distribution, TokenScores
from llm_magic.backends.local.generation.parameters import GenerateInputs
from llm_magic.backends.local.generation.token_streamer import TokenStreamer, opening_tag
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Job
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import PromptTooLong
from llm_magic.types import Chunk, FinishReason, Message, Structure, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class Request:
    """The conversation that a job answers, and the options."""

    messages: abc.Sequence[Message]
    config: GenerationConfig


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and its answer so far, of at most `options["max_new_tokens"]`.

    `ids` includes the answer, so that a preempted sequence can be read again. `cache` holds a part of
    the prompt or all but the last token, `generator` has the random numbers of a seed; both are None
    for a sequence that is decoded alone. `constraint` holds the answer to its structure; `labels` are
    those of an answer that is chosen, `in_reasoning` is whether the prompt has opened its reasoning.
    `finished` is set once the answer has ended, also by an error.
    """

    job: Job[None]
    ids: list[int]
    options: dict[str, Any]
    streamer: TokenStreamer
    eos_token_ids: frozenset[int]
    prompt_tokens: int
    inputs: GenerateInputs | None = None
    cache: DynamicCache | None = None
    cached_tokens: int = 0
    generator: torch.Generator | None = None
    constraint: Constraint | None = None
    labels: Labels | None = None
    in_reasoning: bool = False
    finished: bool = False
    deadline: float = field(init=False, default=float("inf"))

    @classmethod
    def start(cls, loaded: LocalModel, job: Job[None]) -> Sequence:
        """Return the sequence of a job, and emit the length of the prompt.

        Raises the error of a chat template, and that of a prompt which is too long.
        """
        request: Request = job.request
        ids = loaded.prompt_encoder.encode(request.messages)
        left = parameters.max_new_tokens_left(loaded, len(ids))
        tag = opening_tag(loaded.tokenizer, ids)
        job.emit(Chunk(text=tag, usage=Usage(len(ids), 0, 0)))
        options = parameters.generate_options(loaded.model, request.config, left)
        streamer = TokenStreamer(loaded, request.config, job.emit)
        ends = parameters.eos_token_ids(loaded.model, options)
        sequence = cls(job, ids, options, streamer, ends, len(ids))
        sequence._set_structure(loaded, request.config.structure, in_reasoning=bool(tag))
        return sequence

    def _set_structure(
        self, loaded: LocalModel, structure: Structure | None, *, in_reasoning: bool
    ) -> None:
        """Set what holds the answer to its structure. A label is chosen after any reasoning."""
        if structure is None:
            return
        grammars = loaded.grammars
        if structure.kind != "choice":
            self.constraint = grammars.constraint(structure, in_reasoning=in_reasoning)
            return
        self.constraint = grammars.reasoning(in_reasoning=in_reasoning)
        self.in_reasoning = in_reasoning
        self.labels = Labels.encode(structure.labels, loaded.tokenizer)
        self.check_length(loaded, max(map(len, self.labels.tokens)))

    def check_length(self, loaded: LocalModel, tokens: int) -> None:
        """Raise `PromptTooLong` if the context has no space for the prompt and so many tokens after it."""
        context, needed = loaded.info.context_length, self.prompt_tokens + tokens
        if context is not None and needed > context:
            raise PromptTooLong.measured(loaded.info.name, needed, context)

    @property
    def seed(self) -> int | None:
        """The seed of the request."""
        config: GenerationConfig = self.job.request.config
        return config.seed

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens are reported for each token; None if nothing is."""
        config: GenerationConfig = self.job.request.config
        return config.logprobs

    @property
    def max_length(self) -> int:
        """The tokens that prompt and answer may have together."""
        return self.prompt_tokens + int(self.options["max_new_tokens"])

    def start_clock(self) -> None:
        """Start the time limit, if there is one, unless it has started."""
        assert self.inputs is not None
        if self.deadline == float("inf"):
            limits = (criterion.max_time for criterion in self.inputs.criteria)
            self.deadline = time.perf_counter() + min(limits, default=float("inf"))

    def append(self, token: int, scores: TokenScores | None = None) -> None:
        """Append the next token of the answer and emit it; finishes the answer with the last one."""
        self.ids.append(token)
        now = self.streamer.append(token, scores)
        if self.follow(token):
            self.finish(self.end_reason)
        elif self.streamer.token_count >= self.options["max_new_tokens"]:
            self.finish("length")
        elif now >= self.deadline:
            self.finish("truncated")

    def follow(self, token: int) -> bool:
        """Note that `token` was emitted; returns whether the answer has ended, limits aside."""
        if self.constraint is not None:
            self.constraint.append(token)
        return self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether the answer has ended by itself: with its last token, a stop text, or a whole structure."""
        streamer, constraint = self.streamer, self.constraint
        if streamer.stop_reached or streamer.last_token in self.eos_token_ids:
            return True
        return constraint is not None and constraint.is_over

    @property
    def end_reason(self) -> FinishReason:
        """Why an answer that `has_ended` did: a stop text may come before it has its structure."""
        is_cut = self.constraint is not None and not self.constraint.is_complete
        return "truncated" if is_cut else "stop"

    def choose(
        self, labels: Labels, first: torch.Tensor, others: abc.Sequence[torch.Tensor]
    ) -> None:
        """Answer with the likeliest label, by the logits that `Labels.probabilities` takes."""
        probabilities = labels.probabilities(first, others)
        ranked = sorted(zip(labels.texts, probabilities, strict=True), key=lambda pair: -pair[1])
        text, now = ranked[0][0], time.perf_counter()
        number = labels.texts.index(text)
        tokens = labels.tokens[number]
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.alternatives is not None:
            rows = torch.cat([first[None], others[number]])[: len(tokens)]
            scores = Distribution(rows, self.alternatives).scores(tokens)
            logprobs = self.streamer.texts.of_text(tokens, scores)
        self.job.emit(Chunk(text=text, tokens=len(tokens), time=now, logprobs=logprobs))
        count = self.streamer.token_count + len(tokens)
        usage = Usage(self.prompt_tokens, count, self.cached_tokens)
        self.job.emit(
            Chunk(finish_reason="stop", usage=usage, time=now, probabilities=tuple(ranked))
        )
        self.finished = True
        self.job.finish(None)

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        self.finished = True
        self.streamer.finish(reason, self.prompt_tokens, self.cached_tokens)
        self.job.finish(None)

    def fail(self, error: BaseException) -> None:
        """End the answer with an error; other sequences go on."""
        self.finished = True
        self.job.fail(error)


def common_prefix_length(sequences: abc.Sequence[Sequence]) -> int:
    """Return how many tokens all sequences start with; at least the last of each is its own."""
    longest = min(len(sequence.ids) for sequence in sequences) - 1
    return min(common_length([sequence.ids for sequence in sequences]), longest)


def common_length(texts: abc.Sequence[list[int]]) -> int:
    """Return how many tokens all texts start with."""
    low, high, longest = min(texts), max(texts), min(map(len, texts))
    return next((n for n in range(longest) if low[n] != high[n]), longest)
