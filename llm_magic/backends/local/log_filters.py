"""Hides log records and a warning of libraries that a user of a notebook cannot act on."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from typing import cast

# How the names of the threads of this package begin.
_THREAD_PREFIX = "llm_magic-"

# By logger: texts of the records to hide.
_HIDDEN: Mapping[str, tuple[str, ...]] = {
    # Missing weights raise `LoadFailed`. Superfluous weights have no effect.
    "transformers.modeling_utils": ("LOAD REPORT",),
    # An unknown model type raises `LoadFailed`.
    "transformers.configuration_utils": ("You are using a model of type",),
    # A tokenizer that needs another package raises `MissingDependency`.
    "transformers.tokenization_utils_tokenizers": ("Could not extract SentencePiece model",),
    # Contradictions within a model's own settings: the options of a request replace them.
    "transformers.generation.configuration_utils": ("generation flags are not valid",),
    # A model without usable files raises `LoadFailed`.
    "huggingface_hub._snapshot_download": ("No files matched",),
    # Another kernel is used instead. The record advises a download of code from the hub.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # Logged for each matrix of each token.
    "bitsandbytes.autograd._functions": ("MatMul8bitLt: inputs will be cast",),
}
# tqdm warns in a kernel without ipywidgets. This package displays progress itself.
_HIDDEN_WARNING = "IProgress not found"


class _Filter(logging.Filter):
    """Drops the hidden records of this package's threads, not those of the user's own calls."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not (record.threadName or "").startswith(_THREAD_PREFIX):
            return True
        message = record.getMessage()
        return not any(text in message for text in _HIDDEN[record.name])


_FILTER = _Filter()
_LOCK = threading.Lock()
_users = 0
_warning_filters: list[object] = []


def install() -> None:
    """Hide the records and the warning, until `remove` has been called as often."""
    global _users
    with _LOCK:
        _users += 1
        if _users > 1:
            return
        before = list(warnings.filters)
        warnings.filterwarnings("ignore", message=_HIDDEN_WARNING)
        _warning_filters[:] = [entry for entry in warnings.filters if entry not in before]
        for name in _HIDDEN:
            logging.getLogger(name).addFilter(_FILTER)


def remove() -> None:
    """Undo one call of `install`."""
    global _users
    with _LOCK:
        _users -= 1
        if _users > 0:
            return
        for name in _HIDDEN:
            logging.getLogger(name).removeFilter(_FILTER)
        # A list, though its stub declares a sequence.
        filters = cast("list[object]", warnings.filters)
        filters[:] = [entry for entry in filters if entry not in _warning_filters]
