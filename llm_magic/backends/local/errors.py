"""Errors of torch and Transformers, translated into those of this package."""

from __future__ import annotations

import traceback

from llm_magic.backends.local import memory
from llm_magic.config.commands import command, option
from llm_magic.errors import (
    GenerationFailed,
    LLMMagicError,
    LoadFailed,
    MissingDependency,
    OutOfMemory,
)
from llm_magic.text import human_bytes

_LONGEST_LINE = 300
# By a part of the text of an error that Transformers raises during a load.
_TRANSFORMERS_ERRORS: dict[str, tuple[type[LLMMagicError], str]] = {
    "trust_remote_code": (
        LoadFailed,
        "{name} contains its own Python code. If you trust it, add --trust-remote-code.",
    ),
    "`tiktoken` is required": (
        MissingDependency,
        "{name} has no tokenizer.json, and converting its tokenizer needs another package."
        " Run: pip install sentencepiece tiktoken",
    ),
    "backend tokenizer": (
        LoadFailed,
        "{name} has no readable tokenizer. Get its tokenizer.json and load again.",
    ),
    "ignore_mismatched_sizes": (
        LoadFailed,
        "The weights of {name} do not match its config.json. Choose a model whose files belong"
        " together.",
    ),
}


def explain_load(name: str, error: BaseException) -> LLMMagicError:
    """Return the error for what ended a load, a download or a conversion."""
    if isinstance(error, LLMMagicError):
        return error
    # As text: frames would keep tensors in memory.
    details = "".join(traceback.format_exception(error))
    if memory.is_out_of_memory(error):
        return OutOfMemory(
            f"Memory ran out while {name} was being loaded.", details=details
        ).advise(
            f"Try {option('quantization', '4bit')}, a smaller model, or {command('unload')} first."
        )
    line = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return MissingDependency(
            f"{name} could not be loaded: {line.rstrip('.')}.", details=details
        )
    line, text = line[:_LONGEST_LINE], str(error)
    if type(error).__name__ == "SafetensorError":
        return LoadFailed(
            f"The weights of {name} are damaged ({line}). Delete them and load again.",
            details=details,
        )
    for part, (kind, message) in _TRANSFORMERS_ERRORS.items():
        if part in text:
            return kind(message.format(name=name), details=details)
    return LoadFailed(
        f"{name} could not be loaded: {type(error).__name__}: {line}", details=details
    )


def explain_generation(name: str, device: str, error: BaseException) -> LLMMagicError:
    """Return the error for what ended an answer."""
    if isinstance(error, LLMMagicError):
        return error
    details = "".join(traceback.format_exception(error))
    if memory.is_out_of_memory(error):
        # torch caches the memory of the failed step.
        memory.release_memory()
        first_device = device.partition("+")[0]
        return OutOfMemory(
            f"{first_device} ran out of memory while {name} was answering;"
            f" {human_bytes(memory.free_bytes(first_device))} is free now. {name} is still loaded.",
            details=details,
        ).advise(
            f"Try a shorter prompt, a lower {option('max_new_tokens')}, or load it with"
            f" {option('quantization', '4bit')}."
        )
    first = str(error).strip().partition("\n")[0]
    return GenerationFailed(
        f"{name} failed while it was answering: {type(error).__name__}: {first}", details=details
    )
