"""Continuous batching by Transformers: pages of keys and values instead of padding.

With FlashAttention on a CUDA device its graphs and its overlap of host and device are meant to beat
steps of padded rows. Not measured by us on a GPU yet; on a CPU padded rows are faster, and there it is
only tested. Of what changes the scores it knows temperature, top-k and top-p, and its random numbers
depend on the neighbours: everything else is for `batches.Batch`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import import_utils

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.batch.sequence import Ending, Row
from llm_magic.backends.local.worker import Cancelled

_PAGE = 64
_POLL_S = 0.05


def flash_attention(model: PreTrainedModel) -> str | None:
    """Return the installed kind of FlashAttention that this model can use, if any."""
    halves = (torch.float16, torch.bfloat16)
    if model.device.type != "cuda" or model.dtype not in halves:
        return None
    if not compat.supports_flash_attention(model):
        return None
    if import_utils.is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if import_utils.is_flash_attn_2_available() else None


def understands(processors: Sequence[Any], rows: Sequence[Row]) -> bool:
    """Whether these rows get there what they were promised."""
    seeded = any(row.generator is not None for row in rows)
    known = all(getattr(p, "supports_continuous_batching", None) is True for p in processors)
    return known and not seeded and compat.continuous_config(_PAGE, 1) is not None


def answer(
    model: PreTrainedModel,
    rows: Sequence[Row],
    settings: Any,
    ending: Ending,
    tokens: int,
    cancel: Event,
) -> None:
    """Answer all rows, with room for so many tokens; raises `Cancelled` soon after the flag.

    None of them has an answer yet. A failure leaves every row where it is, so that others can go on.
    """
    most = max(row.longest for row in rows)
    needed = min(tokens, sum(row.longest for row in rows))
    blocks = math.ceil(max(needed, most) / _PAGE) + len(rows)
    config = compat.continuous_config(_PAGE, blocks)
    assert config is not None
    by_id = {str(row.index): row for row in rows}
    with _manager(model, settings, config) as manager:
        for name, row in by_id.items():
            row.begin(ending)
            manager.add_request(
                row.ids,
                request_id=name,
                max_new_tokens=row.limit - row.count,
                streaming=True,
                eos_token_id=sorted(ending.tokens) or -1,
            )
        while not all(row.over for row in rows):
            if cancel.is_set():
                raise Cancelled
            output = manager.get_result(timeout=_POLL_S)
            if output is not None:
                _take(manager, by_id[output.request_id], output, ending)
            elif not manager.is_running():
                raise RuntimeError("continuous batching ended before the answers")


def _take(manager: Any, row: Row, output: Any, ending: Ending) -> None:
    if output.error is not None and not row.over:
        raise RuntimeError(output.error)
    now = time.perf_counter()
    for token in output.generated_tokens[row.count :]:
        if row.over:
            return
        row.take(token, now, ending)
    if row.over and not output.is_finished():
        manager.cancel_request(output.request_id)


@contextlib.contextmanager
def _manager(model: PreTrainedModel, settings: Any, config: Any) -> Iterator[Any]:
    able: Any = model
    before, flash = compat.attention(model), flash_attention(model)
    log = logging.getLogger("ContinuousBatchingLogger")
    level = log.level
    # It logs what it does, and the traceback of what it also hands over as an error.
    log.setLevel(logging.CRITICAL)
    try:
        if flash is not None:
            able.set_attn_implementation(flash)
        if settings.eos_token_id is None:
            settings.eos_token_id = -1
        manager = able.init_continuous_batching(settings, config)
        if model.device.type == "cuda":
            manager.warmup()
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()
    finally:
        if compat.attention(model) != before:
            able.set_attn_implementation(before)
        log.setLevel(level)
