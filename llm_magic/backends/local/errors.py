"""What torch and Transformers raise, in our own words."""

from __future__ import annotations

import traceback

from llm_magic.backends.local import memory
from llm_magic.errors import (
    GenerationFailed,
    LLMMagicError,
    LoadFailed,
    MissingDependency,
    OutOfMemory,
)
from llm_magic.text.formatting import human_bytes


def details_of(error: BaseException) -> str:
    """Return the traceback as text, which holds no tensors."""
    return "".join(traceback.format_exception(error))


def explain_load(name: str, error: BaseException) -> LLMMagicError:
    """Return our error for one that ended a load, a download or a conversion."""
    if isinstance(error, LLMMagicError):
        return error
    if memory.ran_out(error):
        return OutOfMemory(
            f"Memory ran out while {name} was loaded."
            " Try -q 4bit, a smaller model, or %llm_unload first.",
            details=details_of(error),
        )
    if isinstance(error, ImportError):
        why = " ".join(str(error).split()).rstrip(".")
        return MissingDependency(f"{name} could not be loaded: {why}.", details=details_of(error))
    try:
        from llm_magic.backends.local import loader
    except ImportError:
        return LoadFailed(f"{name} could not be loaded: {error}", details=details_of(error))
    return loader.explain(error, name, details_of(error))


def explain_generation(name: str, device: str, error: BaseException) -> LLMMagicError:
    """Return our error for one that ended an answer."""
    if isinstance(error, LLMMagicError):
        return error
    if memory.ran_out(error):
        # What the failed step had taken is cached by torch and counts as free.
        memory.give_back()
        place = device.partition("+")[0]
        return OutOfMemory(
            f"Memory ran out on {place} while {name} answered;"
            f" {human_bytes(memory.free_bytes(place))} are free now. {name} is still loaded."
            " Try a shorter prompt, a lower --max-new-tokens, or load it with -q 4bit.",
            details=details_of(error),
        )
    first = str(error).strip().partition("\n")[0]
    return GenerationFailed(
        f"{name} broke while it answered: {type(error).__name__}: {first}",
        details=details_of(error),
    )
