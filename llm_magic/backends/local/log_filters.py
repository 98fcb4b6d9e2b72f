"""Keeps out of the cell what libraries log and nobody at a notebook can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

# What the names of this package's threads begin with.
_THREADS = "llm_magic-"

# By logger, the words a record is known by, and why nobody misses it.
_NOISE: Mapping[str, tuple[str, ...]] = {
    # Missing weights are an error of ours, superfluous ones change nothing.
    "transformers.modeling_utils": ("LOAD REPORT",),
    # An unknown type of model is an error of ours.
    "transformers.configuration_utils": ("You are using a model of type",),
    # A tokenizer that needs another package is an error of ours.
    "transformers.tokenization_utils_tokenizers": ("Could not extract SentencePiece model",),
    # A model's own generation settings that contradict each other: a call's options replace them.
    "transformers.generation.configuration_utils": ("generation flags are not valid",),
    # A model without usable files is an error of ours.
    "huggingface_hub._snapshot_download": ("No files matched",),
    # There is a kernel without this one; the download it proposes would be code from the hub.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # Once for each matrix of each token.
    "bitsandbytes.autograd._functions": ("MatMul8bitLt: inputs will be cast",),
}


class _Filter(logging.Filter):
    """Drops known noise of this package's threads; what users call themselves still tells them."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not (record.threadName or "").startswith(_THREADS):
            return True
        message = record.getMessage()
        return not any(words in message for words in _NOISE[record.name])


_FILTER = _Filter()


def keep_quiet() -> None:
    """Drop known noise from now on; calling it again changes nothing."""
    # tqdm says so when it is imported in a kernel without ipywidgets; progress is shown by us.
    warnings.filterwarnings("ignore", message="IProgress not found")
    for name in _NOISE:
        logging.getLogger(name).addFilter(_FILTER)
