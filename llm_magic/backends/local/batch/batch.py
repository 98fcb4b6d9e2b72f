"""Many conversations through one resident model: rows decoded together, refilled as they finish.

What is promised: every conversation gets the answer that it would get alone, from `decoding.stream`
with the same options and the same seed, whatever its neighbours are. Rounding may differ: in float32
that is too small to see, in 16 bits a token that is almost as likely as another may be the
other one. With a seed every row has random numbers of its own, which begin with that seed: equal
prompts get equal answers. Without one they differ.

A conversation that cannot be answered (too long, refused by the template, no memory even alone)
ends with its error as its last item, before any model step where that can be known; all others are
answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from llm_magic.backends.local import memory
from llm_magic.backends.local.batch.padded_batch import takes_rows
from llm_magic.backends.local.batch.scheduler import Batch, OneByOne
from llm_magic.backends.local.batch.sequence import Job, Row
from llm_magic.backends.local.generation import generate
from llm_magic.backends.local.generation.chat_template import encode, room
from llm_magic.backends.local.generation.detokenizer import Detokenizer
from llm_magic.backends.local.generation.parameters import generate_options
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Cancelled, process_lock
from llm_magic.backends.stop_strings import StopText
from llm_magic.errors import LLMMagicError, release_frames


def stream_many(loaded: LocalModel, job: Job) -> None:
    """Answer all of them, the chunks of each in order; raises `Cancelled` soon after the flag."""
    with process_lock(job.cancel), torch.inference_mode():
        rows = _prepared(loaded, job)
        together = len(rows) > 1 and takes_rows(loaded.model)
        if together:
            try:
                _decode(loaded, rows, job)
                # Not after a stop: collecting takes longer than a step, and somebody waits for it.
                memory.release_memory()
            except OneByOne:
                together = False
    if not together:
        for row in rows:
            _alone(loaded, row, job)


def _alone(loaded: LocalModel, row: Row, job: Job) -> None:
    messages = job.conversations[row.index]
    try:
        generate.stream(
            loaded, messages, job.config, job.cancel, lambda chunk: row.emit((row.index, chunk))
        )
        return
    except Exception as error:
        if not isinstance(error, LLMMagicError) and not memory.is_out_of_memory(error):
            raise
        problem = job.translate(error)
    row.fail(problem)


def _prepared(loaded: LocalModel, job: Job) -> list[Row]:
    """Tokenize everything; what cannot be asked ends here, before the work begins."""
    config = job.config
    stop = (*config.stop, *(loaded.model.generation_config.stop_strings or ()))
    rows = []
    for index, messages in enumerate(job.conversations):
        if job.cancel.is_set():
            raise Cancelled
        try:
            ids = encode(loaded, messages)[0].tolist()
            left = room(loaded, len(ids))
        except Exception as error:  # noqa: BLE001 - a template raises what it likes, for its own row
            job.emit((index, release_frames(job.translate(error))))
            continue
        limit = generate_options(loaded.model, config, left)["max_new_tokens"]
        text = Detokenizer(loaded.tokenizer)
        rows.append(Row(index, ids, limit, text, StopText(stop), job.emit))
        if config.seed is not None:
            generator = torch.Generator(loaded.model.device)
            rows[-1].generator = generator.manual_seed(config.seed)
    return rows


def _decode(loaded: LocalModel, rows: Sequence[Row], job: Job) -> None:
    """Let `generate` make of the options what it does, and decode with that."""
    longest = max(rows, key=lambda row: row.limit)
    ids = torch.tensor([longest.ids], device=loaded.model.device)

    def decode(
        _model: object,
        _ids: torch.Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **inputs: Any,
    ) -> torch.Tensor:
        batch = Batch(loaded, rows, job)
        batch.use(logits_processor, stopping_criteria, generation_config, inputs)
        batch.run()
        return ids

    left = room(loaded, longest.prompt_tokens)
    # `generate` comes from a mixin that the annotations of models do not show.
    generate: Any = loaded.model.generate
    generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=decode,
        **generate_options(loaded.model, job.config, left),
    )
