"""Answers many conversations with one loaded model, decoded together where that is possible.

Every conversation gets the answer that `generation.generate` gives to it alone, with the same options
and the same seed. Rounding may differ: in float32 that is too small to matter, in 16 bits a token
that is almost as likely as another may be the other one. With a seed every sequence has random
numbers of its own, which start with that seed: equal prompts get equal answers. Without one they differ.

A conversation that cannot be answered (too long, an error of the template, not enough memory even
alone) ends with its error, before any forward pass where that is possible. All others are answered.
"""

from __future__ import annotations

from functools import partial

import torch

from llm_magic.backends.local import memory
from llm_magic.backends.local.batch.scheduler import NotBatchable, Scheduler
from llm_magic.backends.local.batch.sequence import BatchRequest, Sequence
from llm_magic.backends.local.generation import generate, parameters
from llm_magic.backends.local.generation.token_streamer import TokenStreamer
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled, process_lock
from llm_magic.errors import LLMMagicError, release_frames
from llm_magic.types import Chunk


def stream_many(loaded: LocalModel, request: BatchRequest) -> None:
    """Answer all conversations of a request; raises `Cancelled` soon after its flag is set."""
    with process_lock(request.cancel), torch.inference_mode():
        sequences = _encoded(loaded, request)
        together = len(sequences) > 1 and loaded.traits.can_batch
        if together:
            try:
                _scheduler(loaded, sequences, request).run()
                memory.release_memory(collect=False)
            except NotBatchable:
                together = False
    if not together:
        for sequence in sequences:
            _answer_alone(loaded, sequence, request)


def _encoded(loaded: LocalModel, request: BatchRequest) -> list[Sequence]:
    """Return a sequence for each conversation; emits the error of one that cannot be answered."""
    config, model = request.config, loaded.model
    sequences = []
    for index, messages in enumerate(request.conversations):
        if request.cancel.is_set():
            raise Cancelled
        try:
            ids = loaded.prompt_encoder.encode(messages)
            left = parameters.max_new_tokens_left(loaded, len(ids))
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            request.emit((index, release_frames(request.translate(error))))
            continue
        options = parameters.generate_options(model, config, left)
        sequence = Sequence(
            index,
            ids,
            options["max_new_tokens"],
            parameters.eos_token_ids(model, options),
            TokenStreamer(loaded, config, partial(_emit, request, index)),
            request.emit,
        )
        if config.seed is not None:
            sequence.generator = torch.Generator(model.device).manual_seed(config.seed)
        sequences.append(sequence)
    return sequences


def _scheduler(loaded: LocalModel, sequences: list[Sequence], request: BatchRequest) -> Scheduler:
    """Return the scheduler of the sequences, with the options as `generate` prepares them."""
    longest = max(sequences, key=lambda sequence: sequence.max_new_tokens)
    ids = torch.tensor([longest.ids], device=loaded.model.device)
    left = parameters.max_new_tokens_left(loaded, longest.prompt_tokens)
    options = parameters.generate_options(loaded.model, request.config, left)
    inputs = parameters.prepare(loaded.model, ids, options)
    return Scheduler(loaded, sequences, request, inputs)


def _answer_alone(loaded: LocalModel, sequence: Sequence, request: BatchRequest) -> None:
    messages = request.conversations[sequence.index]
    emit = partial(_emit, request, sequence.index)
    try:
        generate.stream(loaded, messages, request.config, request.cancel, emit)
        return
    except Exception as error:
        if not isinstance(error, LLMMagicError) and not memory.is_out_of_memory(error):
            raise
        problem = request.translate(error)
    sequence.fail(problem)


def _emit(request: BatchRequest, index: int, chunk: Chunk) -> None:
    request.emit((index, chunk))
